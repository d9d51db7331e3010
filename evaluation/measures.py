"""Which numbers does each kind of task give? Each of sums over documents, as metrics of texts are
(evaluation/text_metrics.py), so that one bootstrap and one comparison serve all.

n documents · S statistics of a document · L labels
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from evaluation.intervals import Estimate, summed, wilson
from evaluation.metrics import BINS, f1_of_counts
from evaluation.task import Choice, Classify, Generate, Perplexity, Task


@dataclasses.dataclass(frozen=True)
class Measure:
  """A number of documents.

  Attributes:
    name: with every setting that changes it.
    value: of statistics [S] that were summed.
    lower_is_better: as of perplexity.
    rate: whether it is a share of documents, whose statistics are (0 or 1, 1).
    signature: how to get the same number elsewhere, if there is a form for that.
  """

  name: str
  value: Callable[[np.ndarray], float]
  lower_is_better: bool = False
  rate: bool = False
  signature: Callable[[], str] = str

  def estimate(self, statistics: np.ndarray, seed: int) -> Estimate:
    """Of documents [n, S], with its interval."""
    if self.rate:
      return wilson(int(statistics[:, 0].sum()), len(statistics))
    return summed(statistics, self.value, seed)


def measures(task: Task, labels: Sequence[str] = ()) -> list[Measure]:
  """Those of a task, the one that it is judged by first. labels: of a Classify."""
  kind = task.kind
  if isinstance(kind, Choice):
    first = _share(_accuracy(kind))
    return [first] if first.name == 'accuracy (sum)' else [first, _share('accuracy (sum)')]
  if isinstance(kind, Classify):
    return [_share('accuracy'), _macro_f1(len(labels)), _calibration_error()]
  if isinstance(kind, Perplexity):
    return [
      Measure('bits per byte', _ratio(2, lambda x: x / math.log(2)), lower_is_better=True),
      Measure('perplexity per token', _ratio(1, math.exp), lower_is_better=True),
      Measure('perplexity per word', _ratio(3, math.exp), lower_is_better=True),
      Measure('nats per token', _ratio(1, float), lower_is_better=True),
    ]
  assert isinstance(kind, Generate)
  return [
    Measure(m.name, m.value, m.lower_is_better, m.rate, lambda m=m: m.signature)
    for m in task.measured
  ]


def _accuracy(kind: Choice) -> str:
  how = 'pmi' if kind.calibration == 'pmi' else f'per {kind.normalise}'
  return f'accuracy ({"sum" if how == "per sum" else how})'


def _share(name: str) -> Measure:
  return Measure(name, lambda total: float(total[0] / total[1]) if total[1] else 0.0, rate=True)


def _ratio(below: int, of: Callable[[float], float]):
  """Of nats, tokens, bytes and words: `of` nats over one of the others."""

  def value(total):
    if not total[below]:
      return math.nan
    try:
      return of(total[0] / total[below])
    except OverflowError:
      return math.inf

  return value


def _macro_f1(labels: int) -> Measure:
  def value(total):
    return f1_of_counts(total[:labels], total[labels:])

  return Measure('macro F1', value)


def _calibration_error() -> Measure:
  def value(total):
    return float(np.abs(total[:-1]).sum() / total[-1]) if total[-1] else 0.0

  return Measure('calibration error', value, lower_is_better=True)


def classified(probabilities: np.ndarray, truth: int) -> dict[str, list[float]]:
  """Statistics of one text that has these probabilities [L] of labels."""
  L, said = len(probabilities), int(probabilities.argmax())
  confidence = float(probabilities.max())
  right = float(said == truth)
  hits, both = np.zeros(L), np.zeros(L)
  hits[truth] = right
  both[truth] += 1
  both[said] += 1
  gaps = np.zeros(BINS)
  # Bins of (low, high], as in evaluation.metrics.calibration_error.
  gaps[min(max(math.ceil(confidence * BINS) - 1, 0), BINS - 1)] = right - confidence
  return {
    'accuracy': [right, 1.0],
    'macro F1': [*hits.tolist(), *both.tolist()],
    'calibration error': [*gaps.tolist(), 1.0],
  }


def chance_of(task: Task, choices: Sequence[int]) -> float:
  """The score of who knows nothing. choices: how many there are, of each question."""
  if task.chance is not None:
    return task.chance
  return float(np.mean([1 / n for n in choices])) if choices else 0.0
