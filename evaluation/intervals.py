"""How sure is a number? A 95% interval of everything that is measured on a sample."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Z = 1.959963984540054  # of the normal law, two-sided, 95%
RESAMPLES = 1000
DRAWN = 1_000_000  # indices at once
LEAST = {'wilson': 10, 'bootstrap': 100}  # with fewer records an interval holds its 95% badly


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number of n records, and its 95% interval.

  Attributes:
    method: 'wilson' or 'bootstrap'.
  """

  value: float
  low: float
  high: float
  n: int
  method: str

  @property
  def small(self) -> bool:
    """Whether the records are too few for the interval to be trusted."""
    return self.n < LEAST[self.method]

  def __str__(self) -> str:
    mark = ' (few records)' if self.small else ''
    return f'{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]{mark}'

  def values(self) -> dict:
    """JSON-able."""
    return dataclasses.asdict(self) | {'small': self.small}


def wilson(successes: int, n: int) -> Estimate:
  """A share, with Wilson's score interval (1927): the p for which the share that was seen is within
  Z standard deviations. Raises ValueError for no records, or more successes than these.
  """
  if not 0 <= successes <= n or n < 1:
    raise ValueError(f'{successes} of {n} is no share; give at least one record')
  share, square = successes / n, Z * Z
  middle = (share + square / (2 * n)) / (1 + square / n)
  half = Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
  # At an end the interval ends there, too: but for rounding, the formula says so.
  low = 0.0 if successes == 0 else max(middle - half, 0.0)
  high = 1.0 if successes == n else min(middle + half, 1.0)
  return Estimate(share, low, high, n, 'wilson')


def bootstrap(
  statistic: Callable[[np.ndarray], float], n: int, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
  """A statistic of n records, with the percentile interval of the bootstrap (Efron 1979).

  statistic: of the records with these indices, int [n], some of them more than once.
  """
  if n < 1:
    raise ValueError('a statistic of no records; give at least one')
  draw = np.random.Generator(np.random.Philox(seed))
  drawn = [statistic(draw.integers(0, n, n)) for _ in range(resamples)]
  low, high = np.quantile(drawn, [0.025, 0.975])
  return Estimate(float(statistic(np.arange(n))), float(low), float(high), n, 'bootstrap')


def resampled_sums(
  statistics: Float[np.ndarray, 'n S'], seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
  """[resamples, S]: statistics of documents summed over n that are drawn with putting back. Which
  are drawn depends on seed and n alone: two calls draw the same.
  """
  n = len(statistics)
  if n < 1:
    raise ValueError('a statistic of no records; give at least one')
  draw = np.random.Generator(np.random.Philox(seed))
  sums = []
  for first in range(0, resamples, at_once := max(1, DRAWN // n)):
    rows = min(at_once, resamples - first)
    # How often which was drawn, of all rows in one count.
    drawn = draw.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
    sums.append(counts.astype(np.float64) @ statistics)
  return np.concatenate(sums)


def summed(
  statistics: Float[np.ndarray, 'n S'],
  value: Callable[[np.ndarray], float],
  seed: int = 0,
  resamples: int = RESAMPLES,
) -> Estimate:
  """A value of statistics of n documents that were summed, with the percentile interval of the
  bootstrap over documents.
  """
  drawn = [value(total) for total in resampled_sums(statistics, seed, resamples)]
  low, high = np.quantile(drawn, [0.025, 0.975])
  said = float(value(statistics.sum(0)))
  return Estimate(said, float(low), float(high), len(statistics), 'bootstrap')
