"""How wrong are the predictions? Cross-entropy with z-loss, by the passes of model.vocabulary.

Gradients are computed in the forward pass, by a custom rule: all tokens share one cotangent, so
that the second pass need not wait for it, and logits are not computed a third time.
Sums are over tokens, not means: gradients of sums accumulate exactly over microbatches, and stay
far from f16's underflow.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model import vocabulary as passes
from model.vocabulary import CHUNK, Law

Sums = dict[str, Float[Array, '']]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(
  x: Float[Array, 'B T D'],
  head: Float[Array, 'V D'],
  targets: Int[Array, 'B T'],
  weights: Float[Array, 'B T'],
  z_loss: float = 0.0,
  softcap: float = 0.0,
  chunk: int = CHUNK,
  vocabulary: int = 0,
) -> tuple[Float[Array, ''], Sums]:
  """Weighted sum over tokens of -log p(target) + z_loss * log(Z)^2, in f32.

  The second term is PaLM's (arXiv:2204.02311, section 5).

  Args:
    x, head, softcap, vocabulary: see vocabulary.Law.
    chunk: logits of a device that are alive at once.
    targets: next tokens, any valid id where none is predicted.
    weights: how much each counts, not differentiable; 0: not at all, NaN in its x included.
  Returns: the sum, differentiable in x and head; and, not differentiable, weighted sums: `nll` (the
    sum without z-loss), `tokens` (of the weights) and `correct` (predictions that no other token
    outscores).
  """

  def run(parts, arrays, place):
    weights, targets = arrays
    return _totals(passes.statistics(parts[0], targets, place.columns), weights, z_loss, place)

  law = Law(x, head, softcap=softcap, vocabulary=vocabulary)
  return passes.on_devices(run, (law,), (weights, targets), ((), ()), chunk)


def _forward(x, head, targets, weights, z_loss, softcap, chunk, vocabulary):
  def run(parts, arrays, place):
    weights, targets = arrays
    seen = passes.statistics(parts[0], targets, place.columns)
    factor = 1 + 2 * z_loss * seen.lse

    def slopes(logits, ids):
      p = jnp.exp(logits[0] - seen.lse[..., None])
      hit = passes.hits(targets, ids)
      return ((p * factor[..., None] - hit) * weights[..., None],)

    return _totals(seen, weights, z_loss, place), passes.pulled(parts, slopes, place)[0]

  law = Law(x, head, softcap=softcap, vocabulary=vocabulary)
  outputs = (((), ()), passes.gradient_axes(law))
  return passes.on_devices(run, (law,), (weights, targets), outputs, chunk)


def _backward(z_loss, softcap, chunk, vocabulary, gradients, cotangents):
  scale, _ = cotangents
  d_x, d_head = gradients
  return (d_x * scale).astype(d_x.dtype), (d_head * scale).astype(d_x.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _totals(seen, weights, z_loss, place):
  def total(value):
    return passes.sum_over((value * weights).sum(dtype=jnp.float32), place.rows)

  nll = total(seen.lse - seen.picked)
  return nll + total(z_loss * jnp.square(seen.lse)), {
    'nll': nll,
    'tokens': total(1.0),
    'correct': total(seen.picked >= seen.top),
  }
