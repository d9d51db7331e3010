"""How does a TPU attend without writing scores to memory? Pallas kernels, forward and backward,
over the blocks that a mask leaves.

FlashAttention-2 (Dao, arXiv:2307.08691), with its backward pass in one kernel. A grid step
(kernels.flash_tpu_steps) is a block of queries, those of all heads that share a key stacked,
against a block of keys; blocks that the mask rules out are no steps at all, and those it leaves
whole are not masked. All keys of a block of queries follow one another, forward and backward: the
gradient of the queries is summed where the output is, and those of all keys of a head wait in VMEM.
What a step computes: kernels.flash_tpu_bodies.

Scores are in powers of two: queries are scaled by log2(e) before. B batch · T query length · S key
length · N query heads · K key/value heads · G query heads of a step · H head width · R = G x block
of queries
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import flash_tpu_bodies as bodies
from kernels.blocks import Blocks
from kernels.flash_tpu_bodies import LOG2E, div, rem
from kernels.flash_tpu_steps import (
  FLAGS,
  LANES,
  Ranges,
  StepShape,
  expected,
  fits,
  keys_in_table,
  ranges_of,
  shape_of,
  step_of,
  steps_of,
)
from kernels.mask import Mask
from kernels.scoring import Scoring


def _ids(mask: Mask, shape: StepShape, transposed: bool):
  """Arrays of positions and segments, and their blocks: those along the scores' second dimension
  [B, 1, n], the others in all lanes.
  """
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
  return div(queries[s], shape.nq)


def _block_of_queries(shape, s, queries, keys, prefix):
  return rem(queries[s], shape.nq)


def _block_of_keys(shape, s, queries, keys, prefix):
  return keys[s] >> FLAGS


def _call(
  kernel,
  name: str,
  shape: StepShape,
  mask: Mask,
  inputs,
  outputs,
  scratch,
  transposed: bool,
  flops: int,
  interpret,
):
  """Runs a kernel over the steps of a mask, in one call, or in several where the steps of one would
  not fit scalar memory.

  Its name says which were chosen: of those analysis.roofline knows no time.

  inputs, outputs: (array, or its shape and dtype; which block of it a step sees) each. transposed:
  as the backward kernel has scores, which also sums over all queries of a row. flops: of a pair of
  a query and a key.
  """
  kinds = mask.blocks(shape.queries, shape.keys, shape.bq, shape.bk)
  steps = steps_of(kinds, shape.B)
  ranges = None if fits(steps) else ranges_of(shape, whole_rows=transposed)
  prefix = jnp.zeros(shape.B, jnp.int32) if mask.prefix is None else mask.prefix.astype(jnp.int32)
  arrays, blocks = _ids(mask, shape, transposed)
  turns = ranges.turns if ranges else 1
  pairs = expected(steps, mask, shape) * shape.R * shape.bk // turns
  heads = shape.N // shape.G
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x, _ in (*inputs, *outputs))
  made = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs]

  def call(steps, before=()):
    """`before`: what earlier calls made of the outputs, which this one writes its part of."""
    passed, scalars = len(before), 3
    return pl.pallas_call(
      lambda *refs: kernel(*refs[:scalars], *refs[scalars + passed :], shape=shape),
      name=f'{name}_{shape.R}x{shape.bk}' if shape.chosen else name,
      interpret=interpret,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=scalars,
        grid=(heads, steps.count),
        in_specs=[
          *[pl.BlockSpec(memory_space=pl.ANY)] * passed,
          *(block for _, block in inputs),
          *blocks,
        ],
        out_specs=[block for _, block in outputs],
        scratch_shapes=scratch,
      ),
      out_shape=made,
      input_output_aliases={scalars + i: i for i in range(passed)},
      cost_estimate=pl.CostEstimate(
        flops=pairs * heads * flops, transcendentals=pairs * heads, bytes_accessed=moved // turns
      ),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=shape.tuning.vmem * 7 // 8
      ),
    )(steps.queries, steps.keys, prefix, *before, *(x for x, _ in inputs), *arrays)

  return call(steps) if ranges is None else _in_turns(call, kinds, shape, ranges, made)


def _in_turns(call, kinds, shape: StepShape, ranges: Ranges, made):
  """The outputs, of calls one after another: each has the steps of a range, and writes its blocks
  of arrays that are handed on, not copied.
  """
  # Small, for it may be a constant of the program: of 2**18 tokens it has millions of entries.
  kinds = jnp.broadcast_to(jnp.asarray(kinds, jnp.int8), (shape.B, *kinds.shape[1:]))
  kinds = kinds.reshape(ranges.units, ranges.blocks, kinds.shape[2])

  def turn(i, outputs):
    # The last range begins early where it would be shorter: what is done twice gives the same.
    start = jnp.minimum(i * ranges.each, ranges.units - ranges.each)
    part = jax.lax.dynamic_slice_in_dim(kinds, start, ranges.each)
    steps = steps_of(part, ranges.each)
    steps = dataclasses.replace(steps, queries=steps.queries + start * ranges.blocks)
    return tuple(call(steps, outputs))

  return jax.lax.fori_loop(0, ranges.turns, turn, tuple(jnp.zeros(x.shape, x.dtype) for x in made))


def _blocks_of(shape: StepShape):
  """Blocks of queries [B, N/G, G, T, H], of numbers of them [B, N/G, G, T], of keys [B, K, S, H],
  and of a head's sinks [N/G, G, LANES].
  """
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
      lambda h, s, *refs: (row(s, *refs), div(h, share), of_k(s, *refs), 0),
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
  shape = shape_of(q, k, v, scoring, 'forward', blocks)
  queries, numbers, keys, of_sinks = _blocks_of(shape)
  H, Hv, G = q.shape[3], v.shape[3], shape.G
  groups = shape.N // G, G
  sinks = jnp.full(shape.N, -jnp.inf) if sinks is None else sinks.astype(jnp.float32) * LOG2E

  def result(dtype, *last):
    return jax.ShapeDtypeStruct((shape.B, *groups, shape.T, *last), dtype)

  def vmem(*sizes):
    return pltpu.VMEM(sizes, jnp.float32)

  out, lse = _call(
    bodies.forward,
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
  """kernels.reference.backward of one device's arrays: gradients of q, k and v, in `dtype`
  (default: theirs where it is None).

  Keys that do not fit VMEM at once, or whose steps of a row do not fit scalar memory, go through
  one after another, with the sum of the queries' gradients in f32.
  """
  step, S, H = step_of(q, v, 'backward', blocks), k.shape[1], q.shape[3] + v.shape[3]

  # Half of VMEM for a key's sums in f32, and its two buffers of what is written.
  def room(dtype):
    return max(
      step.keys,
      step.vmem // 2 // ((4 + 2 * jnp.dtype(dtype).itemsize) * H) // step.keys * step.keys,
    )

  shape = shape_of(q, k, v, scoring, 'backward', blocks)
  in_table, of_a_part = keys_in_table(scoring.mask, shape, step.keys)
  if S <= min(room(dtype or q.dtype), in_table):
    return _backward_of(q, k, v, scoring, lse, delta, d_out, interpret, dtype, blocks)
  most = min(room(jnp.float32), of_a_part)
  if 'zigzag' in scoring.mask.fields():
    # A part of the keys does not say where in the row it is.
    given = (
      jnp.broadcast_to(x, (len(q), x.shape[1])) for x in scoring.mask.positions(q.shape[1], S)
    )
    places = dict(zip(('query_positions', 'key_positions'), given))
    scoring = dataclasses.replace(scoring, mask=dataclasses.replace(scoring.mask, **places))
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
    # One part after another: all at once would keep the sums of each, in f32.
    d_q, q = jax.lax.optimization_barrier((d_q + more, q))
    parts.append(of_keys)
  return tuple(
    x.astype(dtype or like.dtype)
    for x, like in zip((d_q, *(jnp.concatenate(x, 1) for x in zip(*parts))), (q, k, v))
  )


def _backward_of(q, k, v, scoring, lse, delta, d_out, interpret, dtype, blocks):
  mask, scale = scoring.mask, scoring.scale
  shape = shape_of(q, k, v, scoring, 'backward', blocks)
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
    functools.partial(bodies.backward, scale=scale),
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
