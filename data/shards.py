"""How are tokens kept on disk, so that any corpus is written once,
read without copying, and never trusted blindly?

A split is a list of shards. A shard is three files: tokens (raw uint16 or uint32), documents (int64
offsets) and, per sequence length, a packing plan (pieces and rows); of examples, of which not every
token is learned, a fourth says which are (raw bool), and a fifth may hold numbers of each (float64
`notes`). An index lists every file with its size and
checksum.
"""

import dataclasses
import functools
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data import cache, packing as plans

if typing.TYPE_CHECKING:
  from data.batch import Batch  # which is JAX's: whoever only writes shards needs none

# How pieces fill rows: as best they fit, in their order, or one a row.
FIT, ORDER, ALONE = PACKINGS = 'fit', 'order', 'alone'
SHARD_TOKENS = 2**26  # a shard is closed at the first document that reaches this: 128 MiB of uint16


class ShardWriter:
  """Writes documents into numbered shards; use as a context manager.

  Args:
    directory: an existing directory.
    name: what the files' names begin with.
    vocabulary: tokens are kept as uint16 up to 65,536 ids, else as uint32.
    scored: whether each document says which of its tokens are learned.
    notes: how many numbers each has beside it.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    name: str,
    vocabulary: int,
    scored: bool = False,
    notes: int = 0,
  ):
    self._directory, self._name = directory, name
    self._suffixes = ['tokens', *(['scored'] if scored else [])]
    self._dtype = dtype_of(vocabulary)
    self._files = []
    self._offsets = [0]
    self._noted, self._notes = notes, []
    self.shards: list[dict] = []

  def __enter__(self) -> 'ShardWriter':
    return self

  def __exit__(self, *exception) -> None:
    self._close()

  def add(
    self,
    document: np.ndarray,
    scored: np.ndarray | None = None,
    notes: Sequence[float] = (),
  ) -> None:
    """Appends a document, int [tokens], bos and eos included; scored: bool [tokens]."""
    if len(notes) != self._noted:
      raise ValueError(f'{len(notes)} notes of a document; its shard has {self._noted} of each')
    if not self._files:
      self._files = [open(self._path(suffix), 'wb') for suffix in self._suffixes]
    contents = [document.astype(self._dtype), *([] if scored is None else [scored])]
    for file, content in zip(self._files, contents, strict=True):
      file.write(content.tobytes())
    self._offsets.append(self._offsets[-1] + len(document))
    self._notes.append(notes)
    if self._offsets[-1] >= SHARD_TOKENS:
      self._close()

  def end_shard(self) -> None:
    """What is added from here on is in another shard, and so in other rows."""
    self._close()

  def _path(self, suffix: str) -> pathlib.Path:
    return self._directory / f'{self._name}-{len(self.shards):05d}.{suffix}'

  def _close(self) -> None:
    if not self._files:
      return
    for file in self._files:
      file.close()
    np.save(self._path('documents.npy'), np.array(self._offsets, np.int64))
    suffixes = [*self._suffixes, 'documents.npy']
    if self._noted:
      np.save(self._path('notes.npy'), np.array(self._notes, np.float64))
      suffixes.append('notes.npy')
    name = self._path(suffixes[0]).name.removesuffix(f'.{suffixes[0]}')
    made = entry_of(self._directory, name, self._dtype, self._offsets, suffixes)
    self.shards.append(made | ({'scored': True} if 'scored' in self._suffixes else {}))
    self._files, self._notes = [], []
    self._offsets = [0]


def dtype_of(vocabulary: int) -> np.dtype:
  """What tokens are kept as."""
  return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def entry_of(
  directory: pathlib.Path,
  name: str,
  dtype: np.dtype,
  offsets: Sequence[int],
  suffixes: Sequence[str],
) -> dict:
  """What an index says of a shard whose files are written."""
  return {
    'name': name,
    'dtype': dtype.name,
    'tokens': int(offsets[-1]),
    'documents': len(offsets) - 1,
    'files': [cache.record(directory, f'{name}.{suffix}') for suffix in suffixes],
  }


PLANS = {FIT: plans.pack, ORDER: plans.pack_in_order, ALONE: plans.pack_alone}


@dataclasses.dataclass(frozen=True)
class Rows:
  """How documents fill rows: what plans them, and what reads them.

  Attributes:
    length: T. packing: one of PACKINGS.
  """

  length: int
  packing: str = FIT

  # What a plan counts.
  counts = ('pairs', 'squared_pairs')

  @property
  def size(self) -> str:
    """Of a row, as messages have it."""
    return str(self.length)

  @property
  def name(self) -> str:
    """Of the directory of plans."""
    return f'rows-{self.size}' + ('' if self.packing == FIT else f'-{self.packing}')

  @property
  def in_order(self) -> 'Rows':
    """For what is held out."""
    return dataclasses.replace(self, packing=ALONE if self.packing == ALONE else ORDER)

  def write_plan(self, corpus: pathlib.Path, directory: pathlib.Path, shard: dict) -> dict:
    """Packs one shard's documents into rows and writes the plan.

    Args:
      corpus: where the shard is.
      directory: where the plan goes.
      shard: its entry, from ShardWriter.shards.

    Returns:
      The plan's entry: rows, pairs, squared_pairs (the sum over pieces of their pairs squared),
      files.
    """
    pieces = plans.cut(np.load(corpus / f'{shard["name"]}.documents.npy'), self.length)
    order, rows = PLANS[self.packing](pieces[:, 1], self.length)
    return {
      'pairs': int(pieces[:, 1].sum()),
      'squared_pairs': int(np.square(pieces[:, 1]).sum()),
      **written_plan(directory, shard['name'], pieces[order], rows),
    }

  def fill(self, totals: dict) -> float:
    """Which share of rows is no padding, by what their plans count together."""
    return totals['pairs'] / (totals['rows'] * self.length)

  def source(self, *parts) -> 'PackedSource':
    """What reads the rows; parts: as PackedSource has them."""
    return PackedSource(*parts)


def written_plan(directory: pathlib.Path, name: str, pieces: np.ndarray, rows: np.ndarray) -> dict:
  """Writes the pieces in the order of rows, and where each row begins; the entry of both."""
  files = {f'{name}.pieces.npy': pieces, f'{name}.rows.npy': rows}
  for file, content in files.items():
    np.save(directory / file, content)
  return {'rows': len(rows) - 1, 'files': [cache.record(directory, file) for file in files]}


@dataclasses.dataclass(frozen=True)
class PackedShard:
  """One shard and its plan, memory-mapped when first used.

  Attributes:
    corpus, plan: the directories of the tokens and of the plan.
    name: the shard's name.
    dtype: of the tokens on disk.
    partly: whether not every token is learned.
  """

  corpus: pathlib.Path
  plan: pathlib.Path
  name: str
  dtype: str
  partly: bool = False

  @functools.cached_property
  def scored(self) -> np.ndarray:
    return np.memmap(self.corpus / f'{self.name}.scored', bool, 'r')

  @functools.cached_property
  def notes(self) -> np.ndarray:
    return np.load(self.corpus / f'{self.name}.notes.npy', mmap_mode='r')

  @functools.cached_property
  def tokens(self) -> np.ndarray:
    return np.memmap(self.corpus / f'{self.name}.tokens', self.dtype, 'r')

  @functools.cached_property
  def pieces(self) -> np.ndarray:
    return np.load(self.plan / f'{self.name}.pieces.npy', mmap_mode='r')

  @functools.cached_property
  def rows(self) -> np.ndarray:
    return np.load(self.plan / f'{self.name}.rows.npy', mmap_mode='r')


@dataclasses.dataclass(frozen=True)
class PackedSource:
  """The packed rows of one source's split (or of all sources').

  Attributes:
    name: for messages.
    weight: share of the examples drawn from here, relative to the other sources.
    shards: in order.
    ends: int64 [shards], cumulative number of rows.
    alike: whether every piece counts for 1, shared by its tokens, and not every token.
    parts: of what is held out of several sources: the shards of each, by name.
  """

  name: str
  weight: float
  shards: tuple[PackedShard, ...]
  ends: np.ndarray
  alike: bool = False
  parts: Mapping[str, range] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return int(self.ends[-1]) if len(self.ends) else 0

  def fill(self, index: int, batch: 'Batch', into: int) -> None:
    """Writes row `index` into row `into` of a Batch of numpy arrays made by Batch.empty."""
    shard, pieces = self.pieces(index)
    at = 0
    for segment, (start, n) in enumerate(pieces, start=1):
      here = slice(at, at + n)
      piece = shard.tokens[start : start + n + 1]
      batch.tokens[into, here] = piece[:-1]
      batch.targets[into, here] = piece[1:]
      batch.positions[into, here] = np.arange(n, dtype=np.int32)
      batch.segments[into, here] = segment
      weights = (
        np.float32(shard.scored[start + 1 : start + n + 1]) if shard.partly else np.float32(1)
      )
      batch.weights[into, here] = weights / weights.sum() if self.alike else weights
      at += n

  def pieces(self, index: int) -> tuple[PackedShard, list[list[int]]]:
    """Of row `index`: the shard that they are in, and the plan's entries."""
    which = int(np.searchsorted(self.ends, index, side='right'))
    shard = self.shards[which]
    row = index - (int(self.ends[which - 1]) if which else 0)
    first, last = shard.rows[row : row + 2].tolist()
    return shard, shard.pieces[first:last].tolist()

  def documents(self) -> Iterator[np.ndarray]:
    """Tokens of every document, in order, bos and eos included."""
    for shard in self.shards:
      offsets = np.load(shard.corpus / f'{shard.name}.documents.npy', mmap_mode='r')
      for d in range(len(offsets) - 1):
        yield np.asarray(shard.tokens[offsets[d] : offsets[d + 1]])
