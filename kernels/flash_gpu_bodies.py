"""What do the warpgroups of a Hopper GPU do while they attend? The bodies of kernels.flash_gpu's kernels.

FlashAttention-3 (Shah et al., arXiv:2407.08608): one warpgroup loads by TMA, two take turns at products and softmax. Thread blocks stay:
each takes tiles, the longest first, and of a tile the blocks that are seen whole come before those that are masked.

Scores are in powers of two. B batch · T query length · S key length · N query heads · K key/value heads · H head width
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic_gpu_compat as gpu

HIDDEN, NOTHING = (
  -3e38,
  -1e38,
)  # a score that is not seen; the greatest score of none, so that exp2(HIDDEN - NOTHING) is 0
LOG2E = math.log2(math.e)
FULLS, COUNT, BLOCKS = range(3)  # columns of a plan's steps
WARPGROUPS = 2  # that compute; one more loads


@dataclasses.dataclass(frozen=True)
class Tuning:
  """Sizes of a kernel.

  Attributes:
    queries, keys: of a block; of those that a tile holds still, what one warpgroup has. stages: blocks in flight.
  """

  queries: int
  keys: int
  stages: int


@dataclasses.dataclass(frozen=True)
class Shape:
  """What a kernel knows of its problem: sizes, of heads as padded, and what the mask consists of."""

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
    bent = jnp.tanh(products * (self.scale / self.softcap))
    return bent * (self.softcap * LOG2E), bent

  def mask(self, scores, ids, row, queries, keys, of_queries: int):
    """Scores as they are seen, of queries from `queries` on, along axis `of_queries`, and of keys from `keys` on, along the other."""
    starts = {of_queries: queries, 1 - of_queries: keys}

    def index(axis):
      numbers = plgpu.broadcasted_iota(
        jnp.int32, scores.shape[axis : axis + 1], 0, layout=gpu.LAYOUTS[axis]
      )
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
      return jnp.where(
        relation(q, k), scores, HIDDEN
      )  # one after another: a block of bools would fill the registers

    if self.ragged:
      seen = lax.broadcast_in_dim(index(1 - of_queries), scores.shape, [1 - of_queries]) < self.S
      scores = jnp.where(seen, scores, HIDDEN)
    if self.causal or self.window:
      position = index if self.by_index else functools.partial(given, 'positions')
      q, k = position(of_queries), position(1 - of_queries)
      if self.causal:
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


def _zero(step):
  """0 that is no constant for the compiler, which would keep addresses in registers from block to block."""
  return lax.min(step, 0)


def _each_tile(order, shape: Shape, shared: bool, heads: int, body, carry):
  """Runs body(tile of the plan, row, head, tile of the row, carry) for what this thread block takes of all tiles of all heads.

  Thread blocks take one after another, every other round backwards, so that all of them end together.
  """
  blocks, block = lax.axis_size('block'), lax.axis_index('block')
  tiles = order.shape[0]
  repeat = shape.B if shared else 1  # rows that have the same tiles
  rounds, rest = divmod(tiles * repeat * heads, blocks)

  def place(turn):
    return jnp.where(lax.rem(turn, 2) == 0, block, blocks - 1 - block)

  def one(turn, carry):
    number = turn * blocks + place(turn)
    tile, rest = order[lax.div(number, repeat * heads)], lax.rem(number, repeat * heads)
    of_row = tiles if shared else tiles // shape.B
    row = lax.div(rest, heads) if shared else lax.div(tile, of_row)
    return body(tile, row, lax.rem(rest, heads), lax.rem(tile, of_row), carry)

  last = (place(jnp.int32(rounds)) < rest).astype(jnp.int32)
  none = lax.max(
    ~order[0], 0
  )  # 0: a loop that the compiler knows to run but once is taken apart, and registers are spilled
  return lax.fori_loop(0, rounds + last + none, one, carry)


def _load(each_tile, steps, stages: int, memory, ready, free, held, streamed, passes: int = 1):
  """The work of the warpgroup that loads.

  What comes together has one barrier, by the name of its first part. held: (row, head, tile of the row) -> (slot, {name: source}) of what
  a tile holds still. streamed: (tile, row, head, n) -> {name: source}s of the n-th block of it; a tile has steps[tile, COUNT] blocks in
  each of `passes`.
  """
  plgpu.set_max_registers(24, action='decrease')

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

    step = load(0, step)  # before what waits for the end of the tile before
    for part in held(row, head, i):
      copy(*part)
    return lax.fori_loop(1, steps[tile, COUNT] * passes, load, step)

  each_tile(tile, 0)
  for barrier in free.values():
    for slot in range(barrier.shape[0]):
      plgpu.barrier_wait(barrier.at[slot])


def _keys(k, v, steps, bk: int, shape: Shape):
  """What is streamed where a tile is of queries."""

  def streamed(tile, row, head, n):
    part = row, pl.ds(steps[tile, BLOCKS + n] * bk, bk), lax.div(head, shape.N // shape.K)
    return {'k': k.at[part]}, {'v': v.at[part]}

  return streamed


def _release(free, slots):
  """Says of memory that nobody reads it any more. slots: name -> slots."""
  for name, which in slots.items():
    for slot in which:
      plgpu.barrier_arrive(free[name].at[slot])


def _meet(barrier):
  plgpu.barrier_arrive(barrier)
  plgpu.barrier_wait(barrier)


def forward(
  q,
  k,
  v,
  ids,
  sinks,
  order,
  steps,
  out,
  lse,
  memory,
  ready,
  free,
  turn,
  *,
  shape: Shape,
  tuning: Tuning,
  shared: bool,
):
  bq, bk, stages = tuning.queries, tuning.keys, tuning.stages
  warpgroup = lax.axis_index('warpgroup')
  each_tile = functools.partial(_each_tile, order, shape, shared, shape.N)

  def rows_of(i, group):
    return pl.ds((i * WARPGROUPS + group) * bq, bq)

  @pl.when(warpgroup == WARPGROUPS)
  def _():
    def held(row, head, i):
      return [(group, {'q': q.at[row, rows_of(i, group), head]}) for group in range(WARPGROUPS)]

    _load(each_tile, steps, stages, memory, ready, free, held, _keys(k, v, steps, bk, shape))

  @pl.when(warpgroup < WARPGROUPS)
  def _():
    plgpu.set_max_registers(240, action='increase')
    _release(free, {'k': range(stages), 'v': range(stages), 'q': [warpgroup]})
    pl.when(warpgroup == 1)(
      lambda: _meet(turn)
    )  # from here on one computes products while the other is at its softmax

    def tile(tile, row, head, i, first):
      out_rows = rows_of(i, warpgroup)
      plgpu.barrier_wait(ready['q'].at[warpgroup])

      def block(n, carry, masked):
        acc, top, total = carry
        slot, size = lax.rem(first + n, stages), (bq, bk)
        plgpu.barrier_wait(ready['k'].at[slot])
        queries = memory['q'].at[warpgroup + _zero(first + n)]
        (scores,) = gpu.products(
          (gpu.filled(size), queries, memory['k'].at[slot].T),
          interpret=shape.interpret,
          meanwhile=lambda: _meet(turn),
        )
        plgpu.barrier_arrive(free['k'].at[slot])
        factor = shape.factor
        if masked or shape.softcap or factor <= 0:
          scores, factor = shape.scores(scores)[0], 1.0
        if masked:
          scores = shape.mask(scores, ids, row, out_rows.start, steps[tile, BLOCKS + n] * bk, 0)
        now = jnp.maximum(top, scores.max(axis=1) * factor)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(now, size, [0]))
        shrink = jnp.exp2(top - now)
        total = total * shrink + weights.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        narrow = weights.astype(shape.dtype)
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(ready['v'].at[slot])
        plgpu.barrier_wait(turn)
        (acc,) = gpu.products((acc, narrow, memory['v'].at[slot]), interpret=shape.interpret)
        plgpu.barrier_arrive(free['v'].at[slot])
        return acc, now, total

      sink = NOTHING if sinks is None else jnp.maximum(sinks[head], NOTHING)

      def per_query(value):
        return gpu.filled((bq,), gpu.ROWS, value)

      carry = (
        gpu.filled((bq, shape.Hv)),
        per_query(sink),
        per_query(0.0 if sinks is None else jnp.where(sink > NOTHING, 1.0, 0.0)),
      )
      carry = lax.fori_loop(0, steps[tile, FULLS], functools.partial(block, masked=False), carry)
      acc, top, total = lax.fori_loop(
        steps[tile, FULLS], steps[tile, COUNT], functools.partial(block, masked=True), carry
      )

      some = total > 0
      acc = acc * lax.broadcast_in_dim(1 / jnp.where(some, total, 1.0), acc.shape, [0])
      mixed, logs = (
        memory['out' if 'out' in memory else 'q'].at[warpgroup],
        memory['lse'].at[warpgroup],
      )
      mixed[...] = acc.astype(shape.dtype)
      logs[...] = jnp.where(some, top / LOG2E + jnp.log(total), -jnp.inf)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(mixed, out.at[row, out_rows, head])
      plgpu.copy_smem_to_gmem(logs, lse.at[row, head, out_rows])
      plgpu.wait_smem_to_gmem(0)
      plgpu.barrier_arrive(free['q'].at[warpgroup])
      return first + steps[tile, COUNT]

    each_tile(tile, 0)
    pl.when(warpgroup == 0)(lambda: _meet(turn))


def _queries(row, rows, head, q, d_out, lse, delta):
  vectors, numbers = (row, rows, head), (row, head, rows)
  return {
    'q': q.at[vectors],
    'd_out': d_out.at[vectors],
    'lse': lse.at[numbers],
    'delta': delta.at[numbers],
  }


def backward_queries(
  q,
  k,
  v,
  lse,
  delta,
  d_out,
  ids,
  order,
  steps,
  d_q,
  memory,
  ready,
  free,
  *,
  shape: Shape,
  tuning: Tuning,
  shared: bool,
):
  """The gradient of queries; a tile is of queries, as forward."""
  bq, bk, stages = tuning.queries, tuning.keys, tuning.stages
  warpgroup = lax.axis_index('warpgroup')
  each_tile = functools.partial(_each_tile, order, shape, shared, shape.N)

  def rows_of(i, group):
    return pl.ds((i * WARPGROUPS + group) * bq, bq)

  @pl.when(warpgroup == WARPGROUPS)
  def _():
    def held(row, head, i):
      return [
        (group, _queries(row, rows_of(i, group), head, q, d_out, lse, delta))
        for group in range(WARPGROUPS)
      ]

    _load(each_tile, steps, stages, memory, ready, free, held, _keys(k, v, steps, bk, shape))

  @pl.when(warpgroup < WARPGROUPS)
  def _():
    plgpu.set_max_registers(240, action='increase')
    _release(free, {'k': range(stages), 'v': range(stages), 'q': [warpgroup]})

    def tile(tile, row, head, i, first):
      rows, size = rows_of(i, warpgroup), (bq, bk)
      plgpu.barrier_wait(ready['q'].at[warpgroup])

      def of(name, size):
        return lax.broadcast_in_dim(gpu.load(memory[name].at[warpgroup], gpu.ROWS), size, [0])

      def block(n, acc, masked):
        slot = lax.rem(first + n, stages)
        plgpu.barrier_wait(ready['k'].at[slot])
        plgpu.barrier_wait(ready['v'].at[slot])
        queries, d_outs = (memory[name].at[warpgroup + _zero(first + n)] for name in ('q', 'd_out'))
        scores, d_weights = gpu.products(
          (gpu.filled(size), queries, memory['k'].at[slot].T),
          (gpu.filled(size), d_outs, memory['v'].at[slot].T),
          interpret=shape.interpret,
        )
        plgpu.barrier_arrive(free['v'].at[slot])

        def mask(x):
          return (
            shape.mask(x, ids, row, rows.start, steps[tile, BLOCKS + n] * bk, 0) if masked else x
          )

        powers, bent = shape.scores(scores)
        weights = jnp.exp2(mask(powers) - of('lse', size))
        d_scores = weights * (d_weights - of('delta', size))
        d_scores = (d_scores if bent is None else d_scores * (1 - bent * bent)).astype(shape.dtype)
        (acc,) = gpu.products((acc, d_scores, memory['k'].at[slot]), interpret=shape.interpret)
        plgpu.barrier_arrive(free['k'].at[slot])
        return acc

      acc = lax.fori_loop(
        0, steps[tile, FULLS], functools.partial(block, masked=False), gpu.filled((bq, shape.H))
      )
      acc = lax.fori_loop(
        steps[tile, FULLS], steps[tile, COUNT], functools.partial(block, masked=True), acc
      )
      memory['q'].at[warpgroup][...] = (acc * shape.scale).astype(shape.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(memory['q'].at[warpgroup], d_q.at[row, rows, head])
      plgpu.wait_smem_to_gmem(0)
      _release(free, {'q': [warpgroup]})
      return first + steps[tile, COUNT]

    each_tile(tile, 0)


def backward_keys(
  q,
  k,
  v,
  lse,
  delta,
  d_out,
  ids,
  order,
  steps,
  sum_q,
  d_k,
  d_v,
  memory,
  ready,
  free,
  both,
  *,
  shape: Shape,
  tuning: Tuning,
  shared: bool,
  columns: slice,
  wide: slice,
):
  """The gradients of keys and values, of some columns, and where there is sum_q the gradient of queries, added up there.

  A tile is of keys, half of them of each warpgroup, and goes through the queries of all heads that share them. Scores are [keys, queries].
  """
  bq, bk, stages, G = tuning.queries, tuning.keys, tuning.stages, shape.N // shape.K
  warpgroup = lax.axis_index('warpgroup')
  each_tile = functools.partial(_each_tile, order, shape, shared, shape.K)

  def rows_of(tile, n):
    return pl.ds(steps[tile, BLOCKS + n] * bq, bq)

  def part(ref, which):
    return (
      ref
      if which == slice(0, ref.shape[1])
      else ref.at[:, pl.ds(which.start, which.stop - which.start)]
    )

  @pl.when(warpgroup == WARPGROUPS)
  def _():
    def held(row, head, j):
      part = row, pl.ds(j * WARPGROUPS * bk, WARPGROUPS * bk), head
      return [(0, {'k': k.at[part], 'v': v.at[part]})]

    def streamed(tile, row, head, n):
      of, rows = (
        head * G + lax.div(n, steps[tile, COUNT]),
        rows_of(tile, lax.rem(n, steps[tile, COUNT])),
      )
      return [_queries(row, rows, of, q, d_out, lse, delta)]

    _load(each_tile, steps, stages, memory, ready, free, held, streamed, G)

  @pl.when(warpgroup < WARPGROUPS)
  def _():
    plgpu.set_max_registers(240, action='increase')
    _release(free, {'k': [0], 'q': range(stages)})

    def tile(tile, row, head, j, first):
      mine = pl.ds(warpgroup * bk, bk)
      size = bk, bq
      plgpu.barrier_wait(ready['k'].at[0])

      def block(n, carry, g, masked):
        of_k, of_v = carry
        step = first + g * steps[tile, COUNT] + n
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(ready['q'].at[slot])
        keys, values = memory['k'].at[_zero(step), mine], memory['v'].at[_zero(step), mine]
        queries, d_outs = memory['q'].at[slot], memory['d_out'].at[slot]

        # Registers are short: numbers of queries are where sums start, [bk, bq], so that they need none of their own.
        def minus(name, share):
          return lax.broadcast_in_dim(
            gpu.load(memory[name].at[slot], gpu.COLUMNS) * -share, size, [1]
          )

        begun = not shape.softcap and shape.factor > 0
        crowded = shape.softcap or masked and (ids or shape.ragged)
        of_scores = minus('lse', 1 / shape.factor) if begun else gpu.filled(size), keys, queries.T

        def of_weights():
          return (minus('delta', 1.0), values, d_outs.T)

        scores, *d_weights = gpu.products(
          of_scores, *[] if crowded else [of_weights()], interpret=shape.interpret
        )
        powers, bent = shape.scores(scores)
        if masked:
          powers = shape.mask(
            powers, ids, row, steps[tile, BLOCKS + n] * bq, j * WARPGROUPS * bk + mine.start, 1
          )
        weights = jnp.exp2(powers if begun else powers + minus('lse', 1.0))
        slopes = weights if bent is None else weights * (1 - bent * bent)
        weights = weights.astype(shape.dtype)
        for_v, for_k = (
          (of_v, weights, part(d_outs, wide)),
          lambda: (of_k, d_scores, part(queries, columns)),
        )
        if crowded:  # one after another, so that each begins with the registers of the one before
          (of_v,) = gpu.products(for_v, interpret=shape.interpret)
          d_weights = gpu.products(of_weights(), interpret=shape.interpret)
        d_scores = (slopes * d_weights[0]).astype(shape.dtype)
        if sum_q is not None:
          held, half = memory['d_scores'].at[lax.rem(step, 2)], shape.H // WARPGROUPS
          held.at[mine][...] = d_scores
          plgpu.commit_smem()
          _meet(both)
        if crowded:
          (of_k,) = gpu.products(for_k(), interpret=shape.interpret)
        else:
          of_v, of_k = gpu.products(for_v, for_k(), interpret=shape.interpret)
        _release(free, {'q': [slot]})
        if sum_q is not None:  # not with the products before: registers
          across = pl.ds(warpgroup * half, half)
          (of_q,) = gpu.products(
            (gpu.filled((bq, half)), held.T, memory['k'].at[_zero(step), :, across]),
            interpret=shape.interpret,
          )
          gpu.add(
            of_q * shape.scale,
            memory['d_q'].at[warpgroup],
            sum_q.at[row, rows_of(tile, n), head * G + g, across],
            interpret=shape.interpret,
          )
        return of_k, of_v

      def one_head(g, carry):
        carry = lax.fori_loop(
          0, steps[tile, FULLS], functools.partial(block, g=g, masked=False), carry
        )
        return lax.fori_loop(
          steps[tile, FULLS], steps[tile, COUNT], functools.partial(block, g=g, masked=True), carry
        )

      def width(which):
        return which.stop - which.start

      heads = G + lax.max(~order[0], 0)  # G, but not for the compiler: see _each_tile
      sums = lax.fori_loop(
        0, heads, one_head, (gpu.filled((bk, width(columns))), gpu.filled((bk, width(wide))))
      )
      if sum_q is not None:
        _meet(both)  # the other's last product has read these keys
      for of, target, name, scale in zip(sums, (d_k, d_v), 'kv', (shape.scale, 1.0)):
        held = (
          memory['out'][of.shape[1]].at[warpgroup] if 'out' in memory else memory[name].at[0, mine]
        )
        held[...] = (of * scale).astype(shape.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          held, target.at[row, pl.ds((j * WARPGROUPS + warpgroup) * bk, bk), head]
        )
        plgpu.wait_smem_to_gmem(0)
      _release(free, {'k': [0]})
      return first + steps[tile, COUNT] * G

    each_tile(tile, 0)
    if sum_q is not None:
      plgpu.wait_smem_to_gmem(0)
