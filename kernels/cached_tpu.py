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


def _position(slot, newest, ring: bool, S: int):
  """Whose token is in a slot; negative where none was.

  As kernels.cached.positions, but rem is of what is not negative.
  """
  return newest - jax.lax.rem(newest - slot + S, S) if ring else slot


def _product(x, y, axis: int):
  """f32, of the last axis of x and this one of y."""
  return jax.lax.dot_general(
    x,
    y,
    (((1,), (axis,)), ((), ())),
    preferred_element_type=jnp.float32,
    # Mosaic knows no other of 16 bits.
    precision=jax.lax.Precision.DEFAULT if x.dtype.itemsize == 2 else None,
  )


def _written(slot, where, newest, S: int):
  """Whether a token of the row is in a slot that there is: the last block may reach past the
  buffer's end.
  """
  return (where >= 0) & (where <= newest) & (slot < S)


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
  scoring,
  ring,
  S,
  block,
  T,
  Hv,
):
  """One block of slots of a row and key head; a row with fewer blocks than the grid has does
  nothing in the last steps.
  """
  window, softcap = scoring.mask.window, scoring.softcap
  b, i = pl.program_id(0), pl.program_id(2)
  first, last = bounds(lengths, starts, b)

  @pl.when(i == 0)
  def _():
    top[...], total[...] = jnp.full_like(top, HIDDEN), jnp.zeros_like(total)
    mixed[...] = jnp.zeros_like(mixed)

  @pl.when(i <= last - first)
  def _():
    rows = q.shape[2]
    keys = k[0, 0, 0].astype(q.dtype)
    scores = _product(q[0, 0], keys, 1) * scoring.scale
    if k_scale is not None:
      scores = scores * k_scale[0, 0, 0]
    if softcap:
      scores = softcap * jnp.tanh(scores / softcap)
    newest = lengths[b] - 1
    slot = (first + i) * block + jax.lax.broadcasted_iota(jnp.int32, (rows, block), 1)
    where = _position(slot, newest, ring, S)
    # Rows are those of a head side by side: T queries, then those of the next head.
    query = starts[b] + jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (rows, block), 0), T)
    seen = _written(slot, where, newest, S) & (where <= query)
    if window:
      seen = seen & (query - where < window)
    scores = jnp.where(seen, scores, HIDDEN)

    # The online softmax; the state is the same in all lanes, one of which is read. Where nothing is
    # seen HIDDEN is the greatest, and weights would be 1.
    now = jnp.maximum(top[:, :1], scores.max(-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - now), 0.0)
    shrink = jnp.exp(top[:, :1] - now)
    total[...] = total[...] * shrink + weights.sum(-1, keepdims=True)

    # What no token of the row is in may hold anything, and 0 x NaN would be NaN.
    scales = k_scale if v is None else v_scale
    values = keys[:, :Hv] if v is None else v[0, 0, 0].astype(q.dtype)
    slots = (first + i) * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
    at = _position(slots, newest, ring, S)
    values = jnp.where(_written(slots, at, newest, S), values, 0).astype(q.dtype)
    if scales is not None:
      weights = jnp.where(seen, weights * scales[0, 0, 0], 0.0)
    mixed[...] = mixed[...] * shrink + _product(weights.astype(q.dtype), values, 0)
    top[...] = jnp.broadcast_to(now, top.shape)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    top_out[0, 0], total_out[0, 0], mixed_out[0, 0] = top[...], total[...], mixed[...]


