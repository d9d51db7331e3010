"""What do the warpgroups of a Hopper GPU compute while they attend? The body of kernels.flash_gpu's
forward kernel.

Two warpgroups compute, each a half of a tile of queries (kernels.flash_gpu_tiles has how tiles are
shared out and how operands come). They take turns: while one is at its softmax, which the matrix
unit has no part in, the other has products there.

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
from kernels.flash_gpu_tiles import (
  BLOCKS,
  COMPUTER,
  COUNT,
  LOG2E,
  NOTHING,
  WARPGROUPS,
  Tile,
  TileShape,
  Tiling,
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
  shape: TileShape
  tuning: Tiling
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


def forward(*refs, shape: TileShape, tuning: Tiling, shared: bool):
  """The body of the forward kernel; refs: see Forward. shared: rows of the batch have the same
  tiles.
  """
  kernel = Forward(*refs, shape=shape, tuning=tuning, warpgroup=lax.axis_index('warpgroup'))
  tiles.run(kernel, shared, shape.N)
