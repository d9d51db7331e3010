"""Which parts is a corpus read in, and how does a stage find what an earlier one wrote of them?

A corpus's documents are those of its sources, in order; a part has the documents of some files, or
of some lines of one. Parts are told apart by their numbers, documents by theirs in the part.
Nothing that comes out depends on where parts begin.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from data import compressed, duplicates, sources
from data.config import SourceConfig

PART_BYTES = 2**24  # of files as they are on disk, and more where there would be too many parts
MOST_PARTS = 4096  # as each is some files of each stage, and each task of some stages reads all
NUMBERS = 'numbers.npy'


@dataclasses.dataclass(frozen=True)
class Partition:
  """Some documents of a source.

  Attributes:
    source: its number.
    files: path, size and time of change (ns) of each, as they were when parts were made.
    span: of the only file, which bytes lines begin in; () for whole files.
  """

  source: int
  files: tuple[tuple[str, int, int], ...]
  span: tuple[int, ...] = ()

  @property
  def size(self) -> int:
    """Bytes on disk."""
    return self.span[1] - self.span[0] if self.span else sum(size for _, size, _ in self.files)


def partitions(of: Sequence[SourceConfig]) -> list[Partition]:
  """The parts of sources, in order: lines of a JSONL file that is not compressed are divided, and
  other files are taken whole, small ones together.
  """
  paths = [sources.paths(source) for source in of]
  total = sum(os.path.getsize(path) for each in paths for path in each)
  size = max(PART_BYTES, -(-total // MOST_PARTS))
  return [part for i, source in enumerate(of) for part in _parts(i, source.kind, paths[i], size)]


def _parts(number: int, kind: str, paths: Sequence[str], most: int) -> Iterator[Partition]:
  together, size = [], 0
  for path in paths:
    status = os.stat(path)
    file = path, status.st_size, status.st_mtime_ns
    whole = kind != 'jsonl' or path.endswith(compressed.SUFFIXES)
    divided = not whole and status.st_size > most
    if together and (divided or size + status.st_size > most):
      yield Partition(number, tuple(together))
      together, size = [], 0
    if divided:
      for begin in range(0, status.st_size, most):
        yield Partition(number, (file,), (begin, min(begin + most, status.st_size)))
    else:
      together.append(file)
      size += status.st_size
  if together:
    yield Partition(number, tuple(together))


class Work:
  """The directory in which a corpus is made; what each task left there.

  Args:
    path: of the directory.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)

  def of(self, stage: str, number: int) -> pathlib.Path:
    """Where a task is, or will be."""
    return self.path / stage / f'{number:06d}'

  @functools.cached_property
  def numbers(self) -> np.ndarray:
    """The number of each part's first document, among those that passed the filters, and of all:
    int64 [parts + 1].
    """
    return np.load(self.path / NUMBERS)

  @property
  def parts(self) -> range:
    """Numbers of the parts."""
    return range(len(self.numbers) - 1)

  def kept(self, stage: str, tasks: int, part: int) -> np.ndarray:
    """Which documents of a part a stage left: its tasks wrote the numbers, in order, of those it
    drops. bool [documents].
    """
    first, last = self.numbers[part : part + 2].tolist()
    kept = np.ones(last - first, bool)
    for task in range(tasks):
      dropped = raw(self.of(stage, task) / 'dropped', np.int64)
      begin, end = np.searchsorted(dropped, [first, last])
      kept[dropped[begin:end] - first] = False
    return kept


def raw(path: pathlib.Path, dtype) -> np.ndarray:
  """A file of numbers, memory-mapped."""
  if not path.stat().st_size:
    return np.zeros(0, dtype)
  return np.memmap(path, dtype, 'r')


class Signatures:
  """MinHash signatures of all documents by their numbers: rows of what `clean` wrote, as a matrix
  gives them.

  Args:
    work: where.
    numbers: of the documents that index 0, 1, .. stand for.
  """

  def __init__(self, work: Work, numbers: np.ndarray):
    self._work, self._numbers = work, numbers

  def __getitem__(self, index) -> np.ndarray:
    which, columns = index if isinstance(index, tuple) else (index, slice(None))
    numbers = self._numbers[which]
    order = np.argsort(numbers, kind='stable')
    parts = np.searchsorted(self._work.numbers, numbers[order], side='right') - 1
    width = len(range(duplicates.HASHES)[columns])
    rows = np.empty((len(order), width), np.uint32)
    begins = np.flatnonzero(np.diff(parts, prepend=-1))
    for begin, end in zip(begins, [*begins[1:], len(order)]):
      part = int(parts[begin])
      here = order[begin:end]
      stored = raw(self._work.of('clean', part) / 'signatures', np.uint32)
      found = numbers[here] - self._work.numbers[part]
      rows[here] = stored.reshape(-1, duplicates.HASHES)[found][:, columns]
    return rows
