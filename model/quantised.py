"""How does a matrix of bytes multiply? int8 numbers with an f32 scale for each output, for generation only.

A step of decoding waits for weights, so that bytes are time. On TPUs and GPUs the bytes become numbers of the compute dtype on their way
into the product. XLA's CPU has no such product, but one of int8 with int8: there the other side is written in two digits of a byte, which
is 15 bits of the largest number of a row, and both digits are rows of one product.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels import cached
from model import params
from parallel import axes as ax, mesh

DIGIT = 128  # what a high digit counts
FEW = 8  # rows, above which a CPU makes numbers of the bytes for all of them at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bytes:
  """A parameter's value in bytes.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs and placeholders.

  Attributes:
    values: int8. scale: f32, what outputs are multiplied with: the shape of the matrix with 1 for each dimension that is summed over.
    summed: which dimensions are, counted from the last.
  """

  values: Any
  scale: Any
  summed: tuple[int, ...] = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, x: jax.Array, summed: tuple[int, ...]) -> 'Bytes':
    """The nearest numbers of a byte."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(summed, keepdims=True) / cached.BYTE
    return cls(jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale, summed)

  def gathered(self, axes: tuple[str | None, ...]) -> 'Bytes':
    """As it is computed with; axes: of the parameter."""
    scale = (None if size == 1 else axis for axis, size in zip(axes, self.scale.shape, strict=True))
    return Bytes(ax.gather(self.values, *axes), ax.gather(self.scale, *scale), self.summed)

  def whole(self, dtype: str) -> jax.Array:
    """The numbers."""
    return self.values.astype(dtype) * self.scale.astype(dtype)

  def product(self, formula: str, x: jax.Array, axes, dtype: str) -> jax.Array:
    """einsum of x and the matrix, whose summed dimensions are the last of x, and whose others are the last of the result."""
    before = x.shape[: x.ndim - len(self.summed)]
    outputs = tuple(
      size for n, size in enumerate(self.scale.shape) if n - self.scale.ndim not in self.summed
    )
    rows = math.prod(before)
    alone = (
      math.prod(jax.sharding.get_abstract_mesh().shape.values() or [1]) == 1
    )  # nothing is split over devices
    if mesh.platform() == 'cpu' and alone and rows <= FEW:
      y = self._digits(x, rows).reshape(*before, *outputs)
    else:
      times = jnp.einsum if axes is None else functools.partial(ax.einsum, axes=axes)
      y = times(formula, x, self.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * jnp.expand_dims(self.scale.reshape(outputs), range(y.ndim - len(outputs)))).astype(
      dtype
    )

  def _digits(self, x, rows):
    x = x.reshape(rows, -1).astype(jnp.float32)
    unit = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny) / (
      cached.BYTE * DIGIT
    )
    x = jnp.round(x / unit)
    high = jnp.round(x / DIGIT)
    digits = jnp.concatenate([high, x - DIGIT * high]).astype(jnp.int8)
    last = -1 in self.summed
    matrix = (
      self.values.reshape(-1, digits.shape[1]) if last else self.values.reshape(digits.shape[1], -1)
    )
    sums = jax.lax.dot_general(
      digits, matrix, (((1,), (int(last),)), ((), ())), preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    return (DIGIT * sums[:rows] + sums[rows:]) * unit


def in_bytes(model):
  """The model with its matrices in bytes.

  Experts stay as they are, and so does the table of tokens, which has a copy for scores.
  """

  def matrix(p):
    if p.kind != 'matrix' or p.wide or 'experts' in p.axes:
      return p
    outputs = len(p.axes) - p.inputs
    return p.replace(Bytes.of(p[...], tuple(range(-outputs - p.inputs, -outputs))))

  head = model.head.tokens if model.head.tokens is not None else model.embedding.tokens
  model = jax.tree.map(matrix, model, is_leaf=lambda x: isinstance(x, params.nnx.Variable))
  if model.head.bias is None:
    model.head.tokens = params.nnx.data(head.replace(Bytes.of(head[...], (-1,))))
  return model
