"""What is a matrix of which N numbers of every M are there? Those, as a weight of any kind, and
where each stood, in a few bits.

Groups of M lie along what a product sums over: 2:4 is what GPUs have products for (Mishra et al.,
arXiv:2104.08378). A product makes the matrix of them first, here: half of it is stored and moved,
and all of it multiplied.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.weights.weight import Weight, along, gathered_here, in_pieces
from parallel import axes as ax

MOST = 16  # M, whose places are 4 bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse(Weight):
  """A matrix of which all but N of every M are 0.

  Attributes:
    kept: a Weight of the others, N / M as many along `packs`, in order.
    places: uint8, where in its group each stood: `shared` in a byte, the first in the low bits.
    pattern: (N, M).
    packs: the dimension that groups lie along, counted from the last.
    shared: places in a byte; fewer than fit where so many do not fill the dimension.
  """

  kept: Any
  places: Any
  pattern: tuple[int, int] = dataclasses.field(metadata={'static': True})
  packs: int = dataclasses.field(metadata={'static': True})
  shared: int = dataclasses.field(metadata={'static': True})
  coded = True

  @classmethod
  def of(
    cls,
    x: jax.Array,
    pattern: tuple[int, int],
    packs: int,
    axes: tuple[str | None, ...],
    make: Callable[[jax.Array], Weight],
    name: str = '',
  ) -> 'Sparse':
    """The N largest of every M; of equal ones the first. Of a matrix that was pruned so already,
    what is left.

    make: the kept numbers -> the weight that they are stored as.
    Raises ValueError where groups do not fill the dimension, or a device's part of it.
    """
    N, M = pattern
    count, at = x.shape[packs], x.ndim + packs
    if count % M:
      raise ValueError(
        f'{name or "a matrix"}: groups of {M} do not fill the {count} numbers that they lie along; '
        'leave it out by a pattern, or use a pattern of fewer'
      )
    fit = 8 // _bits(M)
    shared = math.gcd(fit, count // M * N)
    _check_shards(count, M * (shared // math.gcd(N, shared)), axes[packs], name)

    groups = _split(x, at, M)
    # Who is ahead of whom, by pairs: nothing is sorted or looked up, so that shards stay apart.
    index = jax.lax.broadcasted_iota(jnp.int32, groups.shape, at + 1)
    size = jnp.abs(groups.astype(jnp.float32))
    rank = sum(
      (_one(size, at, m) > size) | ((_one(size, at, m) == size) & (m < index)) for m in range(M)
    )
    stays = rank < N
    order = jnp.cumsum(stays.astype(jnp.int32), at + 1) - 1

    def taken(values):
      each = [
        jnp.where(stays & (order == n), values, jnp.zeros((), values.dtype)).sum(
          at + 1, dtype=values.dtype
        )
        for n in range(N)
      ]
      return _merged(jnp.stack(each, at + 1), at)

    return cls(make(taken(groups)), _packed(taken(index), at, shared, M), pattern, packs, shared)

  @property
  def axes(self):
    return self.kept.axes

  @property
  def shape(self):
    N, M = self.pattern
    shape = list(self.kept.shape)
    shape[self.packs] = shape[self.packs] // N * M
    return tuple(shape)

  @property
  def dtype(self):
    return self.kept.dtype

  def numbers(self, dtype):
    N, M = self.pattern
    at = self.places.ndim + self.packs
    places = _split(_unpacked(self.places, at, self.shared, M), at, N)
    kept = _split(self.kept.numbers(dtype), at, N)
    shape = (*kept.shape[: at + 1], M, *kept.shape[at + 2 :])
    index = jax.lax.broadcasted_iota(jnp.uint8, shape, at + 1)
    zero = jnp.zeros((), kept.dtype)
    every = (jnp.where(_one(places, at, n) == index, _one(kept, at, n), zero) for n in range(N))
    return _merged(sum(every), at)

  def layout(self):
    return dataclasses.replace(self, kept=self.kept.layout(), places=self.axes)

  def cast(self, dtype):
    return dataclasses.replace(self, kept=self.kept.cast(dtype))

  def gathered(self, dtype):
    places = ax.gather(self.places, *along(self.axes, self.places))
    return dataclasses.replace(self, kept=self.kept.gathered(dtype), places=places)

  def here(self, shards, dtype):
    places = gathered_here(self.places, self.axes, shards)
    return dataclasses.replace(self, kept=self.kept.here(shards, dtype), places=places)

  def cut(self, axis, pieces):
    count = self.places.shape[axis]
    whole = count % pieces == 0 and count // pieces * self.shared % self.pattern[0] == 0
    if axis == self.packs and not whole:
      raise ValueError(
        f'{":".join(map(str, self.pattern))} of {self.shape[axis]} numbers is not cut into '
        f'{pieces} pieces of whole groups and bytes; leave it out by a pattern'
      )
    kept = self.kept.cut(axis, pieces)
    return dataclasses.replace(self, kept=kept, places=in_pieces(self.places, axis, pieces))

  def whole(self, dtype, product=True):
    return self.gathered(dtype).numbers(dtype)


def _check_shards(size: int, unit: int, axis: str | None, name: str) -> None:
  shards = ax.size(axis) if axis else 1
  if size % (unit * shards):
    most = max(n for n in range(1, shards + 1) if shards % n == 0 and size % (unit * n) == 0)
    raise ValueError(
      f'{name or "a matrix"}: {size} numbers along {axis!r} do not fall into whole groups, and '
      f'bytes of their places, of {unit} on each of {shards} devices; use at most {most} along it, '
      'or leave it out by a pattern'
    )


def _bits(M: int) -> int:
  """Of a place among M: as many as divide a byte."""
  return next(bits for bits in (1, 2, 4) if M <= 2**bits)


def _packed(places: jax.Array, at: int, shared: int, M: int) -> jax.Array:
  parts = _split(places.astype(jnp.uint8), at, shared)
  shifts = (_one(parts, at, i).squeeze(at + 1) << (i * _bits(M)) for i in range(shared))
  return sum(shifts, start=jnp.uint8(0))


def _unpacked(x: jax.Array, at: int, shared: int, M: int) -> jax.Array:
  mask = 2 ** _bits(M) - 1
  return _merged(jnp.stack([(x >> (i * _bits(M))) & mask for i in range(shared)], at + 1), at)


def _one(x: jax.Array, at: int, n: int) -> jax.Array:
  """The n-th of each group of a split dimension; a group of one."""
  return jax.lax.slice_in_dim(x, n, n + 1, axis=at + 1)


def _split(x: jax.Array, at: int, size: int) -> jax.Array:
  """A dimension as two: (groups, size)."""
  return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])


def _merged(x: jax.Array, at: int) -> jax.Array:
  """Two dimensions as one."""
  return x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])
