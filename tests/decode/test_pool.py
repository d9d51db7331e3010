"""Is a row's text in its pages, whatever comes, goes, grows, is shared or has to wait? Is no page
lost or had twice, and is there always someone who reaches his end?
"""

import random

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from decode.pool import BACK, COPY, OUT, Pool

SIZE = 4


class Memory:
  """A pool's device and host, where a content is a list of tokens."""

  def __init__(self, places, host):
    self.pool = Pool(places, host, SIZE)
    self.device = [[None] * SIZE for _ in range(places)]
    self.texts, self.ends, self.prompts = {}, {}, {}
    self.order, self.number = [], 0

  def marks(self, text):
    """Of each whole page of a prompt but the last token's, with all before it."""
    return [bytes(text[:end]) for end in range(SIZE, len(text), SIZE)]

  def join(self, prompt, new):
    """A row that begins with what is there of its prompt; None where there is no room."""
    if not self.pool.has_room(len(prompt) + new):
      return None
    row = self.number = self.number + 1
    self.pool.add(row, len(prompt) + new)
    marks = self.marks(prompt)
    found = self.pool.find(marks)
    self.pool.take(row, marks[:found])
    self.prompts[row], self.ends[row] = prompt, len(prompt) + new
    self.texts[row] = list(prompt[: found * SIZE])
    self.order.append(row)
    return row

  def fork(self, row, new):
    """Another one that goes on from all of a row's prompt, which is read just now."""
    prompt = self.prompts[row]
    if self.texts[row] != prompt or not self.pool.has_room(len(prompt) + new):
      return
    other = self.number = self.number + 1
    self.pool.add(other, len(prompt) + new)
    self.pool.share(row, other)
    self.prompts[other], self.ends[other] = prompt, len(prompt) + new
    self.texts[other] = list(prompt)
    self.order.append(other)

  def grow(self, counts):
    """These rows read or write so many more tokens each, as far as there is room."""
    wants = {
      row: min(len(self.texts[row]) + count, self._until(row)) for row, count in counts.items()
    }
    seated, moves = self.pool.seat(wants)
    for move in moves:
      if move.kind == OUT:
        move.page.content = list(self.device[move.source])
      elif move.kind == COPY:
        self.device[move.place] = list(self.device[move.source])
      else:
        assert move.kind == BACK
        self.device[move.place] = list(move.page.content)
        if move.page.place == move.place:
          move.page.content = None
    for row in seated & wants.keys():
      reading = len(self.texts[row]) < len(self.prompts[row])
      for at in range(len(self.texts[row]), wants[row]):
        token = self.prompts[row][at] if reading else random.randrange(200)
        self.device[self.pool.table(row)[at // SIZE]][at % SIZE] = token
        self.texts[row].append(token)
      if reading:
        self.pool.mark(row, self.marks(self.prompts[row])[: len(self.texts[row]) // SIZE])
    if self.order:
      assert self.order[0] in seated
      assert seated == set(self.order[: len(seated)])
    for row in seated:
      self.check(row)
    return seated, moves

  def _until(self, row):
    """A call reads, or writes."""
    read = len(self.prompts[row])
    return read if len(self.texts[row]) < read else self.ends[row]

  def check(self, row):
    table, text = self.pool.table(row), self.texts[row]
    assert [self.device[table[at // SIZE]][at % SIZE] for at in range(len(text))] == text

  def leave(self, row):
    self.pool.remove(row)
    self.order.remove(row)
    for each in (self.texts, self.ends, self.prompts):
      del each[row]

  def conserved(self):
    """Every place is free, kept or someone's, once; owners are exactly who has a page."""
    pool = self.pool
    holders = {}
    for row, holding in pool._rows.items():
      assert len(holding.pages) <= holding.most and len(set(holding.pages)) == len(holding.pages)
      for page in holding.pages:
        holders.setdefault(page, set()).add(row)
    assert all(page.rows == rows for page, rows in holders.items())
    assert not any(page.rows for page in pool._kept)
    places = [page.place for page in [*holders, *pool._kept] if page.place >= 0]
    assert sorted(places + pool._free) == list(range(pool.places))
    assert pool.used == sum(page.place >= 0 for page in holders)
    away = [page for page in holders if page.place < 0]
    assert len(away) <= pool.host and all(page.content is not None for page in away)
    assert all(page.content is None for page in [*holders, *pool._kept] if page.place >= 0)
    assert set(pool._marked.values()) >= set(pool._kept)
    assert all(page in holders or page in pool._kept for page in pool._marked.values())
    assert all(page.mark == mark for mark, page in pool._marked.items())

  def to_the_end(self):
    """All that is there ends, one after another at worst."""
    for _ in range(1000):
      if not self.order:
        break
      self.grow(dict.fromkeys(self.order, 3))
      self.conserved()
      for row in [row for row in self.order if len(self.texts[row]) == self.ends[row]]:
        self.leave(row)
    assert not self.order
    self.pool.forget()
    assert sorted(self.pool._free) == list(range(self.pool.places)) and not self.pool._kept


class Anything(RuleBasedStateMachine):
  """Rows join, fork, grow and leave, in any order."""

  @initialize(places=st.integers(4, 12), host=st.integers(0, 10))
  def begin(self, places, host):
    self.memory = Memory(places, host)

  @rule(kind=st.integers(0, 2), length=st.integers(1, 12), new=st.integers(1, 4))
  def join(self, kind, length, new):
    self.memory.join([kind] * length, new)

  @precondition(lambda self: self.memory.order)
  @rule(index=st.integers(0, 9), new=st.integers(1, 4))
  def fork(self, index, new):
    order = self.memory.order
    self.memory.fork(order[index % len(order)], new)

  @rule(counts=st.lists(st.integers(0, 5), max_size=8))
  def grow(self, counts):
    self.memory.grow(dict(zip(self.memory.order, counts)))

  @precondition(lambda self: self.memory.order)
  @rule(index=st.integers(0, 9))
  def leave(self, index):
    order = self.memory.order
    self.memory.leave(order[index % len(order)])

  @rule(index=st.integers(0, 9))
  def forget(self, index):
    order = self.memory.order
    self.memory.pool.forget(order[index % len(order)] if order and index else None)

  @invariant()
  def nothing_is_lost(self):
    if hasattr(self, 'memory'):
      self.memory.conserved()

  def teardown(self):
    if hasattr(self, 'memory'):
      self.memory.to_the_end()


Anything.TestCase.settings = hypothesis.settings(
  max_examples=30, stateful_step_count=40, deadline=None
)
TestAnything = Anything.TestCase


@pytest.mark.parametrize('host', [0, 7, 40])
def test_ten_thousand_operations(host):
  """A long life: fragmentation harms nobody, and no row waits for ever."""
  draw, memory = random.Random(host), Memory(16, host)
  random.seed(host)
  seen = dict.fromkeys((OUT, COPY, BACK, 'waits', 'hit', 'refused'), 0)
  for _ in range(10_000 // 3):
    act = draw.random()
    if act < 0.35:
      row = memory.join([draw.randrange(3)] * draw.randint(1, 24), draw.randint(1, 30))
      seen['refused'] += row is None
      seen['hit'] += row is not None and bool(memory.texts[row])
    elif act < 0.45 and memory.order:
      memory.fork(draw.choice(memory.order), draw.randint(1, 20))
    elif act < 0.52 and memory.order:
      memory.leave(draw.choice(memory.order))
    else:
      rows = [row for row in memory.order if draw.random() < 0.8]
      seated, moves = memory.grow({row: draw.randint(0, 6) for row in rows})
      seen['waits'] += len(seated) < len(memory.order)
      for move in moves:
        seen[move.kind] += 1
      for row in [row for row in memory.order if len(memory.texts[row]) == memory.ends[row]]:
        memory.leave(row)
    memory.conserved()
  assert seen['hit'] and seen['refused'] and seen[COPY]
  # Without room on the host a row that has joined never waits.
  assert bool(host) == bool(seen['waits']) == bool(seen[OUT] and seen[BACK])
  memory.to_the_end()
