"""How does a person go on with a text? One row whose cache stays: append, generate, look at the scores, take back, fork.

A session remembers what it has read, so that a turn costs what is new in it.
"""
import contextlib
import dataclasses
import sys
from collections.abc import Iterator

import jax
import numpy as np

from decode.generator import APPEND, Generator, bucket
from decode.loop import DecodeState, Rules
from decode.request import FULL, INTERRUPTED, LENGTH, Options, Prompt, Row


class Session:
  """A text that grows.

  Attributes:
    ids: all that was read and written so far. capacity: how many of them there can be.
  """

  def __init__(self, generator: Generator, capacity: int, cache_dtype: str = ''):
    """Raises ValueError for a capacity beyond the model's positions, and for an encoder or encoder-decoder."""
    config = generator.model.config
    if config.encoder_layers or not config.causal:
      raise ValueError('a session is of a decoder: what an encoder has read cannot grow; call the generator for every text')
    self._generator, self._cache_dtype = generator, cache_dtype
    self.capacity, self.ids, self._state = capacity, [], None
    generator.limits(capacity, 0)

  @property
  def text(self) -> str:
    """Of all ids."""
    return self._generator.tokenizer.decode_bytes(self.ids).decode('utf-8', errors='replace')

  @property
  def logits(self) -> np.ndarray:
    """[V] f32, the model's scores for the next token. Raises ValueError before anything was read."""
    if self._state is None:
      raise ValueError('a session that has read nothing has no scores; append a text first')
    return np.asarray(self._state.logits[0])

  def append(self, text: Prompt) -> 'Session':
    """Reads more: text, which begins as documents do if it is the first, or ids. Raises ValueError for more than the capacity."""
    if isinstance(text, str):
      new = [*([] if self.ids else [self._generator.tokenizer.bos]), *self._generator.tokenizer.encode(text)]
    else:
      new = self._generator.encoded(text)
    if len(self.ids) + len(new) > self.capacity:
      raise ValueError(f'{len(new)} more tokens pass capacity={self.capacity} of a session that has {len(self.ids)}; make it with more '
                       '(g.session(capacity=..)), or take some back (truncate)')
    if new:
      self._read(new)
    return self

  def __call__(self, prompt: str = '', **options):
    """Reads a prompt, if there is one, and goes on: a Completion, as of Generator.__call__."""
    row, steps = self._run(prompt, options)
    with contextlib.closing(steps):
      for _ in steps:
        pass
    return row.completion()

  def stream(self, prompt: str = '', **options) -> Iterator[str]:
    """The same, in pieces as they come. What was written when one stops to listen stays written."""
    return self._run(prompt, options)[1]

  def fork(self) -> 'Session':
    """Another session with the same past; from here on each goes its own way."""
    other = Session(self._generator, self.capacity, self._cache_dtype)
    other.ids, other._state = list(self.ids), self._state and _copy(self._state)
    return other

  def truncate(self, length: int) -> 'Session':
    """Takes back all but the first ids. Raises ValueError for a length that is not in [0, what there is]."""
    if not 0 <= length <= len(self.ids):
      raise ValueError(f'length={length} must be in [0, {len(self.ids)}], which is what the session has')
    if length < len(self.ids):
      self._back_to(self.ids[:length], len(self.ids))
    return self

  def _read(self, new):
    generator = self._generator
    if self._state is None:
      self._state = generator.read([[*new]] * generator.parts, self.capacity, self._all(sys.maxsize), cache_dtype=self._cache_dtype)
    else:
      for first in range(0, len(new), APPEND):
        part = new[first:first + APPEND]
        tokens = np.zeros((generator.parts, min(APPEND, bucket(len(part)))), np.int32)
        tokens[:, :len(part)] = part
        self._state = generator.append(self._state, tokens, self._all(len(part)))
    self.ids += new

  def _all(self, value):
    return np.full(self._generator.parts, min(value, 2**31 - 1), np.int32)

  def _back_to(self, ids, written):
    """The state after these ids, where the cache holds `written` tokens that begin with them."""
    self.ids = []
    rings = [held.slots - window for held, window in zip(self._state.cache.held, self._windows()) if held.ring]
    # The last token is read again, for its scores; a ring has it only if nothing has written over what its window sees.
    if len(ids) < 2 or written - len(ids) + 1 > min(rings, default=sys.maxsize):
      self._state = None
      if ids:
        self._read(ids)
      return
    cache = dataclasses.replace(self._state.cache, lengths=self._generator.put(self._all(len(ids) - 1)))
    self._state = dataclasses.replace(self._state, cache=cache)
    self.ids = ids[:-1]
    self._read(ids[-1:])

  def _windows(self):
    return [kind.window for kind, _ in self._generator.model.config.places]

  def _run(self, prompt, given):
    options = Options.of(given)
    for name in ('num_samples', 'beams'):
      if getattr(options, name) > 1:
        raise ValueError(f'{name}={getattr(options, name)}: a session has one row; fork it, or call the generator')
    for name in ('draft', 'lookup', 'early_exit'):
      if getattr(options, name):
        raise NotImplementedError(f'{name}: nothing drafts for a session so far; call the generator')
    for name in ('draft', 'lookup', 'early_exit'):
      if getattr(options, name):
        raise ValueError(f'{name} is given: a session drafts nothing; call the generator')
    if options.cache_dtype:
      raise ValueError(f'cache_dtype={options.cache_dtype!r} is of a whole session: g.session(cache_dtype=..)')
    generator = self._generator
    rules, places, texts, ends = generator.rules(options, 1, generator.parts)
    if prompt:
      self.append(prompt)
    if not self.ids:
      raise ValueError('a session that has read nothing cannot go on; append a text first, or give a prompt')
    row = Row(prompt, list(self.ids), int(rules.sampling.seed[0]), texts, generator.tokenizer, ends)
    return row, self._steps(row, rules, places, options)

  def _steps(self, row, rules, places, options):
    generator, begun = self._generator, len(self.ids)
    stop_at = min(begun + options.max_new_tokens, self.capacity)
    finish = LENGTH if begun + options.max_new_tokens <= self.capacity else FULL
    history = dataclasses.replace(self._state.history, generated=0 * self._state.history.generated)
    with jax.set_mesh(generator.mesh):
      rules = Rules(*jax.tree.map(generator.put, (rules.sampling, rules.ends)),
                    jax.device_put(rules.automaton, jax.NamedSharding(generator.mesh, jax.P())))
      self._state = dataclasses.replace(self._state, stop_at=generator.put(self._all(stop_at)), history=history,
                                        done=generator.put(np.full(generator.parts, begun >= stop_at)),
                                        places=None if places is None else generator.put(places))
    try:
      left = stop_at - begun
      while left and not row.finish:
        count = min(left, options.chunk)
        self._state, chunk = generator.advance(self._state, rules, options, count)
        left -= count
        if piece := row.add(0, jax.tree.map(np.asarray, chunk)):
          yield piece
      if rest := row.end(finish):
        yield rest
    except KeyboardInterrupt:
      row.end(INTERRUPTED)
    finally:
      written = int(np.asarray(self._state.cache.lengths)[0])
      self._state = dataclasses.replace(self._state, places=None)
      ids = [*self.ids, *row.ids]
      if written > len(ids):
        self._back_to(ids, written)
      self.ids = ids


def _copy(state: DecodeState) -> DecodeState:
  """Buffers of its own: those of the other are given away when it goes on."""
  return jax.tree.map(lambda x: x.copy(), state)
