"""How wrong are the predictions? Cross-entropy that never holds the [B, T, V] logits: chunked and sharded by vocabulary, z-loss.

One pass over chunks of the vocabulary finds each token's log-sum-exp, a second one computes a chunk's logits again, and its gradients
from them (the idea of Cut Cross-Entropy, arXiv:2411.09009): the gradient of a chunk's rows of the head is whole at once, so that
nothing as large as the head is carried from chunk to chunk. A vocabulary that fits in one chunk is gone through once.
Gradients are computed in the forward pass, by a custom rule. Sums are over tokens, not means: gradients of sums accumulate exactly
over microbatches, and stay far from f16's underflow.

B batch · T length · D width · V vocabulary (of this device, inside) · C rows of a chunk of it
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from parallel import axes as ax, zero

IGNORE = -1  # a target that is not predicted
CHUNK = 2**25  # logits of a device that are alive at once

Sums = dict[str, Float[Array, '']]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def cross_entropy(
  x: Float[Array, 'B T D'],
  head: Float[Array, 'V D'],
  targets: Int[Array, 'B T'],
  z_loss: float = 0.0,
  softcap: float = 0.0,
  chunk: int = CHUNK,
) -> tuple[Float[Array, ''], Sums]:
  """Sum over predicted tokens of -log p(target) + z_loss * log(Z)^2 (PaLM, arXiv:2204.02311, section 5), in f32.

  Args:
    x: final hidden states. head: output embedding, split as it is stored; a D that `embed` does not split is whole.
    targets: next tokens; IGNORE where none is predicted. softcap: cap * tanh(logit / cap), 0 for none.
    chunk: logits of a device that are alive at once.
  Returns: the sum, differentiable in x and head; and, not differentiable, `nll` (the sum without z-loss), `tokens` and
    `correct` (predictions that no other token outscores).
  """
  return _over_mesh(_sums, (z_loss, softcap, chunk), False, x, head, targets)


def _forward(x, head, targets, z_loss, softcap, chunk):
  return _over_mesh(_sums_and_gradients, (z_loss, softcap, chunk), True, x, head, targets)


def _backward(z_loss, softcap, chunk, gradients, cotangents):
  scale, _ = cotangents
  d_x, d_head = gradients
  return (d_x * scale).astype(d_x.dtype), (d_head * scale).astype(d_x.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _over_mesh(function, settings, gradients, x, head, targets):
  """`function` of each device's rows and columns of the vocabulary; without a mesh, of everything."""
  embed = ax.whole_or('embed', head.shape[1])
  activations, table, tokens, sums = (
    ('batch', 'length', 'width'),
    ('vocab', embed),
    ('batch', 'length'),
    ((), ()),
  )
  run = functools.partial(
    function,
    settings=settings,
    rows=ax.mesh_axes(*tokens),
    columns=ax.mesh_axes('vocab'),
    shards=ax.mesh_axes(embed) if embed else (),
  )
  return ax.local(
    run, (activations, table, tokens), (sums, (activations, table)) if gradients else sums
  )(x, head, targets)


def _sums(x, head, targets, *, settings, rows, columns, shards):
  z_loss, softcap, chunk = settings
  chunks = _chunks(_gathered(head, shards), x, chunk, columns)
  return _totals(_statistics(x, chunks, targets, softcap, columns), targets, z_loss, rows)


