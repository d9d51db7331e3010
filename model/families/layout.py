"""Where does a parameter lie in a checkpoint,
and how do its entries get from there to here and back?
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a parameter lies in a checkpoint.

  Attributes:
    name: of the tensor, with {layer} and {expert}.
    pattern: dimensions there -> here, as in '(N H) D -> D N H': a group in parentheses is one
      dimension there, and names are of `sizes`. Dimensions here follow those of layers and experts.
    take: (name, index or indices) where the parameter is only a part of the tensor, or its entries
      lie in another order: these, of the dimension of that name; one index removes it.
    layers: of each repeat of the stacked parameter; (): it is not stacked.
  """

  name: str
  pattern: str
  take: tuple[str, int | tuple[int, ...]] | None = None
  layers: tuple[int, ...] = ()


def sizes(config: ModelConfig) -> dict[str, int]:
  """Length of each dimension that patterns name:
  the letters of the legend, and of what some families fuse.
  """
  latent, moe, H = config.latent, config.moe, config.H
  return {
    'V': config.V,
    'D': config.D,
    'D2': config.D,
    'N': config.N,
    'K': config.K,
    'H': H,
    'F': config.F,
    'E': config.E,
    'P': config.max_length,
    'types': config.token_types,
    'buckets': config.relative_buckets,
    'M': moe.feed_forward or config.F,
    'S': moe.shared_feed_forward,
    'Q': latent.query_width,
    'R': latent.width,
    'Hv': config.value_width,
    'key': H + latent.rope_width,
    'key_value': H + config.value_width,
    'latent_key': latent.width + latent.rope_width,
    '2': 2,
    '3': 3,
  }


@dataclasses.dataclass(frozen=True)
class Layout:
  """A Source with its lengths.

  Attributes:
    groups: names of each dimension there. lengths: of each name.
    here: names of the dimensions here.
  """

  groups: tuple[tuple[str, ...], ...]
  lengths: tuple[tuple[str, int], ...]
  here: tuple[str, ...]
  take: tuple[str, int | tuple[int, ...]] | None

  @classmethod
  def of(cls, source: Source, lengths: dict[str, int]) -> 'Layout':
    """Raises ValueError for a pattern whose sides do not name the same dimensions."""
    theirs, ours = source.pattern.split(' -> ')
    groups = tuple(
      tuple(group.strip('()').split()) for group in re.findall(r'\([^)]*\)|\S+', theirs)
    )
    names = [name for group in groups for name in group]
    gone = {source.take[0]} if source.take and isinstance(source.take[1], int) else set()
    if sorted({*ours.split()} | gone) != sorted(names):
      raise ValueError(f'{source}: the two sides of the pattern name different dimensions')
    return cls(
      groups, tuple((name, lengths[name]) for name in names), tuple(ours.split()), source.take
    )

  @functools.cached_property
  def shape(self) -> tuple[int, ...]:
    """Of the tensor there."""
    length = dict(self.lengths)
    return tuple(math.prod(length[name] for name in group) for group in self.groups)

  def chunks(self, limit: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of the first name there, so that each holds at most `limit` entries where that is
    possible, and begins at a multiple.
    """
    name, length = self.lengths[0]
    whole = (
      self.take is not None and self.take[0] == name
    )  # its entries are reordered: all are needed at once
    step = max(1, limit * length // max(1, math.prod(self.shape)))
    step = length if whole else max(1, step // multiple) * multiple
    return ((start, min(start + step, length)) for start in range(0, length, step))

  def rows(self, start: int, stop: int) -> tuple[int, int]:
    """The range of the first dimension there that is `start` to `stop` of the first name."""
    inner = self.shape[0] // self.lengths[0][1]
    return start * inner, stop * inner

  def region(self, start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """The range of each dimension here: what comes from `start` to `stop` of the first name
    there.
    """
    length = dict(self.lengths)
    if self.take and not isinstance(self.take[1], int):
      length[self.take[0]] = len(self.take[1])
    first = self.lengths[0][0]
    taken = self.take is not None and self.take[0] == first
    return tuple(
      (start, stop) if name == first and not taken else (0, length[name]) for name in self.here
    )

  def bring(self, x: np.ndarray) -> np.ndarray:
    """Rows of the tensor there as the parameter here; a view where that is possible."""
    parts = self._parts(x)
    if self.take:
      parts = parts.take(self.take[1], axis=self._names.index(self.take[0]))
    return parts.transpose([self._kept.index(name) for name in self.here])

  def send(self, x: np.ndarray, into: np.ndarray) -> int:
    """The inverse: writes the parameter here into rows of the tensor there.
    Returns how many entries it wrote.
    """
    parts = self._parts(into)
    at = tuple(
      self._taken if self.take and name == self.take[0] else slice(None) for name in self._names
    )
    parts[at] = x.transpose([self.here.index(name) for name in self._kept])
    return x.size

  @property
  def _taken(self):
    return self.take[1] if isinstance(self.take[1], int) else list(self.take[1])

  @functools.cached_property
  def _names(self) -> list[str]:
    return [name for name, _ in self.lengths]

  @functools.cached_property
  def _kept(self) -> list[str]:
    return [name for name in self._names if name in self.here]

  def _parts(self, x):
    """A view of rows there with a dimension for every name."""
    first, *others = (length for _, length in self.lengths)
    return x.reshape(-1, *others)
