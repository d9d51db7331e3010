"""Does every sample end exactly once, with what it asked for, whatever comes, goes, is late or
breaks? Is no row lost or freed twice, is every bound kept, and does cancelling work at every point?
"""

import asyncio
import concurrent.futures
import dataclasses
import itertools

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from data.tokenizers import ByteTokenizer
from decode.options import Options
from serving import call as calls
from serving.call import Call, Limits, NotReady, QueueFull
from serving.fake import SIZES, FakeService

TOKENIZER = ByteTokenizer()
PROMPT = 'a prompt of four parts, which are read one after another'  # 57 ids, of 16 a part


def writing(text):
  """What the engine writes: this text, and its end."""
  return lambda request: TOKENIZER.encode(text)


def service(text='hello world', rows=2, **limits):
  sizes = dataclasses.replace(SIZES, rows=rows)
  return FakeService(TOKENIZER, writing(text), sizes=sizes, limits=Limits(**limits))


def call(prompt=PROMPT, new=32, **given):
  options = given.pop('options', {})
  return Call(prompt=prompt, options=Options(max_new_tokens=new, **options), **given)


def events(ticket):
  """All of them, as they lie there."""
  taken = []
  while ticket.unread or ticket._events:
    taken.append(ticket.next(0))
  return taken


def text_of(taken, sample=0):
  return ''.join(event.text for event in taken if event.sample == sample)


def finish(ticket):
  taken = events(ticket)
  assert ticket.done and taken[-1].finish and not any(event.finish for event in taken[:-1])
  return taken[-1].finish


def test_a_call_is_read_part_by_part_and_written_in_chunks():
  served = service()
  ticket = served.submit(call())
  served.run()
  # A chunk is taken when the next one is under way, and the first token comes alone.
  assert served.engine.calls == [
    *('join', 'read', 'read', 'read', 'read', 'decode', 'decode', 'taken', 'decode', 'taken'),
    *('decode', 'taken', 'decode', 'taken', 'release', 'taken'),
  ]
  taken = events(ticket)
  assert text_of(taken) == 'hello world' and taken[-1].finish == 'stop'
  assert taken[-1].stopped_by == TOKENIZER.eos
  assert [len(event.ids) for event in taken] == [1, 4, 4, 3]
  assert ticket.usage == calls.Usage(prompt=57, cached=0, completion=12)


def test_who_writes_waits_for_one_part_of_a_prompt_at_a_time():
  served = service('x' * 200)
  served.submit(call('a', new=60))
  for _ in range(4):
    served.step()
  served.submit(call(new=8))
  served.run()
  names = [name for name in served.engine.calls if name in ('read', 'decode')]
  reads = [len(list(group)) for name, group in itertools.groupby(names) if name == 'read']
  assert reads == [1] * 5


def test_samples_are_rows_of_their_own_and_can_be_asked_for_alone():
  def seeds(request):
    return TOKENIZER.encode(str(request.sampling.seed[0]))

  served = FakeService(TOKENIZER, seeds)
  ticket = served.submit(call(options=dict(num_samples=5, seed=7)))
  alone = served.submit(call(options=dict(num_samples=5, seed=7), sample_index=3))
  served.run()
  taken, other = events(ticket), events(alone)
  texts = [text_of(taken, sample) for sample in range(5)]
  assert texts[0] == '7' and len(set(texts)) == 5
  assert {event.sample for event in other} == {3} and text_of(other, 3) == texts[3]
  assert ticket.usage.prompt == 57 and ticket.done


def test_keys_take_turns_for_rows():
  served = service('x', rows=1)
  tickets = [served.submit(call('a', key=key)) for key in 'aaab']
  order = []
  while served.step():
    order += [t.call.key for t in tickets if t.done and t not in order and not order.append(t)]
  assert [each for each in order if isinstance(each, str)] == ['a', 'b', 'a', 'a']


def test_the_queue_is_bounded_and_says_so():
  served = service(rows=1, waiting=3)
  served.submit(call(options=dict(num_samples=3)))
  with pytest.raises(QueueFull, match='3 samples wait, of at most 3, and 1 more') as caught:
    served.submit(call())
  assert caught.value.retry_after > 0
  served.step()
  served.submit(call())
  assert served.stats().refused == 1 and served.stats().waiting == 3
  served.run()
  assert served.stats().finished == {'stop': 4}


