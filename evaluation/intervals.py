"""How sure is a number? A 95% interval of everything that is measured on a sample."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Z = 1.959963984540054  # of the normal law, two-sided, 95%
RESAMPLES = 1000
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
