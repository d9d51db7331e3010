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
from model.transformer import shallow

TIMED = 2  # chunks of each kind
# Tokens of a chunk without drafts, at most, while chunks are timed: so that a call is judged
# before it ends.
SHORT = 16
READ = APPEND - 1  # tokens that a drafter can read at once, which may have one to catch up with


def drafter_of(generator: Any, options: Any, tokens: int) -> Lookup | DraftModel | EarlyExit | None:
  """What these options draft with; tokens: of the longest row when it ends.

  Raises ValueError for a draft that is none or does not fit the model,
  or for layers that it does not have; NotImplementedError for layers that pipeline stages share.
  """
  config, draft = generator.model.config, options.draft
  if draft is not None:
    if not isinstance(draft, type(generator)):
      raise ValueError(f'draft={draft!r} must be a Generator, such as Generator.load(workdir)')
    mine, its = generator.tokenizer, draft.tokenizer
    for wrong, words in (
      (
        mine.token_bytes != its.token_bytes
        or (mine.pad, mine.bos, mine.eos) != (its.pad, its.bos, its.eos),
        f'it has another tokenizer ({its.kind!r}, {its.vocabulary} ids) than the model '
        f'({mine.kind!r}, {mine.vocabulary} ids)',
      ),
      (
        draft.model.config.V != config.V,
        f'it has model.vocabulary={draft.model.config.V}, the model {config.V}',
      ),
      (
        draft.mesh != generator.mesh,
        f'its mesh is {dict(draft.mesh.shape)}, the model has {dict(generator.mesh.shape)} or '
        'other devices',
      ),
      (
        bool(draft.model.config.encoder_layers) != bool(config.encoder_layers),
        'of it and the model, only one has an encoder',
      ),
      (not draft.model.config.causal, 'model.causal=False: an encoder writes no text'),
      (
        0 < draft.model.config.max_length < tokens,
        f'it has model.max_length={draft.model.config.max_length}, and rows of {tokens} tokens are '
        'asked for; ask for fewer',
      ),
    ):
      if wrong:
        raise ValueError(f'draft: {words}; a draft reads what the model reads')
    return DraftModel(draft.model)
  if options.early_exit:
    if config.scan:
      raise NotImplementedError(
        f'early_exit={options.early_exit} on a mesh with stages, which have some of the layers '
        'each; use lookup, or a mesh without'
      )
    if options.early_exit >= config.L:
      raise ValueError(f'early_exit={options.early_exit} must be below model.layers={config.L}')
    return EarlyExit(options.early_exit)
  return Lookup(options.lookup) if options.lookup else None


class Course:
  """How a call goes on from its prompts, a chunk at a time: with drafts, while they pay,
  or plainly.

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
    """state: after the prompts. read: what gives the same of a draft."""
    self._generator, self._options, self._drafter, self._rules, self.state = (
      generator,
      options,
      drafter,
      rules,
      state,
    )
    self.fell_back, self._pays, self._asked, self._lengths, self._last = (
      False,
      False,
      [],
      [0] * len(prompts),
      None,
    )
    # for a token, of each chunk that had drafts, and that could have none
    self._seconds = {
      True: [],
      False: [],
    }
    # tokens that were drafted; chunks that were asked for without drafts
    self._drafted, self._without = (
      0,
      0,
    )
    if drafter is None:
      return
    memory, cost = None, 0.0
    if isinstance(drafter, Lookup):
      memory = np.zeros((len(prompts), state.cache.capacity), np.int32)
      for row, prompt in zip(memory, prompts):
        row[: len(prompt)] = prompt
      memory = generator.put(memory)
    elif isinstance(drafter, DraftModel):
      memory, cost = (
        (read(options.draft).cache, generator.put(np.zeros(len(prompts), np.int32))),
        weight_bytes(drafter.model),
      )
    else:
      cost = weight_bytes(shallow(generator.model, drafter.layers))
    self._greedy = not np.asarray(rules.sampling.temperature).any()
    self._least = np.float32(0 if self._greedy else min(cost / weight_bytes(generator.model), 1))
    with jax.set_mesh(generator.mesh):
      self.state = Speculation.of(state, memory)

  @property
  def most(self) -> int:
    """Steps of the next chunk, at most; each makes a token of every row, or more."""
    chunk = self._options.chunk
    return self._steps(min(chunk, SHORT) if self._timing() else chunk)

  def _steps(self, chunk: int) -> int:
    """Of a chunk of so many tokens without drafts."""
    return (
      max(1, chunk // (self._options.draft_tokens + 1))
      if self._drafts() and self._drafter.always
      else chunk
    )

  def advance(self, count: int) -> Chunk:
    """The next chunk, of so many steps."""
    generator, options, drafts, trying = (
      self._generator,
      self._options,
      self._drafts(),
      self._trying(),
    )
    steps = self._steps(options.chunk)  # that are compiled, once
    self._asked.append(drafts)
    if not trying:
      self.state, chunk = generator.advance(
        getattr(self.state, 'state', self.state), self._rules, options, count
      )
      return chunk
    with jax.set_mesh(generator.mesh):
      if drafts:
        self.state, chunk = speculate_chunk(
          generator.model,
          self._drafter,
          self.state,
          self._rules,
          self._least,
          jnp.int32(count),
          steps=steps,
          k=options.draft_tokens,
          pad=generator.tokenizer.pad,
          vocabulary=generator.vocabulary,
          alternatives=max(options.logprobs, 0),
        )
      else:
        self._without += 1
        state, chunk = generator.advance(self.state.state, self._rules, options, count)
        self.state = resumed(
          self._drafter,
          dataclasses.replace(self.state, state=state),
          chunk.ids[:, :READ],
          chunk.real[:, :READ],
        )
    return chunk

  def came(self, rows: Sequence[Any]) -> None:
    """Another chunk is in these rows (decode.generator.Row): what it took,
    and what became of its drafts.
    """
    if not self._trying():
      return
    asked, now, lengths = self._asked.pop(0), time.perf_counter(), [len(row.ids) for row in rows]
    grown = [n - before for n, before in zip(lengths, self._lengths) if n > before]
    drafted = sum(row.drafted for row in rows)
    # Looking for drafts in vain costs nothing; behind the last chunk with drafts the one without
    # may have been compiled.
    tells = drafted > self._drafted and all(self._asked) if asked else True
    if self._last is not None and grown and tells:
      self._seconds[asked].append((now - self._last) / statistics.mean(grown))
    self._last, self._lengths, self._drafted = now, lengths, drafted
    if self._timing() and len(self._seconds[False]) == TIMED:
      self._pays = statistics.mean(self._seconds[True]) <= statistics.mean(self._seconds[False])
      self.fell_back = not self._pays
    # Who has given up drafts nothing in the chunk that is under way,
    # so that no part of a law is left over when it ends.
    self.fell_back |= all(
      row.finish or gave_up(np.float32(row.drafted), row.accepted, self._least) for row in rows
    )

  def _trying(self) -> bool:
    return self._drafter is not None and not self.fell_back

  def _timing(self) -> bool:
    """Whether the clock has yet to say what is faster."""
    return self._trying() and self._greedy and not self._pays

  def _drafts(self) -> bool:
    """Whether the next chunk is drafted: until so many with drafts have been timed,
    and again when so many without were asked for.
    """
    return self._trying() and not (
      self._timing() and len(self._seconds[True]) >= TIMED and self._without < TIMED
    )
