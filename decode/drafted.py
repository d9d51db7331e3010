"""How does an engine write several tokens of a row in a step, with the same bits for each whatever
the others do? Drafts are looked up in the row's own text, and every step judges as many of each
row, also where no row has any.

A step that judges fewer, because nobody has drafts just now, is another program, with other last
bits: what a row gets would depend on its neighbours' drafts. So whether to draft is a setting of
the whole engine (Sizes.lookup), and what does not pay goes on.

B rows · J rows that a call is about · S ids of a row · V vocabulary
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decode.calling import flattened
from decode.engine import Engine
from decode.loop import Chunk, Rules
from decode.sizes import Sizes, check_weights
from decode.speculative import Lookup, Speculation, speculate_chunk
from model.cache import rows_of, with_rows
from model.config import ModelConfig
from model.transformer import Decoder
from parallel import axes as ax
from parallel.compiler import GENERATION


class DraftingEngine(Engine):
  """An engine whose every step makes 1 to 1 + sizes.draft_tokens tokens of a row; `count` of
  `decode` is of steps. Chunks are wider by so much, and what is real in them is no prefix.
  """

  def __init__(self, config: ModelConfig, mesh: jax.sharding.Mesh, sizes: Sizes, **given: int):
    """As of Engine. Raises ValueError for sizes that draft nothing."""
    if not sizes.lookup:
      raise ValueError('lookup=0 of an engine that drafts: give at least 1, or make an Engine')
    self._drafter = Lookup(sizes.lookup, np.float32(0), always=True)
    self._drafts: Any = None  # a Speculation, without its state
    super().__init__(config, mesh, sizes, **given)
    ids = np.zeros((self._parts, self.sizes.capacity), np.int32)
    rows = self._named({}, self._parts)
    self._programs['remember'] = self._compiled(remember, self._drafts, *self._puts([rows, ids]))

  def rest(self) -> None:
    super().rest()
    self._drafts = None

  def reset(self) -> None:
    super().reset()
    if 'no drafts' not in self._programs:
      self._programs['no drafts'] = self._compiled(jax.jit(self._nothing))
    self._drafts = self._run('no drafts')

  def read(self, weights: Decoder, rows: Iterable[int] | None = None) -> list[int]:
    ended = super().read(weights, rows)
    # Not as they join: until their prompts are read, every step writes over what it finds here.
    for row in ended:
      part, prompt = self.part_of(row), self._requests[row].prompt
      ids = np.zeros((self._parts, self.sizes.capacity), np.int32)
      ids[part, : len(prompt)] = prompt
      places = self._named({row: part}, self._parts)
      self._drafts = self._run('remember', self._drafts, *self._puts([places, ids]))
    return ended

  def _nothing(self) -> Speculation:
    """Of rows that are all free."""
    B = self.sizes.rows

    def filled(value, dtype, *more):
      axes = 'batch', *(None,) * len(more)
      return ax.place(jnp.full((B, *more), value, dtype, out_sharding=ax.out(*axes)), *axes)

    return Speculation(
      state=None,
      memory=filled(0, jnp.int32, self.sizes.capacity),
      rejected=filled(-jnp.inf, jnp.float32, self._config.table_rows),
      drafted=filled(0, jnp.int32),
      accepted=filled(0, jnp.int32),
    )

  def _write(self, name: str, weights: Decoder, rules: Rules, count: np.int32) -> Chunk:
    carried = dataclasses.replace(self._drafts, state=self.state)
    arguments = self._leaves(weights), self._drafter, carried, rules, count
    carried, chunk = self._run(name, *arguments)
    self.state, self._drafts = carried.state, dataclasses.replace(carried, state=None)
    return chunk

  def _most(self, count: int) -> int:
    # What was rejected behind the last kept one was written, too.
    return count * (1 + self.sizes.draft_tokens) + self.sizes.draft_tokens

  def _decoder(self, weights: Decoder, alternatives: int) -> str:
    name = f'decode with {alternatives} alternatives'
    if name not in self._programs:
      check_weights(weights, self.sizes)
      static = dict(steps=self.sizes.steps, pad=self._pad, vocabulary=self._vocabulary)
      static |= dict(k=self.sizes.draft_tokens, alternatives=alternatives)
      program = flattened(speculate_chunk, weights, 2, GENERATION, **static)
      carried = dataclasses.replace(self._drafts, state=self.state)
      rules = dataclasses.replace(self.rules, automaton=self._automaton)
      arguments = self._leaves(weights), self._drafter, carried, rules, np.int32(0)
      self._programs[name] = self._compiled(program, *arguments)
    return name


@functools.partial(jax.jit, donate_argnums=0)
def remember(drafts: Speculation, rows: Int[Array, 'J'], ids: Int[Array, 'J S']) -> Speculation:
  """These rows, whose prompts were read, have these ids, and have drafted nothing; without state.

  rows: as model.cache.Slots numbers them.
  """
  begun = dataclasses.replace(
    drafts,
    memory=ids,
    rejected=jnp.full_like(rows_of(drafts.rejected, rows), -jnp.inf),
    drafted=jnp.zeros_like(rows),
    accepted=jnp.zeros_like(rows),
  )
  return with_rows(drafts, rows, begun)
