"""What do the warpgroups of a Hopper GPU compute for the gradients of attention? The bodies of
kernels.flash_gpu's backward kernels.

FlashAttention-2, algorithm 2 (Dao, arXiv:2307.08691). Keys and values have a kernel whose tiles are
of keys; it adds up the gradient of queries in main memory as well, or these have a kernel of their
own, whose tiles are of queries, as forward. Registers are what is short: most of the order in here
is so that no more is alive at once than 240 of a thread hold, without a spill.

Scores are in powers of two. B batch · T query length · S key length · N query heads ·
K key/value heads · H head width
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import flash_gpu_tiles as tiles, mosaic_gpu_compat as gpu
from kernels.flash_gpu_tiles import BLOCKS, COMPUTER, COUNT, WARPGROUPS, Tile, TileShape, Tiling


@dataclasses.dataclass(frozen=True, eq=False)
class BackwardQueries:
  """The refs of the kernel of queries' gradients; a tile is of queries, as forward. d_q: as q;
  others: see Forward.
  """

  q: Any
  k: Any
  v: Any
  lse: Any
  delta: Any
  d_out: Any
  ids: Any
  order: Any
  steps: Any
  d_q: Any
  memory: Any
  ready: Any
  free: Any
  shape: TileShape
  tuning: Tiling
  warpgroup: Any

  def load(self, each_tile):
    def held(row, head, i):
      refs = self.q, self.d_out, self.lse, self.delta
      return [
        (
          group,
          tiles.queries_of(row, tiles.rows_of(i, group, self.tuning.queries), head, *refs),
        )
        for group in range(WARPGROUPS)
      ]

    streamed = tiles.keys_of(self.k, self.v, self.steps, self.tuning.keys, self.shape)
    tiles.load(
      each_tile, self.steps, self.tuning.stages, self.memory, self.ready, self.free, held, streamed
    )

  def compute(self, each_tile):
    plgpu.set_max_registers(COMPUTER, action='increase')
    stages = range(self.tuning.stages)
    tiles.release(self.free, {'k': stages, 'v': stages, 'q': [self.warpgroup]})
    each_tile(self.tile, 0)

  def tile(self, tile, row, head, i, first):
    rows = tiles.rows_of(i, self.warpgroup, self.tuning.queries)
    plgpu.barrier_wait(self.ready['q'].at[self.warpgroup])
    block = functools.partial(self.block, at=Tile(tile, row, head, i, first), rows=rows)
    begun = gpu.filled((self.tuning.queries, self.shape.H))
    acc = tiles.whole_then_masked(self.steps, tile, block, begun)
    # Where the queries were: the last product that reads them is done.
    memory = self.memory['q'].at[self.warpgroup]
    memory[...] = (acc * self.shape.scale).astype(self.shape.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(self.memory['q'].at[self.warpgroup], self.d_q.at[row, rows, head])
    plgpu.wait_smem_to_gmem(0)
    tiles.release(self.free, {'q': [self.warpgroup]})
    return first + self.steps[tile, COUNT]

  def block(self, n, acc, at: Tile, rows, masked: bool):
    """acc, the gradient of queries, with what a block of keys adds (FlashAttention-2,
    algorithm 2).
    """
    shape, memory, size = self.shape, self.memory, (self.tuning.queries, self.tuning.keys)

    def of(name):
      return lax.broadcast_in_dim(gpu.load(memory[name].at[self.warpgroup], gpu.ROWS), size, [0])

    slot = lax.rem(at.first + n, self.tuning.stages)
    plgpu.barrier_wait(self.ready['k'].at[slot])
    plgpu.barrier_wait(self.ready['v'].at[slot])
    queries, d_outs = (
      memory[name].at[self.warpgroup + tiles.zero(at.first + n)] for name in ('q', 'd_out')
    )
    scores, d_weights = gpu.products(
      (gpu.filled(size), queries, memory['k'].at[slot].T),
      (gpu.filled(size), d_outs, memory['v'].at[slot].T),
      interpret=shape.interpret,
    )
    plgpu.barrier_arrive(self.free['v'].at[slot])

    # The log-sum-exp is of all keys, so weights need no other block.
    powers, bent = shape.scores(scores)
    if masked:
      start = self.steps[at.number, BLOCKS + n] * self.tuning.keys
      powers = shape.mask(powers, self.ids, at.row, rows.start, start, 0)
    weights = jnp.exp2(powers - of('lse'))
    d_scores = weights * (d_weights - of('delta'))
    d_scores = (d_scores if bent is None else d_scores * (1 - bent * bent)).astype(shape.dtype)
    (acc,) = gpu.products((acc, d_scores, memory['k'].at[slot]), interpret=shape.interpret)
    plgpu.barrier_arrive(self.free['k'].at[slot])
    return acc


def backward_queries(*refs, shape: TileShape, tuning: Tiling, shared: bool):
  """The body of the kernel of queries' gradients; refs: see BackwardQueries."""
  kernel = BackwardQueries(*refs, shape=shape, tuning=tuning, warpgroup=lax.axis_index('warpgroup'))
  tiles.run(kernel, shared, shape.N)


