"""How is a batch too big for memory trained on? In microbatches whose summed gradients are those of
the whole.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from parallel import axes as ax


def accumulate(loss_fn, model, batch, scale, microbatches: int, rows: int = 1):
  """Gradients and sums of `loss_fn` over a batch, computed `microbatches` parts at a time.

  Args:
    loss_fn: (model, batch, scale) -> (loss, sums): both sums over rows, so that parts add up to the
      whole exactly.
    batch: a pytree of [B, ...] arrays, B a multiple of `microbatches` x `rows`.
    rows: that make up one record; they follow one another, and are of the same part.
  Returns: gradients of the summed loss in the parameters' dtype, and the summed sums. Parts are
    added in f32: a narrower sum would stop growing after a few.
  Raises ValueError for a batch that does not fall into so many parts of whole records, on every
    device that has rows of it.
  """
  check(batch, microbatches, rows)
  gradient = jax.grad(loss_fn, has_aux=True)
  if microbatches == 1:
    return gradient(model, batch, scale)

  def step(totals, part):
    return jax.tree.map(jnp.add, totals, gradient(model, part, scale)), None

  parts = jax.tree.map(lambda x: _split(x, microbatches, rows), batch)
  shapes = jax.eval_shape(gradient, model, jax.tree.map(lambda x: x[0], parts), scale)

  def wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, wide(x), out_sharding=getattr(x.sharding, 'spec', None)), shapes
  )
  totals, _ = jax.lax.scan(step, zeros, parts)
  return jax.tree.map(lambda total, x: total.astype(x.dtype), totals, shapes)


def check(batch, microbatches: int, rows: int) -> None:
  """Raises ValueError where records of so many rows would be cut apart, by parts or devices."""
  devices = ax.size('batch') if rows > 1 else 1
  for x in jax.tree.leaves(batch):
    if x.ndim < 1 or x.shape[0] % (microbatches * rows):
      raise ValueError(
        f'an array of shape {x.shape} in the batch does not fall into '
        f'train.accumulation={microbatches} parts of whole records of {rows} row(s); make '
        f'data.batch_size a multiple of {microbatches * rows}'
      )
    if x.shape[0] % (microbatches * rows * devices):
      raise ValueError(
        f'{x.shape[0]} rows over {devices} devices, in train.accumulation={microbatches} parts, '
        f'cut records of {rows} rows apart; make data.batch_size a multiple of '
        f'{microbatches * rows * devices}, or give other axes of the mesh more devices'
      )


def _split(x: jax.Array, microbatches: int, rows: int) -> jax.Array:
  """[B, ...] as [microbatches, B / microbatches, ...]."""
  # Parts are dealt out record by record, not cut off one after another: so every device's rows stay
  # on it.
  first, *rest = (*jax.typeof(x).sharding.spec, *(None,) * x.ndim)[: x.ndim]

  def reshaped(x, shape, *entries):
    return x.reshape(shape, out_sharding=PartitionSpec(*entries) if ax.explicit() else None)

  records = x.shape[0] // (microbatches * rows)
  if rows == 1:
    return jnp.moveaxis(
      reshaped(x, (records, microbatches, *x.shape[1:]), first, None, *rest), 1, 0
    )
  x = reshaped(x, (records, microbatches, rows, *x.shape[1:]), first, None, None, *rest)
  x = jnp.moveaxis(x, 1, 0)
  return reshaped(x, (microbatches, records * rows, *x.shape[3:]), None, first, *rest)
