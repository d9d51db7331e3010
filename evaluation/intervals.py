"""How sure is a number? A 95% interval of everything that is measured on a sample."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

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

  def of_several(self, tests: int) -> 'Estimate':
    """With the interval that each of so many needs if, with 95% probability, all are to hold
    (Bonferroni): as much wider as the normal law's is.
    """
    more = statistics.NormalDist().inv_cdf(1 - 0.025 / tests) / Z
    low = self.value - more * (self.value - self.low)
    high = self.value + more * (self.high - self.value)
    return dataclasses.replace(self, low=low, high=high)

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


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
  """The mean of estimates of other records each, whose intervals lie as they will: either side is
  the root of the sum of squares of theirs (MOVER, Zou and Donner 2008). n, method: of the one of
  fewest records.
  """
  k = len(estimates)
  value = math.fsum(each.value for each in estimates) / k
  low = math.hypot(*(each.value - each.low for each in estimates)) / k
  high = math.hypot(*(each.high - each.value for each in estimates)) / k
  fewest = min(estimates, key=lambda each: each.n)
  return dataclasses.replace(fewest, value=value, low=value - low, high=value + high)


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
  low, high = percentiles(drawn, n)
  return Estimate(float(statistic(np.arange(n))), low, high, n, 'bootstrap')


def percentiles(drawn: Sequence[float] | np.ndarray, n: int) -> tuple[float, float]:
  """The ends of a 95% interval among values of resamples of n records, each of which is one of them
  (there may be infinite ones); those that are no numbers are left out.

  Plain 2.5% tails would be of an interval that is too short: a resample varies by a factor of
  sqrt(1 - 1 / n) less, and as the normal law, where a mean of few follows Student's. Hesterberg's
  expanded percentiles (arXiv:1411.5279) make up for both.
  """
  v = max(n - 1, 1)
  # The quantile of Student's law by that of the normal one (Fisher and Cornish).
  t = Z + (Z**3 + Z) / (4 * v) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * v * v)
  tail = statistics.NormalDist().cdf(-t * math.sqrt(n / v))
  low, high = np.nanquantile(drawn, [tail, 1 - tail], method='nearest')
  return float(low), float(high)


def resampled_sums(
  documents: Float[np.ndarray, 'n S'], seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
  """[resamples, S]: statistics of documents, summed over n that are drawn with putting back. Which
  are drawn depends on seed and n alone: two calls draw the same.
  """
  n = len(documents)
  if n < 1:
    raise ValueError('a statistic of no records; give at least one')
  draw = np.random.Generator(np.random.Philox(seed))
  sums = []
  for first in range(0, resamples, at_once := max(1, DRAWN // n)):
    rows = min(at_once, resamples - first)
    # How often which was drawn, of all rows in one count.
    drawn = draw.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
    sums.append(counts.astype(np.float64) @ documents)
  return np.concatenate(sums)


def summed(
  documents: Float[np.ndarray, 'n S'],
  value: Callable[[np.ndarray], float],
  seed: int = 0,
  resamples: int = RESAMPLES,
) -> Estimate:
  """A value of the sums of statistics of n documents, with the percentile interval of the
  bootstrap over documents.
  """
  n = len(documents)
  drawn = [value(total) for total in resampled_sums(documents, seed, resamples)]
  return Estimate(float(value(documents.sum(0))), *percentiles(drawn, n), n, 'bootstrap')
