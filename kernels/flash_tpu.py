"""How does a TPU attend without writing scores to memory? Pallas kernels, forward and backward, over the blocks that a mask leaves.

FlashAttention-2 (Dao, arXiv:2307.08691), with its backward pass in one kernel. A grid step is a block of queries, those of all heads
that share a key stacked, against a block of keys; blocks that the mask rules out are no steps at all, and those it leaves whole are not
masked. All keys of a block of queries follow one another, forward and backward: the gradient of the queries is summed where the output
is, and those of all keys of a head wait in VMEM.

Scores are in powers of two: queries are scaled by log2(e) before. B batch · T query length · S key length · N query heads · K key/value
heads · G query heads of a step · H head width · R = G x block of queries
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import tuning
from kernels.blocks import LARGEST, Blocks
from kernels.mask import FULL, SKIP, Mask
from kernels.scoring import Scoring
from parallel import mesh as meshes

LANES = 128  # of a register
HIDDEN, NOTHING = (
  -3e38,
  -1e38,
)  # a score that is not seen; the greatest score of none, so that exp2(HIDDEN - NOTHING) is 0
LOG2E = math.log2(math.e)
FIRST, LAST, FIRST_OF_ROW, LAST_OF_ROW, MASKED = (1 << bit for bit in range(5))  # flags of a step
FLAGS = 5


def _tuning(direction: str, width: int) -> tuning.Tuning:
  """Of the chip that is compiled for. One that is not in the table, and what is no TPU, takes v5e's; heads past 256 take those of 256."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = device.device_kind if device is not None and meshes.platform() == 'tpu' else ''
  if not kind and jax.default_backend() == 'tpu':
    kind = jax.devices()[0].device_kind
  return tuning.lookup(kind if kind in tuning.VMEM else 'TPU v5 lite', direction, min(width, 256))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of a grid, in order: all keys of a block of queries, all blocks of a row, all rows.

  Attributes:
    queries: [n] int32, row x blocks of a row + block of queries. keys: [n] int32, block of keys << FLAGS | flags.
    count: how many of the n are steps; an int, or [] int32 where arrays decide.
  """

  queries: Any
  keys: Any
  count: Any


def _steps(kinds, B: int) -> Steps:
  """The steps for kinds of blocks as Mask.blocks gives them. A block of queries that sees no keys still has one step, to write zeros."""
  static = isinstance(kinds, np.ndarray)
  xp = np if static else jnp
  kinds = xp.broadcast_to(kinds, (B, *kinds.shape[1:]))
  _, nq, nk = kinds.shape
  blind = (kinds == SKIP).all(2, keepdims=True) & (xp.arange(nk) == 0)[None, None]
  active = ((kinds != SKIP) | blind).reshape(-1)
  order = xp.argsort(~active, kind='stable') if static else jnp.argsort(~active, stable=True)
  count = int(active.sum()) if static else active.sum(dtype=jnp.int32)
  if static:
    order = order[:count]
  queries, rows = order // nk, order // (nk * nq)
  here = xp.arange(order.size)

  def turns(x):
    return xp.concatenate([xp.ones(1, bool), x[1:] != x[:-1]])

  def ends(first):
    return xp.concatenate([first[1:], xp.ones(1, bool)]) | (here == count - 1)

  first, first_of_row = turns(queries), turns(rows)
  flags = (
    first * FIRST
    + ends(first) * LAST
    + first_of_row * FIRST_OF_ROW
    + ends(first_of_row) * LAST_OF_ROW
    + (kinds.reshape(-1)[order] != FULL) * MASKED
  )
  return Steps(queries.astype(np.int32), ((order % nk) << FLAGS | flags).astype(np.int32), count)


@dataclasses.dataclass(frozen=True)
class Shape:
  """What a kernel knows of its problem: sizes as padded, real lengths, and what the mask consists of."""

  B: int
  N: int
  K: int
  G: int
  T: int
  S: int
  bq: int
  bk: int
  queries: int  # that are real
  keys: int
  causal: bool
  window: int
  by_index: bool
  segments: bool
  prefix: bool
  softcap: float
  tuning: tuning.Tuning
  precision: Any
  chosen: bool  # is the step that of a config, and not the table's?

  @property
  def nq(self) -> int:
    return self.T // self.bq

  @property
  def positioned(self) -> bool:
    return self.causal or self.window > 0

  @property
  def R(self) -> int:
    return self.G * self.bq

  @property
  def chunk(self) -> int:
    return min(self.tuning.chunk, self.bq)

  def seen(self, ids, i, j, row, rows: int, transposed: bool):
    """[rows, bk] (or its transpose) bool of a chunk of `rows` queries from `row` on of block i, against block j of keys.

    ids: refs of the positions and segments of queries and keys, and of prefixes, as far as there are any.
    """
    at = row % self.bq
    shape = (self.bk, rows) if transposed else (rows, self.bk)
    queries, keys = (1, 0) if transposed else (0, 1)

    # Compact until compared: along the first dimension [n, LANES], the same in all lanes, along the second [1, n].
    def given(name, axis):
      part = slice(at, at + rows) if axis == queries else slice(None)
      return ids[name][0, part] if axis == 0 else ids[name][0, :, part]

    def index(axis):
      return jax.lax.broadcasted_iota(
        jnp.int32, (shape[0], LANES) if axis == 0 else (1, shape[1]), axis
      )

    def compare(relation, q, k):
      def spread(x, axis):
        return _over_lanes(x, shape[1]) if axis == 0 else jnp.broadcast_to(x, shape)

      return relation(spread(q, queries), spread(k, keys))

    allowed = []
    if self.positioned:
      if self.by_index:  # both from the block of keys' first
        offset = j * self.bk
        q, k = index(queries) + (i * self.bq + at - offset), index(keys)
      else:
        offset = 0
        q, k = given('query_positions', queries), given('key_positions', keys)
      if self.causal:
        seen = compare(jnp.greater_equal, q, k)
        if self.prefix:
          seen |= compare(jnp.greater, jnp.full_like(q, ids['prefix'] - offset), k)
        allowed.append(seen)
      if self.window:
        allowed.append(compare(jnp.less, q - self.window, k))
        if not self.causal:
          allowed.append(compare(jnp.greater, q + self.window, k))
    if self.segments:
      allowed.append(
        compare(jnp.equal, given('query_segments', queries), given('key_segments', keys))
      )
    if self.keys != self.S:
      allowed.append(
        compare(jnp.greater, jnp.full_like(index(queries), self.keys - j * self.bk), index(keys))
      )
    return functools.reduce(jnp.logical_and, allowed) if allowed else jnp.ones(shape, bool)


def _over_lanes(x, n: int):
  """[rows, LANES], the same in all lanes, to [rows, n]."""
  return x[:, :n] if n <= LANES else jnp.concatenate([x] * -(-n // LANES), 1)[:, :n]


def _by_lane(x):
  """[rows, n] to [rows, LANES], sums of which are those of the rows."""
  return functools.reduce(
    jnp.add, (x[:, start : start + LANES] for start in range(0, x.shape[1], LANES))
  )


def _div(x, n: int):
  return jax.lax.div(x, np.int32(n))  # as x is, even where jax counts in 64 bits


def _rem(x, n: int):
  return jax.lax.rem(x, np.int32(n))


def _dot(a, b, a_axis, b_axis, precision):
  return jax.lax.dot_general(
    a,
    b,
    (((a_axis,), (b_axis,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _named(refs, shape):
  """The refs of ids by name, in the order that _ids gives arrays in."""
  names = [
    name
    for name, is_there in (
      ('positions', shape.positioned and not shape.by_index),
      ('segments', shape.segments),
    )
    if is_there
  ]
  return dict(
    zip([f'{side}_{name}' for name in names for side in ('query', 'key')], refs, strict=True)
  )


def _forward(steps_q, steps_k, prefix, q, k, v, sinks, *refs, shape: Shape):
  *ids, out, lse, top, total, acc = refs
  step, G, bq, H, Hv = pl.program_id(1), shape.G, shape.bq, q.shape[-1], v.shape[-1]
  row, keys = steps_q[step], steps_k[step]
  b, i, j = _div(row, shape.nq), _rem(row, shape.nq), keys >> FLAGS
  ids = _named(ids, shape) | {'prefix': prefix[b]}
  filled = -(-Hv // LANES) * LANES
  ones = shape.tuning.ones
  # By ones a sum stands in every lane; else the lanes' own sums are added up at the end, so that a step moves nothing between lanes.
  whole_sum = (
    (lambda x: x) if ones else lambda x: jnp.broadcast_to(x.sum(1, keepdims=True), x.shape)
  )
  share = 1.0 if ones else 1.0 / LANES

  @pl.when(keys & FIRST != 0)
  def _():
    acc[...] = jnp.zeros_like(acc)
    for g in range(G):
      rows = slice(g * bq, (g + 1) * bq)
      sink = jnp.broadcast_to(sinks[0, g : g + 1], (bq, LANES))
      top[rows] = jnp.maximum(sink, NOTHING)
      total[rows] = jnp.where(sink > NOTHING, share, 0.0)

  def body(masked):
    queries = q[0, 0].reshape(shape.R, H)
    values = v[0, 0]
    if ones:
      values = jnp.concatenate(
        [
          values,
          *[jnp.zeros((shape.bk, filled - Hv), values.dtype)] * (filled > Hv),
          jnp.ones((shape.bk, LANES), values.dtype),
        ],
        1,
      )
    chunks = range(0, shape.R, shape.chunk)

    def scores_of(start):
      return _dot(queries[start : start + shape.chunk], k[0, 0], 1, 1, shape.precision)

    ahead = scores_of(0)
    for start in chunks:
      rows, scores = slice(start, start + shape.chunk), ahead
      if (
        start + shape.chunk < shape.R
      ):  # the matrix unit goes on with the next chunk's scores during this one's softmax
        ahead = scores_of(start + shape.chunk)
      if shape.softcap:
        scores = shape.softcap * LOG2E * jnp.tanh(scores / (shape.softcap * LOG2E))
      if masked:
        scores = jnp.where(shape.seen(ids, i, j, start, shape.chunk, False), scores, HIDDEN)
      before = top[rows]
      now = jnp.maximum(before, scores.max(1, keepdims=True))
      weights = jnp.exp2(scores - _over_lanes(now, shape.bk))
      shrink = jnp.exp2(before - now)
      mixed = _dot(weights.astype(values.dtype), values, 1, 0, shape.precision)
      total[rows] = total[rows] * shrink + (mixed[:, filled:] if ones else _by_lane(weights))
      acc[rows] = acc[rows] * _over_lanes(shrink, Hv) + mixed[:, :Hv]
      top[rows] = now

  pl.when(keys & MASKED != 0)(functools.partial(body, True))
  pl.when(keys & MASKED == 0)(functools.partial(body, False))

  @pl.when(keys & LAST != 0)
  def _():
    sums = whole_sum(total[...])
    mixed = acc[...] / _over_lanes(jnp.where(sums == 0, 1.0, sums), Hv)
    out[0, 0] = mixed.reshape(G, bq, Hv).astype(out.dtype)
    logs = jnp.where(sums == 0, -jnp.inf, (top[...] + jnp.log2(sums)) / LOG2E)
    for g in range(G):
      lse[0, 0, g : g + 1] = logs[g * bq : (g + 1) * bq].T[:1]


def _backward(
  steps_q, steps_k, prefix, q, k, v, lse, delta, d_out, *refs, shape: Shape, scale: float
):
  """Scores are transposed here, [keys, queries]: what belongs to a query is a row then, and only small operands are transposed.

  Gradients of queries are transposed, [H, R], until they are written: scores are what the matrix unit holds still then, and fill it.
  """
  *ids, d_q, d_k, d_v, sum_q, sum_k, sum_v = refs
  step, H, Hv = pl.program_id(1), q.shape[-1], v.shape[-1]
  row, keys = steps_q[step], steps_k[step]
  b, i, j = _div(row, shape.nq), _rem(row, shape.nq), keys >> FLAGS
  ids = _named(ids, shape) | {'prefix': prefix[b]}
  here = pl.ds(pl.multiple_of(j * shape.bk, shape.bk), shape.bk)

  @pl.when(keys & FIRST_OF_ROW != 0)
  def _():
    sum_k[...], sum_v[...] = jnp.zeros_like(sum_k), jnp.zeros_like(sum_v)

  @pl.when(keys & FIRST != 0)
  def _():
    sum_q[...] = jnp.zeros_like(sum_q)

  def body(masked):
    queries, d_outs = q[0, 0].reshape(shape.R, H), d_out[0, 0].reshape(shape.R, Hv)
    of_k, of_v = jnp.zeros((shape.bk, H), jnp.float32), jnp.zeros((shape.bk, Hv), jnp.float32)
    chunk = shape.chunk

    def start_of(start):
      return (
        _dot(k[0, 0], queries[start : start + chunk], 1, 1, shape.precision),
        _dot(v[0, 0], d_outs[start : start + chunk], 1, 1, shape.precision),
      )

    ahead = start_of(0)
    for start in range(0, shape.R, chunk):
      rows, (scores, d_weights) = slice(start, start + chunk), ahead
      if start + chunk < shape.R:
        ahead = start_of(start + chunk)
      g, at = start // shape.bq, slice(start % shape.bq, start % shape.bq + chunk)
      if shape.softcap:
        bent = jnp.tanh(scores / (shape.softcap * LOG2E))
        scores = shape.softcap * LOG2E * bent
      if masked:
        scores = jnp.where(shape.seen(ids, i, j, start, chunk, True), scores, HIDDEN)
      weights = jnp.exp2(scores - lse[0, 0, g : g + 1, at])
      d_scores = weights * (d_weights - delta[0, 0, g : g + 1, at])
      if shape.softcap:
        d_scores = d_scores * (1 - bent * bent)
      d_scores = d_scores.astype(queries.dtype)
      of_v += _dot(weights.astype(d_outs.dtype), d_outs[rows], 1, 0, shape.precision)
      of_k += _dot(d_scores, queries[rows], 1, 0, shape.precision)
      sum_q[:, rows] += _dot(k[0, 0], d_scores, 0, 0, shape.precision)
    sum_v[here] += of_v
    sum_k[here] += of_k

  pl.when(keys & MASKED != 0)(functools.partial(body, True))
  pl.when(keys & MASKED == 0)(functools.partial(body, False))

  @pl.when(keys & LAST != 0)
  def _():
    d_q[0, 0] = (sum_q[...].T * scale).reshape(d_q.shape[2:]).astype(d_q.dtype)

  @pl.when(keys & LAST_OF_ROW != 0)
  def _():
    d_k[0, 0], d_v[0, 0] = (sum_k[...] / LOG2E).astype(d_k.dtype), sum_v[...].astype(d_v.dtype)


def _ids(mask: Mask, shape: Shape, transposed: bool):
  """Arrays of positions and segments, and their blocks: those along the scores' second dimension [B, 1, n], the others in all lanes."""
  arrays, blocks = [], []
  pairs = []
  if shape.positioned and not shape.by_index:
    pairs.append(mask.positions(shape.queries, shape.keys))
  if shape.segments:
    pairs.append((mask.query_segments, mask.key_segments))
  for queries, keys in pairs:
    for x, length, block, of_queries in (
      (queries, shape.T, shape.bq, True),
      (keys, shape.S, shape.bk, False),
    ):
      x = jnp.broadcast_to(x, (shape.B, x.shape[1])).astype(jnp.int32)
      x = jnp.pad(x, ((0, 0), (0, length - x.shape[1])), mode='edge')
      place = _block_of_queries if of_queries else _block_of_keys
      if of_queries == transposed:
        arrays.append(x[:, None])
        blocks.append(
          pl.BlockSpec(
            (1, 1, block),
            lambda h, s, *refs, place=place: (_row(shape, s, *refs), 0, place(shape, s, *refs)),
          )
        )
      else:
        arrays.append(jnp.broadcast_to(x[..., None], (*x.shape, LANES)))
        blocks.append(
          pl.BlockSpec(
            (1, block, LANES),
            lambda h, s, *refs, place=place: (_row(shape, s, *refs), place(shape, s, *refs), 0),
          )
        )
  return arrays, blocks


