"""How small are the scales of codes? Codes themselves: of 8 bits, in blocks of up to 256, once the
mean of all is taken away (QLoRA, Dettmers et al., arXiv:2305.14314, section 3).

    scale = mean + step * code        a mean for each matrix, a step for each block of scales
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from model.weights.above import Above
from model.weights.codes import Codes
from model.weights.grids import spread
from model.weights.weight import along, gathered_here, in_pieces
from parallel import axes as ax

BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Doubled(Above):
  """Codes whose scales are codes. It multiplies as the codes with the scales that these stand for.

  Attributes:
    base: the codes; in the place of their scales, codes of int8.
    step, mean: f32. blocks: how many scales share a step, in each dimension.
    step_axes, mean_axes: as `axes`.
  """

  base: Any
  step: Any
  mean: Any
  blocks: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  step_axes: tuple[str | None, ...] = dataclasses.field(metadata={'static': True})
  mean_axes: tuple[str | None, ...] = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, x: jax.Array, weight: Codes) -> 'Doubled':
    """The nearest codes of x, by scales in codes that are near to those of `weight`."""
    rank = len(weight.axes)
    dims = tuple(n for n in range(-rank, 0) if weight.axes[n] != 'experts')
    mean = weight.scale.mean(dims, keepdims=True)
    counts = weight.scale.shape[-rank:]
    blocks = blocks_of_scales(counts, weight.axes)
    _check_shards(counts, blocks, weight.axes)
    inner = Codes.of(weight.scale - mean, 'int8', blocks, -1, weight.axes)
    mean_axes = tuple(axis if axis == 'experts' else None for axis in weight.axes)
    base = dataclasses.replace(weight, scale=inner.codes)
    made = cls(base, inner.scale, mean, inner.blocks, inner.scale_axes, mean_axes)
    return made.with_numbers(x)

  def with_numbers(self, x: jax.Array) -> 'Doubled':
    """The nearest codes of other numbers, by the same scales."""
    at = self.single()
    made = Codes.with_scales(x, at.scale, at.zero, at.grid, at.blocks, at.packs, at.axes)
    return dataclasses.replace(self, base=dataclasses.replace(self.base, codes=made.codes))

  def single(self) -> Codes:
    """The same codes with f32 scales; one that comes out below 0 was nearly 0."""
    scale = self.mean + spread(self.step, self.blocks) * self.base.scale.astype(jnp.float32)
    return dataclasses.replace(self.base, scale=jnp.maximum(scale, 0))

  @property
  def dtype(self):
    return jnp.dtype('float32')

  def numbers(self, dtype):
    return self.single().numbers(dtype)

  def _with(self, base, one) -> 'Doubled':
    """one: (an array, its axes) -> what is in its place."""
    step, mean = one(self.step, self.step_axes), one(self.mean, self.mean_axes)
    return dataclasses.replace(self, base=base, step=step, mean=mean)

  def layout(self):
    return self._with(self.base.layout(), lambda _, axes: axes)

  def gathered(self, dtype):
    return self._with(self.base.gathered(dtype), lambda x, axes: ax.gather(x, *along(axes, x)))

  def here(self, shards, dtype):
    base = self.base.here(shards, dtype)
    return self._with(base, lambda x, axes: gathered_here(x, axes, shards))

  def cut(self, axis, pieces):
    if self.step.shape[axis] > 1 and self.step.shape[axis] % pieces:
      raise ValueError(
        f'{self.step.shape[axis]} blocks of scales are not cut into {pieces} pieces; leave :double '
        'out'
      )

    def one(x, _):
      if x.shape[axis] == 1:
        return jnp.broadcast_to(x[None], (pieces, *x.shape))
      return in_pieces(x, axis, pieces)

    return self._with(self.base.cut(axis, pieces), one)

  def whole(self, dtype, product=True):
    return self.gathered(dtype).numbers(dtype)

  def product(self, formula, x, dtype, axes=None):
    return self.gathered(dtype).single().product(formula, x, dtype, axes)

  def rows(self, ids, mode=None):
    return self.single().rows(ids, mode)

  def scored(self, x, bias, dtype):
    return self.single().scored(x, bias, dtype)

  def scores(self, x, bias, dtype):
    return self.single().scores(x, bias, dtype)

  def each(self, rows):
    return self.single().each(rows)

  def grouped(self, rows, groups):
    return self.single().grouped(rows, groups)


def blocks_of_scales(counts: tuple[int, ...], axes: tuple[str | None, ...]) -> tuple[int, ...]:
  """Of the longest dimension but that of experts, the largest part up to BLOCK; 1 in the others."""
  every = [n for n in range(len(counts)) if axes[n] != 'experts']
  at = max(every, key=lambda n: (counts[n], n))
  size = max(n for n in range(1, min(BLOCK, counts[at]) + 1) if counts[at] % n == 0)
  return tuple(size if n == at else 1 for n in range(len(counts)))


def _check_shards(counts, blocks, axes) -> None:
  for count, block, axis in zip(counts, blocks, axes):
    shards = ax.size(axis) if axis else 1
    if count > block and count // block % shards:
      raise ValueError(
        f'{count // block} blocks of {block} scales along {axis!r} do not split over {shards} '
        'devices; leave :double out, or use fewer devices along it'
      )
