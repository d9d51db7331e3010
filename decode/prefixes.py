"""Which row holds the beginning of a prompt already? What rows have read stays in their slots, also
when they have left, until others read into them.

Only what was read counts: keys that decoding has written have other last bits than those that the
same tokens get when they are read, and would make a hit differ from a miss. Beginnings are of whole
blocks, and a block is a whole number of the parts that prompts are read in, so that behind a hit
the same parts are read by the same calls.

Host only: copies are the engine's matter.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from decode.sizes import Request


class Prefixes:
  """What the rows of an engine hold.

  Attributes:
    block: tokens; 0: nothing is held.
  """

  def __init__(self, rows: int, block: int, slack: int | None = None):
    """slack: how many tokens a row may have written behind a beginning that is still whole, where a
    ring of slots (model.cache) forgets; None: any number.
    """
    self.block, self._slack = block, slack
    self._rows = rows
    self.clear()

  def clear(self) -> None:
    """Nothing is held."""
    self._marks: list[list[bytes]] = [[] for _ in range(self._rows)]  # of what is to be read
    self._held = [0] * self._rows  # blocks
    self._written = [0] * self._rows  # tokens, at most
    self._since = [0] * self._rows  # tokens before which its rings have nothing for others
    self._used = [0] * self._rows
    self._clock = itertools.count(1)

  def begin(self, row: int, request: Request, tokens: int, like: int | None = None) -> None:
    """A row reads a request's prompt, of which it has the first `tokens` already: of rings what
    comes next sees of them, or all that the row `like` has.
    """
    self._marks[row] = self.marks(request)
    self._since[row] = tokens if like is None else self._since[like]
    self._written[row] = 0
    self._held[row] = 0
    self.read(row, tokens)

  def read(self, row: int, tokens: int) -> None:
    """It has read so many more."""
    self._written[row] += tokens
    if self.block:
      self._held[row] = min(self._written[row] // self.block, len(self._marks[row]))
    self.use(row)

  def written(self, row: int) -> int:
    """Tokens that it holds, at most."""
    return self._written[row]

  def wrote(self, row: int, tokens: int, most: int) -> None:
    """It has written at most so many more behind them, and no more than `most` in all."""
    self._written[row] = min(self._written[row] + tokens, most)

  def forget(self, row: int) -> None:
    """What it holds is nobody's."""
    self._marks[row], self._held[row] = [], 0

  def forget_all(self) -> None:
    """The same of every row; how much they have written stays."""
    for row in range(self._rows):
      self.forget(row)

  def use(self, row: int) -> None:
    """What it holds is of use, and is not the first to go."""
    self._used[row] = next(self._clock)

  def find(self, request: Request, rows: Iterable[int]) -> tuple[int, int]:
    """How many tokens of the prompt's beginning one of these rows holds, and which; (0, -1): none.
    Of equal ones the first.
    """
    return self._find(self.marks(request), rows)

  def choose(self, request: Request, free: Sequence[int], parts: Sequence[Sequence[int]]) -> int:
    """Which of the free rows is to take a request, so that the beginnings that are held serve best,
    and parts of the mesh have equally much to do.

    parts: rows that can copy from one another.
    """
    marks = self.marks(request)
    found = [(*self._find(marks, part), part) for part in parts]

    def order(row):
      tokens, source, part = next(each for each in found if row in each[-1])
      # Nothing is lost where the row itself holds the beginning, and nothing beyond it.
      whole = row == source and self._held[row] * self.block == tokens
      gives_way = not whole and self._held[row] > 0
      return -tokens, len(set(part) - set(free)), gives_way, self._used[row], row

    return min(free, key=order)

  def marks(self, request: Request) -> list[bytes]:
    """A name of each whole block of a prompt, with all before it, but the last token, which is read
    in any case.
    """
    if not self.block or request.source:  # who has read another source has nothing of this one
      return []
    ids = np.asarray(request.prompt, np.int32)
    name = hashlib.blake2b(f'{request.adapter} {request.salt}'.encode(), digest_size=16).digest()
    names = []
    for end in range(self.block, len(ids), self.block):
      part = ids[end - self.block : end].tobytes()
      name = hashlib.blake2b(name + part, digest_size=16).digest()
      names.append(name)
    return names

  def _find(self, marks, rows):
    best = 0, -1
    for row in rows:
      held = self._marks[row][: self._held[row]]
      same = 0
      while same < min(len(held), len(marks)) and held[same] == marks[same]:
        same += 1
      tokens = same * self.block
      behind = self._written[row] - tokens
      kept = self._slack is None or (tokens >= self._since[row] and behind <= self._slack)
      if tokens > best[0] and kept:
        best = tokens, row
    return best
