"""Which backend computes attention? One function, one table of what each backend honours; nothing is dropped silently.

`reference`: the jnp oracle, everything, [T, S] scores in memory. `blocked`: the oracle on blocks of queries, keys that no query
of a block can see skipped and scores recomputed in the backward pass, so that memory and work follow the mask. `xla`:
jax.nn.dot_product_attention as XLA compiles it (jax does not pick cuDNN's kernel by itself).
`splash`: the Pallas kernel for TPUs that comes with jax. `pallas_tpu`: our own (kernels.flash_tpu), everything but relative positions.
`auto`: on a TPU `splash`, then `xla`; on a GPU `xla`; else, and on a CPU, `blocked`, then `reference`: the first that honours the spec.
Where a mesh splits T, parallel.context calls these backends on each device's part; those of PARTS it can put together, on a TPU
`pallas_tpu` first.

B batch · T query length · S key length · N query heads · K key/value heads · H head width
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import names
from kernels import reference
from kernels.mask import Mask, Relative
from parallel import axes as ax
from parallel import context as cp
from parallel import mesh
from parallel.remat import named

HONOURS = {
    'reference': {'causal', 'window', 'prefix', 'segments', 'positions', 'zigzag', 'softcap', 'sinks', 'relative', 'value_width'},
    'blocked': {'causal', 'window', 'segments', 'positions', 'softcap', 'sinks', 'relative', 'value_width'},
    'splash': {'causal', 'window', 'segments', 'softcap', 'sinks', 'value_width'},
    'pallas_tpu': {'causal', 'window', 'prefix', 'segments', 'positions', 'zigzag', 'softcap', 'sinks', 'value_width'},
    'xla': {'causal', 'window', 'segments', 'positions', 'prefix'},
}
ORDER = {'cpu': ('blocked', 'reference'), 'gpu': ('xla', 'blocked', 'reference'), 'tpu': ('splash', 'xla', 'blocked', 'reference')}
ORDER_IN_PARTS = {'cpu': ('blocked', 'reference'), 'gpu': ('blocked', 'reference'), 'tpu': ('pallas_tpu', 'blocked', 'reference')}
NAMES_ITS_OWN = ('splash', 'pallas_tpu')  # what their backward pass keeps has the name that remat policies know
# Precisions that Mosaic has, and whether they are of f32 operands only: of bfloat16 it has one pass, of float16 nothing at all.
PALLAS_PRECISIONS = {None: False, 'default': False, 'bfloat16': False, 'highest': True, 'float32': True}
LANES = 128  # of a TPU's registers; a kernel's blocks are multiples
BLOCK = 128  # queries a block; smaller ones skip more of the causal triangle, larger ones feed the matrix units better


def attention(q: Float[Array, 'B T N H'], k: Float[Array, 'B S K H'], v: Float[Array, 'B S K Hv'], mask: Mask, *, softcap: float = 0.0,
              sinks: Float[Array, 'N'] | None = None, relative: Relative | None = None, scale: float | None = None,
              backend: str = 'auto', context: str = 'ring') -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Attention and the log-sum-exp of its scores.

  Args:
    mask: who sees whom. softcap: cap * tanh(score / cap), 0 for none. sinks: a logit per query head that joins the softmax.
    relative: scores by distance, added before the cap. scale: of q.k; default H ** -0.5. v may be wider or narrower than q
      and k ('value_width').
    backend: 'auto' or one of HONOURS. context: what devices that share a row do (parallel.context), where there are any.
  Returns: the mixed values, in v's dtype, and the log-sum-exp, at least f32.
  Raises: ValueError for shapes that do not fit or an unknown backend; NotImplementedError for a spec that the backend does
    not honour, naming those that do.
  """
  N, H, K = q.shape[2], q.shape[3], k.shape[2]
  if N % K:
    raise ValueError(f'{N} query heads are not a multiple of {K} key/value heads')
  scale = H**-0.5 if scale is None else scale
  if ax.size('length') > 1:
    settings = {'softcap': softcap, 'scale': scale, 'backend': backend}
    local = cp.Local(*(functools.partial(function, **settings) for function in (attention, part, part_backward)))
    return cp.attention(q, k, v, mask, local, sinks=sinks, relative=relative, strategy=context)
  spec = _spec(v.shape[3] != H, mask, softcap, sinks, relative)
  backend = choose(spec) if backend == 'auto' else check(backend, spec)
  run = {'reference': reference.attention, 'blocked': blocked, 'splash': splash, 'pallas_tpu': pallas_tpu, 'xla': xla}[backend]
  out, lse = run(q, k, v, mask, softcap=softcap, sinks=sinks, relative=relative, scale=scale)
  return (out if backend in NAMES_ITS_OWN else named(out, 'attention')), lse


