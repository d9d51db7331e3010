"""What is attention, obviously right? The jnp oracle that every backend is held to; it honours the whole spec.

B batch · T query length · S key length · N query heads · K key/value heads · G = N/K · H head width
"""
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.mask import Mask, Relative
from parallel import axes as ax


def attention(q: Float[Array, 'B T N H'], k: Float[Array, 'B S K H'], v: Float[Array, 'B S K Hv'], mask: Mask, *, softcap: float,
              sinks: Float[Array, 'N'] | None, relative: Relative | None,
              scale: float) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """softmax(scale q k, masked) v and its log-sum-exp; scores, softmax and log-sum-exp in f32 (or wider, as the inputs are).

  softcap: cap * tanh(score / cap), 0 for none. sinks: a logit per head that takes part in the softmax and carries no value
  (gpt-oss). relative: added to the scaled scores. A query that sees no key yields zeros and a log-sum-exp of -inf (of its sink,
  where there are sinks).
  """
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  G = N // K
  kv_heads, group = ('kv_heads', 'group') if K > 1 else (None, 'heads')  # one key for all heads: what is split is the group
  k, v = (ax.place(x, 'batch', 'length', kv_heads, 'head_width') for x in (k, v))
  q = jax.lax.reshape(q, (B, T, K, G, H), out_sharding=ax.out('batch', 'length', kv_heads, group, 'head_width'))
  scores = jnp.einsum('BTKGH,BSKH->BKGTS', q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32)) * scale
  if relative is not None:
    table = jax.lax.reshape(relative.table, (relative.table.shape[0], K, G), out_sharding=ax.out(None, kv_heads, group))
    rows = dataclasses.replace(relative, table=table).scores(*mask.positions(T, S))
    scores = scores + jnp.moveaxis(rows, (1, 2), (3, 4)).astype(scores.dtype)
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  seen = mask.allowed(T, S)[:, None, None]
  scores = jnp.where(seen, scores, -jnp.inf)
  top = scores.max(-1, keepdims=True)
  if sinks is not None:
    sink = jax.lax.reshape(sinks.astype(scores.dtype), (1, K, G, 1, 1), out_sharding=ax.out(None, kv_heads, group, None, None))
    top = jnp.maximum(top, sink)
  top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
  weights = jnp.exp(scores - top)
  total = weights.sum(-1, keepdims=True)
  if sinks is not None:
    total = total + jnp.exp(sink - top)
  lse = (top + jnp.log(total))[..., 0]
  weights = weights / jnp.where(total > 0, total, 1.0)
  out = jnp.einsum('BKGTS,BSKH->BTKGH', weights.astype(v.dtype), v)
  out = jax.lax.reshape(out, (B, T, N, v.shape[-1]), out_sharding=ax.out('batch', 'length', 'heads', 'head_width'))
  lse = jax.lax.reshape(jnp.moveaxis(lse, 3, 1), (B, T, N), out_sharding=ax.out('batch', 'length', 'heads'))
  return out, lse
