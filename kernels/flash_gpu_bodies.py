"""What do the warpgroups of a Hopper GPU compute while they attend? The bodies of
kernels.flash_gpu's kernels.

Two warpgroups compute, each a half of a tile (kernels.flash_gpu_tiles has how tiles are shared out
and how operands come). Registers are what is short: most of the order in here is so that no more is
alive at once than 240 of a thread hold, without a spill.

Scores are in powers of two. B batch · T query length · S key length · N query heads · K key/value
heads · H head width
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import flash_gpu_tiles as tiles, mosaic_gpu_compat as gpu
from kernels.flash_gpu_tiles import (
  BLOCKS,
  COMPUTER,
  COUNT,
  LOG2E,
  NOTHING,
  WARPGROUPS,
  Shape,
  Tile,
  Tuning,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
  """The forward kernel's refs, as a warpgroup has them, and what it does with them.

  q, out [B, T, N, H], k, v [B, S, K, H], lse [B, N, T], sinks [N] or None: in main memory. order,
  steps: see kernels.flash_gpu.plan. memory, ready, free: of stages, by name. turn: where the two
  warpgroups pass each other the matrix unit.
  """

  q: Any
  k: Any
  v: Any
  ids: Any
  sinks: Any
  order: Any
  steps: Any
  out: Any
  lse: Any
  memory: Any
  ready: Any
  free: Any
  turn: Any
  shape: Shape
  tuning: Tuning
  warpgroup: Any

  def load(self, each_tile):
    bq = self.tuning.queries

    def held(row, head, i):
      return [
        (group, {'q': self.q.at[row, tiles.rows_of(i, group, bq), head]})
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
    # The second waits for the first's first product: from here on one computes products while the
    # other is at its softmax.
    pl.when(self.warpgroup == 1)(lambda: tiles.meet(self.turn))
    each_tile(self.tile, 0)
    # The first arrives for the second's last turn.
    pl.when(self.warpgroup == 0)(lambda: tiles.meet(self.turn))

  def tile(self, tile, row, head, i, first):
    """A tile's queries against all its blocks of keys; `first`: blocks before it, by which a stage
    is told.
    """
    rows = tiles.rows_of(i, self.warpgroup, self.tuning.queries)
    plgpu.barrier_wait(self.ready['q'].at[self.warpgroup])
    sinks = self.sinks
    sink = NOTHING if sinks is None else jnp.maximum(sinks[head], NOTHING)

    def per_query(value):
      return gpu.filled((self.tuning.queries,), gpu.ROWS, value)

    # A sink is a weight of 1 beside its own top, and carries no value.
    begun = (
      gpu.filled((self.tuning.queries, self.shape.Hv)),
      per_query(sink),
      per_query(0.0 if sinks is None else jnp.where(sink > NOTHING, 1.0, 0.0)),
    )
    block = functools.partial(self.block, at=Tile(tile, row, head, i, first), rows=rows)
    acc, top, total = tiles.whole_then_masked(self.steps, tile, block, begun)
    self.write(acc, top, total, row, rows, head)
    return first + self.steps[tile, COUNT]

  def block(self, n, carry, at: Tile, rows, masked: bool):
    """A step of the online softmax: acc, the mixed values, and total, the sum of weights, both
    relative to 2 ** top.
    """
    acc, top, total = carry
    shape, memory, size = self.shape, self.memory, (self.tuning.queries, self.tuning.keys)
    slot = lax.rem(at.first + n, self.tuning.stages)
    plgpu.barrier_wait(self.ready['k'].at[slot])
    queries = memory['q'].at[self.warpgroup + tiles.zero(at.first + n)]
    # While these products run the other warpgroup is let go to its softmax.
    (scores,) = gpu.products(
      (gpu.filled(size), queries, memory['k'].at[slot].T),
      interpret=shape.interpret,
      meanwhile=lambda: tiles.meet(self.turn),
    )
    plgpu.barrier_arrive(self.free['k'].at[slot])

    # Where nothing lies between, the factor is left to one multiply-add with the top; what is
    # hidden must be hidden before that, and the greatest product is the greatest score only of a
    # factor that is positive.
    factor = shape.factor
    if masked or shape.softcap or factor <= 0:
      scores, factor = shape.scores(scores)[0], 1.0
    if masked:
      start = self.steps[at.number, BLOCKS + n] * self.tuning.keys
      scores = shape.mask(scores, self.ids, at.row, rows.start, start, 0)
    now = jnp.maximum(top, scores.max(axis=1) * factor)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(now, size, [0]))
    # What was summed relative to the top before is brought to the one of now.
    shrink = jnp.exp2(top - now)
    total = total * shrink + weights.sum(axis=1)
    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
    narrow = weights.astype(shape.dtype)

    # The softmax is done: the other may leave its products for its own, and the values' product
    # waits for the turn.
    plgpu.barrier_arrive(self.turn)
    plgpu.barrier_wait(self.ready['v'].at[slot])
    plgpu.barrier_wait(self.turn)
    (acc,) = gpu.products((acc, narrow, memory['v'].at[slot]), interpret=shape.interpret)
    plgpu.barrier_arrive(self.free['v'].at[slot])
    return acc, now, total

  def write(self, acc, top, total, row, rows, head):
    """Of queries that saw nothing zeros, and -inf."""
    memory, some = self.memory, total > 0
    acc = acc * lax.broadcast_in_dim(1 / jnp.where(some, total, 1.0), acc.shape, [0])
    # By way of shared memory; where values are as wide as keys, where the queries were, which
    # nobody reads any more.
    mixed = memory['out' if 'out' in memory else 'q'].at[self.warpgroup]
    logs = memory['lse'].at[self.warpgroup]
    mixed[...] = acc.astype(self.shape.dtype)
    logs[...] = jnp.where(some, top / LOG2E + jnp.log(total), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(mixed, self.out.at[row, rows, head])
    plgpu.copy_smem_to_gmem(logs, self.lse.at[row, head, rows])
    # Before the loader is told that it may write there.
    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(self.free['q'].at[self.warpgroup])


def forward(*refs, shape: Shape, tuning: Tuning, shared: bool):
  """The body of the forward kernel; refs: see Forward. shared: rows of the batch have the same
  tiles.
  """
  kernel = Forward(*refs, shape=shape, tuning=tuning, warpgroup=lax.axis_index('warpgroup'))
  _run(kernel, shared, shape.N)


def _run(kernel, shared: bool, heads: int):
  """One warpgroup loads, the others compute; each goes through the same tiles."""
  each_tile = functools.partial(tiles.each_tile, kernel.order, kernel.shape, shared, heads)
  pl.when(kernel.warpgroup == WARPGROUPS)(lambda: kernel.load(each_tile))
  pl.when(kernel.warpgroup < WARPGROUPS)(lambda: kernel.compute(each_tile))


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
  shape: Shape
  tuning: Tuning
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
    """acc, the gradient of queries, with what a block of keys adds (FlashAttention-2, algorithm 2)."""
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


def backward_queries(*refs, shape: Shape, tuning: Tuning, shared: bool):
  """The body of the kernel of queries' gradients; refs: see BackwardQueries."""
  kernel = BackwardQueries(*refs, shape=shape, tuning=tuning, warpgroup=lax.axis_index('warpgroup'))
  _run(kernel, shared, shape.N)


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
  shape: Shape
  tuning: Tuning
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


def backward_keys(*refs, shape: Shape, tuning: Tuning, shared: bool, columns: slice, wide: slice):
  """The body of the kernel of keys' and values' gradients; refs: see BackwardKeys."""
  kernel = BackwardKeys(
    *refs,
    shape=shape,
    tuning=tuning,
    columns=columns,
    wide=wide,
    warpgroup=lax.axis_index('warpgroup'),
  )
  _run(kernel, shared, shape.K)


def _columns(ref, which: slice):
  """Of a block in shared memory; all of them as it is, since a part of everything compiles to other
  addresses.
  """
  if which == slice(0, ref.shape[1]):
    return ref
  return ref.at[:, pl.ds(which.start, which.stop - which.start)]
