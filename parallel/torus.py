"""Where in a torus do devices lie that all send to all?

Half of what a group of e devices exchanges passes through its middle, over as many links as its box
has there: devices in a line of 8 take twice as long as those in a box of 4 x 2, and jax, left to
itself, lays an axis of 8 along 8 devices in a row wherever there are any.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np


def boxed(
  lay_out: Callable[..., np.ndarray], axis: int, within: list[int], slices: list[int], devices
) -> np.ndarray:
  """As `lay_out(within, slices, devices)` (parallel.mesh.laid_out), with the devices along `axis`,
  which crosses no slices, in the box through which an all-to-all passes soonest; of equals in that
  of the longest sides, which leaves most rings whole to the other axes.
  """
  shape = [n * crossed for n, crossed in zip(within, slices)]

  def grid(sides):
    split = [*within[:axis], *sides, *within[axis + 1 :]]
    crossed = [*slices[:axis], *(1 for _ in sides), *slices[axis + 1 :]]
    return lay_out(split, crossed, devices).reshape(shape)

  grids = [grid(sides) for sides in _boxes(within[axis])]
  return min(grids, key=lambda grid: _longest_side(np.moveaxis(grid, axis, -1)))


def _boxes(size: int) -> Iterator[tuple[int, ...]]:
  """Sides in up to three dimensions whose product is `size`, long ones first."""
  for side in range(size, 1, -1):
    for other in range(1, size + 1):
      if size % (side * other) == 0:
        sides = side, other, size // side // other
        if list(sides) == sorted(sides, reverse=True):
          yield tuple(n for n in reversed(sides) if n > 1)


def _longest_side(grid: np.ndarray) -> float:
  """Of the boxes of devices along the last dimension: the side through whose middle most has to
  pass; half of it where it is a whole dimension of more than two devices, which may be a ring.
  """
  whole = _box(grid)
  groups = grid.reshape(math.prod(grid.shape[:-1]), -1)
  boxes = np.stack([_box(group) for group in groups])
  return np.where((boxes == whole) & (whole > 2), boxes / 2, boxes).max()


def _box(devices: np.ndarray) -> np.ndarray:
  """Sides of the box that devices lie in."""
  return np.ptp([device.coords for device in devices.flat], axis=0) + 1