def part(q, k, v, mask, *, softcap, relative, scale, backend):
  """Attention of this device's arrays to some of the keys, by a backend of PARTS; not to be differentiated."""
  return PARTS[_part(v.shape[3] != q.shape[3], mask, softcap, relative, backend)][0](
      q, k, v, mask, softcap=softcap, sinks=None, relative=relative, scale=scale)


def part_backward(q, k, v, mask, lse, delta, d_out, *, softcap, relative, scale, backend):
  """What reference.backward gives, by the same backend as part()."""
  return PARTS[_part(v.shape[3] != q.shape[3], mask, softcap, relative, backend)][1](
      q, k, v, mask, lse, delta, d_out, softcap=softcap, relative=relative, scale=scale)


def _part(wide, mask, softcap, relative, backend):
  spec = _spec(wide, mask, softcap, None, relative)
  if backend == 'auto':
    return choose(spec, in_parts=True)
  return check_part(check(backend, spec))


def _spec(wide, mask, softcap, sinks, relative):
  named = {'softcap': softcap, 'sinks': sinks is not None, 'relative': relative is not None, 'value_width': wide}
  return mask.fields() | {name for name, is_set in named.items() if is_set}


def check_part(backend: str) -> str:
  """`backend`, of which attention can be put together part by part; raises NotImplementedError otherwise."""
  if backend not in PARTS:
    raise NotImplementedError(f'attention backend {backend!r} gives no log-sum-exp at no extra cost, which a ring puts the parts together '
                              f"by; these do: {list(PARTS)}; or use model.context='gather' or 'ulysses'")
  return backend


def check(backend: str, spec: set[str]) -> str:
  """`backend` if it honours every part of `spec`; raises as attention() says otherwise."""
  names.check('attention backend', backend, ('auto', *HONOURS))
  missing = spec - HONOURS[backend]
  if missing:
    able = [name for name, honoured in HONOURS.items() if spec <= honoured]
    raise NotImplementedError(f'attention backend {backend!r} does not honour {sorted(missing)}; these do: {able}')
  return backend


def choose(spec: set[str], platform: str = '', in_parts: bool = False) -> str:
  """What `auto` means for this spec on a platform; default: the one compiled for (see parallel.mesh.platform).

  in_parts: of those that attention can be put together from part by part.
  """
  return next(name for name in (ORDER_IN_PARTS if in_parts else ORDER)[platform or mesh.platform()] if spec <= HONOURS[name])


def blocked(q, k, v, mask, *, softcap, sinks, relative, scale):
  """Same contract as reference.attention, without prefix: a loop over query blocks, each with the keys it can see."""
  # Scores are as large as everything else of a block together: cheaper to compute again than to keep.
  run = jax.checkpoint(lambda q, k, v, mask, sinks, relative: reference.attention(
      q, k, v, mask, softcap=softcap, sinks=sinks, relative=relative, scale=scale), prevent_cse=False)
  outs, lses = zip(*[run(q[:, queries], k[:, keys], v[:, keys], block, sinks, relative)
                     for queries, keys, block in _blocks(mask, q.shape[1], k.shape[1], relative)])
  return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)


def blocked_backward(q, k, v, mask, lse, delta, d_out, *, softcap, relative, scale):
  """Same contract as reference.backward, block by block."""
  wide = jnp.promote_types(q.dtype, jnp.float32)
  d_qs, d_k, d_v, d_relative = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide), jax.tree.map(jnp.zeros_like, relative)
  for queries, keys, block in _blocks(mask, q.shape[1], k.shape[1], relative):
    cut = [x[:, queries] for x in (lse, delta, d_out)]
    d_q, dk, dv, new = reference.backward(q[:, queries], k[:, keys], v[:, keys], block, *cut, softcap=softcap, relative=relative,
                                          scale=scale)
    d_qs.append(d_q)
    d_k, d_v, d_relative = d_k.at[:, keys].add(dk), d_v.at[:, keys].add(dv), jax.tree.map(jnp.add, d_relative, new)
  return jnp.concatenate(d_qs, 1), d_k, d_v, d_relative


