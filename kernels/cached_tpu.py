"""How does a TPU read a cache no more than once? A Pallas kernel over blocks of slots, for the few
queries of generation.

XLA multiplies the few rows of a step with keys and values on the vector unit, at several times what
reading them takes; here they are rows of the matrix unit. A block that lies behind a row's last
token, or before its window, is neither read nor computed: its step names a block that is there
already.

B rows · T new tokens · S slots · K key/value heads · G query heads of each · M = G x T ·
H head width
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.scoring import Scoring

BLOCK = 1024  # slots of a step
MOST = 2048  # rows of queries of a key head, above which scores of a block do not fit in VMEM
LANES, ROWS = 128, 16  # of a register of 16 bits
HIDDEN = -1e30


def _bounds(window, ring, S, block, T):
  """(lengths, starts, b) -> first and last block that a row's queries see."""

  def bounds(lengths, starts, b):
    filled = jnp.minimum(lengths[b], S)
    last = jnp.maximum(filled - 1, 0) // block
    first = jnp.maximum(starts[b] - window + 1, 0) // block if window and not ring else 0
    return jnp.minimum(first, last), last

  return bounds


def _kernel(
  scalars,
  lengths,
  starts,
  q,
  k,
  v,
  k_scale,
  v_scale,
  top_out,
  total_out,
  mixed_out,
  top,
  total,
  mixed,
  *,
  bounds,
  window,
  ring,
  S,
  block,
  T,
  Hv,
  softcap,
  scale,
):
  b, i = pl.program_id(0), pl.program_id(2)
  first, last = bounds(lengths, starts, b)

  @pl.when(i == 0)
  def _():
    top[...] = jnp.full_like(top, HIDDEN)
    total[...] = jnp.zeros_like(total)
    mixed[...] = jnp.zeros_like(mixed)

  @pl.when(i <= last - first)
  def _():
    rows = q.shape[2]
    keys = k[0, 0, 0].astype(q.dtype)
    product = functools.partial(
      jax.lax.dot_general,
      preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.DEFAULT if q.dtype.itemsize == 2 else None,
    )  # Mosaic knows no other of 16 bits
    scores = product(q[0, 0], keys, (((1,), (1,)), ((), ()))) * scale
    if k_scale is not None:
      scores = scores * k_scale[0, 0, 0]
    if softcap:
      scores = softcap * jnp.tanh(scores / softcap)
    slot = (first + i) * block + jax.lax.broadcasted_iota(jnp.int32, (rows, block), 1)
    newest = lengths[b] - 1
    where = newest - jax.lax.rem(newest - slot + S, S) if ring else slot
    query = starts[b] + jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (rows, block), 0), T)
    seen = (where >= 0) & (where <= newest) & (where <= query) & (slot < S)
    if window:
      seen = seen & (query - where < window)
    scores = jnp.where(seen, scores, HIDDEN)
    new = jnp.maximum(top[:, :1], scores.max(-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - new), 0.0)
    shrink = jnp.exp(top[:, :1] - new)
    total[...] = total[...] * shrink + weights.sum(-1, keepdims=True)
    scales = k_scale if v is None else v_scale
    values = keys[:, :Hv] if v is None else v[0, 0, 0].astype(q.dtype)
    slots = (first + i) * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
    held = newest - jax.lax.rem(newest - slots + S, S) if ring else slots
    values = jnp.where((held >= 0) & (held <= newest) & (slots < S), values, 0).astype(
      q.dtype
    )  # 0 x NaN would be NaN
    if scales is not None:
      weights = jnp.where(seen, weights * scales[0, 0, 0], 0.0)
    mixed[...] = mixed[...] * shrink + product(
      weights.astype(q.dtype), values, (((1,), (0,)), ((), ()))
    )
    top[...] = jnp.broadcast_to(new, top.shape)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    top_out[0, 0], total_out[0, 0], mixed_out[0, 0] = top[...], total[...], mixed[...]


def blocks(
  q,
  held,
  layer,
  first,
  lengths,
  starts,
  scoring: Scoring,
  *,
  T: int,
  Hv: int,
  interpret=False,
):
  """As kernels.cached.blocks, but that queries are those of T tokens side by side, the first of a
  row at starts [B].

  q: [B, K, G x T, H], of the key heads from `first` on.
  """
  B, K, M, H = q.shape
  S, window = held.slots, scoring.mask.window
  block = min(S, BLOCK)
  bounds = _bounds(window, held.ring, S, block, T)
  rows = -(-M // ROWS) * ROWS
  q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - M), (0, 0)))

  def at(b, h, i, scalars, lengths, starts):
    begin, last = bounds(lengths, starts, b)
    return scalars[0], b, scalars[1] + h, jnp.minimum(begin + i, last), 0

  def scale_at(b, h, i, *given):
    return *at(b, h, i, *given)[:3], 0, at(b, h, i, *given)[3]

  def mine(width):
    return pl.BlockSpec((1, 1, rows, width), lambda b, h, i, *_: (b, h, 0, 0))

  def vectors(x):
    return None if x is None else pl.BlockSpec((1, 1, 1, block, x.shape[4]), at)

  def numbers(x):
    return None if x is None else pl.BlockSpec((1, 1, 1, 1, block), scale_at)

  def row(x):
    return None if x is None else x[:, :, :, None]

  def out(width):
    return jax.ShapeDtypeStruct((B, K, rows, width), jnp.float32)

  def scratch(width):
    return pltpu.VMEM((rows, width), jnp.float32)

  size = held.keys.dtype.itemsize
  cost = pl.CostEstimate(
    flops=2 * B * K * rows * S * (H + Hv),
    transcendentals=B * K * rows * S,
    bytes_accessed=B * K * S * (H + (0 if held.values is None else Hv)) * size + 2 * q.size * 4,
  )
  given = [held.keys, held.values, row(held.key_scales), row(held.value_scales)]
  specs = [
    mine(H),
    vectors(held.keys),
    vectors(held.values),
    numbers(held.key_scales),
    numbers(held.value_scales),
  ]
  body = functools.partial(
    _kernel,
    bounds=bounds,
    window=window,
    ring=held.ring,
    S=S,
    block=block,
    T=T,
    Hv=Hv,
    softcap=scoring.softcap,
    scale=scoring.scale,
  )
  there = [x is not None for x in given]

  def kernel(*refs):
    scalars, (query, *refs) = refs[:3], refs[3:]
    buffers = [refs.pop(0) if is_there else None for is_there in there]
    body(*scalars, query, *buffers, *refs)

  top, total, mixed = pl.pallas_call(
    kernel,
    name='cached_attention',
    interpret=interpret,
    cost_estimate=cost,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(B, K, -(-S // block)),
      in_specs=[spec for spec in specs if spec is not None],
      out_specs=[mine(LANES), mine(LANES), mine(Hv)],
      scratch_shapes=[scratch(LANES), scratch(LANES), scratch(Hv)],
    ),
    out_shape=[out(LANES), out(LANES), out(Hv)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
  )(
    jnp.stack([jnp.asarray(layer, jnp.int32), jnp.asarray(first, jnp.int32)]),
    lengths,
    starts,
    q,
    *(x for x in given if x is not None),
  )
  top = top[:, :, :M, 0]
  return jnp.where(top <= HIDDEN, -jnp.inf, top), total[:, :, :M, 0], mixed[:, :, :M]
