"""How does generation hold its matrices? In bytes, where that is asked for; and on a CPU cut into a part for each thread.

A step of decoding waits for weights, so that bytes are time. int8 has an f32 scale for each output. On TPUs and GPUs the bytes become
numbers of the compute dtype on their way into the product. XLA's CPU has no such product, but one of int8 with int8: there the other side
is written in two digits of a byte, which is 15 bits of the largest number of a row, and both digits are rows of one product.

XLA's CPU gives a product of one row, or of bytes, to one thread; products that do not wait for each other run side by side.
"""
import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from kernels import cached
from model import params
from parallel import axes as ax
from parallel import mesh

DIGIT = 128  # what a high digit counts
FEW = 8  # rows, above which a CPU makes numbers of the bytes for all of them at once
WIDTH = 128  # outputs, below which a part of a matrix is not worth a thread
THREADS = 4  # parts at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
  """A parameter's value, cut along its outputs.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs and placeholders.

  Attributes:
    parts: of the matrix, in the compute dtype or in int8.
    scale: f32, what outputs of int8 are multiplied with: the shape of the matrix with 1 for each dimension that is summed over; or None.
    summed: which dimensions are, counted from the last. cut: the outermost of the others (but for layers), along which parts are cut.
  """
  parts: Any
  scale: Any
  summed: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  cut: int = dataclasses.field(metadata={'static': True})

  def gathered(self, axes: tuple[str | None, ...]) -> 'Parts':
    """As it is computed with; axes: of the parameter."""
    if self.scale is None:  # of one device
      return self
    scale = (None if size == 1 else axis for axis, size in zip(axes, self.scale.shape, strict=True))
    return dataclasses.replace(self, parts=tuple(ax.gather(part, *axes) for part in self.parts), scale=ax.gather(self.scale, *scale))

  def whole(self, dtype: str) -> jax.Array:
    """The numbers."""
    x = jnp.concatenate([part.astype(dtype) for part in self.parts], self.cut)
    return x if self.scale is None else x * self.scale.astype(dtype)

  def product(self, formula: str, x: jax.Array, axes, dtype: str) -> jax.Array:
    """einsum of x and the matrix, whose summed dimensions are the last of x, and whose others are the last of the result."""
    rows = math.prod(x.shape[:x.ndim - len(self.summed)])
    at = self.cut + sum(n > self.cut for n in self.summed)  # of the result
    times = jnp.einsum if axes is None else functools.partial(ax.einsum, axes=axes)
    if self.scale is None:
      return jnp.concatenate([times(formula, x, part) for part in self.parts], at).astype(dtype)
    outputs = tuple(size for n, size in enumerate(self.scale.shape) if n - self.scale.ndim not in self.summed)
    if mesh.platform() == 'cpu' and _alone() and rows <= FEW:
      y = self._digits(x, rows).reshape(*x.shape[:x.ndim - len(self.summed)], *outputs)
    else:
      y = jnp.concatenate([times(formula, x, part.astype(x.dtype), preferred_element_type=jnp.float32) for part in self.parts], at)
    scale = self.scale.reshape(outputs)
    return (y * jnp.expand_dims(scale, range(y.ndim - scale.ndim))).astype(dtype)

  def _digits(self, x, rows):
    x = x.reshape(rows, -1).astype(jnp.float32)
    unit = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny) / (cached.BYTE * DIGIT)
    x = jnp.round(x / unit)
    high = jnp.round(x / DIGIT)
    digits = jnp.concatenate([high, x - DIGIT * high]).astype(jnp.int8)
    last = -1 in self.summed
    across = lambda part: part.reshape(-1, digits.shape[1]) if last else part.reshape(digits.shape[1], -1)
    sums = jnp.concatenate([jax.lax.dot_general(digits, across(part), (((1,), (int(last),)), ((), ())), preferred_element_type=jnp.int32)
                            for part in self.parts], -1).astype(jnp.float32)
    return (DIGIT * sums[:rows] + sums[rows:]) * unit


def held(model, weights: str = ''):
  """The model as generation holds it. weights: 'int8', or '' for matrices as they are.

  Experts stay as they are, and so do the table of tokens, which has a copy for scores if these are in bytes, and what latent attention
  multiplies in two ways.
  """
  threads = min(THREADS, os.cpu_count() or 1) if mesh.platform() == 'cpu' and _alone() else 1
  if not weights and threads == 1:
    return model

  def one(p, value, summed, cut):
    outputs = math.prod(size for d, size in enumerate(value.shape) if d - value.ndim not in summed)
    count = max(n for n in range(1, threads + 1) if n == 1 or not value.shape[cut] % n and outputs // n >= WIDTH)
    if not weights:
      return p.replace(Parts(tuple(jnp.split(value, count, cut)), None, summed, cut)) if count > 1 else p
    scale = jnp.abs(value.astype(jnp.float32)).max(summed, keepdims=True) / cached.BYTE
    value = jnp.round(value.astype(jnp.float32) / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return p.replace(Parts(tuple(jnp.split(value, count, cut)), scale, summed, cut))

  def matrix(p):
    if p.kind != 'matrix' or p.wide or 'experts' in p.axes or (not weights and 'latent' in p.axes):
      return p
    outputs = len(p.axes) - p.inputs
    return one(p, p[...], tuple(range(-outputs - p.inputs, -outputs)), -outputs)
  own, head = model.head.tokens is not None, model.head.tokens if model.head.tokens is not None else model.embedding.tokens
  model = jax.tree.map(matrix, model, is_leaf=lambda x: isinstance(x, params.nnx.Variable))
  if (own or weights) and model.head.bias is None:
    model.head.tokens = params.nnx.data(one(head, head[...], (-1,), -2))
  return model


def _alone() -> bool:
  """Whether nothing is split over devices."""
  return math.prod(jax.sharding.get_abstract_mesh().shape.values() or [1]) == 1