def _blocks(mask, T, S, relative):
  """(queries, keys, mask) of each block; of rows in order, keys that no query of the block can see are left out."""
  in_order = mask.query_positions is None
  if T != S and in_order and (mask.causal or relative is not None):
    raise ValueError(f'backend blocked aligns queries and keys by index, {T} queries and {S} keys do not align; use reference')
  for start in range(0, T, BLOCK):
    stop = min(start + BLOCK, T)
    first = max(0, start - mask.window + 1) if mask.window and in_order else 0
    queries, keys = slice(start, stop), slice(first, stop if mask.causal and in_order else S)
    yield queries, keys, mask.block(queries, keys)


def xla(q, k, v, mask, *, softcap, sinks, relative, scale):
  """jax.nn.dot_product_attention: its own causal and window flags where they say it all, else a dense mask."""
  T, S = q.shape[1], k.shape[1]
  if mask.fields() <= {'causal', 'window'} and T == S:
    window = (mask.window - 1, 0) if mask.window else None
    dense = None
    causal = mask.causal
  else:
    window, causal, dense = None, False, mask.allowed(T, S)[:, None]
  out = jax.nn.dot_product_attention(q, k, v, mask=dense, scale=scale, is_causal=causal, local_window_size=window)
  if dense is not None:  # a query that sees no key is given the mean of all values
    out = jnp.where(dense.any(-1).swapaxes(1, 2)[..., None], out, 0)
  # Its own residual is rounded to the inputs' type and has no gradient. Under jit a log-sum-exp that nobody reads costs nothing.
  _, lse = reference.attention(q, k, v, mask, softcap=softcap, sinks=sinks, relative=relative, scale=scale)
  return out, lse


def splash(q, k, v, mask, *, softcap, sinks, relative, scale):
  """jax's Pallas flash attention, each device on its own rows and heads; queries and keys are padded to whole blocks."""
  dtype, (q, k, v) = v.dtype, _for_mosaic('splash', q, k, v)
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  B, T, N, _ = q.shape
  S = k.shape[1]
  if T != S and mask.causal:
    raise ValueError(f'backend splash aligns queries and keys by index, {T} queries and {S} keys do not align; use reference')
  (rows, block), (columns, key_block) = (_padded(length) for length in (T, S))
  blocks = kernel.BlockSizes(block_q=block, block_q_dkv=block, block_q_dq=block,
                             block_kv=key_block, block_kv_dkv=key_block, block_kv_dq=key_block)
  if mask.window:
    shape = masks.LocalMask((rows, columns), (mask.window - 1, 0), 0)
  else:
    shape = (masks.CausalMask if mask.causal else masks.FullMask)((rows, columns))
  queries, keys = mask.query_segments, mask.key_segments
  if queries is None and not mask.causal:  # which hides the padding, being behind the last query
    queries, keys = (ax.place(jnp.ones((B, length), jnp.int32), 'batch', 'length') for length in (T, S))

  def local(q, k, v, queries, keys, sinks):
    run = kernel.make_splash_mha(masks.MultiHeadMask([shape] * q.shape[2]), block_sizes=blocks, head_shards=1, q_seq_shards=1,
                                 residual_checkpoint_name='attention', attn_logits_soft_cap=softcap or None,
                                 interpret=mesh.platform() != 'tpu')
    fill = lambda x, to, value=0: jnp.pad(x, [(0, 0), (0, to - x.shape[1]), *[(0, 0)] * (x.ndim - 2)], constant_values=value)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (fill(q * jnp.asarray(scale, q.dtype), rows), fill(k, columns), fill(v, columns)))
    segments = None if queries is None else kernel.SegmentIds(fill(queries, rows, -1), fill(keys, columns, -1))
    return jnp.swapaxes(jax.vmap(run, in_axes=(0, 0, 0, 0, None))(q, k, v, segments, sinks), 1, 2)[:, :T]
  heads_of = lambda name: ('batch', 'length', name, 'head_width')
  tokens = None if queries is None else ('batch', 'length')
  k_heads = ax.whole_or('kv_heads', k.shape[2])
  arrays = heads_of('heads'), heads_of(k_heads), heads_of(k_heads), tokens, tokens, None if sinks is None else ('heads',)
  out = ax.local(local, arrays, heads_of('heads'))(q, k, v, queries, keys, sinks)
  if mask.query_segments is not mask.key_segments:  # a query that sees no key is given a mean of values
    out = jnp.where(mask.allowed(T, S).any(-1)[..., None, None], out, 0)
  _, lse = reference.attention(q, k, v, mask, softcap=softcap, sinks=sinks, relative=relative, scale=scale)  # as of xla
  return out.astype(dtype), lse


