"""How do a Hopper GPU's thread blocks share the tiles of attention out, and how do a tile's
operands come? For all of our kernels.

FlashAttention-3 (Shah et al., arXiv:2407.08608): of a thread block's three warpgroups one loads by
TMA, the others compute. Thread blocks stay: each takes tiles, the longest first, and of a tile the
blocks that are seen whole come before those that are masked.

A stage of memory has two barriers. `ready` is passed when what TMA writes there has come; `free`
when all who read it have said that they are done. So the loader runs ahead by as many blocks as
there are stages, and nobody waits for the whole thread block.

Scores are in powers of two. B batch · T query length · S key length · N query heads · K key/value
heads · H head width
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic_gpu_compat as gpu

# A score that is not seen; the greatest score of none. Numbers and not -inf, whose difference would
# be NaN: the weight of what is not seen is exp2(HIDDEN - NOTHING) = 0 even where nothing is.
HIDDEN, NOTHING = -3e38, -1e38
LOG2E = math.log2(math.e)
FULLS, COUNT, BLOCKS = range(3)  # columns of a plan's steps
WARPGROUPS = 2  # that compute; one more loads
# Of a thread's registers: the loader needs few, and what it gives back makes room for the sums of
# the others.
LOADER, COMPUTER = 24, 240


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Sizes of a kernel.

  Attributes:
    queries, keys: of a block; of those that a tile holds still, what one warpgroup has. stages:
      blocks in flight.
  """

  queries: int
  keys: int
  stages: int


@dataclasses.dataclass(frozen=True)
class TileShape:
  """What a kernel knows of its problem: sizes, of heads as padded, and what the mask consists
  of.
  """

  B: int
  N: int
  K: int
  T: int
  S: int
  H: int
  Hv: int
  causal: bool
  window: int
  by_index: bool
  ragged: bool  # are there keys that fill the last block and must be hidden?
  softcap: float
  scale: float
  dtype: Any
  interpret: Any

  @property
  def factor(self) -> float:
    """From a product to a power of two."""
    return self.scale * LOG2E

  def scores(self, products):
    """Powers of two, and of a soft cap the tanh."""
    if not self.softcap:
      return products * self.factor, None
    # The tanh is kept for the backward pass: it is the cap's slope.
    bent = jnp.tanh(products * (self.scale / self.softcap))
    return bent * (self.softcap * LOG2E), bent

  def mask(self, scores, ids, row, queries, keys, of_queries: int):
    """Scores as they are seen, of queries from `queries` on, along axis `of_queries`, and of keys
    from `keys` on.
    """
    starts = {of_queries: queries, 1 - of_queries: keys}

    def index(axis):
      numbers = plgpu.broadcasted_iota(
        jnp.int32, scores.shape[axis : axis + 1], 0, layout=gpu.LAYOUTS[axis]
      )
      # Behind a barrier, or the compiler makes the comparisons' constants out of them, one for each
      # number, and keeps those.
      return (lax.optimization_barrier(numbers) if axis == 0 else numbers) + starts[axis]

    def given(name, axis):
      side = 'query' if axis == of_queries else 'key'
      return gpu.load(
        ids[f'{side}_{name}'].at[row, pl.ds(starts[axis], scores.shape[axis])], gpu.LAYOUTS[axis]
      )

    def hide(scores, relation, q, k):
      """Of the scores those where relation(q, k) does not hold; q and k are compact until here."""
      q, k = (
        lax.broadcast_in_dim(x, scores.shape, [axis])
        for x, axis in ((q, of_queries), (k, 1 - of_queries))
      )
      # Each relation hides on its own: to join them first, a block of bools would fill the
      # registers.
      return jnp.where(relation(q, k), scores, HIDDEN)

    # Keys that only fill the last block up.
    if self.ragged:
      seen = lax.broadcast_in_dim(index(1 - of_queries), scores.shape, [1 - of_queries]) < self.S
      scores = jnp.where(seen, scores, HIDDEN)
    if self.causal or self.window:
      position = index if self.by_index else functools.partial(given, 'positions')
      q, k = position(of_queries), position(1 - of_queries)
      if self.causal:
        # What a prefix shows lies before every query then, and one comparison does.
        before = jnp.where(k < ids['prefix'][row], -1, k) if 'prefix' in ids else k
        scores = hide(scores, lax.ge, q, before)
      if self.window:
        scores = hide(scores, lax.lt, q - self.window, k)
        if not self.causal:
          scores = hide(scores, lax.gt, q + self.window, k)
    if 'query_segments' in ids:
      scores = hide(
        scores, lax.eq, given('segments', of_queries), given('segments', 1 - of_queries)
      )
    return scores


class Tile(NamedTuple):
  """Where a warpgroup is: tile of the plan, row of the batch, head, tile of the row, and blocks
  that went through before it.
  """

  number: Any
  row: Any
  head: Any
  i: Any
  first: Any


def zero(step):
  """0 that is no constant for the compiler, which would keep addresses in registers from block to
  block.
  """
  return lax.min(step, 0)


