"""Which tokens does an encoder have to guess? Those that are masked: BERT's pretraining (Devlin et
al., arXiv:1810.04805, section 3.1), with masks that are drawn anew each time (RoBERTa,
arXiv:1907.11692, section 4.1).
"""

import dataclasses
import functools

import numpy as np

from data.batch import Batch
from data.chunks import ChunkTokens, Uniform


@dataclasses.dataclass(frozen=True)
class Masking:
  """The noise: of the tokens of text (special ones never), each is scored with probability
  `masked`, and is then, with the probabilities that follow, replaced by the mask, by any token of
  text, or kept.

  Attributes:
    length, key: see data.chunks.Noise.
    text: ids that text has, ascending. mask: the id of the mask.
  """

  length: int
  key: str
  masked: float
  replaced: float
  random: float
  text: np.ndarray
  mask: int
  whole = True

  @functools.cached_property
  def _is_text(self) -> np.ndarray:
    # Behind all of them, one for ids that are larger still, which are clipped to it.
    table = np.zeros(max(self.text[-1], self.mask) + 2, bool)
    table[self.text] = True
    return table

  def empty(self, rows: int) -> Batch:
    return Batch.empty(rows, self.length)

  def fill(self, chunk: ChunkTokens, uniform: Uniform, batch: Batch, into: int) -> None:
    which, how, other = uniform(3 * self.length).reshape(3, -1)
    text = self._is_text.take(chunk.tokens, mode='clip')
    scored = (which < self.masked) & text
    drawn = self.text[(other * len(self.text)).astype(np.int64)]
    changed = np.where(how < self.replaced, self.mask, drawn)
    keeps = how >= self.replaced + self.random
    batch.tokens[into] = np.where(scored & ~keeps, changed, chunk.tokens)
    batch.targets[into] = np.where(scored, chunk.tokens, 0)
    batch.weights[into] = scored
    batch.positions[into] = chunk.positions
    batch.segments[into] = chunk.segments
