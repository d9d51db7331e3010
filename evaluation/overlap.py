"""How much of what a model writes stands in the text that it was trained on? Runs of words that
both have, and pieces that resemble each other, beside what people wrote at the same places.

The text is streamed: memory holds the words of what was written.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from data.duplicates import SHINGLE_WORDS, minhash
from evaluation import unpaired
from evaluation.contamination import LEAST, WORDS, Runs, words_of
from evaluation.intervals import Estimate, wilson

NEAR = 0.75  # similarity from which on data/duplicates.py takes texts for the same
ANY, RUNS, ALIKE = 'texts with a run', 'share of runs', 'near duplicates'


@dataclasses.dataclass(frozen=True)
class Overlap:
  """Of a text, what was found of it.

  Attributes:
    runs: how many it has. inside: how many of them stand in the training text, the first of which
      is `run`. similarity: the largest estimated Jaccard similarity with a piece of that text.
  """

  runs: int
  inside: int
  run: str
  similarity: float


def overlaps(
  texts: Sequence[str], training: Iterable[str], size: int = WORDS
) -> list[Overlap | None]:
  """Of each text, or None of one that has fewer than LEAST words: those are found by chance."""
  runs, counts = Runs(size), [0] * len(texts)
  for i, text in enumerate(texts):
    words = words_of(text)
    for j in range(max(1, len(words) - size + 1)):
      counts[i] += runs.add(' '.join(words[j : j + size]), (i, j))
  alike = Alike(texts)
  inside: dict[int, dict[int, str]] = collections.defaultdict(dict)
  for document in training:
    for (i, j), run in runs.within(document).items():
      inside[i].setdefault(j, run)
    alike.look(document)
  return [
    Overlap(count, len(inside[i]), next(iter(inside[i].values()), ''), alike.similarity[i])
    if count
    else None
    for i, count in enumerate(counts)
  ]


class Alike:
  """Texts, and the pieces of other texts that resemble them most.

  A piece is as long as the text, and lies where most of its shingles do; only where a text has half
  of them in a document is it looked at, which no near duplicate fails to have.

  Attributes:
    similarity: of each text, by data.duplicates.minhash.
  """

  def __init__(self, texts: Sequence[str]):
    self.similarity = [0.0] * len(texts)
    self._lengths, self._sketches, self._shingles = [], [], []
    self._at: dict[tuple[bytes, ...], list[tuple[int, int]]] = collections.defaultdict(list)
    for i, text in enumerate(texts):
      words = text.lower().encode().split()
      shingles = dict.fromkeys(_shingles(words)) if len(words) >= LEAST else {}
      self._lengths.append(len(words))
      self._sketches.append(minhash(words) if shingles else None)
      self._shingles.append(len(shingles))
      for j, shingle in enumerate(_shingles(words) if shingles else ()):
        self._at[shingle].append((i, j))

  def look(self, document: str) -> None:
    """Looks for the texts in one more document."""
    words = document.lower().encode().split()
    begins: dict[int, collections.Counter] = collections.defaultdict(collections.Counter)
    met: dict[int, set] = collections.defaultdict(set)
    for place, shingle in enumerate(_shingles(words)):
      for i, j in self._at.get(shingle, ()):
        begins[i][max(place - j, 0)] += 1
        met[i].add(shingle)
    for i, at in begins.items():
      if 2 * len(met[i]) < self._shingles[i]:
        continue
      begin = at.most_common(1)[0][0]
      sketch = minhash(words[begin : begin + self._lengths[i]])
      alike = float((sketch == self._sketches[i]).mean())
      self.similarity[i] = max(self.similarity[i], alike)


def _shingles(words: Sequence[bytes]) -> Iterable[tuple[bytes, ...]]:
  return zip(*(words[i:] for i in range(SHINGLE_WORDS)))


def findings(
  written: Sequence[Overlap | None], control: Sequence[Overlap | None], seed: int
) -> dict[str, dict[str, Estimate]]:
  """{what: {'written', 'control', 'difference': an estimate}} of those that are long enough.

  Raises ValueError where none is.
  """
  sides = [[each for each in side if each is not None] for side in (written, control)]
  if not all(sides):
    raise ValueError(
      f'none of {len(written)} texts that were written, or none of {len(control)} of the control, '
      f'has {LEAST} words, and shorter ones are found by chance; make --new larger'
    )
  rows = {}
  for name, is_so in (
    (ANY, lambda each: each.inside > 0),
    (ALIKE, lambda each: each.similarity >= NEAR),
  ):
    counts = [(sum(map(is_so, side)), len(side)) for side in sides]
    rows[name] = {
      'written': wilson(*counts[0]),
      'control': wilson(*counts[1]),
      'difference': unpaired.rate_difference(*counts[0], *counts[1]),
    }
  shares = [np.array([each.inside / each.runs for each in side]) for side in sides]
  rows[RUNS] = {
    'written': unpaired.mean(shares[0], seed),
    'control': unpaired.mean(shares[1], seed),
    'difference': unpaired.mean_difference(*shares, seed),
  }
  return rows