def each_tile(order, shape: TileShape, shared: bool, heads: int, body, carry):
  """Runs body(tile of the plan, row, head, tile of the row, carry) for what this thread block takes
  of all tiles of all heads.

  Thread blocks take one after another, every other round backwards, so that all of them end
  together: tiles are sorted by length, and who had the longest of a round has the shortest of the
  next.
  """
  blocks, block = lax.axis_size('block'), lax.axis_index('block')
  tiles = order.shape[0]
  repeat = shape.B if shared else 1  # rows that have the same tiles
  rounds, rest = divmod(tiles * repeat * heads, blocks)

  def place(turn):
    return jnp.where(lax.rem(turn, 2) == 0, block, blocks - 1 - block)

  def one(turn, carry):
    # Heads (and rows of the same tiles) go fastest, so that neighbours in a round are equally long.
    number = turn * blocks + place(turn)
    tile, rest = order[lax.div(number, repeat * heads)], lax.rem(number, repeat * heads)
    of_row = tiles if shared else tiles // shape.B
    row = lax.div(rest, heads) if shared else lax.div(tile, of_row)
    return body(tile, row, lax.rem(rest, heads), lax.rem(tile, of_row), carry)

  last = (place(jnp.int32(rounds)) < rest).astype(jnp.int32)
  none = nothing(order)
  return lax.fori_loop(0, rounds + last + none, one, carry)


def nothing(order):
  """0, which the compiler does not know.

  A loop that it knows to run but once is taken apart, and what was in it needs more registers than
  there are.
  """
  return lax.max(~order[0], 0)


def run(kernel, shared: bool, heads: int):
  """One warpgroup loads, the others compute; each goes through the same tiles."""
  turns = functools.partial(each_tile, kernel.order, kernel.shape, shared, heads)
  pl.when(kernel.warpgroup == WARPGROUPS)(lambda: kernel.load(turns))
  pl.when(kernel.warpgroup < WARPGROUPS)(lambda: kernel.compute(turns))


def load(each_tile, steps, stages: int, memory, ready, free, held, streamed, passes: int = 1):
  """The work of the warpgroup that loads.

  What comes together has one barrier, by the name of its first part.

  Args:
    held: (row, head, tile of the row) -> (slot, {name: source}) of what a tile holds still.
    streamed: (tile, row, head, n) -> {name: source}s of the n-th block of it. A tile has
      steps[tile, COUNT] blocks in each of `passes`.
  """
  plgpu.set_max_registers(LOADER, action='decrease')

  def copy(slot, sources):
    of = next(iter(sources))
    plgpu.barrier_wait(free[of].at[slot])
    for name, source in sources.items():
      plgpu.copy_gmem_to_smem(source, memory[name].at[slot], ready[of].at[slot])

  def tile(tile, row, head, i, step):
    def load(n, step):
      for sources in streamed(tile, row, head, n):
        copy(lax.rem(step, stages), sources)
      return step + 1

    # The first block before what is held: the latter's memory is free only at the end of the tile
    # before.
    step = load(0, step)
    for part in held(row, head, i):
      copy(*part)
    return lax.fori_loop(1, steps[tile, COUNT] * passes, load, step)

  each_tile(tile, 0)
  # Every arrival is waited for: a thread block must not end while others still arrive at its
  # barriers.
  for barrier in free.values():
    for slot in range(barrier.shape[0]):
      plgpu.barrier_wait(barrier.at[slot])


def keys_of(k, v, steps, bk: int, shape: TileShape):
  """What is streamed where a tile is of queries."""

  def streamed(tile, row, head, n):
    part = row, pl.ds(steps[tile, BLOCKS + n] * bk, bk), lax.div(head, shape.N // shape.K)
    # Apart: products with keys begin before the values have come.
    return {'k': k.at[part]}, {'v': v.at[part]}

  return streamed


def queries_of(row, rows, head, q, d_out, lse, delta):
  """All that a backward pass reads of a block of queries."""
  vectors, numbers = (row, rows, head), (row, head, rows)
  return {
    'q': q.at[vectors],
    'd_out': d_out.at[vectors],
    'lse': lse.at[numbers],
    'delta': delta.at[numbers],
  }


def rows_of(i, group, size: int):
  """Of the i-th tile of a row those of a warpgroup."""
  return pl.ds((i * WARPGROUPS + group) * size, size)


def whole_then_masked(steps, tile, block, carry):
  """Runs block(n, carry, masked=...) over the blocks of a tile: two loops, so that those that are
  seen whole have no comparison.
  """
  carry = lax.fori_loop(0, steps[tile, FULLS], functools.partial(block, masked=False), carry)
  return lax.fori_loop(
    steps[tile, FULLS], steps[tile, COUNT], functools.partial(block, masked=True), carry
  )


def release(free, slots):
  """Says of memory that nobody reads it any more. slots: name -> slots."""
  for name, which in slots.items():
    for slot in which:
      plgpu.barrier_arrive(free[name].at[slot])


def meet(barrier):
  plgpu.barrier_arrive(barrier)
  plgpu.barrier_wait(barrier)
