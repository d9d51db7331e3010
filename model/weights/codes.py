"""How does a matrix of codes multiply? Numbers of 4 or 8 bits with a scale for each block: groups
along what is summed over, an output, a square, or the whole.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels import quantised_matmul
from model.weights.grids import GRIDS, Grid, packed, spread, unpacked
from model.weights.weight import Weight, along, gathered_here, in_pieces
from parallel import axes as ax, mesh, target

# Numbers that a CPU makes of codes at a time: at most so many, and an eighth of the matrix or less.
PART, PARTS = 1 << 18, 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes(Weight):
  """A matrix on a grid.

  Attributes:
    codes: int8 or fp8 of the matrix's shape; of 4 bits uint8, half as many along `packs`.
    scale: f32, for each block. zero: f32, the same, the code that stands for 0; None: 0.
    grid: of model.weights.grids. blocks: their size in each dimension.
    packs: the dimension along which two codes share a byte, counted from the last.
    scale_axes: as `axes`, of the scale: None where all of a dimension is one block. Known from the
      whole matrix: a device's part may have one block of several.
  """

  codes: Any
  scale: Any
  zero: Any
  grid: str = dataclasses.field(metadata={'static': True})
  blocks: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  packs: int = dataclasses.field(metadata={'static': True})
  axes: tuple[str | None, ...] = dataclasses.field(metadata={'static': True})
  scale_axes: tuple[str | None, ...] = dataclasses.field(metadata={'static': True})
  coded = True

  @classmethod
  def of(
    cls,
    x: jax.Array,
    grid: str,
    blocks: tuple[int, ...],
    packs: int,
    axes: tuple[str | None, ...],
    symmetric: bool = True,
    shrink: jax.Array | float = 1.0,
  ) -> 'Codes':
    """The nearest codes of numbers [.., *blocks' dimensions].

    shrink: of the largest of each block, so much is on the grid, and what is beyond is clipped.
    """
    scale, zero = _scales(x.astype(jnp.float32), GRIDS[grid], blocks, symmetric, shrink)
    return cls.with_scales(x, scale, zero, grid, blocks, packs, axes)

  @classmethod
  def with_scales(cls, x, scale, zero, grid, blocks, packs, axes) -> 'Codes':
    """The nearest codes with these scales."""
    wide = spread(scale, blocks)
    x = x.astype(jnp.float32) / jnp.where(wide > 0, wide, 1)
    codes = GRIDS[grid].nearest(x if zero is None else x + spread(zero, blocks))
    if GRIDS[grid].packed:
      codes = packed(codes, packs, blocks[packs])
    parts = scale.shape[-len(axes) :]
    scale_axes = tuple(axis if count > 1 else None for axis, count in zip(axes, parts))
    return cls(codes, scale, zero, grid, blocks, packs, axes, scale_axes)

  @property
  def shape(self):
    shape = list(self.codes.shape)
    shape[self.packs] *= 1 + GRIDS[self.grid].packed
    return tuple(shape)

  @property
  def dtype(self):
    return self.scale.dtype

  def numbers(self, dtype):
    codes = self.codes
    if GRIDS[self.grid].packed:
      codes = unpacked(codes, self.packs, self.blocks[self.packs], self.grid == 'int4')
    x = GRIDS[self.grid].stands_for(codes)
    if self.zero is not None:
      x = x - spread(self.zero, self.blocks)
    return (x * spread(self.scale, self.blocks)).astype(dtype)

  def _map(self, one) -> 'Codes':
    """one: (an array, its axes) -> what is in its place."""
    zero = None if self.zero is None else one(self.zero, self.scale_axes)
    codes, scale = one(self.codes, self.axes), one(self.scale, self.scale_axes)
    return dataclasses.replace(self, codes=codes, scale=scale, zero=zero)

  def layout(self):
    return self._map(lambda _, axes: axes)

  def gathered(self, dtype):
    return self._map(lambda x, axes: ax.gather(x, *along(axes, x)))

  def here(self, shards, dtype):
    return self._map(lambda x, axes: gathered_here(x, axes, shards))

  def cut(self, axis, pieces):
    count = self.scale.shape[axis]
    # Pieces of one block share its scale, but not its bytes: each holds a code of both halves.
    one_block = count == 1 and GRIDS[self.grid].packed and axis == self.packs
    if pieces > 1 and (one_block or (count > 1 and count % pieces)):
      raise ValueError(
        f'{self.grid} in blocks of {self.blocks[axis]} is not cut into {pieces} pieces of '
        f'{self.shape[axis] // pieces}; use smaller groups'
      )

    def one(x, _):
      if x.shape[axis] == 1:
        return jnp.broadcast_to(x[None], (pieces, *x.shape))
      return in_pieces(x, axis, pieces)

    return self._map(one)

  def whole(self, dtype, product=True):
    return self.gathered(dtype).numbers(dtype)

  def product(self, formula, x, dtype, axes=None):
    left, right = formula.split('->')[0].split(',')
    inputs = sum(letter in left for letter in right)
    # A product sums over the last dimensions of x and the first of the matrix; other ones (against
    # a cache, MLA sums over what are outputs elsewhere) take numbers, and so do several devices.
    plain = left.endswith(right[:inputs]) and not set(right[inputs:]) & set(left)
    if not plain or not target.alone() or self.codes.ndim > len(self.axes):
      return super().product(formula, x, dtype, axes)
    matrix = self.as_coded(inputs)
    rows = x.reshape(-1, math.prod(self.shape[:inputs]))
    if matrix is not None and quantised_matmul.choose(rows, matrix) != 'numbers':
      y = quantised_matmul.product(rows, matrix)
      return y.reshape(*x.shape[: x.ndim - inputs], *self.shape[inputs:]).astype(dtype)
    if mesh.platform() != 'cpu':
      return super().product(formula, x, dtype, axes)
    return self._in_parts(formula, x, dtype, x.ndim - inputs)

  def as_coded(self, inputs: int) -> quantised_matmul.CodedOperand | None:
    """As kernels take it, of a product that sums over so many dimensions, the first ones.

    None for other grids than whole numbers, and for blocks of several outputs.
    """
    outputs, size = self.shape[inputs:], math.prod(self.shape[inputs:])
    packed_ = GRIDS[self.grid].packed
    if self.grid not in ('int8', 'int4') or self.scale.shape[inputs:] != outputs:
      return None
    if packed_ and self.packs != inputs - 1 - len(self.shape):
      return None
    arrays = (
      None if x is None else x.reshape(1, -1, size) for x in (self.codes, self.scale, self.zero)
    )
    return quantised_matmul.CodedOperand(*arrays, self.blocks[self.packs] if packed_ else 0)

  def _in_parts(self, formula, x, dtype, axis: int):
    """Numbers of a part of the inputs at a time. axis: of x, that the matrix's first dimension is
    summed with.
    """
    rank = len(self.axes)
    # Blocks stay whole: of two codes in a byte, and of a scale where there are several.
    count = self.scale.shape[0]
    if count == 1 and not (GRIDS[self.grid].packed and self.packs == -rank):
      count = self.shape[0]
    least = max(PARTS, math.prod(self.shape) / PART)
    parts = min((n for n in range(1, count + 1) if count % n == 0 and n >= least), default=count)
    wide = jnp.promote_types(dtype, jnp.float32)

    @jax.checkpoint  # or a gradient keeps all numbers
    def product(rows, part):
      return jnp.einsum(formula, rows, part.numbers(dtype), preferred_element_type=wide)

    rows, pieces = in_pieces(x, axis - x.ndim, parts), self.cut(-rank, parts)
    y = None
    for n in range(parts):
      part = jax.tree.map(lambda a: a[n], pieces)
      # After what came before, and not at once or before the loop over tokens, which would take
      # room for all numbers: a bit of that, which is 0, is in the codes.
      before = quantised_matmul.never(x if y is None else y)
      codes = (part.codes.view(jnp.uint8) ^ before.astype(jnp.uint8)).view(part.codes.dtype)
      more = product(rows[n], dataclasses.replace(part, codes=codes))
      y = more if y is None else y + more
    return y.astype(dtype)


def _scales(x, grid: Grid, blocks, symmetric: bool, shrink) -> tuple[jax.Array, jax.Array | None]:
  """Of each block the scale, and the zero point where sides may differ."""
  if symmetric:
    # The side with fewer codes holds the largest number: -8..7 by 7, so that no sign is favoured.
    scale = reduced(jnp.abs(x), blocks, jnp.max) * shrink / min(-grid.lowest, grid.highest)
    return (_power_above(scale) if grid.name == 'mxfp4' else scale), None
  low = jnp.minimum(reduced(x, blocks, jnp.min), 0) * shrink  # 0 is a number of the grid
  high = jnp.maximum(reduced(x, blocks, jnp.max), 0) * shrink
  scale = (high - low) / (grid.highest - grid.lowest)
  zero = jnp.round(grid.lowest - low / jnp.where(scale > 0, scale, 1))
  return scale, zero


def _power_above(x: jax.Array) -> jax.Array:
  """The least power of two that is not below a number; 0 of 0."""
  mantissa, exponent = jnp.frexp(x)
  return jnp.ldexp(jnp.sign(mantissa), exponent - (mantissa == 0.5))


def reduced(x, blocks, how):
  """One number for each block of a matrix, by a function of (array, axis)."""
  for axis, block in zip(range(-len(blocks), 0), blocks):
    at = x.ndim + axis
    shape = (*x.shape[:at], x.shape[at] // block, block, *x.shape[at + 1 :])
    x = how(x.reshape(shape), at + 1)
  return x


def blocks_of(
  shape: tuple[int, ...], dimensions: tuple[int, ...], size: int, name: str = ''
) -> tuple[int, ...]:
  """Blocks of so many numbers along dimensions that a product takes as one, such as heads and their
  widths; 0: all of them are one. 1 along the others.

  A block is a part of the last of the dimensions, or some whole ones. dimensions: counted from the
  last. Raises ValueError where blocks do not fill them.
  """
  every = math.prod(shape[n] for n in dimensions)
  blocks, left = [1] * len(shape), size or every
  for n in sorted(dimensions, reverse=True):
    blocks[n] = min(left, shape[n])
    if shape[n] % blocks[n] or left % blocks[n]:
      left = 0
      break
    left //= blocks[n]
  if left != 1:
    last = shape[max(dimensions)]
    parts = f', in parts of {last},' if last < every else ''
    raise ValueError(
      f'blocks of {size} do not divide the {every} numbers{parts} of {name or "a matrix"}; use '
      f'{math.gcd(size, last)}, or leave it out by a pattern'
    )
  return tuple(blocks)
