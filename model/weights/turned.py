"""What is a matrix whose outputs lie in front of its inputs? One as a CPU multiplies it fastest.

XLA's CPU lays the right side of a product of few tokens out anew, whenever it multiplies; the left
side it reads as it is, if what is summed over comes last. So the weights are the left side
(parallel.one_cpu; of bytes, model.weights.int8). A table of embeddings lies so already.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.weights.int8 import Int8
from model.weights.low_rank import LowRank
from model.weights.plain import Plain
from model.weights.weight import Weight
from parallel import mesh, target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned(Weight):
  """A matrix that lies as `inner` does, whose last dimensions are what this one begins with.

  Attributes:
    inner: a Weight, [outputs, inputs]. inputs: how many dimensions a product sums over.
  """

  inner: Any
  inputs: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, weight: Int8 | Plain, inputs: int) -> 'Turned':
    """The same matrix, laid out anew."""
    rank = len(weight.axes)
    axes = (*weight.axes[inputs:], *weight.axes[:inputs])

    def turn(x):
      return jnp.moveaxis(x, range(-rank, inputs - rank), range(-inputs, 0))

    if isinstance(weight, Plain):
      return cls(Plain(turn(weight.value), axes), inputs)
    summed = tuple(range(-inputs, 0))
    return cls(Int8(turn(weight.values), turn(weight.scale), summed, axes), inputs)

  @property
  def coded(self):
    return self.inner.coded

  @property
  def axes(self):
    return self._back(self.inner.axes)

  @property
  def shape(self):
    shape, stacked = self.inner.shape, len(self.inner.shape) - len(self.inner.axes)
    return (*shape[:stacked], *self._back(shape[stacked:]))

  @property
  def dtype(self):
    return self.inner.dtype

  def _back(self, entries):
    return (*entries[-self.inputs :], *entries[: -self.inputs])

  def _at(self, axis: int) -> int:
    """A dimension's place in `inner`, both counted from the last."""
    rank = len(self.inner.axes)
    return (axis + rank - self.inputs) % rank - rank

  def numbers(self, dtype):
    x = self.inner.numbers(dtype)
    rank = len(self.inner.axes)
    return jnp.moveaxis(x, range(-self.inputs, 0), range(-rank, self.inputs - rank))

  def layout(self):
    return dataclasses.replace(self, inner=self.inner.layout())

  def gathered(self, dtype):
    return dataclasses.replace(self, inner=self.inner.gathered(dtype))

  def here(self, shards, dtype):
    return dataclasses.replace(self, inner=self.inner.here(shards, dtype))

  def cut(self, axis, pieces):
    return dataclasses.replace(self, inner=self.inner.cut(self._at(axis), pieces))

  def product(self, formula, x, dtype, axes=None):
    terms, result = formula.split('->')
    left, right = terms.split(',')
    turned = right[self.inputs :] + right[: self.inputs]
    return self.inner.product(f'{left},{turned}->{result}', x, dtype, axes)


def turned(model):
  """The model with its matrices of numbers and of bytes turned, where that is faster: on one CPU.
  Traced.

  Tables lie so already, and experts, of whom few are read, stay as they are, as does what is
  computed with in f32 whatever the compute dtype.
  """
  if mesh.platform() != 'cpu' or not target.alone():
    return model

  def turn(p):
    value = p.get_value()
    if p.kind != 'matrix' or p.wide or 'experts' in p.axes:
      return p
    if isinstance(value, LowRank):
      return p.replace(dataclasses.replace(value, base=_turned(value.base, p.inputs)))
    weight = value if isinstance(value, Weight) else Plain(value, p.axes)
    return p.replace(_turned(weight, p.inputs))

  return jax.tree.map(turn, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _turned(weight: Weight, inputs: int) -> Weight:
  return Turned.of(weight, inputs) if isinstance(weight, Int8 | Plain) else weight