def _row(shape, s, queries, keys, prefix):
  return _div(queries[s], shape.nq)


def _block_of_queries(shape, s, queries, keys, prefix):
  return _rem(queries[s], shape.nq)


def _block_of_keys(shape, s, queries, keys, prefix):
  return keys[s] >> FLAGS


def _step(q, v, direction: str, blocks: Blocks) -> tuning.Tuning:
  """Of the table, with the sizes that are chosen; what such a step takes is not known."""
  step, (rows, keys) = _tuning(direction, max(q.shape[3], v.shape[3])), blocks.of(direction)
  return (
    dataclasses.replace(step, rows=rows or step.rows, keys=keys or step.keys, whole=0, masked=0)
    if rows or keys
    else step
  )


def _fill(length: int) -> int:
  return -(-length // LANES) * LANES


def _sizes(length: int) -> list[int]:
  """Of the blocks that a row, filled up, can be cut into."""
  return [n for n in (LANES << bit for bit in range(4)) if _fill(length) % n == 0]


def _cut(
  T: int, S: int, share: int, step: tuning.Tuning, direction: str, blocks: Blocks
) -> tuple[int, int, int]:
  """Heads of a step, of the `share` that have one key, and its queries of one and keys. Raises ValueError where chosen ones do not fit."""
  rows, keys = blocks.of(direction)
  groups = [g for g in range(1, share + 1) if share % g == 0]

  def largest(length, most):
    return max(n for n in _sizes(length) if n <= most or n == LANES)

  if rows:
    able = {
      g * n: (g, n) for g in groups for n in _sizes(T) if g * n <= LARGEST
    }  # the most heads last
    if rows not in able:
      raise ValueError(
        f'model.attention_blocks.{direction}_queries={rows}, of {share} heads a key or fewer, make no whole blocks of a row '
        f'of {T} queries, filled up to {_fill(T)}; choose one of {sorted(able)}, or 0'
      )
    G, bq = able[rows]
  else:
    G = max(g for g in groups if g == 1 or g * LANES <= step.rows)
    bq = largest(T, step.rows // G)
  if keys and keys not in _sizes(S):
    raise ValueError(
      f'model.attention_blocks.{direction}_keys={keys} make no whole blocks of a row of {S} keys, filled up to {_fill(S)}; '
      f'choose one of {_sizes(S)}, or 0'
    )
  return G, bq, keys or largest(S, step.keys)


def _shape(q, k, v, scoring: Scoring, direction: str, blocks: Blocks = Blocks()) -> Shape:
  mask = scoring.mask
  (B, T, N, _), (S, K), step = q.shape, k.shape[1:3], _step(q, v, direction, blocks)
  G, bq, bk = _cut(T, S, N // K, step, direction, blocks)
  by_index = not mask.positioned or (mask.query_positions is None and (mask.zigzag == 1 or T != S))
  exact = q.dtype == jnp.float32 and jax.config.jax_default_matmul_precision in (
    'highest',
    'float32',
  )
  return Shape(
    B,
    N,
    K,
    G,
    _fill(T),
    _fill(S),
    bq,
    bk,
    T,
    S,
    mask.causal,
    mask.window,
    by_index,
    mask.query_segments is not None,
    mask.prefix is not None,
    scoring.softcap,
    step,
    jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
    any(blocks.of(direction)),
  )


def _expected(steps: Steps, mask: Mask, shape: Shape) -> int:
  """Steps that there are; where arrays decide, those without segments, and by positions half of a causal mask's blocks."""
  if isinstance(steps.count, int):
    return steps.count
  if mask.query_positions is None and mask.prefix is None:
    kinds = dataclasses.replace(mask, query_segments=None, key_segments=None).blocks(
      shape.queries, shape.keys, shape.bq, shape.bk
    )
    return shape.B * int((kinds != SKIP).sum())
  return -(
    -shape.B * shape.nq * (shape.S // shape.bk) // (2 if mask.causal and mask.prefix is None else 1)
  )


def _call(
  kernel,
  name: str,
  shape: Shape,
  mask: Mask,
  inputs,
  outputs,
  scratch,
  transposed: bool,
  flops: int,
  interpret,
):
  """Runs a kernel over the steps of a mask. Its name says which were chosen: of those analysis.roofline knows no time.

  inputs, outputs: (array, or its shape and dtype; which block of it a step sees) each. flops: of a pair of a query and a key.
  """
  kinds = mask.blocks(shape.queries, shape.keys, shape.bq, shape.bk)
  steps = _steps(kinds, shape.B)
  prefix = jnp.zeros(shape.B, jnp.int32) if mask.prefix is None else mask.prefix.astype(jnp.int32)
  arrays, blocks = _ids(mask, shape, transposed)
  pairs = _expected(steps, mask, shape) * shape.R * shape.bk
  heads = shape.N // shape.G
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x, _ in (*inputs, *outputs))
  return pl.pallas_call(
    functools.partial(kernel, shape=shape),
    name=f'{name}_{shape.R}x{shape.bk}' if shape.chosen else name,
    interpret=interpret,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(heads, steps.count),
      in_specs=[*(block for _, block in inputs), *blocks],
      out_specs=[block for _, block in outputs],
      scratch_shapes=scratch,
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
    cost_estimate=pl.CostEstimate(
      flops=pairs * heads * flops, transcendentals=pairs * heads, bytes_accessed=moved
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=shape.tuning.vmem * 7 // 8
    ),
  )(steps.queries, steps.keys, prefix, *(x for x, _ in inputs), *arrays)


def _blocks_of(shape: Shape):
  """Blocks of queries [B, N/G, G, T, H], of numbers of them [B, N/G, G, T], of keys [B, K, S, H], and of a head's sinks [N/G, G, LANES]."""
  row, of_q, of_k = (functools.partial(f, shape) for f in (_row, _block_of_queries, _block_of_keys))
  share = shape.N // shape.K // shape.G

  def queries(width):
    return pl.BlockSpec(
      (1, 1, shape.G, shape.bq, width), lambda h, s, *refs: (row(s, *refs), h, 0, of_q(s, *refs), 0)
    )

  numbers = pl.BlockSpec(
    (1, 1, shape.G, shape.bq), lambda h, s, *refs: (row(s, *refs), h, 0, of_q(s, *refs))
  )

  def keys(width):
    return pl.BlockSpec(
      (1, 1, shape.bk, width),
      lambda h, s, *refs: (row(s, *refs), _div(h, share), of_k(s, *refs), 0),
    )

  sinks = pl.BlockSpec((1, shape.G, LANES), lambda h, s, *refs: (h, 0, 0))
  return queries, numbers, keys, sinks


def _by_head(x, length: int, heads: tuple[int, ...]):
  """[B, T, N, H] to [B, *heads, length, H], filled up with zeros."""
  x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
  return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], *heads, length, x.shape[3])


def _by_token(x, length: int):
  """[B, heads.., T', H] to [B, length, N, H]."""
  return jnp.moveaxis(x.reshape(x.shape[0], -1, *x.shape[-2:]), 1, 2)[:, :length]


def _scaled(q, scale):
  return (q.astype(jnp.float32) * (scale * LOG2E)).astype(q.dtype)


def forward(q, k, v, scoring: Scoring, *, interpret, blocks: Blocks = Blocks()):
  """kernels.reference.attention of one device's arrays; not to be differentiated."""
  mask, sinks, scale = scoring.mask, scoring.sinks, scoring.scale
  shape = _shape(q, k, v, scoring, 'forward', blocks)
  queries, numbers, keys, of_sinks = _blocks_of(shape)
  H, Hv, G = q.shape[3], v.shape[3], shape.G
  groups = shape.N // G, G
  sinks = jnp.full(shape.N, -jnp.inf) if sinks is None else sinks.astype(jnp.float32) * LOG2E

  def result(dtype, *last):
    return jax.ShapeDtypeStruct((shape.B, *groups, shape.T, *last), dtype)

  def vmem(*sizes):
    return pltpu.VMEM(sizes, jnp.float32)

  out, lse = _call(
    _forward,
    'flash_forward',
    shape,
    mask,
    [
      (_by_head(_scaled(q, scale), shape.T, groups), queries(H)),
      (_by_head(k, shape.S, (shape.K,)), keys(H)),
      (_by_head(v, shape.S, (shape.K,)), keys(Hv)),
      (jnp.broadcast_to(sinks.reshape(*groups, 1), (*groups, LANES)), of_sinks),
    ],
    [(result(v.dtype, Hv), queries(Hv)), (result(jnp.float32), numbers)],
    [vmem(shape.R, LANES), vmem(shape.R, LANES), vmem(shape.R, Hv)],
    False,
    2 * (H + Hv),
    interpret,
  )
  return _by_token(out, shape.queries), _by_token(lse[..., None], shape.queries)[..., 0]


def backward(
  q,
  k,
  v,
  scoring: Scoring,
  lse,
  delta,
  d_out,
  *,
  interpret,
  dtype=jnp.float32,
  blocks: Blocks = Blocks(),
):
  """kernels.reference.backward of one device's arrays: gradients of q, k and v, in `dtype` (default: theirs where it is None).

  Keys that do not fit VMEM at once go through one after another, with the sum of the queries' gradients in f32.
  """
  step, S, H = _step(q, v, 'backward', blocks), k.shape[1], q.shape[3] + v.shape[3]

  # Half of VMEM for a key's sums in f32, and its two buffers of what is written.
  def room(dtype):
    return max(
      step.keys,
      step.vmem // 2 // ((4 + 2 * jnp.dtype(dtype).itemsize) * H) // step.keys * step.keys,
    )

  if S <= room(dtype or q.dtype):
    return _backward_of(q, k, v, scoring, lse, delta, d_out, interpret, dtype, blocks)
  most = room(jnp.float32)
  d_q, parts = 0.0, []
  for start in range(0, S, most):
    part = slice(start, min(S, start + most))
    more, *of_keys = _backward_of(
      q,
      k[:, part],
      v[:, part],
      dataclasses.replace(scoring, mask=scoring.mask.block(slice(0, q.shape[1]), part)),
      lse,
      delta,
      d_out,
      interpret,
      jnp.float32,
      blocks,
    )
    d_q += more
    parts.append(of_keys)
  return tuple(
    x.astype(dtype or like.dtype)
    for x, like in zip((d_q, *(jnp.concatenate(x, 1) for x in zip(*parts))), (q, k, v))
  )


def _backward_of(q, k, v, scoring, lse, delta, d_out, interpret, dtype, blocks):
  mask, scale = scoring.mask, scoring.scale
  shape = _shape(q, k, v, scoring, 'backward', blocks)
  queries, numbers, keys, _ = _blocks_of(shape)
  H, Hv, G = q.shape[3], v.shape[3], shape.G
  groups = shape.N // G, G

  def whole(width):
    return pl.BlockSpec(
      (1, 1, shape.S, width), lambda h, s, *refs: (_row(shape, s, *refs), h, 0, 0)
    )

  def result(dtype, *sizes):
    return jax.ShapeDtypeStruct((shape.B, *sizes), dtype)

  def vmem(*sizes):
    return pltpu.VMEM(sizes, jnp.float32)

  # Of queries that see nothing, and of those that fill up: no weight.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse.astype(jnp.float32) * LOG2E)
  lse = jnp.pad(lse, ((0, 0), (0, shape.T - shape.queries), (0, 0)), constant_values=jnp.inf)
  split = shape.N // G // shape.K  # heads of a key that are no single step

  def wide(like):
    return (dtype or like.dtype) if split == 1 else jnp.float32

  d_q, d_k, d_v = _call(
    functools.partial(_backward, scale=scale),
    'flash_backward',
    shape,
    mask,
    [
      (_by_head(_scaled(q, scale), shape.T, groups), queries(H)),
      (_by_head(k, shape.S, (shape.K,)), keys(H)),
      (_by_head(v, shape.S, (shape.K,)), keys(Hv)),
      (_by_head(lse[..., None], shape.T, groups)[..., 0], numbers),
      (_by_head(delta.astype(jnp.float32)[..., None], shape.T, groups)[..., 0], numbers),
      (_by_head(d_out.astype(v.dtype), shape.T, groups), queries(Hv)),
    ],
    [
      (result(dtype or q.dtype, *groups, shape.T, H), queries(H)),
      (result(wide(k), groups[0], shape.S, H), whole(H)),
      (result(wide(v), groups[0], shape.S, Hv), whole(Hv)),
    ],
    [vmem(H, shape.R), vmem(shape.S, H), vmem(shape.S, Hv)],
    True,
    6 * H + 4 * Hv,
    interpret,
  )
  if split > 1:
    d_k, d_v = (
      x.reshape(shape.B, shape.K, split, *x.shape[2:]).sum(2).astype(dtype or like.dtype)
      for x, like in ((d_k, k), (d_v, v))
    )
  return _by_token(d_q, shape.queries), _by_token(d_k, shape.keys), _by_token(d_v, shape.keys)
