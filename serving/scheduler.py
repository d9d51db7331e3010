"""Which rows does an engine read and write next, and for whom? Samples wait, join rows as they get
free, and leave them one by one.

    a step:  end what was cancelled or is late -> release rows -> samples join -> one call that
             reads -> chunk k + 1 is dispatched -> chunk k is taken, and reaches who asked

Between two chunks there is one call that reads, at most, so that who writes never waits for more.
What a row gets does not depend on any of this (decode.engine): here it is only decided when.

Plain Python over an engine's few methods (`AnyEngine`), one thread's but for what says otherwise.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from decode.constrain import NoRoom
from decode.engine import Request, Sizes
from decode.loop import Chunk
from decode.request import FAILED, Row
from decode.sizes import Use
from serving import call as calls
from serving.call import EngineLost, Event, Failure, Limits, NotReady, QueueFull, Stats
from serving.queue import Queue, Waiting, check_places
from serving.ticket import Ticket

log = logging.getLogger(__name__)

RETRY = 1.0  # seconds after which who finds the queue full may come again, at least
RECENT = 0.2  # how much the last chunk counts of how long a step takes


@runtime_checkable
class AnyEngine(Protocol):
  """Rows, as decode.engine.Engine has them, with its weights. (serving/rows.py)

  Attributes:
    free, reading: rows without a request, and rows whose prompt is not read to its end.
    width: of the model, D.
  """

  sizes: Sizes
  width: int
  free: Sequence[int]
  reading: Sequence[int]

  def check(self, request: Request) -> None:
    """Raises ValueError for a request that no row could take. From any thread."""

  def takes(self, request: Request) -> bool:
    """Whether one of the free rows can take it now."""

  def choose(self, request: Request) -> int:
    """Which of them is to."""

  def join(self, row: int, request: Request) -> None:
    """A free row begins with a request. Raises decode.constrain.NoRoom where its constraint has to
    wait for others to leave.
    """

  def read(self) -> Sequence[int]:
    """Reads on in some rows, in one call; whose prompts have come to their end."""

  def cached(self, row: int) -> int:
    """Tokens of the row's prompt that need not be read."""

  def seat(self) -> Sequence[int]:
    """The rows whose prompt was read, and that there is room for: the others wait, and write later
    what they would have written now.
    """

  def decode(self, count: int, alternatives: bool) -> Any:
    """Begins a chunk of so many tokens of each of these."""

  def taken(self, chunk: Any) -> Chunk:
    """A chunk that was begun, as numpy arrays, when it is there."""

  def use(self) -> Use:
    """Of its memory, now. From any thread."""

  def forget(self, row: int) -> None:
    """Nobody goes on from what this row has read."""

  def release(self, rows: Sequence[int]) -> None:
    """Frees rows."""

  def reset(self) -> None:
    """All rows are free, whatever has happened to them."""


@dataclasses.dataclass(eq=False, kw_only=True)
class RowCall(Waiting):
  """One row's worth of a call.

  Attributes:
    ticket, index: whose, and which of its samples. request: what the engine is asked for.
    text: what has come of it. alternatives: how many of each token it has.
    until: when it is late. constraint: that is being made, and will be the request's.
    place: its row in the engine, which it has had since `began`; -1: none. begun: tokens that it
      has, or has at least when the chunks that were begun are there.
  """

  ticket: Ticket
  index: int
  request: Request
  text: Row
  alternatives: int = 0
  until: float | None = None
  constraint: concurrent.futures.Future | None = None
  place: int = -1
  began: float = 0.0
  begun: int = 0

  @property
  def left(self) -> int:
    """Tokens that no chunk has been begun for."""
    return self.request.max_new_tokens - self.begun


@dataclasses.dataclass(frozen=True)
class _Ahead:
  """A chunk that was begun: for whom, row by row, how many tokens, and when."""

  chunk: Any
  rows: dict[int, RowCall]
  count: int