def test_no_key_takes_all_places():
  """Half of what others leave, so that there are some for whoever comes; without keys, all."""
  served = service(rows=1, waiting=8)
  served.submit(call(key='a', options=dict(num_samples=3)))
  served.submit(call(key='a'))
  with pytest.raises(QueueFull, match=r'4 samples wait, of at most 8 \(4 of this API key, .* half'):
    served.submit(call(key='a'))
  served.submit(call(key='b', options=dict(num_samples=2)))
  with pytest.raises(QueueFull, match=r'\(2 of this'):
    served.submit(call(key='b'))
  served.submit(call(key='c'))
  served.run()
  served.submit(call(key='a', options=dict(num_samples=8)))
  served.run()
  assert served.stats().waiting == 0 and served.stats().refused == 2
  for _ in range(8):
    served.submit(call())


@pytest.mark.parametrize('steps', range(12))
def test_a_call_that_is_cancelled_frees_its_rows_at_the_next_step(steps):
  """At every point: as it waits, is read, is written, and has ended."""
  served = service(rows=2)
  other = served.submit(call('b', new=50))
  ticket = served.submit(call(options=dict(num_samples=2)))
  for _ in range(steps):
    served.step()
  ticket.cancel()
  served.step()
  ticket.cancel()
  served.run()
  taken = events(ticket)
  for sample in (0, 1):
    ends = [event.finish for event in taken if event.sample == sample and event.finish]
    assert ends in (['cancelled'], ['stop'])
  assert 'hello world'.startswith(text_of(taken)) and text_of(events(other)) == 'hello world'
  assert served.stats().free == 2 and served.stats().waiting == 0


def test_a_call_that_is_late_ends_with_what_there_is():
  served = service('x' * 100, rows=1)
  first, second = served.submit(call(seconds=10.0)), served.submit(call(seconds=5.0))
  for _ in range(6):
    served.step()
  served.clock.advance(5.0)
  served.step()
  assert finish(second) == 'deadline' and not first.done
  served.clock.advance(5.0)
  served.run()
  taken = events(first)
  assert taken[-1].finish == 'deadline' and len(text_of(taken)) > 1
  assert first.times == calls.Times(asked=0.0, began=0.0, first=0.0, ended=10.0)


def test_scores_that_are_not_finite_end_their_row_alone():
  served = service()
  broken, other = served.submit(call()), served.submit(call())
  while not served.stats().writing == 2:
    served.step()
  served.engine.broken = {0}
  served.run()
  taken = events(broken)
  assert taken[-1].finish == 'failed' and taken[-1].error.kind == calls.BROKEN
  assert 'not finite' in taken[-1].error.message and 'forget' in served.engine.calls
  assert text_of(events(other)) == 'hello world' and served.stats().errors == {'broken': 1}


@pytest.mark.parametrize('steps', range(8))
def test_an_error_of_the_device_ends_what_has_a_row_and_nothing_else(steps):
  served = service(rows=1)
  first, second = served.submit(call()), served.submit(call())
  for _ in range(steps):
    served.step()
  served.engine.lost = RuntimeError('secret')
  served.run()
  taken = events(first)
  assert taken[-1].error.kind == calls.DEVICE and 'secret' not in taken[-1].error.message
  assert text_of(events(second)) == 'hello world' and served.stats().free == 1


def test_a_row_that_stops_to_write_does_not_wait_for_ever():
  served = service('x' * 100, rows=1)
  ticket, other = served.submit(call(new=40)), served.submit(call(new=8))
  while not ticket.usage.completion:
    served.step()
  served.engine._writing.clear()
  served.run()
  assert events(ticket)[-1].error.kind == calls.DEVICE and text_of(events(other)) == 'x' * 8


def test_a_row_that_waits_for_room_goes_on_where_it_was():
  served = service('x' * 100)
  ticket, other = served.submit(call('a', new=40)), served.submit(call('b', new=40))
  while not ticket.usage.completion:
    served.step()
  served.engine.waiting = {0}
  for _ in range(5):
    served.step()
  waits, goes = text_of(events(ticket)), text_of(events(other))
  for _ in range(30):
    served.step()
  assert len(goes) > len(waits) + 8 and not ticket.done and other.done
  served.engine.waiting = set()
  served.run()
  assert waits + text_of(events(ticket)) == 'x' * 40 and ticket.done


