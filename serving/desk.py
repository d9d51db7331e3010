"""What becomes of a call, from its words to rows and back? It is judged, made samples of, and
scheduled; a constraint is made meanwhile, beside the engine's thread.

Everything of a service but the thread that steps (serving/running.py, and for tests
serving/fake.py).
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

import names
from data import generation
from data.classes import ids_of
from data.tokenizer import Tokenizer
from decode.engine import Request
from decode.front import Front
from decode.request import Bound, Row
from decode.sampling import Sampling, sample_seed, sampling_of
from serving import call as calls
from serving.call import Call, Failure, Limits, NotReady, QueueFull, Stats
from serving.constraints import Constraints
from serving.jobs import Job, Jobs
from serving.scheduler import AnyEngine, RowCall, Scheduler
from serving.ticket import Ticket


class Desk:
  """Takes calls, for an engine that is stepped elsewhere. A serving.service.Service, but for
  `closed` and `close`.

  Attributes: as of serving.service.Service.
  """

  def __init__(
    self,
    engine: AnyEngine,
    tokenizer: Tokenizer,
    *,
    vocabulary: int = 0,
    plain: Front = Front(),
    adapters: Mapping[str, Front] | None = None,
    limits: Limits = Limits(),
    clock: Callable[[], float] = time.monotonic,
    scorer: Callable[[Sequence[int], Front, int], Job] | None = None,
    embedder: Callable[[Sequence[Sequence[int]], Front], Job] | None = None,
    writes: bool = True,
  ):
    """vocabulary: ids below it are read and written; 0: all of the tokenizer's. plain, adapters:
    see decode.loaded.LoadedModel. scorer: of prompts, where they are scored. embedder:
    of texts, where they are embedded. writes: whether it writes texts.
    """
    self.tokenizer, self.limits, self.clock = tokenizer, limits, clock
    self.vocabulary = vocabulary or tokenizer.vocabulary
    self.state, self.progress, self.error = calls.STARTING, (0, 0), ''
    self.alternatives, self.page = engine.sizes.alternatives, engine.sizes.block
    self.width = engine.width
    self._engine, self._plain, self._fronts = engine, plain, dict(adapters or {})
    self._constraints = Constraints(tokenizer, engine.sizes, limits)
    self._scheduler = Scheduler(engine, limits, clock)
    self._jobs = Jobs(limits, clock)
    self._scorer, self._embedder, self.writes = scorer, embedder, writes
    self._ends = generation.ends(tokenizer)
    self._turning = threading.Lock()

  @property
  def adapters(self) -> tuple[str, ...]:
    return tuple(self._fronts)

  def encoded(self, prompt: str | Sequence[int]) -> list[int]:
    """The ids that the model reads. Raises ValueError for none, and for what is no id."""
    if isinstance(prompt, str):
      if self.writes:
        return self._plain.ids(prompt, self.tokenizer)
      return ids_of(prompt, self.tokenizer, causal=False)
    ids = list(prompt)
    if not ids:
      raise ValueError('a prompt has no ids; give at least one')
    for i in ids:
      if (
        not isinstance(i, (int, np.integer)) or isinstance(i, bool) or not 0 <= i < self.vocabulary
      ):
        raise ValueError(f'a prompt has the id {i!r}; ids are in [0, {self.vocabulary})')
    return [int(i) for i in ids]

  def room(self, tokens: int, adapter: str = '') -> int:
    """New tokens for which there is room behind a prompt of so many, at most."""
    front, sizes = self._front(adapter), self._engine.sizes
    if not front.encoder:
      return max(0, sizes.capacity - front.behind(tokens))
    # What a decoder writes begins with one token, whatever its encoder has read.
    return sizes.capacity - 1 if tokens <= self.longest(adapter) else 0

  def longest(self, adapter: str = '') -> int:
    """See serving.service.Service."""
    front, sizes = self._front(adapter), self._engine.sizes
    return (sizes.source if front.encoder else sizes.capacity) - len(front.soft)

  def submit(self, call: Call) -> Ticket:
    """See serving.service.Service."""
    self._check_ready()
    self._check(call)
    front, ids = self._front(call.options.adapter), self.encoded(call.prompt)
    self._check_room(call, len(ids))
    texts, stop_ids = call.options.stops(self.vocabulary)
    ends = (*(() if call.ignore_end else self._ends), *stop_ids)
    plain = dataclasses.replace(call.options, num_samples=1)
    sampling = sampling_of(plain, 1, self.vocabulary)
    prompt, source = front.read(ids, self.tokenizer.pad)
    request = Request(
      prompt,
      call.options.max_new_tokens,
      sampling,
      ends,
      adapter=front.index,
      salt=call.salt,
      source=source,
    )
    self._engine.check(request)

    # Nothing is made for whom there is no place.
    self._scheduler.check_places(call.key, len(call.samples))
    made = self._constraints.made(call)
    now = self.clock()
    ticket = Ticket(call, ids, now, self._cancel)
    ticket.usage.prompt = len(ids)
    samples = [
      RowCall(
        call.key,
        call.priority,
        now,
        ticket=ticket,
        index=index,
        request=dataclasses.replace(request, sampling=_of_sample(sampling, index)),
        text=Row(
          call.prompt,
          ids,
          0,
          texts,
          self.tokenizer,
          ends,
          Bound(request.max_new_tokens),
          max(call.options.logprobs, 0),
        ),
        alternatives=max(call.options.logprobs, 0),
        until=None if call.seconds is None else now + call.seconds,
        constraint=made,
      )
      for index in call.samples
    ]
    try:
      self._scheduler.submit(samples)
    except (QueueFull, NotReady):
      if made is not None:
        made.cancel()
      raise
    self._woken()
    if made is not None:
      made.add_done_callback(lambda _: self._woken())
    return ticket

  @property
  def scores(self) -> bool:
    """Whether prompts are scored."""
    return self._scorer is not None

  @property
  def embeds(self) -> bool:
    """Whether texts are embedded."""
    return self._embedder is not None

  def score(self, call: Call, alternatives: int) -> Future:
    """See serving.service.Service."""
    if self._scorer is None:
      raise ValueError('prompt_logprobs: this server scores no prompts')
    self._check_ready()
    _within('prompt_logprobs', alternatives, self.alternatives)
    adapter = call.options.adapter
    front, ids = self._front(adapter), self.encoded(call.prompt)
    self._check_fits(ids, adapter)
    job = self._scorer(ids, front, alternatives)
    return self._submitted(job, 'score', len(ids), key=call.key, priority=call.priority)

  def embed(self, texts: Sequence[Sequence[int]], adapter: str, key: str = '') -> Future:
    """See serving.service.Service."""
    if self._embedder is None:
      raise ValueError('this server embeds no texts')
    self._check_ready()
    rows = [self.encoded(ids) for ids in texts]
    for row in rows:
      self._check_fits(row, adapter)
    job = self._embedder(rows, self._front(adapter))
    return self._submitted(job, 'embedding', sum(map(len, rows)), key=key)

  def _check_ready(self) -> None:
    """Raises NotReady, before anything is asked of an engine that is not there."""
    if self.state != calls.READY:
      raise NotReady(self.state)

  def _check_fits(self, ids: Sequence[int], adapter: str) -> None:
    if len(ids) > (most := self.longest(adapter)):
      raise ValueError(
        f'a text of {len(ids)} tokens, of at most {most} that a row holds; shorten it'
      )

  def _submitted(self, job: Job, kind: str, tokens: int, **more: Any) -> Future:
    made = self._jobs.submit(job, kind, tokens, **more)
    self._woken()
    return made

  @property
  def idle(self) -> bool:
    """Whether there is nothing to do."""
    return self._scheduler.idle and self._jobs.idle

  def _step(self) -> bool:
    """One step of all that there is; whether there is more to do at once."""
    more = self._scheduler.step()
    self._jobs.step()
    return more or not self._jobs.idle

  def _end_all(self, finish: str, error: Failure | None = None) -> None:
    self._scheduler.end_all(finish, error)
    self._jobs.end_all()

  def stats(self) -> Stats:
    stats, jobs = self._scheduler.stats(), self._jobs
    return dataclasses.replace(
      stats,
      compiled=self.progress[0],
      refused=stats.refused + jobs.refused,
      jobs_waiting=jobs.waiting,
      jobs={kind: dataclasses.replace(counts) for kind, counts in jobs.counts.items()},
    )

  def drain(self, seconds: float) -> None:
    """See serving.service.Service."""
    if self._turn(calls.STARTING, calls.DRAINING) or self._turn(calls.READY, calls.DRAINING):
      self._scheduler.drain(self.clock() + seconds)
      self._jobs.drain(self.clock() + seconds)
      self._woken()

  def _turn(self, before: str, after: str) -> bool:
    """From one state to another, if it is the first."""
    with self._turning:
      if self.state != before:
        return False
      self.state = after
      return True

  def _cancel(self, ticket: Ticket) -> None:
    if not ticket.done:
      self._scheduler.cancel(ticket)
      self._woken()

  def _woken(self) -> None:
    """There is something to do: for who steps."""

  def _front(self, adapter: str) -> Front:
    if not adapter:
      return self._plain
    if not self._fronts:
      raise ValueError(f'adapter={adapter!r}, and no adapters were loaded; leave it out')
    names.check('adapter', adapter, self._fronts)
    return self._fronts[adapter]

  def _check(self, call: Call) -> None:
    """Raises ValueError for what passes a limit."""
    options, limits = call.options, self.limits
    _within('num_samples', options.num_samples, limits.samples)
    _within('logprobs', options.logprobs, self.alternatives)
    _within('stop: texts and ids', len(options.stop), limits.stops)
    for stop in options.stop:
      if isinstance(stop, str):
        _within('characters of a stop', len(stop), limits.stop_length)
    for name in ('seed', 'adapter'):
      if isinstance(getattr(options, name), (list, tuple, np.ndarray)):
        raise ValueError(f'{name} of a call is one value, not several')

  def _check_room(self, call: Call, tokens: int) -> None:
    new, room = call.options.max_new_tokens, self.room(tokens, call.options.adapter)
    if new <= room:
      return
    most = self.longest(call.options.adapter)
    if self._plain.encoder:
      raise ValueError(
        f'max_new_tokens={new}, of at most {room} that a row holds; ask for fewer'
        if room
        else f'a prompt of {tokens} tokens, of at most {most} that the encoder reads; shorten it'
      )
    raise ValueError(
      f'a prompt of {tokens} tokens and max_new_tokens={new} pass the {most} tokens that a row '
      f'holds; ask for at most {room} new ones, or shorten the prompt'
      if room
      else f'a prompt of {tokens} tokens leaves no room for new ones, of the {most} tokens that a '
      'row holds; shorten it'
    )


def _within(what: str, value: Any, most: int) -> None:
  if value > most:
    raise ValueError(f'{what}: {value}, of at most {most} that this server takes; ask for fewer')


def _of_sample(sampling: Sampling, index: int) -> Sampling:
  """Of sample number `index`: with its own seed."""
  seed = np.array([sample_seed(int(sampling.seed[0]), index)], np.uint32)
  return dataclasses.replace(sampling, seed=seed)
