"""How is a batch too big for memory trained on? In microbatches whose summed gradients are those of the whole."""

import jax
import jax.numpy as jnp

from parallel import axes as ax


def accumulate(loss_fn, model, batch, scale, microbatches: int):
  """Gradients and sums of `loss_fn` over a batch, computed `microbatches` parts at a time.

  Args:
    loss_fn: (model, batch, scale) -> (loss, sums): both sums over tokens, so that parts add up to the whole exactly.
    batch: a pytree of [B, ...] arrays, B a multiple of `microbatches`.
  Returns: gradients of the summed loss in the parameters' dtype, and the summed sums. Parts are added in f32: a narrower sum
    would stop growing after a few.
  """
  gradient = jax.grad(loss_fn, has_aux=True)
  if microbatches == 1:
    return gradient(model, batch, scale)

  def split(x):
    # Strided parts: every device's rows stay on it.
    x = x.reshape(
      x.shape[0] // microbatches,
      microbatches,
      *x.shape[1:],
      out_sharding=ax.out('batch', None, 'length'),
    )
    return jnp.moveaxis(x, 1, 0)

  def step(totals, part):
    return jax.tree.map(jnp.add, totals, gradient(model, part, scale)), None

  parts = jax.tree.map(split, batch)
  shapes = jax.eval_shape(gradient, model, jax.tree.map(lambda x: x[0], parts), scale)

  def wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, wide(x), out_sharding=getattr(x.sharding, 'spec', None)), shapes
  )
  totals, _ = jax.lax.scan(step, zeros, parts)
  return jax.tree.map(lambda total, x: total.astype(x.dtype), totals, shapes)