def test_nobody_overtakes_who_waits_for_room():
  served = service('x', rows=2)
  served.engine.full = True
  tickets = [served.submit(call('a')) for _ in range(3)]
  for _ in range(4):
    served.step()
  assert served.stats().waiting == 3 and 'join' not in served.engine.calls
  served.engine.full = False
  served.run()
  assert [finish(ticket) for ticket in tickets] == ['stop'] * 3


def test_who_does_not_read_is_ended():
  served = service('x' * 100, unread=8)
  ticket = served.submit(call(new=60))
  other = served.submit(call(new=60))
  taken = []
  while served.step():
    taken += events(other)
  error = events(ticket)[-1].error
  assert error.kind == calls.SLOW and 'of at most 8' in error.message
  assert len(text_of(taken)) == 60 and ticket.usage.completion <= 8 + 2 * SIZES.steps


def test_draining_ends_what_is_there_and_takes_no_more():
  served = service('x' * 100, rows=1)
  first, second = served.submit(call(new=4)), served.submit(call(new=90))
  served.drain(20.0)
  with pytest.raises(NotReady, match='draining'):
    served.submit(call())
  served.run()
  assert finish(first) == 'length' and finish(second) == 'length'
  assert served.state == 'closed' and served.closed(0)

  served = service('x' * 100, rows=1)
  tickets = [served.submit(call(new=90)) for _ in range(2)]
  served.drain(20.0)
  [served.step() for _ in range(7)]
  served.clock.advance(20.0)
  served.run()
  assert [finish(ticket) for ticket in tickets] == ['drained'] * 2 and served.state == 'closed'


def test_a_constraint_is_made_beside_and_its_mistake_is_its_own(monkeypatch):
  made = concurrent.futures.Future()
  served = service(rows=1)
  monkeypatch.setattr(served._constraints, 'made', lambda call: call.regex and made)
  waits, goes = served.submit(call(regex='a+')), served.submit(call())
  served.run()
  assert text_of(events(goes)) == 'hello world' and not events(waits)
  made.set_exception(ValueError('no such thing'))
  served.step()
  (event,) = events(waits)
  assert event.error == calls.Failure(kind=calls.INVALID, message='no such thing')


@pytest.mark.parametrize(
  'given, words',
  [
    (dict(prompt=[]), 'a prompt has no ids'),
    (dict(prompt=[1, 999]), r'the id 999; ids are in \[0, 259\)'),
    (dict(new=300), r'a prompt of 57 tokens and max_new_tokens=300 pass the 256 .* at most 199'),
    (dict(prompt='x' * 300), 'a prompt of 301 tokens leaves no room for new ones, of the 256'),
    (dict(options=dict(num_samples=17)), 'num_samples: 17, of at most 16'),
    (dict(options=dict(logprobs=21)), 'logprobs: 21, of at most 20'),
    (dict(options=dict(stop=['x'] * 17)), 'stop: texts and ids: 17, of at most 16'),
    (dict(options=dict(stop=['x' * 257])), 'characters of a stop: 257, of at most 256'),
    (dict(options=dict(adapter='other')), "adapter='other', and no adapters were loaded"),
    (dict(options=dict(seed=[1, 2])), 'seed'),
    (dict(options=dict(temperature=-1.0)), 'temperature=-1.0 must be 0'),
    (dict(regex='a' * 70000), 'regex has 70000 characters, of at most 65536'),
    (dict(regex='a', schema={}), 'regex and schema are both given'),
    (dict(options=dict(beams=2)), 'beams=2: a search is of no server'),
    (dict(options=dict(lookup=2)), 'lookup: what drafts is a setting of the server'),
    (dict(options=dict(cache_dtype='int8')), "cache_dtype='int8' is a setting of the server"),
    (dict(options=dict(num_samples=2), sample_index=2), r'sample_index=2 must be in \[0'),
    (dict(regex='a', ignore_end=True), 'ignore_end: .* leave out one'),
    (dict(schema={}, ignore_end=True), 'ignore_end: .* leave out one'),
    (dict(seconds=0.0), 'seconds=0.0 that a call may take'),
  ],
)
def test_what_cannot_be_is_said_at_once(given, words):
  served = service()
  with pytest.raises(ValueError, match=words):
    served.submit(call(**given))
  assert served.idle


