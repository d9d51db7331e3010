"""Where is what a frozen model said of a corpus, and how does it come into batches? In files beside
the rows, of every token that counts, in the order of rows; a batch has it by name beside its rows.

B rows · T length · K numbers of a token
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data import cache
from data.loader import Loader, ValidationBatches
from data.pairs import PairLoader, Pairs, PairValidation
from data.prepared import Prepared
from data.shards import PackedSource

ROWS = 'rows'  # the name of a batch's own part
Fields = Mapping[str, tuple[str, int]]  # of what is said: dtype, and numbers of a token


@dataclasses.dataclass(frozen=True)
class Said:
  """Of the rows of one split.

  Attributes:
    directory: where the files are. name: that they begin with. fields: of what is said.
  """

  directory: pathlib.Path
  name: str
  fields: Fields

  @functools.cached_property
  def ends(self) -> np.ndarray:
    """int64 [rows + 1]: where the tokens of each row begin, and where the last ones end."""
    return np.load(self.directory / f'{self.name}.ends.npy')

  @functools.cached_property
  def arrays(self) -> dict[str, np.ndarray]:
    """[tokens, K] by field, memory-mapped."""
    return {
      field: np.memmap(self.directory / f'{self.name}.{field}', dtype, 'r').reshape(-1, count)
      for field, (dtype, count) in self.fields.items()
    }

  def fill(self, index: int, batch: Mapping[str, Any], into: int) -> None:
    """Writes what is said of row `index` beside row `into` of a batch, which has that already."""
    counted = batch[ROWS].weights[into] != 0
    tokens = slice(*self.ends[index : index + 2].tolist())
    for field in self.fields:
      batch[field][into, counted] = self.arrays[field][tokens]


class SaidWriter:
  """Writes a split's; use as a context manager, within a directory that is being built."""

  def __init__(self, directory: pathlib.Path, name: str, fields: Fields):
    self._directory, self._name, self._fields = directory, name, fields
    self._files: dict[str, Any] = {}
    self._ends = [0]

  def __enter__(self) -> 'SaidWriter':
    for field in self._fields:
      self._files[field] = open(self._directory / f'{self._name}.{field}', 'wb')
    return self

  def __exit__(self, *exception) -> None:
    for file in self._files.values():
      file.close()
    np.save(self._directory / f'{self._name}.ends.npy', np.array(self._ends, np.int64))

  def add(self, counted: np.ndarray, said: Mapping[str, np.ndarray]) -> None:
    """Appends a row: bool [T], and [T, K] by field, of which what counts is kept."""
    for field, (dtype, _) in self._fields.items():
      self._files[field].write(said[field][counted].astype(dtype).tobytes())
    self._ends.append(self._ends[-1] + int(counted.sum()))

  def records(self) -> list[dict]:
    """Of its files, for the index."""
    names = [*self._fields, 'ends.npy']
    return [cache.record(self._directory, f'{self._name}.{name}') for name in names]


@dataclasses.dataclass(frozen=True)
class WithSaid:
  """Prepared data, and what is said of it.

  Attributes:
    prepared: see objectives.objective.Objective.read.
    said: of each source. held_out: of what is held out.
    digest: of what was said, and by whom.
  """

  prepared: Prepared
  said: tuple[Said, ...]
  held_out: Said
  digest: str

  def __getattr__(self, name):
    return getattr(self.prepared, name)

  @property
  def key(self) -> str:
    """Of all that decides about batches."""
    return f'{self.prepared.key}-{self.digest}'

  @property
  def in_rows(self) -> Prepared:
    """The same for batches that have fields of their own for what is said."""
    return dataclasses.replace(
      self.prepared,
      key=self.key,
      train=tuple(map(InRows, self.prepared.train, self.said)),
      validation=InRows(self.prepared.validation, self.held_out),
    )

  def batches(self, config, rows) -> Loader:
    """Training batches: {'rows': .., and each field [B, T, K]}."""
    return (SaidPairLoader if isinstance(self.prepared, Pairs) else SaidLoader)(self, config, rows)

  def validation_batches(self, config, rows) -> ValidationBatches:
    """The same of what is held out."""
    kind = SaidPairValidation if isinstance(self.prepared, Pairs) else SaidValidation
    return kind(self, config, rows)


@dataclasses.dataclass(frozen=True)
class InRows:
  """A source of rows that writes what is said of them into their batches' own fields, [B, T]."""

  source: PackedSource
  said: Said

  def __len__(self) -> int:
    return len(self.source)

  def __getattr__(self, name):
    return getattr(self.source, name)

  def fill(self, index: int, batch: Any, into: int) -> None:
    """As PackedSource.fill."""
    self.source.fill(index, batch, into)
    # Views: what is written there is in the batch.
    fields = {name: getattr(batch, name)[..., None] for name in self.said.fields}
    self.said.fill(index, {ROWS: batch} | fields, into)


def batch_of(rows, fields: Fields, make) -> dict[str, Any]:
  """A batch of these rows, with room for what is said; make: (shape, dtype) -> array. Whole numbers
  are int32 there.
  """

  def room(dtype, count):
    whole = np.dtype(dtype).kind in 'iu'
    return make((*rows.weights.shape, count), np.dtype('int32' if whole else dtype))

  return {ROWS: rows} | {name: room(*field) for name, field in fields.items()}


class _Saying:
  """Loaders whose batches have what is said beside the rows; before those of the rows."""

  def __init__(self, prepared: WithSaid, config, rows):
    self._said = prepared
    super().__init__(prepared, config, rows)

  def _empty(self, rows):
    return batch_of(super()._empty(rows), self._said.held_out.fields, np.zeros)


class _SayingTraining(_Saying):
  def _fill(self, example, batch, into):
    super()._fill(example, batch[ROWS], into)
    source, index = self._sequence[example]
    self._said.said[source].fill(index, batch, into)


class _SayingValidation(_Saying):
  def _fill(self, index, batch, into):
    super()._fill(index, batch[ROWS], into)
    self._said.held_out.fill(index, batch, into)


class SaidLoader(_SayingTraining, Loader):
  """As Loader."""


class SaidPairLoader(_SayingTraining, PairLoader):
  """As PairLoader."""


class SaidValidation(_SayingValidation, ValidationBatches):
  """As ValidationBatches."""


class SaidPairValidation(_SayingValidation, PairValidation):
  """As PairValidation."""
