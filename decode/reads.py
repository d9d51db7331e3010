"""By which program does an engine read the next part of a prompt? What a program of another shape
computes differs in its last bits, so that it is the request alone that says which one it is: who
else is read meanwhile makes no difference.

A prompt is read C tokens at a time. Where that costs as much for a few tokens as for C, as on a
CPU, its last part, if it is short, has a shorter program. Of an encoder-decoder it is the source
that is read: as a whole, for every token of one sees all others of it, padded to one of a few
lengths.

J rows that are read together · C tokens of each · S tokens of each source
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from decode.sizes import Request, Sizes, lengths_to


class Shape(NamedTuple):
  """Of a program that reads.

  Attributes:
    tokens: of a row's prompt at a time. source: of what its encoder reads; 0: it has none.
  """

  tokens: int
  source: int = 0


class Reads:
  """The programs that read, of an engine.

  Attributes:
    shapes: of all of them.
  """

  def __init__(self, sizes: Sizes, rows: int, pad: int):
    """rows: J. pad: what is behind a source."""
    whole, self._last = sizes.read_tokens, sizes.last_tokens
    sources = lengths_to(sizes.source) if sizes.source else [0]
    self.shapes = [Shape(whole, source) for source in sources]
    self.shapes += [Shape(self._last)] if self._last else []
    self._whole, self._sources = whole, sources
    self._rows, self._pad = rows, pad

  def shape(self, request: Request, unread: int) -> Shape:
    """By which the next part of a prompt is read, of which so many tokens are left."""
    source = next(length for length in self._sources if length >= len(request.source))
    return Shape(self._last if unread <= self._last else self._whole, source)

  def alike(self, shapes: Mapping[int, Shape]) -> list[int]:
    """The rows whose next parts are read by one program, that of the first row."""
    return [row for row, shape in shapes.items() if shape == next(iter(shapes.values()))]

  def common(self, shapes: Iterable[Shape]) -> Shape:
    """The one of them all; the first there is for none. Raises ValueError for several."""
    each = sorted(set(shapes)) or self.shapes[:1]
    if len(each) > 1:
      parts = [shape.source or shape.tokens for shape in each]
      raise ValueError(
        f'{"sources" if each[0].source else "parts"} that are read as {parts} tokens do not go '
        'together: each is a program of its own; read them one after another'
      )
    return each[0]

  def sources(
    self, places: Mapping[int, Request], length: int
  ) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids [J, S] of requests' sources, each at its place, and how many of them [J]; None without
    S, which is `length`.
    """
    if not length:
      return None
    ids = np.full((self._rows, length), self._pad, np.int32)
    counts = np.zeros(self._rows, np.int32)
    for place, request in places.items():
      counts[place] = len(request.source)
      ids[place, : counts[place]] = request.source
    return ids, counts
