"""Which numbers does each kind of task give? Each of sums over documents, as metrics of texts are
(evaluation/text_metrics.py), so that one bootstrap and one comparison serve all.

n documents · S statistics of a document · L labels
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.intervals import Estimate, summed, wilson
from evaluation.metrics import BINS, f1_of_counts
from evaluation.task import Classification, MultipleChoice, Perplexity, Task
from evaluation.text_metrics import METRICS, Metric, PassAt, made


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


def measures(task: Task) -> list[Measure]:
  """Those of a task, the one that it is judged by first."""
  kind = task.kind
  if isinstance(kind, MultipleChoice):
    first = f'accuracy (per {kind.normalise})' if kind.normalise != 'sum' else 'accuracy (sum)'
    first = 'accuracy (pmi)' if kind.calibration == 'pmi' else first
    return [_share(name) for name in dict.fromkeys([first, 'accuracy (sum)'])]
  if isinstance(kind, Classification):
    return [_share('accuracy'), OTHERS['macro F1'], OTHERS['calibration error']]
  if isinstance(kind, Perplexity):
    return [OTHERS[name] for name in FORETOLD]
  return [_of_texts(metric, task.values()) for metric in task.measured]


def named(name: str, settings: Mapping[str, Any]) -> Measure:
  """The one of a name in the summary of a task with these settings (Task.values).

  Raises ValueError for that of a metric that only the task's file knows, and is no mean.
  """
  if name in OTHERS:
    return OTHERS[name]
  if name.startswith('accuracy'):
    return _share(name)
  known = [made(metric) for metric in settings['metrics'] if metric in METRICS]
  for metric in known:
    if metric.name == name:
      return _of_texts(metric, settings)
  raise ValueError(
    f'{name!r} is a metric of a task of its own, and how it adds up is not known here'
  )


def known(name: str, settings: Mapping[str, Any], of: str) -> Measure | None:
  """As `named`; None where it is not known, which is said with the results that it is of."""
  try:
    return named(name, settings)
  except ValueError as error:
    print(f'NOTE: {of}: {error}; it is left out')
    return None


def _of_texts(metric: Metric, settings: Mapping[str, Any]) -> Measure:
  kind = settings.get('kind', {})
  judged = kind.get('passed') or kind.get('program')
  # Of one program for each problem, which passes or does not.
  rate = isinstance(metric, PassAt) and bool(judged) and kind['samples'] == 1
  return Measure(
    metric.name, metric.value, metric.lower_is_better, metric.rate or rate, lambda: metric.signature
  )


def _share(name: str) -> Measure:
  return Measure(name, lambda total: float(total[0] / total[1]) if total[1] else 0.0, rate=True)


def _ratio(name: str, below: int, of: Callable[[float], float]) -> Measure:
  """Of nats, tokens, bytes and words: `of` nats over one of the others."""

  def value(total):
    if not total[below]:
      return math.nan
    try:
      return of(float(total[0] / total[below]))
    except OverflowError:
      return math.inf

  return Measure(name, value, lower_is_better=True)


def _macro_f1(total: np.ndarray) -> float:
  labels = len(total) // 2
  return f1_of_counts(total[:labels], total[labels:])


def _calibration_error(total: np.ndarray) -> float:
  return float(np.abs(total[:-1]).sum() / total[-1]) if total[-1] else 0.0


FORETOLD = ('bits per byte', 'perplexity per token', 'perplexity per word', 'nats per token')
OTHERS = {
  measure.name: measure
  for measure in (
    _ratio(FORETOLD[0], 2, lambda x: x / math.log(2)),
    _ratio(FORETOLD[1], 1, math.exp),
    _ratio(FORETOLD[2], 3, math.exp),
    _ratio(FORETOLD[3], 1, float),
    Measure('macro F1', _macro_f1),
    Measure('calibration error', _calibration_error, lower_is_better=True),
  )
}


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


def chance_at(
  name: str, metrics: Sequence[str], chance: float, settings: Mapping[str, Any]
) -> float:
  """The score of who knows nothing, by one of the metrics of a task with these settings
  (Task.values), of the first of which it is `chance`; 0 where it is not known.
  """
  if name == metrics[0]:
    return chance
  kind = settings.get('kind', {}).get('name')
  if kind in (MultipleChoice.__name__, Classification.__name__) and name.startswith('accuracy'):
    return chance
  # Who guesses among L labels has 1 / L, and less where some of them are rarer than others.
  guessed = kind == Classification.__name__ and settings.get('chance') is None
  return chance if guessed and name == 'macro F1' else 0.0


def chance_of(task: Task, choices: Sequence[int]) -> float:
  """The score of who knows nothing. choices: how many there are, of each question."""
  if task.chance is not None:
    return task.chance
  return float(np.mean([1 / n for n in choices])) if choices else 0.0
