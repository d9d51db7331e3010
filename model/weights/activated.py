"""How does a matrix multiply whose tokens become codes, too? As int8 by int8 (W8A8), or fp8 by fp8.

Each token has a scale of its own, found as it comes: its largest number is the largest code. So
the product is one of codes, which a chip may have at twice the rate of bfloat16's, and is then
scaled on both sides. Experts multiply by their numbers, and so does what sums over outputs.
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp

from kernels import cached
from model.weights.above import Above
from model.weights.codes import Codes
from model.weights.grids import FP8, GRIDS
from parallel import axes as ax, mesh, target

# TPUs whose matrix unit has products of fp8; those before compute them in bfloat16.
FP8_TPUS = ('TPU7x',)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activated(Above):
  """A matrix of codes, one scale for each output or for all; base: an Int8, or Codes in fp8."""

  base: Any

  def numbers(self, dtype):
    return self.base.numbers(dtype)

  def cut(self, axis, pieces):
    return dataclasses.replace(self, base=self.base.cut(axis, pieces))

  def rows(self, ids, mode=None):
    return self.base.rows(ids, mode)

  def each(self, rows):
    return self.base.each(rows)

  def grouped(self, rows, groups):
    return self.base.grouped(rows, groups)

  def product(self, formula, x, dtype, axes=None):
    sides, result = formula.split('->')
    left, right = sides.split(',')
    summed = ''.join(letter for letter in right if letter in left)
    weight = self.base.gathered(dtype)
    sizes = dict(zip(right, weight.scale.shape))
    kept = any(letter in result or sizes[letter] > 1 for letter in summed)
    if kept or not left.endswith(summed):
      return self.base.product(formula, x, dtype, axes)
    fp8 = isinstance(weight, Codes)
    check_platform(fp8)
    low, unit = lowered(x, len(summed), fp8)
    y = _product(low, weight.codes if fp8 else weight.values, formula, axes)
    outputs = tuple(n for n, letter in enumerate(right) if letter not in summed)
    scale = weight.scale.reshape([weight.scale.shape[n] for n in outputs])
    unit = unit.reshape(*unit.shape[: x.ndim - len(summed)], *(1,) * len(outputs))
    return (y * unit * jnp.expand_dims(scale, range(y.ndim - scale.ndim))).astype(dtype)


def lowered(x, count: int, fp8: bool):
  """Tokens as codes, whose last `count` dimensions have one scale, and that, f32.

  What is rounded has no slope: its gradient is that of the numbers.
  """
  x = x.astype(jnp.float32)
  largest = jnp.abs(jax.lax.stop_gradient(x)).max(range(-count, 0), keepdims=True)
  unit = largest / (GRIDS['fp8'].highest if fp8 else cached.BYTE)
  return x / jnp.where(unit > 0, unit, 1), unit


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, codes, formula, axes):
  """x: numbers to be rounded to the type of `codes`; f32."""
  fp8 = codes.dtype == FP8
  x = GRIDS['fp8' if fp8 else 'int8'].nearest(x)
  wide = jnp.float32 if fp8 else jnp.int32
  if axes is None:
    y = jnp.einsum(formula, x, codes, preferred_element_type=wide)
  else:
    y = ax.einsum(formula, x, codes, axes, preferred_element_type=wide)
  return y.astype(jnp.float32)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Rows:
  """Shape, type and layout of what was multiplied, which a gradient of it has."""

  type: Any


def _forward(x, codes, formula, axes):
  return _product(x, codes, formula, axes), (codes, _Rows(jax.typeof(x)))


def _backward(formula, axes, residuals, cotangent):
  codes, rows = residuals

  def run(x):
    numbers = codes.astype(jnp.float32)
    if axes is None:
      return jnp.einsum(formula, x, numbers)
    return ax.einsum(formula, x, numbers, axes)

  like = jax.ShapeDtypeStruct(rows.type.shape, rows.type.dtype, sharding=rows.type.sharding)
  return *jax.linear_transpose(run, like)(cotangent), None


_product.defvjp(_forward, _backward)


def check_platform(fp8: bool) -> None:
  """Raises NotImplementedError where the compiler has no product of fp8 for the chip; on a CPU,
  says once that it computes the same in f32.
  """
  platform, kind = mesh.platform(), target.kind()
  if not fp8:
    return
  if platform == 'tpu' and kind not in FP8_TPUS:
    raise NotImplementedError(
      f'fp8:activations on a {kind}: it has no product of fp8; use int8:activations, or fp8 alone, '
      'whose numbers multiply in bfloat16'
    )
  if platform == 'cpu':
    _said()


@functools.cache
def _said() -> None:
  if jax.process_index() == 0:
    print('fp8:activations: a cpu computes products of fp8 in f32', file=sys.stderr)