def test_events_reach_an_event_loop():
  served = service()

  async def texts():
    tickets = [served.submit(call()) for _ in range(5)]
    return [''.join([event.text async for event in ticket]) for ticket in tickets]

  with served.by_itself():
    assert asyncio.run(texts()) == ['hello world'] * 5


class Anything(RuleBasedStateMachine):
  """Calls come, are cancelled, are late; rows break, the device is lost; in any order."""

  @initialize()
  def begin(self):
    self.served = service('x' * 30, rows=3, waiting=8, unread=24, patience=3.0)
    self.tickets, self.taken = [], {}

  @rule(
    key=st.sampled_from('ab'),
    n=st.integers(1, 3),
    new=st.integers(1, 20),
    priority=st.integers(0, 1),
    seconds=st.one_of(st.none(), st.integers(1, 4)),
    length=st.integers(1, 40),
  )
  def submit(self, key, n, new, priority, seconds, length):
    asked = call(
      'x' * length, new, key=key, priority=priority, seconds=seconds, options=dict(num_samples=n)
    )
    try:
      self.tickets.append(self.served.submit(asked))
    except QueueFull:
      waiting = self.served._scheduler._waiting
      left = 8 - waiting.total() + waiting[key]  # by others
      assert waiting[key] + n > (left // 2 if waiting[key] else left)

  @rule(times=st.integers(1, 4))
  def step(self, times):
    for _ in range(times):
      self.served.step()

  @rule(index=st.integers(0, 50))
  def cancel(self, index):
    if self.tickets:
      self.tickets[index % len(self.tickets)].cancel()

  @rule(index=st.integers(0, 50))
  def read(self, index):
    if self.tickets:
      ticket = self.tickets[index % len(self.tickets)]
      self.taken.setdefault(ticket, []).extend(events(ticket))

  @rule(seconds=st.integers(1, 2))
  def wait(self, seconds):
    self.served.clock.advance(seconds)

  @rule(row=st.integers(0, 2))
  def break_row(self, row):
    self.served.engine.broken.add(row)

  @rule(rows=st.sets(st.integers(0, 2)), full=st.booleans())
  def fill(self, rows, full):
    self.served.engine.waiting, self.served.engine.full = rows, full

  @rule()
  def lose(self):
    self.served.engine.lost = RuntimeError('lost')

  @invariant()
  def nothing_is_lost(self):
    stats = self.served.stats()
    assert stats.waiting <= 8 and stats.free + stats.reading + stats.writing == 3
    asked = sum(len(ticket.call.samples) for ticket in self.tickets)
    assert asked == sum(stats.finished.values()) + stats.waiting + stats.reading + stats.writing
    for ticket in self.tickets:
      assert ticket.unread <= 24 + 3 * 2 * SIZES.steps

  def teardown(self):
    """All that is left goes on to its end."""
    self.served.engine.lost, self.served.engine.broken = None, set()
    self.served.engine.waiting, self.served.engine.full = set(), False
    self.served.run()
    self.served.run()
    assert self.served.idle and self.served.engine.free == [0, 1, 2]
    for ticket in self.tickets:
      taken = [*self.taken.get(ticket, ()), *events(ticket)]
      for sample in ticket.call.samples:
        ends = [event.finish for event in taken if event.sample == sample and event.finish]
        assert len(ends) == 1 and ends[0] in calls.FINISHES
        new = ticket.call.options.max_new_tokens
        if ends == ['length']:
          assert text_of(taken, sample) == 'x' * new
        assert ('x' * new).startswith(text_of(taken, sample))
      assert ticket.done and ticket.usage.completion == sum(len(event.ids) for event in taken)


Anything.TestCase.settings = hypothesis.settings(
  max_examples=40, stateful_step_count=40, deadline=None
)
TestAnything = Anything.TestCase
