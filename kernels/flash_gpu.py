"""How does a Hopper GPU attend without writing scores to memory? What tiles there are, what is held
where, and the kernels that are run.

B batch · T query length · S key length · N query heads · K key/value heads · H head width
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import cudnn, mosaic_gpu_compat as gpu
from kernels.blocks import Blocks
from kernels.flash_gpu_backward import backward_keys, backward_queries
from kernels.flash_gpu_forward import forward as forward_body
from kernels.flash_gpu_tiles import COUNT, LOG2E, WARPGROUPS, TileShape, Tiling
from kernels.mask import FULL, PARTIAL, SKIP, Mask
from kernels.scoring import Scoring

HOPPER = 132  # processors of an H100 and an H200
# Of head widths: what they are multiples of, and the most that a product writes.
TILE, WIDEST = 64, 256
# By width of heads: what ptxas compiles without a spill, and what shared memory holds.
FORWARD = {
  64: Tiling(64, 128, 2),
  128: Tiling(64, 128, 2),
  192: Tiling(64, 64, 2),
  256: Tiling(64, 64, 2),
}
KEYS = {
  64: Tiling(64, 64, 2),
  128: Tiling(64, 64, 2),
  192: Tiling(32, 64, 2),
  256: Tiling(32, 64, 2),
}
QUERIES = {
  64: Tiling(64, 64, 2),
  128: Tiling(64, 64, 2),
  192: Tiling(64, 32, 2),
  256: Tiling(64, 32, 2),
}


def plan(kinds):
  """What tiles there are, in the order they are taken, and which blocks each goes through, from
  kinds as Mask.blocks gives them.

  kinds: [rows, tiles, blocks]; NumPy's where they are. A tile that sees nothing goes through one
  block, all masked.
  Returns, int32: order [rows x tiles], tiles, those with most blocks first; steps [rows x tiles, 2
    + most], of a tile how many of its blocks are FULL, how many there are, and which, FULL ones
    first.
  """
  xp = np if isinstance(kinds, np.ndarray) else jnp
  kinds = kinds.reshape(-1, kinds.shape[-1])
  blind = (kinds == SKIP).all(1, keepdims=True) & (xp.arange(kinds.shape[1]) == 0)[None]
  kinds = xp.where(blind, PARTIAL, kinds)
  full, count = (kinds == FULL).sum(1), (kinds != SKIP).sum(1)
  blocks = xp.argsort(
    xp.where(kinds == FULL, 0, xp.where(kinds == PARTIAL, 1, 2)), axis=1, stable=True
  )
  if xp is np:
    blocks = blocks[:, : count.max()]
  order, steps = (
    xp.argsort(-count, stable=True),
    xp.concatenate([full[:, None], count[:, None], blocks], 1),
  )
  return order.astype(np.int32), steps.astype(np.int32)


def _tuning(table, width: int, queries: int, keys: int, held: str) -> Tiling:
  """Of the table, with sizes of a tile and a block that are chosen (kernels.blocks.check). held:
  which of them the tile holds.
  """
  sizes = {
    name: size // WARPGROUPS if name == held else size
    for name, size in (('queries', queries), ('keys', keys))
    if size
  }
  return dataclasses.replace(table[width], **sizes)


def _shape(q, k, v, scoring: Scoring, interpret) -> TileShape:
  (B, T, N, H), (_, S, K, Hv) = q.shape, v.shape
  if max(H, Hv) > WIDEST:
    raise NotImplementedError(
      f'backend pallas_gpu has heads of at most {WIDEST}, not {max(H, Hv)}; use xla or blocked'
    )
  if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
    raise NotImplementedError(
      f'backend pallas_gpu has bfloat16 and float16, not {q.dtype}, {k.dtype}, {v.dtype}; '
      'use xla or blocked'
    )
  if not interpret and (found := cudnn.capability())[0] != 9:
    raise NotImplementedError(
      f'backend pallas_gpu is for Hopper GPUs, of compute capability 9, not {found}; '
      'use xla or blocked'
    )
  mask = scoring.mask
  by_index = not mask.positioned or mask.fields() <= {'causal', 'window'}
  H, Hv = (_whole(width, TILE) for width in (H, Hv))
  return TileShape(
    B,
    N,
    K,
    T,
    S,
    H,
    Hv,
    mask.causal,
    mask.window,
    by_index,
    False,
    scoring.softcap,
    scoring.scale,
    q.dtype,
    interpret,
  )


def _ids(mask: Mask, shape: TileShape, T: int, S: int):
  """The mask's arrays for T queries and S keys, by name: [B, T], [B, S] and [B]."""
  ids = {}
  if not shape.by_index:
    ids['query_positions'], ids['key_positions'] = mask.positions(shape.T, shape.S)
  if mask.query_segments is not None:
    ids['query_segments'], ids['key_segments'] = mask.query_segments, mask.key_segments
  for name, x in ids.items():
    x = jnp.broadcast_to(x, (shape.B, x.shape[1])).astype(jnp.int32)
    length = T if name.startswith('query') else S
    ids[name] = jnp.pad(x, ((0, 0), (0, length - x.shape[1])), mode='edge')
  return ids if mask.prefix is None else ids | {'prefix': mask.prefix.astype(jnp.int32)}


