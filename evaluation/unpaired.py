"""Do two sets of other documents differ? Differences of what is not paired, and how well a score
tells the sets apart, with intervals.

Sets are f64 [n] and [m].
"""

import math
from collections.abc import Callable

import numpy as np

from evaluation.intervals import RESAMPLES, Estimate, bootstrap, percentiles, wilson

OTHER = 1  # added to the seed of the second set: its resamples are its own


def rate_difference(first: int, n: int, second: int, m: int) -> Estimate:
  """Share first / n less second / m, with Newcombe's hybrid interval (1998, method 10), which is
  made of Wilson's two and so is no point where both shares are 0.
  """
  p, q = wilson(first, n), wilson(second, m)
  gap = p.value - q.value
  low = gap - math.hypot(p.value - p.low, q.high - q.value)
  high = gap + math.hypot(p.high - p.value, q.value - q.low)
  return Estimate(gap, low, high, min(n, m), 'wilson')


def mean(values: np.ndarray, seed: int = 0) -> Estimate:
  """With the percentile interval of the bootstrap."""
  return bootstrap(lambda i: float(values[i].mean()), len(values), seed)


def mean_difference(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Estimate:
  """Mean of first less that of second."""
  return compared(first, second, lambda a, b: float(a.mean() - b.mean()), seed)


def compared(
  first: np.ndarray,
  second: np.ndarray,
  value: Callable[[np.ndarray, np.ndarray], float],
  seed: int = 0,
  resamples: int = RESAMPLES,
) -> Estimate:
  """A value of two sets, with the percentile interval of the bootstrap, in which each is drawn by
  itself. n is that of the smaller one. Raises ValueError for an empty set.
  """
  sides = [np.asarray(x, np.float64) for x in (first, second)]
  if not all(map(len, sides)):
    raise ValueError(f'sets of {len(first)} and {len(second)} values; give one of each, at least')
  draws = [np.random.Generator(np.random.Philox(seed + i)) for i in (0, OTHER)]
  drawn = [
    value(*(x[draw.integers(0, len(x), len(x))] for x, draw in zip(sides, draws)))
    for _ in range(resamples)
  ]
  n = min(map(len, sides))
  return Estimate(float(value(*sides)), *percentiles(drawn, n), n, 'bootstrap')


def auc(first: np.ndarray, second: np.ndarray) -> float:
  """How often one of first is larger than one of second, where as large counts half: the area
  under the curve of true over false positives; 1/2 tells nothing apart.
  """
  order = np.sort(second)
  below = np.searchsorted(order, first, 'left')
  upto = np.searchsorted(order, first, 'right')
  return float((below + upto).mean() / 2 / len(order))


def caught(first: np.ndarray, second: np.ndarray, false: float = 0.05) -> float:
  """Share of first above the lowest threshold that at most a share `false` of second is above."""
  order = np.sort(second)[::-1]
  threshold = order[int(math.floor(false * len(order) + 1e-9))]
  return float((first > threshold).mean())