def _sums_and_gradients(x, head, targets, *, settings, rows, columns, shards):
  z_loss, softcap, chunk = settings
  chunks = _chunks(_gathered(head, shards), x, chunk, columns)
  statistics = _statistics(x, chunks, targets, softcap, columns)
  lse = statistics[0]
  factor, counted = 1 + 2 * z_loss * lse, targets != IGNORE
  copies = tuple(axis for axis in rows if axis not in shards)

  def step(d_x, chunk):
    logits, hit = _logits(x, chunk, targets, softcap)
    d_logits = jnp.where(
      counted[..., None], jnp.exp(logits - lse[..., None]) * factor[..., None] - hit, 0
    )
    if softcap:
      d_logits = d_logits * (1 - jnp.square(jnp.where(jnp.isfinite(logits), logits, 0) / softcap))
    d_logits = d_logits.astype(x.dtype)
    d_x += jnp.einsum('BTC,CD->BTD', d_logits, chunk['head'], preferred_element_type=jnp.float32)
    # As [D, C], so that what a CPU has to transpose for the product is x, not the logits (7% of a step).
    d_head = jnp.einsum('BTD,BTC->DC', x, d_logits, preferred_element_type=jnp.float32)
    if (
      x.dtype == jnp.bfloat16
    ):  # as every other gradient crosses devices; f16 could not hold the sum before it is scaled
      d_head = d_head.astype(x.dtype)
    d_head = zero.reduce_scatter(d_head, shards, 0) if shards else d_head
    return d_x, _sum_over(d_head, copies).T

  d_x, d_head = jax.lax.scan(step, jnp.zeros(x.shape, jnp.float32), chunks)
  d_x = _sum_over(d_x.astype(x.dtype), columns)
  return _totals(statistics, targets, z_loss, rows), (
    d_x,
    d_head.reshape(-1, d_head.shape[-1])[: head.shape[0]],
  )


def _statistics(x, chunks, targets, softcap, columns):
  """Of each token, [B, T] f32: log-sum-exp of the logits, the target's logit, the largest logit."""

  def step(carry, chunk):
    top, total, picked = carry
    logits, hit = _logits(x, chunk, targets, softcap)
    higher = jnp.maximum(top, logits.max(-1))
    total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[..., None]).sum(-1)
    return (higher, total, picked + jnp.where(hit, logits, 0).sum(-1)), None

  zeros = jnp.zeros(targets.shape, jnp.float32)
  (own, total, picked), _ = jax.lax.scan(step, (zeros - jnp.inf, zeros, zeros), chunks)
  top = jax.lax.pmax(own, columns) if columns else own
  return (
    top + jnp.log(_sum_over(total * jnp.exp(own - top), columns)),
    _sum_over(picked, columns),
    top,
  )


def _logits(x, chunk, targets, softcap):
  """Of a chunk of the vocabulary, f32 [B, T, C], -inf where it has no row; and which of them are the targets'."""
  logits = jnp.einsum('BTD,CD->BTC', x, chunk['head'], preferred_element_type=jnp.float32)
  if softcap:
    logits = softcap * jnp.tanh(logits / softcap)
  # Comparing with ids picks the target without a gather, which a vocabulary-sharded row could not answer alone.
  ids = chunk['ids'][None, None]
  return jnp.where(ids >= 0, logits, -jnp.inf), (targets[..., None] == ids) & (ids >= 0)


def _chunks(head, x, chunk, columns):
  """The head in chunks, 'head' [n, C, D] and 'ids' [n, C], -1 for rows that fill up the last one."""
  V, rows = head.shape[0], max(1, chunk // (x.shape[0] * x.shape[1]))
  n = -(-V // rows)
  # A few chunks more rather than a copy of the head, filled up.
  n = next((more for more in range(n, min(2 * n, V) + 1) if V % more == 0), n)
  pad = -V % n
  ids = jnp.arange(V + pad, dtype=jnp.int32)
  ids = jnp.where(ids < V, ids + (jax.lax.axis_index(columns) * V if columns else 0), -1)
  return {
    'head': jnp.pad(head, ((0, pad), (0, 0))).reshape(n, -1, head.shape[1]),
    'ids': ids.reshape(n, -1),
  }


def _gathered(head, shards):
  return zero.all_gather(head, shards, 1) if shards else head


def _totals(statistics, targets, z_loss, rows):
  lse, picked, top = statistics
  counted = targets != IGNORE

  def total(value):
    return _sum_over(jnp.where(counted, value, 0).sum(dtype=jnp.float32), rows)

  nll = total(lse - picked)
  return nll + total(z_loss * jnp.square(lse)), {
    'nll': nll,
    'tokens': total(1.0),
    'correct': total(picked >= top),
  }


def _sum_over(value, axes):
  return jax.lax.psum(value, axes) if axes else value