def _whole(length: int, block: int) -> int:
  return -(-length // block) * block


def _filled(shape: TileShape, rows: int, keys: int) -> tuple[int, int, TileShape]:
  """T and S filled up to whole blocks, and the shape that knows whether there are keys to be hidden
  for that.
  """
  T, S = _whole(shape.T, rows), _whole(shape.S, keys)
  behind = shape.causal and shape.by_index  # all queries
  return T, S, dataclasses.replace(shape, ragged=S != shape.S and not behind)


def _pad(x, length: int, width: int):
  """[B, length, N, width], filled up with zeros."""
  return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[3])))


def _by_head(x, length: int, filling: float = 0.0):
  """[B, T, N] to [B, N, length], f32."""
  return jnp.pad(
    jnp.moveaxis(x.astype(jnp.float32), 1, 2),
    ((0, 0), (0, 0), (0, length - x.shape[1])),
    constant_values=filling,
  )


def _barriers(arrivals: int, **numbers: int):
  return {
    name: plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)
    for name, number in numbers.items()
  }


def _call(
  kernel,
  name: str,
  shape: TileShape,
  kinds,
  heads: int,
  work: tuple[int, int],
  inputs,
  outputs,
  scratch,
  sums=(),
):
  """Runs a kernel over the tiles of `kinds`, [rows, tiles, blocks], of so many heads.

  work: pairs of a query and a key in a block, and flops of a pair. sums: (arrays that are added
  to,); one thread block does that where the kernel is interpreted.
  """
  plans, shared = plan(kinds), kinds.shape[0] == 1
  tiles = plans[0].size * (shape.B if shared else 1) * heads
  if isinstance(kinds, np.ndarray):
    blocks_of_row = int(plans[1][:, COUNT].sum())
  else:  # about: arrays decide
    blocks_of_row = kinds[0].size // (2 if shape.causal else 1)
  block, flops = work
  pairs = block * heads * shape.B * blocks_of_row
  moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs)))
  cost = pl.CostEstimate(flops=flops * pairs, transcendentals=pairs, bytes_accessed=moved)
  blocks = 1 if any(x is not None for x in sums) and shape.interpret else min(_processors(), tiles)
  run = gpu.kernel(
    functools.partial(kernel, shape=shape, shared=shared),
    name,
    outputs,
    scratch,
    blocks,
    WARPGROUPS + 1,
    cost,
    shape.interpret,
  )
  # Without the barrier XLA (seen in jaxlib 0.11.2) makes the kernel a part of what writes its
  # result into a loop's stack of kept values, and runs it a second time for whoever else reads that
  # result, as the rest of the layer does.
  return jax.lax.optimization_barrier(run(*inputs, *plans, *sums))