def blocks(
  q,
  held,
  at,
  lengths,
  starts,
  scoring: Scoring,
  *,
  T: int,
  Hv: int,
  named=None,
  interpret=False,
):
  """As kernels.cached.blocks, but that queries are those of T tokens side by side, the first of a
  row at starts [B], and that a step is of one page, where there are pages.

  q: [B, K, G x T, H]. named: [B] rows of the buffers, or [B, n] pages where they are paged.
  """
  B, K, M, H = q.shape
  S, block = held.slots, min(held.slots, BLOCK)
  if held.paged:
    S, block = S * named.shape[1], S
  bounds = _bounds(scoring.mask.window, held.ring, S, block, T)
  padded = -(-M // ROWS) * ROWS
  q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - M), (0, 0)))

  def out(width):
    return jax.ShapeDtypeStruct((B, K, padded, width), jnp.float32)

  def scratch(width):
    return pltpu.VMEM((padded, width), jnp.float32)

  size = held.keys.dtype.itemsize
  cost = pl.CostEstimate(
    flops=2 * B * K * padded * S * (H + Hv),
    transcendentals=B * K * padded * S,
    bytes_accessed=B * K * S * (H + (0 if held.values is None else Hv)) * size + 2 * q.size * 4,
  )
  scales = [None if x is None else x[:, :, :, None] for x in (held.key_scales, held.value_scales)]
  given = [held.keys, held.values, *scales]
  there = [x is not None for x in given]
  body = functools.partial(
    _kernel, bounds=bounds, scoring=scoring, ring=held.ring, S=S, block=block, T=T, Hv=Hv
  )

  # Which rows of the buffers these are, or which pages, is a matter of index maps, that read one
  # more vector.
  named = () if named is None else (named.reshape(-1),)

  def kernel(*refs):
    """The body, with None for what is not held."""
    scalars, (query, *refs) = refs[:3], refs[3 + len(named) :]
    buffers = [refs.pop(0) if is_there else None for is_there in there]
    body(*scalars, query, *buffers, *refs)

  mine = functools.partial(_queries, padded)
  top, total, mixed = pl.pallas_call(
    kernel,
    name='cached_attention',
    interpret=interpret,
    cost_estimate=cost,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3 + len(named),
      grid=(B, K, -(-S // block)),
      in_specs=[mine(H), *_held(held, bounds, block, S // block)],
      out_specs=[mine(LANES), mine(LANES), mine(Hv)],
      scratch_shapes=[scratch(LANES), scratch(LANES), scratch(Hv)],
    ),
    out_shape=[out(LANES), out(LANES), out(Hv)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
  )(
    jnp.stack([jnp.asarray(x, jnp.int32) for x in at]),
    lengths,
    starts,
    *named,
    q,
    *(x for x in given if x is not None),
  )
  top = top[:, :, :M, 0]
  return jnp.where(top <= HIDDEN, -jnp.inf, top), total[:, :, :M, 0], mixed[:, :, :M]


def _queries(rows: int, width: int):
  """The block of [B, K, rows, width] of a row and key head."""
  return pl.BlockSpec((1, 1, rows, width), lambda b, h, i, *_: (b, h, 0, 0))


def _held(held, bounds, block: int, blocks: int):
  """The blocks of what is held of keys, values and their scales, as far as there are any."""

  # Past a row's last block its step names that one again, which is there already: nothing is
  # copied. named: of rows, or of their pages, which are blocks of their own.
  def at(b, h, i, scalars, lengths, starts, named=None):
    begin, last = bounds(lengths, starts, b)
    index, head = jnp.minimum(begin + i, last), scalars[1] + h
    if held.paged:
      return scalars[0], named[b * blocks + index], head, 0, 0
    return scalars[0], b if named is None else named[b], head, index, 0

  # Scales are numbers of slots, along lanes.
  def scale_at(b, h, i, *given):
    layer, row, head, index, _ = at(b, h, i, *given)
    return layer, row, head, 0, index

  vectors, numbers = (held.keys, held.values), (held.key_scales, held.value_scales)
  return [
    *(pl.BlockSpec((1, 1, 1, block, x.shape[4]), at) for x in vectors if x is not None),
    *(pl.BlockSpec((1, 1, 1, 1, block), scale_at) for x in numbers if x is not None),
  ]
