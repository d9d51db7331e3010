"""Which rows make up the next batch, on this process, now and after any restart?

Global batch b is rows b * B .. (b + 1) * B - 1 of one endless, randomly accessible sequence of
training rows; a process reads those that its devices hold. So a position in the sequence is the
whole state, whatever the number of processes.
"""

import copy
import sys
from collections.abc import Iterator, Sequence

from data.batch import Batch
from data.config import DataConfig
from data.prepared import Prepared

THREADS = 2  # gathering rows is copying; more threads than this only contend for the interpreter
BUFFERED_BATCHES = 8


class Loader:
  """An endless iterator of training batches, numpy int32 [rows of this process, T];
  see `train_loader`.
  """

  def __init__(self, prepared: Prepared, config: DataConfig, rows: Sequence[int]):
    self._prepared = prepared
    self._config = config
    self._rows = rows
    self._sequence = row_sequence(prepared, config)
    self._examples = 0
    self._batches = self._read_from(0)

  def __iter__(self) -> 'Loader':
    return self

  def __next__(self) -> Batch:
    batch = next(self._batches)
    self._examples += self._config.batch_size
    return batch

  def take(self, state) -> Batch:
    """The next batch, whatever the state of training."""
    del state
    return next(self)

  def state(self) -> dict:
    """What `restore` needs, JSON-able: how many examples all processes together have been given,
    and of what.
    """
    return {'examples': self._examples, **self._identity()}

  def _identity(self) -> dict:
    return {
      'key': self._prepared.key,
      'files': self._prepared.files,
      'seed': self._config.seed,
      'weights': [source.weight for source in self._prepared.train],
    }

  def restore(self, state: dict) -> None:
    """Goes on where `state` was taken, without repeating or skipping an example;
    processes and batch size may differ.

    Raises:
      ValueError: the state belongs to other data, another seed or other weights,
        so its position means nothing here.
    """
    differing = [
      f'{name}: {state.get(name)!r} then, {value!r} now'
      for name, value in self._identity().items()
      # Older versions kept no digest of the files.
      if state.get(name) != value and (name != 'files' or name in state)
    ]
    if differing:
      raise ValueError(
        'the data order has changed since this loader state was saved ('
        + '; '.join(differing)
        + '); use the data config it was saved with (where keys end in said-..., bring back the '
        'checkpoint that was asked), or start without the state'
      )
    self._batches.close()
    self._examples = int(state['examples'])
    self._batches = self._read_from(self._examples)

  def close(self) -> None:
    """Stops the prefetching threads."""
    self._batches.close()

  def _read_from(self, example: int) -> Iterator[Batch]:
    import grain

    size = self._config.batch_size

    def batch(b: int) -> Batch:
      gathered = self._empty(len(self._rows))
      for into, row in enumerate(self._rows):
        self._fill(example + int(b) * size + row, gathered, into)
      return gathered

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BUFFERED_BATCHES)
    return iter(
      grain.MapDataset.range((sys.maxsize - example) // size).map(batch).to_iter_dataset(options)
    )

  # What a batch is made of, for loaders of other rows.

  def _empty(self, rows: int) -> Batch:
    return Batch.empty(rows, self._config.sequence_length)

  def _fill(self, example: int, batch: Batch, into: int) -> None:
    source, index = self._sequence[example]
    self._prepared.train[source].fill(index, batch, into)


def row_sequence(prepared: Prepared, config: DataConfig):
  """The endless sequence of training rows, a grain.MapDataset of (source, row): each source in a
  new random order in every epoch, mixed in exact proportion to the weights (which grain rounds to
  1% of the smallest).
  """
  import grain

  def rows(i: int):
    # grain seeds epoch e with seed + e: seeds of different sources must be far apart.
    seed = (config.seed + i * 0x9E3779B1) % 2**32
    return (
      grain.MapDataset.range(len(prepared.train[i]))
      .shuffle(seed=seed)
      .repeat()
      .map(lambda row: (i, int(row)))
    )

  sources = [rows(i) for i in range(len(prepared.train))]
  if len(sources) == 1:
    return sources[0]
  return grain.MapDataset.mix(sources, [source.weight for source in prepared.train])


def train_loader(
  prepared: Prepared, config: DataConfig, rows: Sequence[int] | None = None
) -> Loader:
  """Training batches for one process, for ever;
  deterministic in the prepared data, config.seed and the weights.

  Args:
    prepared: from `prepare(config)`.
    config: its batch_size B is global.
    rows: which of the B rows of every batch this process reads; all by default.
  """
  return Loader(prepared, config, range(config.batch_size) if rows is None else rows)


class ValidationBatches:
  """The held-out rows in order, as batches [rows of this process, T];
  can be iterated again; see `validation_batches`.
  """

  def __init__(self, prepared: Prepared, config: DataConfig, rows: Sequence[int]):
    self._source = prepared.validation
    self._config = config
    self._rows = rows
    self._held_out = range(len(self._source))

  def parts(self) -> 'dict[str, ValidationBatches]':
    """Of each source, by name, the same of its rows alone, which no batch mixes with others'; {}
    where there is one source.
    """
    ends, parts = [0, *self._source.ends.tolist()], {}
    for name, shards in self._source.parts.items():
      if len(shards):
        parts[name] = copy.copy(self)
        parts[name]._held_out = range(ends[shards.start], ends[shards.stop])
    return parts

  def __len__(self) -> int:
    return -(-len(self._held_out) // self._config.batch_size)

  def __iter__(self) -> Iterator[Batch]:
    for b in range(len(self)):
      batch = self._empty(len(self._rows))
      for into, row in enumerate(self._rows):
        index = b * self._config.batch_size + row
        if index < len(self._held_out):
          self._fill(self._held_out[index], batch, into)
      yield batch

  def _empty(self, rows: int) -> Batch:
    return Batch.empty(rows, self._config.sequence_length)

  def _fill(self, index: int, batch: Batch, into: int) -> None:
    self._source.fill(index, batch, into)


def validation_batches(
  prepared: Prepared, config: DataConfig, rows: Sequence[int] | None = None
) -> ValidationBatches:
  """Held-out batches for one process: every held-out token is predicted exactly once;
  the last batch ends in padding.

  The arguments are those of `train_loader`.
  """
  return ValidationBatches(prepared, config, range(config.batch_size) if rows is None else rows)