def forward(q, k, v, scoring: Scoring, *, interpret, blocks: Blocks = Blocks()):
  """kernels.reference.attention of one device's arrays; not to be differentiated."""
  mask, sinks = scoring.mask, scoring.sinks
  shape = _shape(q, k, v, scoring, interpret)
  tuning = _tuning(FORWARD, max(shape.H, shape.Hv), *blocks.of('forward'), 'queries')
  rows, keys, stages = WARPGROUPS * tuning.queries, tuning.keys, tuning.stages
  T, S, shape = _filled(shape, rows, keys)
  held = functools.partial(gpu.tiled, dtype=shape.dtype)
  memory = {
    'q': held((WARPGROUPS, tuning.queries, shape.H)),
    'k': held((stages, keys, shape.H)),
    'v': held((stages, keys, shape.Hv)),
    'lse': plgpu.SMEM((WARPGROUPS, tuning.queries), jnp.float32),
  }
  if shape.H != shape.Hv:  # else what is mixed goes where the queries were
    memory['out'] = held((WARPGROUPS, tuning.queries, shape.Hv))
  ready = _barriers(1, q=WARPGROUPS, k=stages, v=stages)
  free = _barriers(1, q=WARPGROUPS) | _barriers(WARPGROUPS, k=stages, v=stages)
  out, lse = _call(
    functools.partial(forward_body, tuning=tuning),
    'flash_forward',
    shape,
    mask.blocks(shape.T, shape.S, rows, keys),
    shape.N,
    (rows * keys, 2 * (shape.H + shape.Hv)),
    (
      _pad(q, T, shape.H),
      _pad(k, S, shape.H),
      _pad(v, S, shape.Hv),
      _ids(mask, shape, T, S),
      None if sinks is None else sinks.astype(jnp.float32) * LOG2E,
    ),
    (
      jax.ShapeDtypeStruct((shape.B, T, shape.N, shape.Hv), shape.dtype),
      jax.ShapeDtypeStruct((shape.B, shape.N, T), jnp.float32),
    ),
    (memory, ready, free, plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=1)),
  )
  return out[:, : shape.T, :, : v.shape[3]], jnp.moveaxis(lse, 1, 2)[:, : shape.T]


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

  Those of k and v were rounded to the dtype of k.

  The gradient of queries comes from a kernel of its own (two products of seven more), instead of
  being added up in main memory in no certain order, where it is to be deterministic, and of wide
  heads, with a soft cap or a prefix: their sums, derivatives or masks fill the registers.
  """
  mask = scoring.mask
  shape = _shape(q, k, v, scoring, interpret)
  # What a product writes is at most WIDEST wide: sums of keys and of values, wider together, are
  # made in parts. Each part has columns of both, hence heads at least so wide.
  parts = -(-(shape.H + shape.Hv) // WIDEST)
  shape = dataclasses.replace(shape, H=max(shape.H, TILE * parts), Hv=max(shape.Hv, TILE * parts))
  # Of queries that see nothing: no weight.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse.astype(jnp.float32) * LOG2E)
  given = Given(q, k, v, mask, lse, delta, d_out.astype(shape.dtype))
  alone = (
    blocks.deterministic
    or max(shape.H, shape.Hv) > WIDEST // 2
    or shape.softcap
    or mask.prefix is not None
  )
  d_q = _d_q(given, shape) if alone else None
  of_keys = []
  for n in range(parts):
    columns, wide = (
      slice(*(TILE * (width // TILE * at // parts) for at in (n, n + 1)))
      for width in (shape.H, shape.Hv)
    )
    sum_q, *of_part = _d_keys(given, shape, columns, wide, d_q is None, blocks)
    of_keys.append(of_part)
  d_k, d_v = (x[0] if parts == 1 else jnp.concatenate(x, -1) for x in zip(*of_keys))
  gradients = sum_q if d_q is None else d_q, d_k, d_v
  return tuple(
    x[..., : like.shape[3]].astype(dtype or like.dtype) for x, like in zip(gradients, (q, k, v))
  )


class Given(NamedTuple):
  """What a backward pass is given; lse [B, T, N] in powers of two, +inf where nothing is seen.

  Others: kernels.reference.backward.
  """

  q: Any
  k: Any
  v: Any
  mask: Mask
  lse: Any
  delta: Any
  d_out: Any

  def padded(self, T: int, S: int, shape: TileShape):
    """The arrays in the order of the kernels' refs, filled up to T queries and S keys, and the
    mask's arrays.
    """
    return (
      _pad(self.q, T, shape.H),
      _pad(self.k, S, shape.H),
      _pad(self.v, S, shape.Hv),
      _by_head(self.lse, T, jnp.inf),
      _by_head(self.delta, T),
      _pad(self.d_out, T, shape.Hv),
      _ids(self.mask, shape, T, S),
    )


def _d_q(given: Given, shape: TileShape):
  tuning = QUERIES[max(shape.H, shape.Hv)]
  rows, keys, stages, groups = WARPGROUPS * tuning.queries, tuning.keys, tuning.stages, WARPGROUPS
  T, S, shape = _filled(shape, rows, keys)
  # Of 32 keys a row of scores is half as long: swizzled by that, products read them.
  held = functools.partial(gpu.tiled, dtype=shape.dtype, swizzle=2 * min(TILE, keys))
  numbers = plgpu.SMEM((groups, tuning.queries), jnp.float32)
  memory = {
    'q': held((groups, tuning.queries, shape.H)),
    'd_out': held((groups, tuning.queries, shape.Hv)),
    'lse': numbers,
    'delta': numbers,
    'k': held((stages, keys, shape.H)),
    'v': held((stages, keys, shape.Hv)),
  }
  # Four copies arrive for a tile's queries: q, d_out, lse and delta.
  ready = _barriers(4, q=groups) | _barriers(1, k=stages, v=stages)
  free = _barriers(1, q=groups) | _barriers(groups, k=stages, v=stages)
  (d_q,) = _call(
    functools.partial(backward_queries, tuning=tuning),
    'flash_backward_queries',
    shape,
    given.mask.blocks(shape.T, shape.S, rows, keys),
    shape.N,
    (rows * keys, 4 * shape.H + 2 * shape.Hv),
    given.padded(T, S, shape),
    (jax.ShapeDtypeStruct((shape.B, T, shape.N, shape.H), shape.dtype),),
    (memory, ready, free),
  )
  return d_q[:, : shape.T]


def _d_keys(
  given: Given, shape: TileShape, columns: slice, wide: slice, fused: bool, blocks: Blocks
):
  """Of queries, if fused, else None, and of these columns of keys and values."""
  tuning = _tuning(KEYS, max(shape.H, shape.Hv), *blocks.of('backward'), 'keys')
  queries, stages, groups = tuning.queries, tuning.stages, WARPGROUPS
  keys = groups * tuning.keys
  if shape.window:  # to compute positions takes registers that are not there, to read them does not
    shape = dataclasses.replace(shape, by_index=False)
  T, S, shape = _filled(shape, queries, keys)
  width = [which.stop - which.start for which in (columns, wide)]
  memory = _memory_of_keys(shape, tuning, width, fused)
  both = sum_q = None
  if fused:
    both = plgpu.Barrier(num_arrivals=groups, num_barriers=1)
    # In place: thread blocks add to it as they come to a query.
    sum_q = jax.new_ref(jnp.zeros((shape.B, T, shape.N, shape.H), jnp.float32))

  def result(width):
    return jax.ShapeDtypeStruct((shape.B, S, shape.K, width), shape.dtype)

  # Two copies arrive for a tile's keys and values, four for a block of queries.
  ready = _barriers(2, k=1) | _barriers(4, q=stages)
  d_k, d_v = _call(
    functools.partial(backward_keys, tuning=tuning, columns=columns, wide=wide),
    'flash_backward',
    shape,
    given.mask.blocks(shape.T, shape.S, queries, keys).swapaxes(1, 2),
    shape.K,
    (shape.N // shape.K * queries * keys, (6 if fused else 4) * shape.H + 4 * shape.Hv),
    given.padded(T, S, shape),
    tuple(map(result, width)),
    (memory, ready, _barriers(groups, k=1, q=stages), both),
    (sum_q,),
  )
  return (
    None if sum_q is None else jax.freeze(sum_q)[:, : shape.T],
    d_k[:, : shape.S],
    d_v[:, : shape.S],
  )


def _memory_of_keys(shape: TileShape, tuning: Tiling, width: list[int], fused: bool):
  """Shared memory of the kernel of keys' gradients, of which it writes so many columns of keys and
  of values.
  """
  queries, stages, groups = tuning.queries, tuning.stages, WARPGROUPS
  keys, half = groups * tuning.keys, shape.H // groups
  # Products read these on either side, so they are swizzled by the narrowest that any of them takes
  # of a row.
  held = functools.partial(
    gpu.tiled, dtype=shape.dtype, swizzle=2 * min(TILE, queries, half if fused else TILE)
  )
  numbers = plgpu.SMEM((stages, queries), jnp.float32)
  memory = {
    'k': held((1, keys, shape.H)),
    'v': held((1, keys, shape.Hv)),
    'q': held((stages, queries, shape.H)),
    'd_out': held((stages, queries, shape.Hv)),
    'lse': numbers,
    'delta': numbers,
  }
  if width != [shape.H, shape.Hv]:  # else what is summed goes where keys and values were
    memory['out'] = {size: held((groups, tuning.keys, size)) for size in width}
  if fused:
    memory |= {
      'd_scores': held((2, keys, queries)),
      'd_q': gpu.tiled((groups, queries, half), jnp.float32),
    }
  return memory


def _processors() -> int:
  """Of the GPU that is compiled for; of an interpreted one, few."""
  target = jax.sharding.get_abstract_mesh().abstract_device
  return getattr(target, 'num_cores', None) or HOPPER
