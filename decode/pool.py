"""Whose tokens are in which page of a cache? Pages are handed out as rows grow, shared where rows
begin alike, and taken back; where there are too few, the youngest rows wait, and what they have is
in the host's memory meanwhile.

    device   free -> a row's (or several rows') -> kept, while others may begin with it -> free
    host     a row's that waits, if the room on the device was needed

Plain Python of numbers. Contents move elsewhere, as `seat` says; that they are the same bytes
wherever a page is, nobody here depends on.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OUT, COPY, BACK = 'out', 'copy', 'back'


@dataclasses.dataclass(eq=False)
class Page:
  """What some tokens left.

  Attributes:
    rows: whose it is. place: where on the device; -1: on the host.
    mark: by which others find it, once it has been read to its end; None: they don't.
    content: on the host, for whoever moves it.
  """

  rows: set[int]
  place: int
  mark: bytes | None = None
  content: Any = None


@dataclasses.dataclass(eq=False)
class Holding:
  """What a row has. most: pages, ever. tokens: for which there is room, the last page's included
  as far as it is asked for.
  """

  most: int
  pages: list[Page] = dataclasses.field(default_factory=list)
  tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Move:
  """What becomes of a content. OUT: what is at `source` is page.content from now on. COPY: from
  `source` to `place`. BACK: page.content comes to `place`; nobody needs it on the host any more if
  that is where the page is now.
  """

  kind: str
  page: Page | None = None
  source: int = -1
  place: int = -1


class Pool:
  """Pages of one part of a mesh.

  Attributes:
    places: on the device. host: pages for which there is room on the host besides.
    size: tokens of a page.
  """

  def __init__(self, places: int, host: int, size: int):
    self.places, self.host, self.size = places, host, size
    self._free = list(range(places - 1, -1, -1))
    self._rows: dict[int, Holding] = {}  # the oldest first
    self._marked: dict[bytes, Page] = {}
    self._kept: collections.OrderedDict[Page, None] = collections.OrderedDict()  # used last: last

  @property
  def used(self) -> int:
    """Places whose pages are some row's."""
    return self.places - len(self._free) - len(self._kept)

  def pages_of(self, tokens: int) -> int:
    return -(-tokens // self.size)

  def has_room(self, most: int) -> bool:
    """Whether a row of at most so many tokens can come, so that all that there are reach their end,
    one after another at worst.
    """
    return self._promised() + self.pages_of(most) <= self.places + self.host

  def add(self, row: int, most: int) -> None:
    """A row of at most so many tokens, which is the youngest."""
    self._rows[row] = Holding(self.pages_of(most))

  def tokens(self, row: int) -> int:
    """For which the row has room."""
    return self._rows[row].tokens

  def find(self, marks: Sequence[bytes]) -> int:
    """How many pages of this beginning there are."""
    return next((n for n, mark in enumerate(marks) if mark not in self._marked), len(marks))

  def take(self, row: int, marks: Sequence[bytes]) -> None:
    """A row that has nothing begins with these pages, which are there."""
    for mark in marks:
      page = self._marked[mark]
      self._kept.pop(page, None)
      self._own(row, page)
    self._rows[row].tokens = len(marks) * self.size

  def mark(self, row: int, marks: Sequence[bytes]) -> None:
    """Its first pages are read to their ends: others may begin with them."""
    for page, mark in zip(self._rows[row].pages, marks, strict=False):
      if page.mark is None and mark not in self._marked:
        page.mark = mark
        self._marked[mark] = page

  def share(self, source: int, row: int) -> None:
    """A row that has nothing goes on from all that another has; of the last page, which both go on
    to write, whoever writes first gets a copy.
    """
    for page in self._rows[source].pages:
      self._own(row, page)
    self._rows[row].tokens = self._rows[source].tokens

  def remove(self, row: int) -> None:
    """A row leaves. What others may begin with is kept, until its place is needed."""
    for page in reversed(self._rows.pop(row).pages):  # of a beginning the end goes first
      self._disown(row, page)

  def forget(self, row: int | None = None) -> None:
    """Nobody else begins with what the row has, or with anything."""
    for page in list(self._marked.values()) if row is None else self._rows[row].pages:
      if page.mark is not None:
        del self._marked[page.mark]
        page.mark = None
      if page in self._kept:
        del self._kept[page]
        self._free.append(page.place)

  def table(self, row: int) -> list[int]:
    """Where its pages are, if it has any; `places`: on the host."""
    pages = self._rows[row].pages if row in self._rows else []
    return [self.places if page.place < 0 else page.place for page in pages]

  def seat(self, wants: Mapping[int, int]) -> tuple[set[int], list[Move]]:
    """Room for some rows to have so many tokens, as far as there is: which rows have all that they
    have and want on the device then, and what has to be moved for it, in this order.

    The older go before the younger, and none of these before an older one that waits: so the oldest
    reaches its end.
    """
    seated, needed, more = [], set(), 0
    for row, holding in self._rows.items():
      tokens = max(wants.get(row, 0), holding.tokens)
      own = [page for page in holding.pages if page not in needed]
      new = self.pages_of(tokens) - len(holding.pages)
      if tokens > holding.tokens and (last := self._split(holding)):
        new += 1
        if last in own:
          own.remove(last)
      if len(needed) + len(own) + more + new > self.places:
        break
      seated.append(row)
      needed.update(own)
      more += new

    moves: list[Move] = []
    for row in seated:
      self._sit(row, max(wants.get(row, 0), self._rows[row].tokens), needed, moves)
    return set(seated), moves

  def _sit(self, row: int, tokens: int, needed: set[Page], moves: list[Move]) -> None:
    holding = self._rows[row]
    last = self._split(holding) if tokens > holding.tokens else None
    if last is not None:
      # The others keep the page, and the row gets one of its own.
      holding.pages.pop()
      last.rows.remove(row)
      source, place = last.place, self._place(needed, moves)
      if source < 0:
        moves.append(Move(BACK, last, place=place))
      elif source != place:  # where it was until now, they are on the host
        moves.append(Move(COPY, source=source, place=place))
      self._grow(row, place, needed)
    for page in holding.pages:
      if page.place < 0:
        page.place = self._place(needed, moves)
        moves.append(Move(BACK, page, place=page.place))
    while len(holding.pages) < self.pages_of(tokens):
      self._grow(row, self._place(needed, moves), needed)
    holding.tokens = tokens
    needed.update(holding.pages)

  def _grow(self, row: int, place: int, needed: set[Page]) -> None:
    page = Page(set(), place)
    self._own(row, page)
    needed.add(page)

  def _place(self, needed: set[Page], moves: list[Move]) -> int:
    """A place that is free now: it was; or nobody begins with what was there any more; or a row
    that waits has it on the host.
    """
    if self._free:
      return self._free.pop()
    if self._kept:
      page, _ = self._kept.popitem(last=False)
      del self._marked[page.mark]
      return page.place
    page = next(
      page
      for row in reversed(self._rows)
      for page in reversed(self._rows[row].pages)
      if page.place >= 0 and page not in needed
    )
    place, page.place = page.place, -1
    moves.append(Move(OUT, page, source=place))
    return place

  def _split(self, holding: Holding) -> Page | None:
    """The page that the row is to write in, and that others have, too."""
    last = holding.pages[-1] if holding.tokens % self.size else None
    return last if last is not None and len(last.rows) > 1 else None

  def _own(self, row: int, page: Page) -> None:
    page.rows.add(row)
    self._rows[row].pages.append(page)

  def _disown(self, row: int, page: Page) -> None:
    page.rows.remove(row)
    if page.rows:
      return
    if page.mark is not None and page.place >= 0:
      self._kept[page] = None
      return
    if page.mark is not None:
      del self._marked[page.mark]
    if page.place >= 0:
      self._free.append(page.place)

  def _promised(self) -> int:
    """Pages that rows have, and that they may need yet."""
    pages = {page for holding in self._rows.values() for page in holding.pages}
    split = {last for holding in self._rows.values() if (last := self._split(holding)) is not None}
    copies = sum(len(page.rows) - 1 for page in split)
    rest = sum(holding.most - len(holding.pages) for holding in self._rows.values())
    return len(pages) + copies + rest


def table_of(pools: Sequence[Pool], rows: int, width: int) -> np.ndarray:
  """[rows, width] of all parts' rows, side by side: model.cache.Cache.table."""
  here = rows // len(pools)
  table = np.full((rows, width), pools[0].places, np.int32)
  for part, pool in enumerate(pools):
    for row in range(part * here, (part + 1) * here):
      places = pool.table(row)
      table[row, : len(places)] = places
  return table
