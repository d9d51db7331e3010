"""How does a corpus become rows of exactly one length, with noise that is drawn anew each time and
is the same for anyone who draws it?

Documents follow one another, and rows are cut off one after another (a chunk); nothing is padded,
and only what does not fill a row at the end of a shard is left out. What an objective makes of a
chunk is a `Noise`, a function of the chunk and of numbers that the seed and the example's place in
the endless sequence of examples decide, so that a resume, other processes and other batch sizes see
the same examples, and every epoch sees others.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from data.batch import Batch
from data.config import DataConfig
from data.loader import Loader, ValidationBatches
from data.prepared import Prepared
from data.shards import PackedShard, PackedSource
from data.tokenizer import Tokenizer

TRAINING, VALIDATION = 0, 1  # whose draws have nothing to do with each other
Uniform = Callable[[int], np.ndarray]  # (n) -> [n] numbers in [0, 1), the same ones each time


class ChunkTokens(NamedTuple):
  """Of each token of a row, int32 [length]: its id, and as in data.batch.Batch its position and
  segment: of its document, of which a chunk may have only a part.
  """

  tokens: np.ndarray
  positions: np.ndarray
  segments: np.ndarray


class Noise(Protocol):
  """What is done to a chunk.

  Attributes:
    length: tokens of a chunk.
    whole: whether documents come with their bos and eos, else with neither.
    key: of all that decides what is drawn.
  """

  length: int
  whole: bool
  key: str

  def empty(self, rows: int) -> Batch:
    """A batch of padding, numpy arrays to be filled in."""

  def fill(self, chunk: ChunkTokens, uniform: Uniform, batch: Batch, into: int) -> None:
    """Writes an example of the chunk into row `into`."""


def uniform(stream: int, seed: int, example: int, count: int) -> np.ndarray:
  """f64 [count] in [0, 1), a function of the arguments alone; of different ones, independent.

  By a counter (Philox, Salmon et al. 2011) whose bits no version of numpy changes, as those of its
  distributions may.
  """
  key = np.array([seed + (stream << 32), example], np.uint64)
  return (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53


@dataclasses.dataclass(frozen=True)
class Chunks:
  """The chunks of one source's split (or of all sources').

  Attributes:
    name, weight, shards: as of data.shards.PackedSource.
    length, whole: see Noise.
    parts: as of PackedSource.
  """

  name: str
  weight: float
  shards: tuple[PackedShard, ...]
  length: int
  whole: bool
  parts: Mapping[str, range] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, source: PackedSource, noise: Noise) -> 'Chunks':
    """Those of a packed source. Raises ValueError where its text does not fill one."""
    made = cls(source.name, source.weight, source.shards, noise.length, noise.whole, source.parts)
    if not len(made):
      tokens = sum(int(ends[-1]) for _, ends in made._documents if len(ends))
      raise ValueError(
        f'{source.name}: {tokens} tokens do not fill an example, which takes {noise.length} in '
        'one shard; lower data.sequence_length, or give more text (of what is held out: raise '
        'data.validation_fraction)'
      )
    return made

  @functools.cached_property
  def _documents(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Of each shard: where each document's tokens begin on disk, and where it ends when they follow
    each other; int64 [documents] each.
    """
    edge = 0 if self.whole else 1
    each = []
    for shard in self.shards:
      offsets = np.load(shard.corpus / f'{shard.name}.documents.npy')
      each.append((offsets[:-1] + edge, np.cumsum(np.diff(offsets) - 2 * edge)))
    return tuple(each)

  @functools.cached_property
  def ends(self) -> np.ndarray:
    """int64 [shards], cumulative number of chunks."""
    counts = [int(ends[-1]) // self.length if len(ends) else 0 for _, ends in self._documents]
    return np.cumsum(counts, dtype=np.int64)

  def __len__(self) -> int:
    return int(self.ends[-1]) if len(self.ends) else 0

  def __getitem__(self, index: int) -> ChunkTokens:
    which = int(np.searchsorted(self.ends, index, side='right'))
    before = int(self.ends[which - 1]) if which else 0
    starts, ends = self._documents[which]
    chunk = ChunkTokens(*(np.empty(self.length, np.int32) for _ in ChunkTokens._fields))
    begin = (index - before) * self.length
    document = int(np.searchsorted(ends, begin, side='right'))
    at = segment = 0
    while at < self.length:
      inside = begin + at - (int(ends[document - 1]) if document else 0)
      n = min(self.length - at, int(ends[document]) - begin - at)
      if n:  # a document without its ends may be empty
        segment += 1
        start = int(starts[document]) + inside
        here = slice(at, at + n)
        chunk.tokens[here] = self.shards[which].tokens[start : start + n]
        chunk.positions[here] = np.arange(n)
        chunk.segments[here] = segment
        at += n
      document += 1
    return chunk

  @property
  def document_length(self) -> float:
    """Length of the piece of document that a token stands in, averaged over tokens."""
    squares = 0
    for _, ends in self._documents:
      used = int(ends[-1]) // self.length * self.length if len(ends) else 0
      cuts = np.union1d(ends[ends < used], np.arange(0, used + 1, self.length))
      squares += int(np.square(np.diff(cuts)).sum())
    return squares / (len(self) * self.length)


@dataclasses.dataclass(frozen=True)
class Chunked:
  """A prepared corpus in chunks, for an objective that makes noise; see objectives.objective's
  `read`.

  Attributes:
    prepared: whose documents they are.
    tokenizer: with the ids that the noise needs.
    noise: what becomes of a chunk.
    train: of each source. validation: of what is held out, always with the same noise.
  """

  prepared: Prepared
  tokenizer: Tokenizer
  noise: Noise
  train: tuple[Chunks, ...]
  validation: Chunks

  @classmethod
  def of(cls, prepared: Prepared, tokenizer: Tokenizer, noise: Noise) -> 'Chunked':
    """Raises ValueError where a split does not fill an example."""
    train = tuple(Chunks.of(source, noise) for source in prepared.train)
    return cls(prepared, tokenizer, noise, train, Chunks.of(prepared.validation, noise))

  @property
  def key(self) -> str:
    """Hash of all that decides about the examples."""
    return f'{self.prepared.directories[0].name}-{self.noise.key}'

  @property
  def files(self) -> str:
    """Digest of the corpus's files."""
    return self.prepared.files

  @property
  def rows(self) -> int:
    """Chunks to train on."""
    return sum(map(len, self.train))

  @property
  def document_length(self) -> float:
    """Of Chunks, averaged over training tokens as they are drawn."""
    lengths = [source.document_length for source in self.train]
    return float(np.average(lengths, weights=[source.weight for source in self.train]))

  def validation_documents(self) -> Iterator[str]:
    """None: bits of noise are not bits of a text, which compressors could be asked for."""
    return iter(())


class ChunkLoader(Loader):
  """As Loader, of a Chunked."""

  def _empty(self, rows: int) -> Batch:
    return self._prepared.noise.empty(rows)

  def _fill(self, example: int, batch: Batch, into: int) -> None:
    source, index = self._sequence[example]
    draw = functools.partial(uniform, TRAINING, self._config.seed, example)
    self._prepared.noise.fill(self._prepared.train[source][index], draw, batch, into)


class ChunkValidation(ValidationBatches):
  """As ValidationBatches, of a Chunked: the same examples each time, whatever data.seed is."""

  def __init__(self, chunked: Chunked, config: DataConfig, rows: Sequence[int]):
    super().__init__(chunked, config, rows)
    self._noise = chunked.noise

  def _empty(self, rows: int) -> Batch:
    return self._noise.empty(rows)

  def _fill(self, index: int, batch: Batch, into: int) -> None:
    draw = functools.partial(uniform, VALIDATION, 0, index)
    self._noise.fill(self._source[index], draw, batch, into)
