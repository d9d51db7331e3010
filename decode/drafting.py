"""Do drafts pay? What a call drafts with, and when it goes on without, because that is faster.

Where no row draws, so that the text is the same either way, the clock decides: a call times a few
chunks with drafts and a few without, and stays with what makes its tokens sooner. Otherwise a row
stops drafting where too few of its drafts are kept for the bytes that they cost, which depends on
the row alone, so that a seed's text does; and where all have stopped, the call goes on without.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode.front import Front
from decode.loop import Chunk, DecodeState, Rules
from decode.report import weight_bytes
from decode.speculative import (
  DraftModel,
  EarlyExit,
  Lookup,
  Speculation,
  gave_up,
  resumed,
  speculate_chunk,
)
from model.cache import APPEND
from model.rearranged import shallow

TIMED = 2  # chunks of each kind
# Tokens of a chunk without drafts, at most, while chunks are timed: so that a call is judged
# before it ends.
SHORT = 16
READ = APPEND - 1  # tokens that a drafter can read at once, which may have one to catch up with


def drafter_of(
  generator: Any, options: Any, tokens: int, fronts: Sequence[Front]
) -> Lookup | DraftModel | EarlyExit | None:
  """What these options draft with; tokens: of the longest row when it ends. fronts: of the prompts.

  Raises ValueError for a draft that is none or does not fit the model, or for layers that it does
  not have; NotImplementedError for layers that pipeline stages share.
  """
  config = generator.model.config
  if options.draft is not None:
    if not isinstance(options.draft, type(generator)):
      raise ValueError(
        f'draft={options.draft!r} must be a Generator, such as Generator.load(workdir)'
      )
    if options.draft.adapters:
      raise NotImplementedError(
        f'draft: a Generator with adapters ({", ".join(options.draft.adapters)}); nothing drafts '
        'with several so far: load it without'
      )
    if misfit := _misfit(options.draft, generator, tokens, fronts):
      raise ValueError(f'draft: {misfit}; a draft reads what the model reads')
    return DraftModel(options.draft.model)

  if options.early_exit:
    if config.execution.scan:
      raise NotImplementedError(
        f'early_exit={options.early_exit} on a mesh with stages, which have some of the layers '
        'each; use lookup, or a mesh without'
      )
    if options.early_exit >= config.L:
      raise ValueError(f'early_exit={options.early_exit} must be below model.layers={config.L}')
    return EarlyExit(options.early_exit)
  return Lookup(options.lookup) if options.lookup else None


def _misfit(draft: Any, generator: Any, tokens: int, fronts: Sequence[Front]) -> str:
  """Why this Generator cannot draft for the other; '' where it can."""
  mine, its = generator.tokenizer, draft.tokenizer
  config, theirs = generator.model.config, draft.model.config
  if mine.token_bytes != its.token_bytes or _controls(mine) != _controls(its):
    return (
      f'it has another tokenizer ({its.kind!r}, {its.vocabulary} ids) than the model '
      f'({mine.kind!r}, {mine.vocabulary} ids)'
    )
  for reader, front in [('it', draft.plain), *(('the model', front) for front in fronts)]:
    if front.soft:
      adapter = f' with adapter={front.adapter!r}' if front.adapter else ''
      return (
        f'{reader}{adapter} reads soft tokens before every text (adapter.kind=prompt or prefix), '
        'and the other does not; use lookup or early_exit'
      )
  if theirs.V != config.V:
    return f'it has model.vocabulary={theirs.V}, the model {config.V}'
  if theirs.table_rows != config.table_rows:
    return (
      f'its tables have {theirs.table_rows} rows (model.vocabulary_multiple='
      f'{theirs.vocabulary_multiple}), the model {config.table_rows}'
    )
  if draft.mesh != generator.mesh:
    return (
      f'its mesh is {dict(draft.mesh.shape)}, the model has {dict(generator.mesh.shape)} or other '
      'devices'
    )
  if bool(theirs.encoder_layers) != bool(config.encoder_layers):
    return 'of it and the model, only one has an encoder'
  if not theirs.causal:
    return 'model.causal=False: an encoder writes no text'
  if 0 < theirs.max_length < tokens:
    return (
      f'it has model.max_length={theirs.max_length}, and rows of {tokens} tokens are asked for; '
      'ask for fewer'
    )
  return ''


def _controls(tokenizer: Any) -> tuple[int, int, int]:
  return tokenizer.pad, tokenizer.bos, tokenizer.eos


class Course:
  """How a call goes on from its prompts, a chunk at a time: with drafts, while they pay, or
  plainly.

  Attributes:
    fell_back: whether it has gone over from drafts to none, for good.
    state: after all chunks that were asked for.
  """

  def __init__(
    self,
    generator: Any,
    options: Any,
    drafter: Any,
    rules: Rules,
    state: DecodeState,
    prompts: Sequence[Sequence[int]],
    read: Callable[[Any], DecodeState] | None = None,
  ):
    """state: after the prompts, of which each row's stands in the cache (Front.row). read: what
    gives the same of a draft.
    """
    self._generator = generator
    self._options = options
    self._drafter = drafter
    self._rules = rules
    self.state = state
    self.fell_back = False
    self._pays = False  # whether the clock has found that drafts do
    self._asked: list[bool] = []  # of chunks that are under way: whether they are drafted

    # When the last chunk came, and each row's tokens and the drafted ones by then.
    self._last: float | None = None
    self._lengths = [0] * len(prompts)
    self._drafted = 0
    # Seconds for a token, of each chunk that had drafts, and that could have none.
    self._seconds: dict[bool, list[float]] = {True: [], False: []}
    self._without = 0  # chunks that were asked for without drafts

    if drafter is not None:
      memory, cost = self._memory(prompts, read)
      self._greedy = not np.asarray(rules.sampling.temperature).any()
      # Greedy texts are the same either way, so that the clock may decide, and no row gives up.
      least = 0 if self._greedy else min(cost / weight_bytes(generator.model), 1)
      self._drafter = dataclasses.replace(drafter, least=np.float32(least))
      with jax.set_mesh(generator.mesh):
        self.state = Speculation.of(state, memory)

  def _memory(self, prompts, read) -> tuple[Any, float]:
    """What the drafter remembers of the prompts, and bytes of weights that a draft of it reads."""
    generator, drafter = self._generator, self._drafter
    if isinstance(drafter, Lookup):
      memory = np.zeros((len(prompts), self.state.cache.capacity), np.int32)
      for row, prompt in zip(memory, prompts):
        row[: len(prompt)] = prompt
      return generator.put(memory), 0.0
    if isinstance(drafter, DraftModel):
      tail = generator.put(np.zeros(len(prompts), np.int32))
      return (read(self._options.draft).cache, tail), weight_bytes(drafter.model)
    return None, weight_bytes(shallow(generator.model, drafter.layers))

  @property
  def most(self) -> int:
    """Steps of the next chunk, at most; each makes a token of every row, or more."""
    chunk = self._options.chunk
    return self._steps(min(chunk, SHORT) if self._timing() else chunk)

  def _steps(self, chunk: int) -> int:
    """Of a chunk of so many tokens without drafts."""
    if self._drafts() and self._drafter.always:
      return max(1, chunk // (self._options.draft_tokens + 1))
    return chunk

  def advance(self, count: int) -> Chunk:
    """The next chunk, of so many steps."""
    generator, options = self._generator, self._options
    drafts = self._drafts()
    self._asked.append(drafts)
    if not self._trying():
      plain = self.state.state if isinstance(self.state, Speculation) else self.state
      self.state, chunk = generator.advance(plain, self._rules, options, count)
      return chunk

    with jax.set_mesh(generator.mesh):
      if drafts:
        self.state, chunk = speculate_chunk(
          generator.model,
          self._drafter,
          self.state,
          self._rules,
          jnp.int32(count),
          steps=self._steps(options.chunk),  # that are compiled, once
          k=options.draft_tokens,
          pad=generator.tokenizer.pad,
          vocabulary=generator.vocabulary,
          alternatives=max(options.logprobs, 0),
        )
      else:
        self._without += 1
        state, chunk = generator.advance(self.state.state, self._rules, options, count)
        carried = dataclasses.replace(self.state, state=state)
        self.state = resumed(self._drafter, carried, chunk.ids[:, :READ], chunk.real[:, :READ])
    return chunk

  def came(self, rows: Sequence[Any]) -> None:
    """Another chunk is in these rows (decode.request.Row): what it took, and what became of its
    drafts.
    """
    if not self._trying():
      return
    asked, now = self._asked.pop(0), time.perf_counter()
    lengths = [len(row.ids) for row in rows]
    grown = [n - before for n, before in zip(lengths, self._lengths) if n > before]
    drafted = sum(row.drafted for row in rows)
    # Looking for drafts in vain costs nothing; behind the last chunk with drafts the one without
    # may have been compiled.
    tells = not asked or (drafted > self._drafted and all(self._asked))
    if self._last is not None and grown and tells:
      self._seconds[asked].append((now - self._last) / statistics.mean(grown))
    self._last = now
    self._lengths = lengths
    self._drafted = drafted

    if self._timing() and len(self._seconds[False]) == TIMED:
      self._pays = statistics.mean(self._seconds[True]) <= statistics.mean(self._seconds[False])
      self.fell_back = not self._pays
    # Who has given up drafts nothing in the chunk that is under way, so that no part of a law is
    # left over when it ends.
    least = self._drafter.least
    going = [row for row in rows if not row.finish]
    self.fell_back |= bool(going) and all(
      gave_up(np.float32(row.drafted), row.accepted, least) for row in going
    )

  def _trying(self) -> bool:
    return self._drafter is not None and not self.fell_back

  def _timing(self) -> bool:
    """Whether the clock has yet to say what is faster."""
    return self._trying() and self._greedy and not self._pays

  def _drafts(self) -> bool:
    """Whether the next chunk is drafted: until so many with drafts have been timed, and again when
    so many without were asked for.
    """
    if not self._trying():
      return False
    enough = len(self._seconds[True]) >= TIMED
    return not (self._timing() and enough and self._without < TIMED)
