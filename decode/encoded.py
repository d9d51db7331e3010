"""What does an engine's call read for an encoder? Whole sources, for every token of one sees all
others of it, padded to one of a few lengths.

Which length it is depends on the source alone, and so do the bits that come of it: sources of
another one are read by another call.

J rows that are read together · S tokens of each
"""

from collections.abc import Iterable, Mapping

import numpy as np

from decode.sizes import Request, lengths_to


class Sources:
  """Of requests to an engine.

  Attributes:
    lengths: for which there are programs, least first; [0]: there is no encoder.
  """

  def __init__(self, most: int, rows: int, pad: int):
    """most: tokens of a source, 0 without an encoder. rows: J. pad: what is behind a source."""
    self.lengths = lengths_to(most) if most else [0]
    self._rows, self._pad = rows, pad

  def length(self, request: Request) -> int:
    """S, as which its source is read."""
    return next(length for length in self.lengths if length >= len(request.source))

  def common(self, requests: Iterable[Request]) -> int:
    """Their one length; the least of all for none. Raises ValueError where they have several."""
    each = sorted({self.length(request) for request in requests}) or self.lengths[:1]
    if len(each) > 1:
      raise ValueError(
        f'sources that are read as {each} tokens do not go together: each is a program of its own; '
        'read them one after another'
      )
    return each[0]

  def arrays(
    self, places: Mapping[int, Request], length: int
  ) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids [J, S] of requests, each at its place, and how many of them [J]; None without S."""
    if not length:
      return None
    ids = np.full((self._rows, length), self._pad, np.int32)
    counts = np.zeros(self._rows, np.int32)
    for place, request in places.items():
      counts[place] = len(request.source)
      ids[place, : counts[place]] = request.source
    return ids, counts
