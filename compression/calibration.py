"""What do a layer's matrices multiply? Sums over the tokens of calibration, taken where each matrix
is used.

`Watched` is a weight around another one. It multiplies as that does, and what it multiplies passes
through `_seen`, which has a second input of zeros and lets the tokens through. The derivative of
anything by these zeros is defined to be the statistics. So jax.grad carries them out of scans and
of experts' shards, and no layer needs to know; what else a backward pass has is dead code.

B batch · T length · I inputs of a matrix · E experts · M rows of all experts
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.grouped_matmul import grouped_matmul
from model.params import by_name, is_param, name_of
from model.weights import read
from model.weights.above import Above
from model.weights.scheme import summed_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputStatistics:
  """Of what a matrix was multiplied with: X [tokens, I], all f32; of experts [E, ..] each.

  Attributes:
    count [*E]: tokens. absolute, squares [*E, I]: sums of |x| and x^2. largest [*E, I]: of |x|.
    products [*E, I, I]: X^T X; None where nobody asked.
  """

  count: Any
  absolute: Any
  squares: Any
  largest: Any
  products: Any

  @classmethod
  def zeros(cls, lead: tuple[int, ...], inputs: int, products: bool) -> 'InputStatistics':
    """Of no token yet."""
    row = jnp.zeros((*lead, inputs), jnp.float32)
    square = jnp.zeros((*lead, inputs, inputs), jnp.float32) if products else None
    return cls(jnp.zeros(lead, jnp.float32), row, row, row, square)

  def and_of(self, other: 'InputStatistics') -> 'InputStatistics':
    """Of the tokens of both."""
    both = jax.tree.map(jnp.add, self, other)
    return dataclasses.replace(both, largest=jnp.maximum(self.largest, other.largest))

  @property
  def size(self) -> int:
    """Bytes."""
    return sum(4 * math.prod(x.shape) for x in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watched(Above):
  """A matrix whose tokens are added up.

  Attributes:
    base: the weight. zeros: what statistics are the derivative by.
    real: [B, T], which tokens are none of padding; None for experts, who get none of it.
    inputs: how many dimensions the matrix sums over.
  """

  base: Any
  zeros: Any
  real: Any
  inputs: int = dataclasses.field(metadata={'static': True})

  def numbers(self, dtype):
    return self.base.numbers(dtype)

  def layout(self):
    first = ('experts',) if 'experts' in self.axes else ()
    lead = len(self.shape) - len(self.axes)  # of layers that are stacked

    def axes_of(x):
      return first + (None,) * (x.ndim - len(first) - lead)

    zeros = jax.tree.map(axes_of, self.zeros)
    real = None if self.real is None else ('batch', 'length')
    return Watched(self.base.layout(), zeros, real, self.inputs)

  def cut(self, axis, pieces):
    raise NotImplementedError(
      'experts that are computed in pieces are not watched; calibrate on one device'
    )

  def product(self, formula, x, dtype, axes=None):
    left, right = formula.split('->')[0].split(',')
    if not left.endswith(right[: self.inputs]):
      raise NotImplementedError(f'{formula}: only products that sum over the inputs are watched')
    lead = x.shape[: x.ndim - self.inputs]
    real = jnp.ones(lead, bool) if self.real is None else self.real
    x = _seen(_of_tokens, x, self.zeros, real.reshape(-1))
    return self.base.product(formula, x, dtype, axes)

  def each(self, rows):
    return self.base.each(_seen(_of_each, rows, self.zeros, None))

  def grouped(self, rows, groups):
    return self.base.grouped(_seen(_of_groups, rows, self.zeros, groups), groups)


def _seen(count: Callable, x, zeros: InputStatistics, which):
  """x; count: (x, zeros, which) -> the statistics, which are called the derivative by `zeros`."""

  @jax.custom_vjp
  def through(x, zeros, which):
    return x

  def forward(x, zeros, which):
    return x, (x, zeros, which)

  def backward(kept, d):
    none = jax.tree.map(lambda y: np.zeros(y.shape, jax.dtypes.float0), kept[2])
    with jax.default_matmul_precision('highest'):
      return d, count(*kept), none

  through.defvjp(forward, backward)
  return through(x, zeros, which)


def _of_tokens(x, zeros, real):
  """x [B, T, *I] of any shape in front."""
  x = x.astype(jnp.float32).reshape(real.size, -1)
  x = jnp.where(real[:, None], x, 0)
  products = None if zeros.products is None else x.T @ x
  count = real.sum(dtype=jnp.float32)
  return _summed(x, count, products)


def _of_each(x, zeros, _):
  """x [E, C, I]; a slot that is not filled is zeros."""
  x = x.astype(jnp.float32)
  products = None if zeros.products is None else jnp.einsum('ECI,ECJ->EIJ', x, x)
  return jax.vmap(_summed)(x, (x != 0).any(-1).sum(-1, dtype=jnp.float32), products)


def _of_groups(x, zeros, groups):
  """x [M, I], sorted by expert."""
  sizes, E = groups.sizes, zeros.count.shape[0]
  mine = (jnp.arange(len(x)) < sizes.sum())[:, None]
  x = jnp.where(mine, x.astype(jnp.float32), 0)
  products = None
  if zeros.products is not None:
    # The gradient of the matrices is the sum of outer products of each group.
    _, pulled = jax.vjp(lambda w: grouped_matmul(x, w, sizes), zeros.products)
    (products,) = pulled(x)
  total = [jax.ops.segment_sum(y, groups.of_row, E) for y in (jnp.abs(x), jnp.square(x))]
  largest = jnp.maximum(jax.ops.segment_max(jnp.abs(x), groups.of_row, E), 0)
  return InputStatistics(sizes.astype(jnp.float32), *total, largest, products)


def _summed(x, count, products):
  size = jnp.abs(x)
  return InputStatistics(count, size.sum(0), jnp.square(x).sum(0), size.max(0), products)


def sizes_of(p) -> tuple[tuple[int, ...], int]:
  """What stands in front of a matrix's inputs, () or (E,), and how many these are; p may be stacked
  by layers.
  """
  shape = read(p).shape[-len(p.axes) :]
  return shape[: int('experts' in p.axes)], math.prod(shape[n] for n in summed_of(p))


def watched(block, prefix: str, real: Mapping[str, Any], zeros):
  """A stack of one layer whose wanted matrices are watched. Traced.

  real: which tokens are real, of '' and of 'cross', whose keys and values are of others. zeros: by
    name, of `begun`.
  """

  def one(path, p):
    name = f'{prefix}.{name_of(path)}'
    if name not in zeros:
      return p
    of_memory = '.cross.k' in name or '.cross.v' in name
    tokens = None if 'experts' in p.axes else real['cross' if of_memory else '']
    tokens, sums = jax.tree.map(lambda x: x[None], (tokens, zeros[name]))
    return p.replace(Watched(read(p), sums, tokens, p.inputs))

  return jax.tree_util.tree_map_with_path(one, block, is_leaf=is_param)


def begun(block, wanted: Callable[[str, Any], bool], prefix: str, products: bool):
  """Zeros for each wanted matrix of a layer, by name."""
  return {
    name: InputStatistics.zeros(*sizes_of(p), products)
    for name, p in matrices(block, prefix).items()
    if wanted(name, p)
  }


def matrices(block, prefix: str) -> dict[str, Any]:
  """A layer's matrices by the name that they have in the model; routers are none of them."""
  named = {f'{prefix}.{name}': p for name, p in by_name(block).items()}
  return {name: p for name, p in named.items() if p.kind == 'matrix' and not p.wide}


def filled(sums: InputStatistics, few: np.ndarray, own: bool) -> InputStatistics:
  """With other statistics for experts that saw too few tokens.

  own: each expert has inputs of its own: independent ones, of the mean size of all; else what all
    experts saw together.
  """
  E, inputs = sums.absolute.shape
  if own:
    mean = jnp.maximum(sums.squares.sum() / jnp.maximum(sums.count.sum() * inputs, 1), 1e-30)
    row = jnp.broadcast_to(mean, (inputs,))
    square = None if sums.products is None else mean * jnp.eye(inputs)
    other = InputStatistics(jnp.float32(1), jnp.sqrt(row), row, jnp.sqrt(row), square)
  else:
    other = jax.tree.map(lambda x: x.sum(0), sums)
    other = dataclasses.replace(other, largest=sums.largest.max(0))
  which = np.isin(np.arange(E), few)

  def chosen(x, y):
    return jnp.where(which.reshape(-1, *(1,) * (x.ndim - 1)), y[None], x)

  return jax.tree.map(chosen, sums, other)
