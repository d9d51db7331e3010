"""A matrix whose shards were gathered ahead of its layer: ZeRO-1 and 2 (training/step.py)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from model.weights.weight import Weight, in_pieces
from parallel import axes as ax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered(Weight):
  """Attributes:
  shard: the array as it is stored, which the gradient belongs to.
  complete: the same whole and in the compute dtype, which is computed with.
  """

  shard: Any
  complete: Any
  axes: tuple[str | None, ...] = dataclasses.field(metadata={'static': True})

  @property
  def shape(self):
    return self.shard.shape

  @property
  def dtype(self):
    return self.complete.dtype

  def numbers(self, dtype):
    return _complete(self.shard, self.complete, self.axes).astype(dtype)

  def whole(self, dtype, product=True):
    return self.numbers(dtype)

  def layout(self):
    whole = tuple(None if axis in ax.EMBED else axis for axis in self.axes)
    return Gathered(self.axes, whole, self.axes)

  def gathered(self, dtype):
    return self

  def here(self, shards, dtype):
    return self

  def cut(self, axis, pieces):
    shard, complete = (in_pieces(x, axis, pieces) for x in (self.shard, self.complete))
    return Gathered(shard, complete, self.axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _complete(shard, complete, axes):
  return complete


_complete.defvjp(
  lambda shard, complete, axes: (complete, jnp.zeros((), shard.dtype)),
  lambda axes, shard, gradient: (ax.place(gradient, *axes).astype(shard.dtype), None),
)
