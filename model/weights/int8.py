"""How does a matrix of bytes multiply? int8 numbers, an f32 scale for each output; to generate.

A step of decoding waits for weights, so that bytes are time. On TPUs and GPUs the bytes become
numbers of the compute dtype on their way into the product. XLA's CPU has no such product, but one
of int8 with int8: there the other side is written in two digits of a byte, which is 15 bits of the
largest number of a row, and both digits are rows of one product.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels import cached, quantised_matmul
from model.weights import read
from model.weights.weight import Weight, along, gathered_here, in_pieces
from parallel import axes as ax, mesh, target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Weight):
  """A matrix in bytes.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs and
  placeholders.

  Attributes:
    values: int8.
    scale: f32, what outputs are multiplied with: the shape of the matrix with 1 for each dimension
      that is summed over. An expert has its own.
    summed: which dimensions are, counted from the last.
  """

  values: Any
  scale: Any
  summed: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  axes: tuple[str | None, ...] = dataclasses.field(metadata={'static': True})
  coded = True

  @classmethod
  def of(
    cls,
    x: jax.Array,
    summed: tuple[int, ...],
    axes: tuple[str | None, ...],
    shrink: jax.Array | float = 1.0,
  ) -> 'Int8':
    """The nearest numbers of a byte. shrink: of the largest of each output, so much is one; what is
    beyond is clipped.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(summed, keepdims=True) * shrink / cached.BYTE
    values = jnp.round(x / jnp.where(scale > 0, scale, 1))
    values = jnp.clip(values, -cached.BYTE, cached.BYTE).astype(jnp.int8)
    return cls(values, scale, summed, axes)

  @property
  def shape(self):
    return self.values.shape

  @property
  def dtype(self):
    return self.scale.dtype

  @property
  def scale_axes(self) -> tuple[str | None, ...]:
    """As `axes`, of the scale."""
    rank = len(self.axes)
    return tuple(None if n - rank in self.summed else axis for n, axis in enumerate(self.axes))

  def numbers(self, dtype):
    # The scale in f32: rounded to bf16 it would move all numbers of an output together.
    return (self.values.astype(jnp.float32) * self.scale).astype(dtype)

  def layout(self):
    return Int8(self.axes, self.scale_axes, self.summed, self.axes)

  def _with(self, values, scale):
    return Int8(values, scale, self.summed, self.axes)

  def gathered(self, dtype):
    return self._with(
      ax.gather(self.values, *along(self.axes, self.values)),
      ax.gather(self.scale, *along(self.scale_axes, self.scale)),
    )

  def here(self, shards, dtype):
    return self._with(
      gathered_here(self.values, self.axes, shards),
      gathered_here(self.scale, self.scale_axes, shards),
    )

  def cut(self, axis, pieces):
    if axis in self.summed:  # all pieces of a sum have its scale
      scale = jnp.broadcast_to(self.scale[None], (pieces, *self.scale.shape))
    else:
      scale = in_pieces(self.scale, axis, pieces)
    return self._with(in_pieces(self.values, axis, pieces), scale)

  def whole(self, dtype, product=True):
    return self.gathered(dtype).numbers(dtype)

  def product(self, formula, x, dtype, axes=None):
    if not self._takes(formula):
      return super().product(formula, x, dtype, axes)
    weight = self.gathered(dtype)
    before = x.shape[: x.ndim - len(self.summed)]
    outputs, rows = weight._outputs(), math.prod(before)
    if mesh.platform() == 'cpu' and target.alone() and rows <= quantised_matmul.FEW:
      y = weight._in_digits(x, rows).reshape(*before, *outputs)
    elif axes is None:
      y = jnp.einsum(formula, x, weight.values.astype(x.dtype), preferred_element_type=jnp.float32)
    else:
      values = weight.values.astype(x.dtype)
      y = ax.einsum(formula, x, values, axes, preferred_element_type=jnp.float32)
    scale = weight.scale.reshape(outputs)
    return (y * jnp.expand_dims(scale, range(y.ndim - scale.ndim))).astype(dtype)

  def _outputs(self):
    rank = self.values.ndim
    return tuple(size for n, size in enumerate(self.values.shape) if n - rank not in self.summed)

  def _takes(self, formula: str) -> bool:
    """Whether a product sums over what has one scale, and over nothing else.

    Those are the last dimensions of x, and the matrix's others the last of the result. In other
    products (against a cache, MLA sums over what are outputs elsewhere) the numbers are taken.
    """
    terms, result = formula.split('->')
    left, right = terms.split(',')
    summed = ''.join(right[n] for n in self.summed)
    outputs = ''.join(letter for letter in right if letter not in summed)
    return left.endswith(summed) and result.endswith(outputs) and not set(outputs) & set(left)

  def _in_digits(self, x, rows):
    x = x.reshape(rows, -1).astype(jnp.float32)
    last = -1 in self.summed
    shape = (-1, x.shape[1]) if last else (x.shape[1], -1)
    return _digits(x, self.values.reshape(shape), int(last))

  def rows(self, ids, mode=None):
    return self.values.at[ids].get(mode=mode) * self.scale.at[ids].get(mode=mode)

  def scores(self, x, bias, dtype):
    y = self.product('...D,VD->...V', x, 'float32')
    return y if bias is None else y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))

  def each(self, rows):
    values = self.values.astype(rows.dtype)
    y = jnp.einsum('ECD,EDF->ECF', rows, values, preferred_element_type=jnp.float32)
    return (y * self.scale).astype(rows.dtype)

  def grouped(self, rows, groups):
    # Sums of bytes are up to 127 times those of the numbers, which f16 might not hold.
    x = rows.astype(jnp.float32) if rows.dtype == jnp.float16 else rows
    # Numbers are made of the bytes of experts that have rows, so that of the others none is read.
    return (groups.multiply(x, self.values) * self.scale[groups.of_row, 0]).astype(rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _digits(x, values, last):
  """x [rows, K] times int8 numbers, whose dimension `last` is summed over.

  The rounding has no slope: the gradient, where an adapter is trained on bytes, is the product's.
  """
  rows = len(x)
  digits, unit = quantised_matmul.digits(x)
  # The bytes go first where they can: XLA's CPU lays out anew what goes second (see `turned`).
  operands = ((values, 1), (digits, 1)) if last else ((digits, 1), (values, 0))
  (left, axis), (right, other) = operands
  contracted = (((axis,), (other,)), ((), ()))
  sums = jax.lax.dot_general(left, right, contracted, preferred_element_type=jnp.int32)
  sums = (sums.T if last else sums).astype(jnp.float32)
  return (quantised_matmul.DIGIT * sums[:rows] + sums[rows:]) * unit


def _digits_backward(last, values, cotangent):
  contracted = (((1,), (1 - last,)), ((), ()))
  return jax.lax.dot_general(cotangent, values.astype(cotangent.dtype), contracted), None


_digits.defvjp(lambda x, values, last: (_digits(x, values, last), values), _digits_backward)


def in_bytes(model):
  """The model with its matrices in bytes, the output embedding among them.

  Routers, which are computed with in f32, stay as they are, and so do norms and biases. So does the
  table that tokens are looked up in: a step reads a row of it for each token, which is no time, and
  bytes would make the model's input less exact. Where it is the output embedding, too, that becomes
  a copy in bytes. What is in codes already stays as it is.
  """

  def matrix(p):
    if p.kind != 'matrix' or p.wide or read(p).coded:
      return p
    outputs = len(p.axes) - ('experts' in p.axes) - p.inputs
    summed = tuple(range(-outputs - p.inputs, -outputs))
    return p.replace(Int8.of(read(p).numbers('float32'), summed, p.axes))

  head = model.head.tokens if model.head.tokens is not None else model.embedding.tokens
  model = jax.tree.map(matrix, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
  if not read(head).coded:
    numbers = read(head).numbers('float32')
    model.head.tokens = nnx.data(head.replace(Int8.of(numbers, (-1,), head.axes)))
  return model
