"""What does a stack of layers ask of a cache? Little: training reads this file, and not the cache.

B batch · T new tokens · S slots or source length · N query heads · K key/value heads · H head width
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int


@runtime_checkable
class AnySlots(Protocol):
  """A block's view of a cache, see model.cache.Slots."""

  held: Any
  fresh: bool

  def append(
    self, keys: Float[Array, 'B T K H'], values: Float[Array, 'B T K Hv'] | None, window: int = 0
  ) -> 'AnySlots':
    """With the row's tokens behind those that it has."""

  def look(self, q: Float[Array, 'B T N H'], **how) -> Float[Array, 'B T N Hv']:
    """Attention of the call's tokens to all that is held."""

  def recall(self, q: Float[Array, 'B T N H'], **how) -> Float[Array, 'B T N H']:
    """Attention of the call's tokens to their sources."""


@dataclasses.dataclass(frozen=True)
class Places:
  """What a call of a stack has of a cache, for some of the stack's places (ModelConfig.places).

  Buffers go through the loop over layers, everything else is as it was at its begin. Without a
  cache, which is this class, there are none (None in every place), so that a stack is written once.

  Attributes:
    held: the buffers of each place.
    lengths: tokens before the call of each row; None: there is no cache.
  """

  held: tuple
  lengths: Any = None

  def split(self, sizes: Iterable[int]) -> list['Places']:
    """So many places after one another."""
    parts, first = [], 0
    for size in sizes:
      parts.append(self.part(slice(first, first + size)))
      first += size
    return parts

  def part(self, places: slice) -> 'Places':
    """Some of the places."""
    return dataclasses.replace(self, held=self.held[places])

  def joined(self, parts: Sequence['Places']) -> 'Places':
    """All places, with the buffers of these parts of them."""
    return self.carrying(sum((part.held for part in parts), ()))

  def carrying(self, held: Sequence[Any]) -> 'Places':
    """With these buffers: what a loop carries."""
    return dataclasses.replace(self, held=tuple(held))

  def slots(self, place: int, layer: Int[Array, ''] | int) -> AnySlots | None:
    """What a block sees: one layer of a place."""
    return None


def without(places: int) -> Places:
  """So many places without a cache."""
  return Places((None,) * places)


@runtime_checkable
class AnyCache(Protocol):
  """What a model is called with, see model.cache.Cache.

  Attributes:
    lengths: [B] tokens of each row.
    memory: what cross-attention looks up, or None. memory_lengths: [B] tokens of each source.
  """

  lengths: Any
  memory: Any
  memory_lengths: Any

  def lengths_of(self, rows: Int[Array, 'B'] | None) -> Int[Array, 'B']:
    """Tokens of these rows; None: of all."""

  def places(
    self, tokens: int, counts: Int[Array, 'B'] | None, fresh: bool, rows: Int[Array, 'B'] | None
  ) -> Places:
    """All places, for a call of `tokens` tokens a row, which are the row's where counts is None."""

  def remembering(
    self, memory: tuple, lengths: Int[Array, 'B'], rows: Int[Array, 'B'] | None
  ) -> 'AnyCache':
    """With what cross-attention looks up, in these rows; None: in all."""

  def longer(
    self, held: tuple, counts: Int[Array, 'B'], rows: Int[Array, 'B'] | None
  ) -> 'AnyCache':
    """With these buffers, and so many more tokens in these rows."""
