"""Which tokens does an encoder-decoder have to give back? Spans of noise, each of which a sentinel
stands for: T5's pretraining (Raffel et al., arXiv:1910.10683, section 3.1.4), with the lengths and
the layout of its code, t5.data.preprocessors.span_corruption.

    text     w0 w1 w2 w3 w4 w5 w6 w7 w8          noise: w2 w3, w6
    source   w0 w1 <0> w4 w5 <1> w7 w8 </s>      (T5's code ends a text with noise)
    target   <0> w2 w3 <1> w6 </s>

An example is a row: a text of exactly as many tokens as give a source of `data.sequence_length`, so
that there is no padding. Documents follow one another in it without anything between them, and see
each other, as T5's did.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from data.batch import SourceBatch
from data.chunks import ChunkTokens, Uniform


class Lengths(NamedTuple):
  """Of an example, in tokens: of the text, of what the encoder reads, and of what the decoder
  gives; how many tokens of the text are noise, and in how many spans.
  """

  text: int
  source: int
  target: int
  noise: int
  spans: int

  @classmethod
  def of_text(cls, text: int, density: float, mean_span: float) -> 'Lengths':
    """Of a text of so many tokens: a sentinel for each span on either side, and eos."""
    noise = round(text * density)
    spans = round(noise / mean_span)
    return cls(text, text - noise + spans + 1, noise + spans + 1, noise, spans)

  @classmethod
  def of_source(cls, source: int, density: float, mean_span: float) -> 'Lengths':
    """Of the longest text whose source has so many tokens (T5's random_spans_helper). Raises
    ValueError where no span fits.
    """
    # A token more of text is at most one more of source.
    text = max(source - 1, 0)
    while cls.of_text(text + 1, density, mean_span).source <= source:
      text += 1
    lengths = cls.of_text(text, density, mean_span)
    if density == 0.5 and lengths.target > lengths.source:
      lengths = cls.of_text(text - 1, density, mean_span)  # as there: rows of one round length
    if not lengths.spans:
      raise ValueError(
        f'data.sequence_length={source} has no span of noise with '
        f'objective.noise_density={density} and objective.mean_span={mean_span}: raise one of the '
        'first two'
      )
    return lengths


@dataclasses.dataclass(frozen=True)
class Spans:
  """The noise.

  Attributes:
    lengths: of every example.
    key: see data.chunks.Noise.
    sentinels: ids of the first span's, the second's, ..., at least as many as there are spans.
    eos: ends source and target. start: what the decoder begins with.
  """

  lengths: Lengths
  key: str
  sentinels: tuple[int, ...]
  eos: int
  start: int
  whole = False

  @property
  def length(self) -> int:
    return self.lengths.text

  def empty(self, rows: int) -> SourceBatch:
    return SourceBatch.empty(rows, self.lengths.target, self.lengths.source)

  def fill(self, chunk: ChunkTokens, uniform: Uniform, batch: SourceBatch, into: int) -> None:
    noise = places(self.lengths, uniform)
    source, target = (
      np.append(collapsed(chunk.tokens, hidden, self.sentinels), self.eos)
      for hidden in (noise, ~noise)
    )
    batch.source[into] = source
    batch.source_positions[into] = np.arange(len(source))
    batch.source_segments[into] = 1
    batch.tokens[into, 0] = self.start
    batch.tokens[into, 1:] = target[:-1]
    batch.targets[into] = target
    batch.positions[into] = np.arange(len(target))
    batch.segments[into] = 1
    batch.weights[into] = 1


def places(lengths: Lengths, uniform: Uniform) -> np.ndarray:
  """Which tokens of a text are noise, bool [text]: what is kept and what is noise by turns, each
  cut into as many pieces at random; the first is kept, the last is noise.
  """
  kept = lengths.text - lengths.noise
  numbers = uniform(kept - 1 + lengths.noise - 1)
  pieces = np.stack(
    [segmented(part, lengths.spans) for part in np.split(numbers, [kept - 1])], axis=1
  )
  return np.repeat(np.arange(2 * lengths.spans) % 2 == 1, pieces.ravel())


def segmented(numbers: np.ndarray, pieces: int) -> np.ndarray:
  """Lengths of pieces, int64 [pieces], each at least 1, of n + 1 things between which n numbers
  stand: cut at the smallest of these, so that every way of cutting is as likely as any other.
  """
  cuts = np.sort(np.argsort(numbers, kind='stable')[: pieces - 1]) + 1
  return np.diff(cuts, prepend=0, append=len(numbers) + 1)


def collapsed(tokens: np.ndarray, hidden: np.ndarray, sentinels: tuple[int, ...]) -> np.ndarray:
  """The tokens with each run of hidden ones as one sentinel, in order."""
  first = hidden & ~np.concatenate([[False], hidden[:-1]])
  return np.where(first, np.take(sentinels, first.cumsum() - 1), tokens)[first | ~hidden]
