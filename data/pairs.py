"""How do records of a source and a target become rows of both? Examples with their own segments,
packed so that both of a row's sides are full.

    record    source, target                        texts
    example   prefix source </s> | target </s>      ids, of which the target's are learned
    row       source   a a a a b b c c c 0          what the encoder reads
              segments 1 1 1 1 2 2 3 3 3 0
              target   A A B B B B C 0              what the decoder writes: its targets
              segments 1 1 2 2 2 2 3 0              (its inputs: shifted by one in each segment)

The tokens of a segment see the source of the same number (data.batch.SourceBatch), so a packed
example is what it is alone.

S, T lengths of a row's sources and targets
"""

import dataclasses
from typing import NamedTuple

import numpy as np

import names
from data import packing as plans
from data.batch import SourceBatch
from data.conversations import Example
from data.examples import TOO_LONG, Fitted, Packed
from data.loader import Loader, ValidationBatches
from data.prepared import Prepared
from data.records import PairRecord
from data.shards import ALONE, FIT, ORDER, PackedSource, Rows, written_plan
from data.tokenizer import Tokenizer, in_utf8

SIDES = ('source tokens', 'target tokens')
PLANS = {FIT: plans.pack_both, ORDER: plans.pack_both_in_order, ALONE: plans.pack_alone}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSettings(Packed):
  """What is made of records of a source and a target.

  Attributes:
    prefix: text that stands in front of every source: 'summarize: '.
    target_length: T, tokens of a row's targets; 0: data.sequence_length, which is that of its
      sources.
    too_long: of sources of more than data.sequence_length tokens: 'drop' the example, or cut the
      'left' or the 'right' end off; prefix and </s> are kept.
    target_too_long: the same of targets of more than target_length; one that is cut on the right
      has no </s>: it did not end there.

  Raises ValueError for names that are unknown and for a length that cannot be.
  """

  prefix: str = ''
  target_length: int = 0
  target_too_long: str = 'drop'
  tunes = 'seq2seq'
  formats = ('pair',)
  sides = SIDES

  def __post_init__(self):
    super().__post_init__()
    names.check('objective.target_too_long', self.target_too_long, TOO_LONG)
    if self.target_length < 0:
      raise ValueError(
        f'objective.target_length={self.target_length} must be at least 1 token, or 0 for '
        'data.sequence_length'
      )
    in_utf8(self.prefix)

  def room(self, config) -> tuple[int, int]:
    """S and T."""
    return config.sequence_length, self.target_length or config.sequence_length

  def writer(self, tokenizer):
    return PairWriter(tokenizer, self.prefix), tokenizer

  def facts(self, config):
    return {
      'prefix': self.prefix,
      'too_long': [self.too_long, self.target_too_long, *self.room(config)],
    }

  def lengths(self, example):
    target = int(example.scored.sum())
    return len(example.ids) - target, target

  def fitted(self, example, config, reserved=0):
    lengths = self.lengths(example)
    source, target = np.split(example.ids, lengths[:1])
    length, target_length = self.room(config)
    room = length - reserved, target_length
    long = [n > most for n, most in zip(lengths, room)]
    for side, is_long, then in zip(SIDES, long, (self.too_long, self.target_too_long)):
      if is_long and then == 'drop':
        return Fitted(None, dropped=side.replace(' tokens', '_too_long'))
    cut = tuple(side for side, is_long in zip(SIDES, long) if is_long)
    if long[0]:
      source = cut_source(source, room[0], example.kept, self.too_long, reserved)
    if long[1]:
      target = target[-room[1] :] if self.target_too_long == 'left' else target[: room[1]]
    return Fitted(Pair.of(source, target, example.kept), cut)

  def rows_of(self, config, tokenizer):
    length, target_length = self.room(config)
    return PairRows(length, self.packing, target_length, tokenizer.pad)


def cut_source(
  source: np.ndarray, most: int, kept: int, side: str, reserved: int = 0
) -> np.ndarray:
  """A source of `most` tokens: its last one is the end's, the first `kept` stay, too; behind
  `reserved` others of the row.

  Raises ValueError where nothing is left between them.
  """
  inside = most - kept - 1
  if inside < 1:
    raise ValueError(
      f'data.sequence_length={most + reserved} has no room for a source behind '
      + (f'{reserved} soft tokens (adapter.tokens) and ' if reserved else '')
      + f'a prefix of {kept} tokens; raise it, or shorten objective.prefix'
    )
  text = source[kept:-1]
  text = text[-inside:] if side == 'left' else text[:inside]
  return np.concatenate([source[:kept], text, source[-1:]])


@dataclasses.dataclass(frozen=True)
class Pair(Example):
  """A source and a target as one sequence of ids, of which the target's are learned.

  Attributes:
    kept: how many ids in front are not the source's own, and never cut off.
  """

  kept: int = 0

  @classmethod
  def of(cls, source: np.ndarray, target: np.ndarray, kept: int = 0) -> 'Pair':
    ids = np.concatenate([source, target]).astype(np.int32)
    return cls(ids, np.arange(len(ids)) >= len(source), kept=kept)


