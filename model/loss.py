"""How wrong are the predictions? Cross-entropy that never holds the [B, T, V] logits: chunked, vocabulary-sharded, z-loss.

A custom rule computes gradients chunk by chunk in the forward pass, while a chunk's logits are at hand: none are kept and
none are computed twice (the idea of Liger's fused linear cross-entropy, arXiv:2410.10989). Sums are over tokens, not means:
gradients of sums accumulate exactly over microbatches, and stay far from f16's underflow.

B batch · T length · D width · V vocabulary (of this device, inside) · C tokens of a chunk, in each row
"""
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from parallel import axes as ax

IGNORE = -1  # a target that is not predicted
CHUNK_TOKENS = 1024  # tokens of a device whose logits are alive at once

Sums = dict[str, Float[Array, '']]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def cross_entropy(x: Float[Array, 'B T D'], head: Float[Array, 'V D'], targets: Int[Array, 'B T'], z_loss: float = 0.0,
                  softcap: float = 0.0, chunk_tokens: int = CHUNK_TOKENS) -> tuple[Float[Array, ''], Sums]:
  """Sum over predicted tokens of -log p(target) + z_loss * log(Z)^2 (PaLM, arXiv:2204.02311, section 5), in f32.

  Args:
    x: final hidden states. head: output embedding, gathered over fsdp, its V dimension split over `tensor` or whole.
    targets: next tokens; IGNORE where none is predicted. softcap: cap * tanh(logit / cap), 0 for none.
    chunk_tokens: tokens of a device whose logits are alive at once.
  Returns: the sum, differentiable in x and head; and, not differentiable, `nll` (the sum without z-loss), `tokens` and
    `correct` (predictions that no other token outscores).
  """
  return _over_mesh(_sums, (z_loss, softcap, chunk_tokens), gradients=False)(x, head, targets)


def _forward(x, head, targets, z_loss, softcap, chunk_tokens):
  outputs, gradients = _over_mesh(_sums_and_gradients, (z_loss, softcap, chunk_tokens), gradients=True)(x, head, targets)
  return outputs, gradients


def _backward(z_loss, softcap, chunk_tokens, gradients, cotangents):
  scale, _ = cotangents
  d_x, d_head = gradients  # d_head, a sum over all tokens, is still f32: f16 could not hold it before it is scaled
  return (d_x * scale).astype(d_x.dtype), (d_head * scale).astype(d_x.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _over_mesh(function, settings, gradients: bool):
  """`function` on each device's rows and columns of the vocabulary; without a mesh, on everything."""
  rows, columns = ax.mesh_axes('batch', 'length'), ax.mesh_axes('vocab')
  activations, table = ('batch', 'length', 'width'), ('vocab', None)
  sums = ((), ())
  return ax.local(functools.partial(function, settings=settings, rows=rows, columns=columns),
                  (activations, table, ('batch', 'length')), (sums, (activations, table)) if gradients else sums)


def _sums(x, head, targets, *, settings, rows, columns):
  z_loss, softcap, chunk_tokens = settings

  def step(totals, chunk):
    values, _ = _score(*chunk, head, z_loss, softcap, columns)
    return jax.tree.map(jnp.add, totals, values), None
  totals, _ = jax.lax.scan(step, _zeros(), _chunks(x, targets, chunk_tokens))
  return _outputs(totals, rows)


def _sums_and_gradients(x, head, targets, *, settings, rows, columns):
  z_loss, softcap, chunk_tokens = settings

  def step(carry, chunk):
    totals, d_head = carry
    values, d_logits = _score(*chunk, head, z_loss, softcap, columns)
    d_logits = d_logits.astype(x.dtype)
    d_x = _sum_over(jnp.einsum('BCV,VD->BCD', d_logits, head), columns)
    # As [D, V], so that what a CPU has to transpose for the product is the chunk of x, not of the logits (7% of a step).
    d_head += jnp.einsum('BCD,BCV->DV', chunk[0], d_logits, preferred_element_type=jnp.float32)
    return (jax.tree.map(jnp.add, totals, values), d_head), d_x
  start = _zeros(), jnp.zeros(head.shape[::-1], jnp.float32)
  (totals, d_head), d_x = jax.lax.scan(step, start, _chunks(x, targets, chunk_tokens))
  d_x = jnp.moveaxis(d_x, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, :x.shape[1]]
  return _outputs(totals, rows), (d_x, _sum_over(d_head.T, rows))


def _score(x, targets, head, z_loss, softcap, columns):
  """Sums of a chunk, and the gradient of their loss with respect to its logits [B, C, V], f32."""
  V = head.shape[0]
  logits = jnp.einsum('BCD,VD->BCV', x, head, preferred_element_type=jnp.float32)
  if softcap:
    logits = softcap * jnp.tanh(logits / softcap)
  top = logits.max(-1)
  top = jax.lax.pmax(top, columns) if columns else top
  exps = jnp.exp(logits - top[..., None])
  total = _sum_over(exps.sum(-1), columns)
  lse = top + jnp.log(total)
  first = jax.lax.axis_index(columns) * V if columns else 0
  # Comparing with an iota picks the target without a gather, which a vocabulary-sharded row could not answer alone.
  hit = (targets - first)[..., None] == jax.lax.broadcasted_iota(targets.dtype, (1, 1, V), 2)
  picked = _sum_over(jnp.where(hit, logits, 0).sum(-1), columns)
  counted = targets != IGNORE
  nll = jnp.where(counted, lse - picked, 0)
  penalty = jnp.where(counted, z_loss * jnp.square(lse), 0)
  values = {'loss': (nll + penalty).sum(), 'nll': nll.sum(), 'tokens': counted.sum(dtype=jnp.float32),
            'correct': (counted & (picked >= top)).sum(dtype=jnp.float32)}
  factor = (1 + 2 * z_loss * lse) / total
  d_logits = jnp.where(counted[..., None], exps * factor[..., None] - hit, 0)
  if softcap:
    d_logits = d_logits * (1 - jnp.square(logits / softcap))
  return values, d_logits


def _chunks(x, targets, chunk_tokens):
  """x [n, B, C, D] and targets [n, B, C]: chunks along T, the last one padded with targets that are not predicted."""
  B, T, D = x.shape
  C = min(T, max(1, chunk_tokens // B))
  pad = -T % C
  x = jnp.pad(x, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, C, D)
  targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORE).reshape(B, -1, C)
  return jnp.moveaxis(x, 1, 0), jnp.moveaxis(targets, 1, 0)


def _zeros():
  return {name: jnp.float32(0) for name in ('loss', 'nll', 'tokens', 'correct')}


def _outputs(totals, rows):
  totals = jax.tree.map(lambda value: _sum_over(value, rows), totals)
  return totals.pop('loss'), totals


def _sum_over(value, axes):
  return jax.lax.psum(value, axes) if axes else value
