"""Which text has a run been trained on, and which was held out from it? The rows that its loader
had given when a checkpoint was written, and no others: of a large corpus a short run reads a part.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from data.loader import row_sequence
from data.prepared import Prepared
from data.shards import PackedShard, PackedSource
from evaluation.passages import Cut, Passage, PassageDraw, Passages
from parallel.mesh import MeshConfig, make_mesh
from training.config import Config
from training.program import read
from workdir.checkpoint import Checkpoints
from workdir.open import config_of, step_of

MOST = 2**17  # examples among which rows are drawn, at most


class Trained(NamedTuple):
  """What a run read.

  Attributes:
    prepared: its data. config: of the run. examples: rows that it was given, some of them again in
      later epochs.
  """

  prepared: Prepared
  config: Config
  examples: int

  def members(self, cut: Cut) -> Passages:
    """Passages of rows that were read. Raises ValueError where none is long enough."""
    draw = np.random.Generator(np.random.Philox(cut.seed))
    every = self.examples <= MOST
    order = draw.permutation(self.examples) if every else draw.integers(0, self.examples, MOST)
    sequence = row_sequence(self.prepared, self.config.data)
    rows = dict.fromkeys(sequence[int(example)] for example in order)
    placed = ((self.prepared.train[source], row) for source, row in rows)
    return _passages(placed, f'{self.examples:,} rows that were read', self._bos, cut)

  def control(self, cut: Cut) -> Passages:
    """The same of what is held out."""
    held_out = self.prepared.validation
    order = np.random.Generator(np.random.Philox(cut.seed)).permutation(len(held_out))
    placed = ((held_out, int(row)) for row in order)
    return _passages(placed, f'{len(held_out):,} rows held out', self._bos, cut)

  def texts(self) -> Iterator[str]:
    """Every document of the training shards, whether it was read yet or not."""
    for source in self.prepared.train:
      for ids in source.documents():
        yield self.prepared.tokenizer.decode(ids)

  @property
  def _bos(self) -> int:
    return self.prepared.tokenizer.bos


def trained(
  workdir: str | os.PathLike, checkpoint: str = 'last', log: Callable[[str], Any] = print
) -> Trained:
  """What a run had read at a checkpoint, by the position that was saved with it.

  Raises ValueError for a run that was imported, or trained on what is no text of its own, and where
  the data are not those that it read.
  """
  config = config_of(workdir)
  checkpoints = Checkpoints(workdir)
  step = step_of(checkpoints, checkpoint)
  position = {} if step is None else checkpoints.record(step)['data']
  remedy = 'name files that it has read, and others, by --training and --control'
  if not position.get('examples'):
    raise ValueError(
      f'{workdir} has no training rows: it was imported, or not trained yet, and what it has read '
      f'is not known; {remedy}'
    )
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.local_devices()[:1])):
    prepared = read(config, log)
  texts = isinstance(prepared, Prepared) and all(
    type(source) is PackedSource for source in (*prepared.train, prepared.validation)
  )
  if not texts or not config.model.causal or config.model.encoder_layers:
    raise ValueError(
      f'{workdir} was trained with objective.kind={config.objective.kind!r}, whose rows are no '
      f'texts that a decoder goes on with; {remedy}'
    )
  batches = config.objective.batches(prepared, config.data, range(config.data.batch_size))
  if position.get('key', '').startswith(f'{prepared.key}-'):
    # What a teacher has said of the rows (data.said) is not asked for: they are the same rows.
    position = position | {'key': prepared.key}
  try:
    batches.restore(position)
  except ValueError as error:
    raise ValueError(f'the data of {workdir} are not those that it read: {error}') from error
  finally:
    batches.close()
  return Trained(prepared, config, position['examples'])


def _passages(rows: Iterable[tuple[PackedSource, int]], of: str, bos: int, cut: Cut) -> Passages:
  """Of the pieces of documents in some rows, which are in an order by chance; where not all is
  learned (an answer behind a question), what is learned is what the model has to go on with.
  """
  drawing = PassageDraw(cut)
  for source, row in rows:
    if drawing.full:
      break
    shard, pieces = source.pieces(row)
    bounds = _bounds(shard)
    for start, n in pieces:
      place = f'{source.name} row {row}, token {start}'
      ids = np.asarray(shard.tokens[start : start + n + 1]).tolist()
      if shard.partly:
        passage = _answer(place, ids, shard.scored[start : start + n + 1], cut)
      else:
        passage = cut.passage(place, ids, bos)
      begin = int(bounds[np.searchsorted(bounds, start, 'right') - 1])
      if passage is not None:
        passage = dataclasses.replace(passage, document=f'{source.name} {shard.name} {begin}')
      drawing.add(passage, begin != start)
  return drawing.passages(of)


@functools.cache
def _bounds(shard: PackedShard) -> np.ndarray:
  """Where its documents begin, and the last one ends."""
  return np.load(shard.corpus / f'{shard.name}.documents.npy', mmap_mode='r')


def _answer(place: str, ids: list[int], scored: np.ndarray, cut: Cut) -> Passage | None:
  """The first thing that is learned, behind all that is before it; None where it is too short."""
  learned = np.flatnonzero(scored)
  if not len(learned):
    return None
  at = int(learned[0])
  if not 0 < at <= cut.prompt + 1 or not scored[at : at + cut.new].all() or len(ids) < at + cut.new:
    return None
  return Passage(place, tuple(ids[:at]), tuple(ids[at : at + cut.new]), at)