class Scheduler:
  """Takes samples, and steps.

  `submit`, `cancel` and `stats` may be called from any thread.
  """

  def __init__(self, engine: AnyEngine, limits: Limits, clock: Callable[[], float]):
    self._engine, self._limits, self._clock = engine, limits, clock
    self._queue = Queue(limits.patience)
    self._rows: dict[int, RowCall] = {}  # that have one
    self._writing: dict[int, RowCall] = {}  # of these, whose prompt was read
    self._leaving: list[int] = []
    self._ahead: _Ahead | None = None
    self._stuck: RowCall | None = None  # whose constraint waits for others to leave

    # What other threads hand over.
    self._lock = threading.Lock()
    self._arrived: list[RowCall] = []
    self._cancelled: list[tuple[Ticket, str, Failure | None]] = []
    self._waiting: collections.Counter[str] = collections.Counter()  # of each key
    self._until: float | None = None  # all ends then
    self._over = False

    self._finished: collections.Counter[str] = collections.Counter()
    self._errors: collections.Counter[str] = collections.Counter()
    self._counts: collections.Counter[str] = collections.Counter()
    self._came: float | None = None  # when the last chunk was taken, if the next was under way
    self._seconds = 0.0  # of a step
    self._lasted = 0.0  # seconds a sample keeps its row, about

  # From any thread.

  def check_places(self, key: str, count: int) -> None:
    """Raises what `submit` would, for so many samples."""
    with self._lock:
      self._check_places(key, count)

  def _check_places(self, key: str, count: int) -> None:
    if self._over:
      raise NotReady(calls.CLOSED)
    retry_after = max(RETRY, self._lasted)
    try:
      check_places(key, count, self._waiting, self._limits.waiting, 'samples wait', retry_after)
    except QueueFull:
      self._counts['refused'] += 1
      raise

  def submit(self, samples: Sequence[RowCall]) -> None:
    """All of them, of one key, wait, or none. Raises QueueFull, and NotReady behind `end_all`."""
    with self._lock:
      self._check_places(samples[0].key, len(samples))
      self._waiting[samples[0].key] += len(samples)
      self._arrived += samples

  def _waits_no_more(self, sample: RowCall) -> None:
    with self._lock:
      self._waiting -= collections.Counter([sample.key])

  def cancel(
    self, ticket: Ticket, finish: str = calls.CANCELLED, error: Failure | None = None
  ) -> None:
    """What is left of it ends at the next step."""
    with self._lock:
      self._cancelled.append((ticket, finish, error))

  def drain(self, until: float) -> None:
    """What has not ended by then ends."""
    with self._lock:
      self._until = until

  @property
  def idle(self) -> bool:
    """Whether there is nothing to do."""
    return not (self._waiting or self._rows or self._leaving or self._ahead or self._cancelled)

  def stats(self) -> Stats:
    rows, sizes, counts = list(self._rows.values()), self._engine.sizes, self._counts
    writing, use = len(self._writing), self._engine.use()
    with self._lock:
      waiting = self._waiting.total()
    return Stats(
      rows=sizes.rows,
      free=sizes.rows - len(rows),
      reading=len(rows) - writing,
      writing=writing,
      waiting=waiting,
      tokens=use.tokens,
      room=use.room,
      prompt_tokens=counts['prompt'],
      generated_tokens=counts['generated'],
      prefix_queries=counts['queried'],
      prefix_hits=counts['hit'],
      drafted=counts['drafted'],
      accepted=counts['accepted'],
      finished=dict(self._finished),
      errors=dict(self._errors),
      refused=counts['refused'],
      preempted=use.preempted,
      steps=counts['steps'],
      step_seconds=self._seconds,
    )

  # From the engine's thread.

  def step(self) -> bool:
    """Goes on with all that there is; whether there is more to do at once, but for what waits for
    something else. An error of the engine ends what has a row; what waits goes on. Raises where the
    engine cannot begin anew (EngineLost).
    """
    now = self._clock()
    self._take_in(now)
    self._end_late(now)
    try:
      self._run(now)
    except EngineLost:
      raise
    except Exception as error:
      log.exception('the engine has failed; %d samples end', len(self._rows))
      self._begin_anew(error)
      return True
    return bool(self._rows or self._leaving or self._ahead)

  def end_all(self, finish: str, error: Failure | None = None) -> None:
    """Nothing goes on, and nothing comes any more."""
    with self._lock:
      self._over = True
    self._take_in(self._clock())
    for sample in [*self._rows.values(), *self._queue]:
      self._end(sample, finish, error)

  def _run(self, now: float) -> None:
    engine = self._engine
    if self._leaving:
      leaving, self._leaving = self._leaving, []
      engine.release(leaving)
    self._admit(now)
    if engine.reading:
      for row in engine.read():
        sample = self._writing[row] = self._rows[row]
        self._note_read(row, sample)

    # Chunk k + 1 is under way while chunk k is taken.
    before, self._ahead = self._ahead, self._next_chunk()
    if before is not None:
      self._deliver(before, engine.taken(before.chunk))

  def _take_in(self, now: float) -> None:
    """What other threads have handed over."""
    with self._lock:
      arrived, self._arrived = self._arrived, []
      cancelled, self._cancelled = self._cancelled, []
    for sample in arrived:
      self._queue.add(sample)
    for ticket, finish, error in cancelled:
      for sample in [*self._rows.values(), *self._queue]:
        if sample.ticket is ticket:
          self._end(sample, finish, error)

  def _end_late(self, now: float) -> None:
    """What has had its time, and what can never be, ends."""
    drained = self._until is not None and now >= self._until
    for sample in [*self._rows.values(), *self._queue]:
      if drained:
        self._end(sample, calls.DRAINED)
      elif sample.until is not None and now >= sample.until:
        self._end(sample, calls.DEADLINE)
    for sample in self._queue:
      made = sample.constraint
      if made is not None and made.done():
        sample.constraint = None
        try:
          request = dataclasses.replace(sample.request, constraint=made.result())
          sample.request = request
        except ValueError as error:
          self._end(sample, FAILED, Failure(kind=calls.INVALID, message=str(error)))
        except Exception as error:
          log.error('a constraint could not be made', exc_info=error)
          message = f'what it keeps to could not be made ({type(error).__name__}); ask again'
          self._end(sample, FAILED, Failure(kind=calls.BROKEN, message=message))

  def _admit(self, now: float) -> None:
    """Free rows are taken."""
    while self._engine.free:
      sample = self._queue.next(now, self._may)
      if sample is None or not self._engine.takes(sample.request):
        return  # whose turn it is waits for room, and nobody overtakes it
      row = self._engine.choose(sample.request)
      try:
        self._engine.join(row, sample.request)
      except ValueError as error:
        if isinstance(error, NoRoom) and sample is not self._stuck:
          self._stuck = sample
        else:
          self._end(sample, FAILED, Failure(kind=calls.INVALID, message=str(error)))
        continue
      except Exception as error:
        self._end(sample, FAILED, _lost(error))
        raise
      if sample is self._stuck:
        self._stuck = None
      self._queue.turn(sample)
      self._waits_no_more(sample)
      sample.place, sample.began, self._rows[row] = row, now, sample
      if sample.ticket.times.began is None:
        sample.ticket.times.began = now

  def _may(self, sample: RowCall) -> bool:
    """Whether it can join. Of constraints none overtakes one that waits for room."""
    if sample.constraint is not None:
      return False
    if sample.request.constraint is None or self._stuck is None:
      return True
    return sample is self._stuck and not any(
      other.request.constraint for other in self._rows.values()
    )

  def _note_read(self, row: int, sample: RowCall) -> None:
    cached, prompt = self._engine.cached(row), sample.request.tokens
    if sample.index == sample.ticket.call.samples[0]:
      # What an adapter has before every prompt is no part of a request's.
      usage, more = sample.ticket.usage, max(0, prompt - sample.ticket.usage.prompt)
      usage.cached = min(max(0, cached - more), usage.prompt)
    self._counts.update(hit=cached, queried=prompt, prompt=prompt - cached)

  def _next_chunk(self) -> _Ahead | None:
    """The next chunk, begun; None where no row has more to write."""
    if all(sample.left <= 0 for sample in self._writing.values()):
      return None
    seated = self._engine.seat()
    rows = {row: sample for row, sample in self._writing.items() if row in seated}
    rows = {row: sample for row, sample in rows.items() if sample.left > 0}
    if not rows:
      return None
    count = min(self._count(rows), max(sample.left for sample in rows.values()))
    alternatives = any(sample.alternatives for sample in rows.values())
    chunk = self._engine.decode(count, alternatives)
    for sample in rows.values():
      sample.begun += count
    self._counts['steps'] += 1
    return _Ahead(chunk, rows, count)

  def _count(self, rows: dict[int, RowCall]) -> int:
    """Tokens of the next chunk: one where someone waits for his first, fewer where prompts are
    read meanwhile, and no more than fit into the gap.
    """
    steps = self._engine.sizes.steps
    if not all(sample.begun for sample in rows.values()):
      return 1
    if self._engine.reading:
      steps = max(1, steps // 4)
    if self._seconds:
      steps = min(steps, max(1, int(self._limits.gap_ms / 1000 / self._seconds)))
    return steps

  def _deliver(self, ahead: _Ahead, chunk: Chunk) -> None:
    """A chunk reaches who asked."""
    now = self._clock()
    if self._came is not None:
      seconds = (now - self._came) / ahead.count
      self._seconds += RECENT * (seconds - self._seconds) if self._seconds else seconds
    self._came = now if self._ahead is not None else None
    for row, sample in ahead.rows.items():
      if self._rows.get(row) is sample:  # and has not ended meanwhile
        self._add(row, sample, chunk)

  def _add(self, row: int, sample: RowCall, chunk: Chunk) -> None:
    text, before = sample.text, len(sample.text.ids)
    piece = text.add(row, chunk)
    if text.finish:
      error = None
      if text.error is not None:
        error = Failure(kind=calls.BROKEN, message=str(text.error))
        self._engine.forget(row)
      self._end(sample, text.finish, error, piece, before)
    elif sample.left <= 0 and not (self._ahead and self._ahead.rows.get(row) is sample):
      # It never ends by itself, and nobody is to wait for that.
      error = _lost(RuntimeError('a row that writes nothing'))
      self._end(sample, FAILED, error, piece, before)
    elif len(text.ids) > before:
      # Of a chunk with drafts there may be more than was certain.
      coming = self._ahead.count if self._ahead and self._ahead.rows.get(row) is sample else 0
      sample.begun = max(sample.begun, len(text.ids) + coming)
      self._put(sample, self._event(sample, piece, before))
      if sample.ticket.unread > self._limits.unread:
        self._end_slow(sample.ticket)

  def _end_slow(self, ticket: Ticket) -> None:
    message = (
      f'{ticket.unread} tokens and alternatives of tokens were left unread, of at most '
      f'{self._limits.unread}; read faster, or ask for fewer at a time'
    )
    self.cancel(ticket, FAILED, Failure(kind=calls.SLOW, message=message))

  def _event(self, sample: RowCall, piece: str, before: int, **end) -> Event:
    """What has come of it behind its first ids."""
    ids, raw, processed, likeliest = sample.text.since(before)
    return Event(
      sample=sample.index,
      ids=tuple(ids),
      text=piece,
      logprobs=tuple(raw),
      processed=tuple(processed),
      alternatives=tuple(map(tuple, likeliest)),
      at=self._clock(),
      **end,
    )

  def _put(self, sample: RowCall, event: Event) -> None:
    self._counts['generated'] += len(event.ids)
    sample.ticket.put(event)

  def _end(
    self,
    sample: RowCall,
    finish: str,
    error: Failure | None = None,
    piece: str = '',
    before: int | None = None,
  ) -> None:
    """It ends, and whatever it has is free from the next step on."""
    text, row = sample.text, sample.place
    if self._rows.get(row) is sample:
      del self._rows[row]
      self._writing.pop(row, None)
      self._leaving.append(row)
      self._lasted += RECENT * (self._clock() - sample.began - self._lasted)
    else:
      self._queue.remove(sample)
      self._waits_no_more(sample)
      if sample.constraint is not None:
        sample.constraint.cancel()  # that of all samples of its call, which end together
    if sample is self._stuck:
      self._stuck = None
    piece += text.end(finish)
    before = len(text.ids) if before is None else before
    # A stop text may turn out as the last bytes are taken.
    finish = finish if error or finish not in calls.OF_TEXTS else text.finish
    self._finished[finish] += 1
    self._counts.update(drafted=text.drafted, accepted=text.accepted)
    if error is not None:
      self._errors[error.kind] += 1
    end = dict(finish=finish, note=text.note, error=error)
    if finish == calls.STOPPED:
      end['stopped_by'] = text.stopped_by
    self._put(sample, self._event(sample, piece, before, **end))

  def _begin_anew(self, error: Exception) -> None:
    """The engine's rows are lost."""
    self._ahead = self._came = None
    for sample in list(self._rows.values()):
      self._end(sample, FAILED, _lost(error))
    self._leaving = []
    self._engine.reset()


def _lost(error: Exception) -> Failure:
  """What is said of an error that is none of the caller's."""
  message = f'the device has failed ({type(error).__name__}); ask again'
  return Failure(kind=calls.DEVICE, message=message)
