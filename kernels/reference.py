"""What is attention, obviously right? The jnp oracle that every backend is held to; it honours the
whole spec.

B batch · T query length · S key length · N query heads · K key/value heads · G = N/K · H head width
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.scoring import Scoring
from parallel import axes as ax


def attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  scoring: Scoring,
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """softmax(scale q k, masked) v and its log-sum-exp; scores, softmax and log-sum-exp in f32 (or
  wider, as the inputs are).

  A query that sees no key yields zeros and a log-sum-exp of -inf (of its sink, where there are
  sinks).
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  G = N // K
  kv_heads, group = _split(K)
  k, v = (ax.place(x, 'batch', 'length', kv_heads, 'head_width') for x in (k, v))
  q = jax.lax.reshape(
    q, (B, T, K, G, H), out_sharding=ax.out('batch', 'length', kv_heads, group, 'head_width')
  )
  # Queries and results are moved where products take and leave them, and not scores, which are S/H
  # times as many: on a CPU these would be copied.
  q = jnp.moveaxis(q, 1, 3)
  scores = _scores(_product('BKGTH,BSKH->BKGTS', q, k) * scoring.scale, scoring.relative, scoring)

  # Weights are relative to the greatest score, which cancels: no gradient goes through it. Where
  # nothing is seen it is -inf, and differences with it would be NaN.
  top = scores.max(-1, keepdims=True)
  if scoring.sinks is not None:
    sink = jax.lax.reshape(
      scoring.sinks.astype(scores.dtype),
      (1, K, G, 1, 1),
      out_sharding=ax.out(None, kv_heads, group, None, None),
    )
    top = jnp.maximum(top, sink)
  top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
  weights = jnp.exp(scores - top)
  total = weights.sum(-1, keepdims=True)
  if scoring.sinks is not None:
    total = total + jnp.exp(sink - top)
  # The log-sum-exp in f32, before weights are rounded to the values' type. Where nothing is seen,
  # no sink either, the slope of log(0) would make a gradient of 0 NaN.
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  lse = (top + jnp.where(empty, -jnp.inf, jnp.log(total)))[..., 0]
  weights = weights / total
  if scoring.dropout is not None:
    weights = scoring.dropout.of_weights(weights)
  out = jnp.einsum('BKGTS,BSKH->BKGTH', weights.astype(v.dtype), v)
  out = jax.lax.reshape(
    jnp.moveaxis(out, 3, 1),
    (B, T, N, v.shape[-1]),
    out_sharding=ax.out('batch', 'length', 'heads', 'head_width'),
  )
  lse = jax.lax.reshape(
    jnp.moveaxis(lse, 3, 1), (B, T, N), out_sharding=ax.out('batch', 'length', 'heads')
  )
  return out, lse


def backward(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  scoring: Scoring,
  lse: Float[Array, 'B T N'],
  delta: Float[Array, 'B T N'],
  d_out: Float[Array, 'B T N Hv'],
):
  """Gradients of a part of attention: of queries whose softmax also ran over keys that are not
  here.

  Args:
    lse: of all keys. delta: sum over Hv of d_out * out, less the gradient of lse; out being that of
      all keys. With these the gradient of a score needs no other key (FlashAttention-2,
      arXiv:2307.08691, algorithm 2).
  Returns: gradients of q, k, v and relative, at least f32. Nothing is split here: for what runs on
    one device.
  """
  B, T, N, H = q.shape
  K, Hv = v.shape[2:]

  def grouped(x):
    return x.reshape(B, T, K, N // K, *x.shape[3:])

  def by_score(x):
    return jnp.moveaxis(grouped(x), 1, 3)[..., None]

  q, d_out = grouped(q), grouped(d_out)
  scores, pull = jax.vjp(
    lambda x, relative: _scores(x, relative, scoring),
    _product('BTKGH,BSKH->BKGTS', q, k) * scoring.scale,
    scoring.relative,
  )
  weights = jnp.exp(
    scores - by_score(jnp.where(lse == -jnp.inf, jnp.inf, lse))
  )  # of a query that sees nothing: 0
  d_weights = _product('BTKGH,BSKH->BKGTS', d_out, v)
  d_scores, d_relative = pull(weights * (d_weights - by_score(delta)))
  d_scores = (d_scores * scoring.scale).astype(q.dtype)
  d_q = _product('BKGTS,BSKH->BTKGH', d_scores, k).reshape(B, T, N, H)
  return (
    d_q,
    _product('BKGTS,BTKGH->BSKH', d_scores, q),
    _product('BKGTS,BTKGH->BSKH', weights.astype(v.dtype), d_out),
    d_relative,
  )


def _product(formula, x, y):
  return jnp.einsum(formula, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _split(K):
  """Logical axes of K key heads and of their queries: of one key for all heads, what is split is
  the group.
  """
  return ('kv_heads', 'group') if K > 1 else (None, 'heads')


def _scores(scores, relative, scoring):
  """Scaled products [B, K, G, T, S] as the softmax takes them; `relative` apart, since it is
  differentiated.
  """
  mask, softcap = scoring.mask, scoring.softcap
  K, G, T, S = scores.shape[1:]
  if relative is not None:
    table = jax.lax.reshape(
      relative.table, (relative.table.shape[0], K, G), out_sharding=ax.out(None, *_split(K))
    )
    rows = dataclasses.replace(relative, table=table).scores(*mask.positions(T, S))
    scores = scores + jnp.moveaxis(rows, (1, 2), (3, 4)).astype(scores.dtype)
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  return jnp.where(mask.allowed(T, S)[:, None, None], scores, -jnp.inf)