class PairWriter:
  """Makes examples of records, for one tokenizer: source and target each end in eos, as T5's do.

  prefix: text in front of every source, which is encoded with it, as generation meets both.
  """

  def __init__(self, tokenizer: Tokenizer, prefix: str = ''):
    self._tokenizer, self._prefix = tokenizer, prefix
    self._in_front = tokenizer.encode(prefix) if prefix else []

  def example(self, place: str, record: PairRecord) -> Pair:
    """Raises ValueError, naming the place, for an empty source or target."""
    for side in ('source', 'target'):
      if not getattr(record, side):
        raise ValueError(f'{place}: the {side} is empty: there is nothing to learn; leave it out')
    try:
      texts = [in_utf8(self._prefix + record.source), in_utf8(record.target)]
      source, target = self._tokenizer.encode_arrays(texts)
    except ValueError as error:
      raise ValueError(f'{place}: {error}') from error
    # Where prefix and text meet, a token may be of both: that is the text's.
    both = min(len(self._in_front), len(source))
    same = np.array(self._in_front[:both]) == source[:both]
    kept = both if same.all() else int(same.argmin())
    end = [self._tokenizer.eos]
    return Pair.of(np.append(source, end), np.append(target, end), kept)


@dataclasses.dataclass(frozen=True)
class PairRows(Rows):
  """How pairs fill rows.

  Attributes:
    length: S. target_length: T.
    start: what the decoder begins with.
  """

  target_length: int = 0
  start: int = 0
  counts = ('sources', 'pairs', 'squared_sources', 'squared_pairs', 'crossed')

  @property
  def size(self):
    return f'{self.length}x{self.target_length}'

  def write_plan(self, corpus, directory, shard):
    """As Rows.write_plan; the entry counts tokens of sources and of targets (pairs of the decoder),
    the sums over examples of their squares and of their products.
    """
    offsets = np.load(corpus / f'{shard["name"]}.documents.npy')
    learned = np.memmap(corpus / f'{shard["name"]}.scored', bool, 'r')
    targets = np.add.reduceat(learned, offsets[:-1], dtype=np.int64)
    sources = np.diff(offsets) - targets
    order, rows = PLANS[self.packing](
      np.stack([sources, targets], 1), (self.length, self.target_length)
    )
    pieces = np.stack([offsets[:-1], sources, targets], 1)
    return {
      'sources': int(sources.sum()),
      'pairs': int(targets.sum()),
      'squared_sources': int(np.square(sources).sum()),
      'squared_pairs': int(np.square(targets).sum()),
      'crossed': int((sources * targets).sum()),
      **written_plan(directory, shard['name'], pieces[order], rows),
    }

  def fill(self, totals):
    full = totals['rows'] * (self.length + self.target_length)
    return (totals['sources'] + totals['pairs']) / full

  def source(self, *parts):
    return PairSource(*parts, start=self.start)


@dataclasses.dataclass(frozen=True)
class PairSource(PackedSource):
  """As PackedSource, of rows of pairs.

  Attributes:
    start: what the decoder begins with.
  """

  start: int = 0

  def fill(self, index: int, batch: SourceBatch, into: int) -> None:
    shard, pieces = self.pieces(index)
    at = [0, 0]
    for segment, (begin, source, target) in enumerate(pieces, start=1):
      ids = shard.tokens[begin : begin + source + target]
      read, written = slice(at[0], at[0] + source), slice(at[1], at[1] + target)
      batch.source[into, read] = ids[:source]
      batch.source_positions[into, read] = np.arange(source)
      batch.source_segments[into, read] = segment

      batch.tokens[into, at[1]] = self.start
      batch.tokens[into, at[1] + 1 : at[1] + target] = ids[source:-1]
      batch.targets[into, written] = ids[source:]
      batch.positions[into, written] = np.arange(target)
      batch.segments[into, written] = segment
      batch.weights[into, written] = np.float32(1) / target if self.alike else 1
      at = [at[0] + source, at[1] + target]


class PairLengths(NamedTuple):
  """Of a row, in tokens, and what each of them attends to: what `model.flops.pair_flops` needs.

  Attributes:
    source, target: tokens of a row's sources and targets on average.
    source_seen, target_seen: length of the source (target) that a token of one (the other) stands
      in. source_crossed: of the source that a token of a target stands beside.
  """

  source: float
  target: float
  source_seen: float
  target_seen: float
  source_crossed: float


@dataclasses.dataclass(frozen=True)
class Pairs(Prepared):
  """Prepared rows of pairs.

  Attributes:
    form: of the rows.
  """

  form: PairRows

  @property
  def document_length(self) -> PairLengths:
    """As rows are drawn from the sources."""
    names_ = self.form.counts
    per_row = [
      [packing[name] / packing['rows'] for name in names_]
      for packing in self.report['packing']['train']
    ]
    means = np.average(per_row, axis=0, weights=[source.weight for source in self.train])
    mean = dict(zip(names_, means.tolist()))
    source, target = mean['sources'], mean['pairs']
    return PairLengths(
      source,
      target,
      mean['squared_sources'] / source,
      mean['squared_pairs'] / target,
      mean['crossed'] / target,
    )

  @property
  def fills(self) -> dict[str, float]:
    """Shares of training rows that are no padding, by side."""
    totals = {
      name: sum(packing[name] for packing in self.report['packing']['train'])
      for name in ('rows', 'sources', 'pairs')
    }
    return {
      'sources': totals['sources'] / (totals['rows'] * self.form.length),
      'targets': totals['pairs'] / (totals['rows'] * self.form.target_length),
    }

  def empty(self, rows: int) -> SourceBatch:
    """A batch of padding, numpy arrays to be filled in."""
    return SourceBatch.empty(rows, self.form.target_length, self.form.length)


class PairLoader(Loader):
  """As Loader, of Pairs."""

  def _empty(self, rows: int) -> SourceBatch:
    return self._prepared.empty(rows)


class PairValidation(ValidationBatches):
  """As ValidationBatches, of Pairs."""

  def __init__(self, pairs: Pairs, config, rows):
    super().__init__(pairs, config, rows)
    self._pairs = pairs

  def _empty(self, rows: int) -> SourceBatch:
    return self._pairs.empty(rows)
