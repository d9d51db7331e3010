"""How does a person go on with a text? One row whose cache stays: append, generate,
look at the scores, take back, fork.

A session remembers what it has read, so that a turn costs what is new in it.
"""

import dataclasses
import sys
from collections.abc import Iterator

import jax
import numpy as np

from decode.delivery import deliver, pieces_of, run_out
from decode.drafting import Course
from decode.loaded import LoadedModel
from decode.loop import DecodeState
from decode.options import DRAFTERS, Options
from decode.report import CallTimer
from decode.request import FULL, Bound, Completion, Prompt, Row
from decode.sampling import History
from model.cache import APPEND


class Session:
  """A text that grows.

  Whatever interrupts it, Ctrl-C included, it holds a text that it can go on with.

  Attributes:
    ids: all that was read and written so far, in turns that have ended.
    capacity: how many of them there can be.
    finish: why the last turn ended, as its Completion says it; '' before, and where it had no end.
  """

  def __init__(
    self, generator: LoadedModel, capacity: int, cache_dtype: str = '', adapter: str = ''
  ):
    """capacity: 0 is for as many ids as there are positions. Raises ValueError for more than that,
    and for an encoder or encoder-decoder.
    """
    config = generator.model.config
    if config.encoder_layers or not config.causal:
      raise ValueError(
        'a session is of a decoder: what an encoder has read cannot grow; call the generator for '
        'every text'
      )
    (front,) = generator.fronts_of(Options(adapter=adapter).adapter, 1)
    if capacity > front.context:
      raise ValueError(f'capacity={capacity} tokens of a session pass {front.limit}; ask for fewer')
    self._generator = generator
    self._cache_dtype = cache_dtype
    self._front = front
    self.capacity = capacity or front.context
    self.ids: list[int] = []
    self.finish = ''
    self._turn: Iterator[list[str]] | None = None
    # Behind all ids, or None: they have to be read (again).
    self._state: DecodeState | None = None
    # So many tokens the cache has held at most, those taken back included.
    self._reach = 0

  @property
  def text(self) -> str:
    """Of all ids."""
    return self._generator.tokenizer.decode_bytes(self.ids).decode('utf-8', errors='replace')

  @property
  def logits(self) -> np.ndarray:
    """[V] f32, the model's scores for the next token.

    Raises ValueError before anything was read.
    """
    self._end_turn()
    if not self.ids:
      raise ValueError('a session that has read nothing has no scores; append a text first')
    return np.asarray(self._read(()).logits[0])

  def append(self, text: Prompt) -> 'Session':
    """Reads more: text, which begins as documents do if it is the first, or ids.

    Raises ValueError for more than the capacity.
    """
    self._end_turn()
    if isinstance(text, str):
      tokenizer = self._generator.tokenizer
      ids = [*([] if self.ids else [tokenizer.bos]), *tokenizer.encode(text)]
    else:
      ids = self._generator.encoded(text)
    if len(self.ids) + len(ids) > self.capacity:
      raise ValueError(
        f'{len(ids)} more tokens pass capacity={self.capacity} of a session that has '
        f'{len(self.ids)}; make it with more (g.session(capacity=..)), or take some back (truncate)'
      )
    if ids:
      self._read(ids)
    return self

  def __call__(self, prompt: str = '', **options) -> Completion:
    """Reads a prompt, if there is one, and goes on: a Completion, as of Generator.__call__."""
    row, steps = self._run(prompt, options)
    run_out(steps)
    return row.completion()

  def stream(self, prompt: str = '', **options) -> Iterator[str]:
    """The same, in pieces as they come. What was written when one stops to listen stays written.

    Ctrl-C raises KeyboardInterrupt, as of Generator.stream. Whatever else is done with the session
    ends the stream, too: going on to listen raises ValueError.
    """
    row, steps = self._run(prompt, options)

    def pieces():
      yield from pieces_of(row, steps)
      if not row.finish:
        raise ValueError(
          'this stream has ended before its text, as the session was used for something else; '
          'listen to the end first, or fork the session'
        )

    return pieces()

  def fork(self) -> 'Session':
    """Another session with the same past; from here on each goes its own way."""
    self._end_turn()
    other = Session(self._generator, self.capacity, self._cache_dtype, self._front.adapter)
    other.ids = list(self.ids)
    other._state = self._state and _copy(self._state)
    other._reach = self._reach
    return other

  def truncate(self, length: int) -> 'Session':
    """Takes back all but the first ids.

    Raises ValueError for a length that is not in [0, what there is].
    """
    self._end_turn()
    if not 0 <= length <= len(self.ids):
      raise ValueError(
        f'length={length} must be in [0, {len(self.ids)}], which is what the session has'
      )
    if length < len(self.ids):
      self._back_to(length)
    return self

  def _read(self, more):
    """The state behind these ids, too; where that is interrupted, none of them was read."""
    generator, ids = self._generator, [*self.ids, *more]
    state, self._state = self._state, None  # its buffers are given away
    if state is None:
      self._reach = 0
      state = generator.read(
        [self._front.row(ids)] * generator.parts,
        self._front.behind(self.capacity),
        self._all(sys.maxsize),
        adapters=generator.indices([self._front] * generator.parts),
        cache_dtype=self._cache_dtype,
      )
    else:
      state = self._behind(state, more)
    self.ids, self._reach = ids, max(self._reach, len(ids))
    self._state = state
    return state

  def _behind(self, state, ids):
    """The state after these ids, too."""
    for first in range(0, len(ids), APPEND):
      part = ids[first : first + APPEND]
      width = min(APPEND, self._generator.room(len(part)))
      tokens = np.zeros((self._generator.parts, width), np.int32)
      tokens[:, : len(part)] = part
      state = self._generator.append(state, tokens, self._all(len(part)))
    return state

  def _all(self, value):
    return np.full(self._generator.parts, min(value, 2**31 - 1), np.int32)

  def _back_to(self, length):
    """Only the first ids stay."""
    state, self._state = self._state, None
    self.ids = self.ids[:length]
    if state is None or length < 2:
      return

    # The last token is read again, for its scores; a ring has it only if nothing has written over
    # what its window sees.
    windows = [kind.window for kind, _ in self._generator.model.config.places]
    rings = [held.slots - window for held, window in zip(state.cache.held, windows) if held.ring]
    if self._reach - length + 1 <= min(rings, default=sys.maxsize):
      lengths = self._all(self._front.behind(length - 1))
      cache = dataclasses.replace(state.cache, lengths=self._generator.put(lengths))
      self._state = self._behind(dataclasses.replace(state, cache=cache), self.ids[-1:])

  def _run(self, prompt, given):
    """The row of a turn, and an iterator that fills it."""
    options = Options.of(given)
    check_turn(options)
    generator, timer = self._generator, CallTimer(self._generator.model)
    rules, places, texts, ends = generator.rules(options, 1, generator.parts)
    self._end_turn()
    if prompt:
      self.append(prompt)
    if not self.ids:
      raise ValueError(
        'a session that has read nothing cannot go on; append a text first, or give a prompt'
      )
    seed, bound = int(rules.sampling.seed[0]), self._bound(options.max_new_tokens)
    row = Row(prompt, list(self.ids), seed, texts, generator.tokenizer, ends, bound)
    self._turn = self._steps(row, rules, places, options, timer)
    return row, self._turn

  def _bound(self, new):
    """How far a turn of at most so many new tokens goes."""
    most = self.capacity - len(self.ids)
    if new <= most:
      return Bound(new)
    if self.capacity == self._front.context:
      return self._front.bound(len(self.ids), new)
    note = (
      f'the session ended it: {len(self.ids)} tokens before it and {most} new ones fill '
      f'capacity={self.capacity}, before max_new_tokens={new}'
    )
    return Bound(most, FULL, note)

  def _steps(self, row, rules, places, options, timer):
    generator, begun = self._generator, len(self.ids)
    prompt = np.zeros((generator.parts, generator.model.config.table_rows), bool)
    prompt[:, self.ids] = True  # a turn is as a call with all that there is
    state = dataclasses.replace(
      self._read(()),
      stop_at=generator.put(self._all(self._front.behind(begun + row.most))),
      done=generator.put(np.full(generator.parts, not row.most)),
      history=History(generator.put(np.zeros(prompt.shape, np.int32)), generator.put(prompt)),
      places=None if places is None else generator.put(places),
    )
    course = Course(
      generator, options, None, generator.placed(rules), state, [self._front.row(self.ids)]
    )
    self._state = None  # the course has it, and gives its buffers away
    timer.began(course.state.cache, begun, begun)

    try:
      yield from deliver(generator, [row], course, timer, options)
    finally:
      self.ids, self._turn = [*self.ids, *row.ids], None
      self.finish = row.finish
      # An interrupt may come when they are given away.
      if not any(x.is_deleted() for x in jax.tree.leaves(course.state)):
        written = int(np.asarray(course.state.cache.lengths)[0]) - self._front.behind(0)
        self._reach = max(self._reach, written)
        self._state = dataclasses.replace(course.state, places=None)
        if written > len(self.ids):
          self._back_to(len(self.ids))

  def _end_turn(self):
    """What a stream that is under way has written stays, and nothing comes after it."""
    if self._turn is not None:
      self._turn.close()
      self._turn = None


def check_turn(options: Options) -> None:
  """Raises ValueError or NotImplementedError for options that a session's one row cannot have."""
  for name in ('num_samples', 'beams'):
    if getattr(options, name) > 1:
      raise ValueError(
        f'{name}={getattr(options, name)}: a session has one row; fork it, or call the generator'
      )
  for name in DRAFTERS:
    if getattr(options, name):
      raise NotImplementedError(f'{name}: nothing drafts for a session so far; call the generator')
  for name in ('cache_dtype', 'adapter'):
    if value := getattr(options, name):
      raise ValueError(f'{name}={value!r} is of a whole session: g.session({name}=..)')


def _copy(state: DecodeState) -> DecodeState:
  """Buffers of its own: those of the other are given away when it goes on."""
  return jax.tree.map(lambda x: x.copy(), state)