@dataclasses.dataclass(frozen=True, eq=False)
class BackwardKeys:
  """The refs of the kernel of keys' and values' gradients, of some columns, and where there is
  sum_q of queries', added up there.

  A tile is of keys, half of them of each warpgroup, and goes through the queries of all heads that
  share them. Scores are [keys, queries]: the keys' gradients are then products whose left side is
  in registers already.

  sum_q: [B, T, N, H] f32, or None. d_k, d_v: of these `columns` of keys, and `wide` of values.
  both: where the warpgroups meet, or None.
  """

  q: Any
  k: Any
  v: Any
  lse: Any
  delta: Any
  d_out: Any
  ids: Any
  order: Any
  steps: Any
  sum_q: Any
  d_k: Any
  d_v: Any
  memory: Any
  ready: Any
  free: Any
  both: Any
  shape: TileShape
  tuning: Tiling
  columns: slice
  wide: slice
  warpgroup: Any

  @property
  def G(self) -> int:
    return self.shape.N // self.shape.K

  def rows(self, tile, n):
    """Queries of the n-th block of a tile."""
    return pl.ds(self.steps[tile, BLOCKS + n] * self.tuning.queries, self.tuning.queries)

  def load(self, each_tile):
    def held(row, head, j):
      size = WARPGROUPS * self.tuning.keys
      part = row, pl.ds(j * WARPGROUPS * self.tuning.keys, size), head
      return [(0, {'k': self.k.at[part], 'v': self.v.at[part]})]

    # All blocks of one head, then those of the next that shares the keys.
    def streamed(tile, row, head, n):
      of, rows = (
        head * self.G + lax.div(n, self.steps[tile, COUNT]),
        self.rows(tile, lax.rem(n, self.steps[tile, COUNT])),
      )
      return [tiles.queries_of(row, rows, of, self.q, self.d_out, self.lse, self.delta)]

    stages = self.tuning.stages
    tiles.load(
      each_tile, self.steps, stages, self.memory, self.ready, self.free, held, streamed, self.G
    )

  def compute(self, each_tile):
    plgpu.set_max_registers(COMPUTER, action='increase')
    tiles.release(self.free, {'k': [0], 'q': range(self.tuning.stages)})
    each_tile(self.tile, 0)
    if self.sum_q is not None:
      plgpu.wait_smem_to_gmem(0)

  def tile(self, tile, row, head, j, first):
    bk, G = self.tuning.keys, self.G
    mine = pl.ds(self.warpgroup * bk, bk)
    at = Tile(tile, row, head, j, first)
    plgpu.barrier_wait(self.ready['k'].at[0])

    def one_head(g, carry):
      block = functools.partial(self.block, at=at, mine=mine, g=g)
      return tiles.whole_then_masked(self.steps, tile, block, carry)

    heads = G + tiles.nothing(self.order)  # G, but not for the compiler
    widths = [part.stop - part.start for part in (self.columns, self.wide)]
    sums = lax.fori_loop(0, heads, one_head, tuple(gpu.filled((bk, width)) for width in widths))
    if self.sum_q is not None:
      tiles.meet(self.both)  # the other's last product has read these keys
    self.write(sums, at, mine)
    return first + self.steps[tile, COUNT] * G

  def block(self, n, carry, at: Tile, mine, g, masked: bool):
    """of_k and of_v, the gradients of this warpgroup's keys and values, with what a block of
    queries of head g adds.
    """
    of_k, of_v = carry
    shape = self.shape
    step = at.first + g * self.steps[at.number, COUNT] + n
    slot = lax.rem(step, self.tuning.stages)
    plgpu.barrier_wait(self.ready['q'].at[slot])
    keys = self.memory['k'].at[tiles.zero(step), mine]
    values = self.memory['v'].at[tiles.zero(step), mine]
    queries, d_outs = self.memory['q'].at[slot], self.memory['d_out'].at[slot]

    # A mask's positions and segments, or a cap's slope, take the registers that the second
    # product's result would wait in.
    crowded = shape.softcap or masked and (self.ids or shape.ragged)
    size = self.tuning.keys, self.tuning.queries
    begun = not shape.softcap and shape.factor > 0
    of_scores = self.minus('lse', 1 / shape.factor, slot) if begun else gpu.filled(size)

    def of_weights():
      return (self.minus('delta', 1.0, slot), values, d_outs.T)

    scores, *d_weights = gpu.products(
      (of_scores, keys, queries.T),
      *[] if crowded else [of_weights()],
      interpret=shape.interpret,
    )
    weights, slopes = self.weights(scores, n, at, mine, slot, begun, masked)
    for_v = of_v, weights, _columns(d_outs, self.wide)
    if crowded:  # one after another, so that each begins with the registers of the one before
      (of_v,) = gpu.products(for_v, interpret=shape.interpret)
      d_weights = gpu.products(of_weights(), interpret=shape.interpret)
    d_scores = (slopes * d_weights[0]).astype(shape.dtype)
    held = self.share(d_scores, step, mine)

    for_k = of_k, d_scores, _columns(queries, self.columns)
    if crowded:
      (of_k,) = gpu.products(for_k, interpret=shape.interpret)
    else:
      of_v, of_k = gpu.products(for_v, for_k, interpret=shape.interpret)
    tiles.release(self.free, {'q': [slot]})
    if self.sum_q is not None:
      self.add_queries(held, step, n, at, g)
    return of_k, of_v

  def minus(self, name, share, slot):
    """Numbers of queries, negative, as [keys, queries] that a product is added to.

    Registers are short: as what a sum starts from, they need none of their own.
    """
    size = self.tuning.keys, self.tuning.queries
    numbers = gpu.load(self.memory[name].at[slot], gpu.COLUMNS) * -share
    return lax.broadcast_in_dim(numbers, size, [1])

  def weights(self, scores, n, at: Tile, mine, slot, begun: bool, masked: bool):
    """(weights, in 16 bits; what a weight's gradient is multiplied with). begun: the log-sum-exp is
    taken off already.
    """
    shape, bq, bk = self.shape, self.tuning.queries, self.tuning.keys
    powers, bent = shape.scores(scores)
    if masked:
      queries = self.steps[at.number, BLOCKS + n] * bq
      powers = shape.mask(powers, self.ids, at.row, queries, at.i * WARPGROUPS * bk + mine.start, 1)
    weights = jnp.exp2(powers if begun else powers + self.minus('lse', 1.0, slot))
    slopes = weights if bent is None else weights * (1 - bent * bent)
    return weights.astype(shape.dtype), slopes

  def share(self, d_scores, step, mine):
    """Where there is sum_q: puts these keys' gradients of scores beside the other warpgroup's;
    returns both, in shared memory.

    There are two such places, taken in turn: the other may be a step behind, and still read the one
    before.
    """
    if self.sum_q is None:
      return None
    held = self.memory['d_scores'].at[lax.rem(step, 2)]
    held.at[mine][...] = d_scores
    plgpu.commit_smem()
    tiles.meet(self.both)
    return held

  def add_queries(self, held, step, n, at: Tile, g):
    """Adds the gradient of the block's queries up in main memory: each warpgroup half of a head's
    columns, over the keys of both.

    A product of its own, not beside those of keys: registers.
    """
    shape, half = self.shape, self.shape.H // WARPGROUPS
    across = pl.ds(self.warpgroup * half, half)
    (of_q,) = gpu.products(
      (
        gpu.filled((self.tuning.queries, half)),
        held.T,
        self.memory['k'].at[tiles.zero(step), :, across],
      ),
      interpret=shape.interpret,
    )
    gpu.add(
      of_q * shape.scale,
      self.memory['d_q'].at[self.warpgroup],
      self.sum_q.at[at.row, self.rows(at.number, n), at.head * self.G + g, across],
      interpret=shape.interpret,
    )

  def write(self, sums, at: Tile, mine):
    """Of these keys and values; where all columns are, by way of the memory that they were in."""
    for of, target, name, scale in zip(sums, (self.d_k, self.d_v), 'kv', (self.shape.scale, 1.0)):
      if 'out' in self.memory:
        held = self.memory['out'][of.shape[1]].at[self.warpgroup]
      else:
        held = self.memory[name].at[0, mine]
      held[...] = (of * scale).astype(self.shape.dtype)
      plgpu.commit_smem()
      rows = tiles.rows_of(at.i, self.warpgroup, self.tuning.keys)
      plgpu.copy_smem_to_gmem(held, target.at[at.row, rows, at.head])
      plgpu.wait_smem_to_gmem(0)
    tiles.release(self.free, {'k': [0]})


def backward_keys(
  *refs, shape: TileShape, tuning: Tiling, shared: bool, columns: slice, wide: slice
):
  """The body of the kernel of keys' and values' gradients; refs: see BackwardKeys."""
  kernel = BackwardKeys(
    *refs,
    shape=shape,
    tuning=tuning,
    columns=columns,
    wide=wide,
    warpgroup=lax.axis_index('warpgroup'),
  )
  tiles.run(kernel, shared, shape.K)


def _columns(ref, which: slice):
  """Of a block in shared memory; all of them as it is, since a part of everything compiles to other
  addresses.
  """
  if which == slice(0, ref.shape[1]):
    return ref
  return ref.at[:, pl.ds(which.start, which.stop - which.start)]