def pallas_tpu(q, k, v, mask, *, softcap, sinks, relative, scale):
  """Our own kernels, each device on its own rows and heads; everywhere but on TPUs they are interpreted, which is slow."""
  arrays = {field.name: getattr(mask, field.name) for field in dataclasses.fields(mask) if hasattr(getattr(mask, field.name), 'shape')}
  spec = dataclasses.replace(mask, **dict.fromkeys(arrays))

  def local(q, k, v, arrays, sinks):
    from kernels import flash_tpu  # takes half a second to import
    q, k, v = _for_mosaic('pallas_tpu', q, k, v)
    return flash_tpu.flash((softcap, scale, mesh.platform() != 'tpu'), q, k, v, dataclasses.replace(spec, **arrays), sinks)
  heads_of = lambda name: ('batch', 'length', name, 'head_width')
  of_array = {name: ('batch', 'length')[:x.ndim] for name, x in arrays.items()}
  k_heads = ax.whole_or('kv_heads', k.shape[2])
  inputs = heads_of('heads'), heads_of(k_heads), heads_of(k_heads), of_array, None if sinks is None else ('heads',)
  out, lse = ax.local(local, inputs, (heads_of('heads'), ('batch', 'length', 'heads')))(q, k, v, arrays, sinks)
  return out.astype(v.dtype), lse


def pallas_tpu_part(q, k, v, mask, *, softcap, sinks, relative, scale):
  """Same contract as reference.attention, on one device, not to be differentiated."""
  from kernels import flash_tpu
  out, lse = flash_tpu.forward(*_for_mosaic('pallas_tpu', q, k, v), mask, softcap=softcap, sinks=sinks, scale=scale,
                               interpret=mesh.platform() != 'tpu')
  return out.astype(v.dtype), lse


def pallas_tpu_backward(q, k, v, mask, lse, delta, d_out, *, softcap, relative, scale):
  """Same contract as reference.backward."""
  from kernels import flash_tpu
  q, k, v, d_out = _for_mosaic('pallas_tpu', q, k, v, d_out)
  return *flash_tpu.backward(q, k, v, mask, lse, delta, d_out, softcap=softcap, scale=scale, interpret=mesh.platform() != 'tpu'), None


# Backends that give the log-sum-exp at no extra cost, and gradients of parts by it: (forward, backward).
PARTS = {'reference': (reference.attention, reference.backward), 'blocked': (blocked, blocked_backward),
         'pallas_tpu': (pallas_tpu_part, pallas_tpu_backward)}


def _for_mosaic(backend, *arrays):
  """Arrays in a type that Mosaic multiplies in the precision that is asked for."""
  precision = jax.config.jax_default_matmul_precision
  if precision not in PALLAS_PRECISIONS:
    raise NotImplementedError(f'backend {backend} has no products of jax_default_matmul_precision={precision!r}; use one of '
                              f"{list(PALLAS_PRECISIONS)}, or model.attention='xla'")
  if PALLAS_PRECISIONS[precision] or arrays[0].dtype == jnp.float16:  # f32 holds both narrow types exactly
    return tuple(x.astype(jnp.float32) for x in arrays)
  return arrays


def _padded(length):
  """A length filled up to whole blocks, and the largest block that it then is a multiple of."""
  whole = -(-length // LANES) * LANES
  return whole, next(size for size in (1024, 512, 256, LANES) if whole % size == 0)
