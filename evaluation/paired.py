"""Is one better than the other on the same documents, or was it luck? Differences and ratios with
intervals, tests, and what is left of many tests.

n documents, in the same order on both sides · S statistics of a document (evaluation/text_metrics)
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from evaluation.intervals import RESAMPLES, Estimate, percentiles, resampled_sums, summed

SWAPS = 10_000  # that a permutation test draws
ENUMERATED = 12  # documents, of which it goes through all 2^n ways to swap them

Value = Callable[[np.ndarray], float]  # of statistics [S] that were summed


def difference(
  first: Float[np.ndarray, '_ _'],
  second: Float[np.ndarray, '_ _'],
  value: Value,
  seed: int = 0,
  resamples: int = RESAMPLES,
) -> Estimate:
  """value of second less that of first, with the percentile interval of the paired bootstrap: a
  document is drawn with both of its answers, so that what is hard for both adds nothing.
  """
  return _compared(first, second, value, lambda x, y: y - x, seed, resamples)


def ratio(
  first: Float[np.ndarray, '_ _'],
  second: Float[np.ndarray, '_ _'],
  value: Value,
  chance: float = 0.0,
  seed: int = 0,
  resamples: int = RESAMPLES,
  before: Estimate | None = None,
) -> Estimate | None:
  """(second - chance) / (first - chance), as `difference`; None where the interval of first reaches
  down to chance: there is nothing to divide by. before: of first; default: the bootstrap's.
  """
  before = before or summed(first, value, seed, resamples)
  if before.low <= chance:
    return None

  def share(x, y):
    return (y - chance) / (x - chance) if x > chance else math.inf

  return _compared(first, second, value, share, seed, resamples)


def _compared(first, second, value, how, seed, resamples) -> Estimate:
  _check_pairs(first, second)
  n, S = first.shape
  both = resampled_sums(np.concatenate([first, second], 1), seed, resamples)
  drawn = [how(value(total[:S]), value(total[S:])) for total in both]
  said = float(how(value(first.sum(0)), value(second.sum(0))))
  return Estimate(said, *percentiles(drawn, n), n, 'bootstrap')


def permutation_test(
  first: Float[np.ndarray, '_ _'],
  second: Float[np.ndarray, '_ _'],
  value: Value,
  seed: int = 0,
  swaps: int = SWAPS,
) -> float:
  """p of a difference at least as large, either way, if of each document the two answers could as
  well be swapped (Fisher's sign-flip test; approximate randomisation, Noreen 1989, for values that
  are no means). Exact for up to ENUMERATED documents.
  """
  _check_pairs(first, second)
  n, total = len(first), first.sum(0) + second.sum(0)

  def gap(of_first):
    return abs(value(total - of_first) - value(of_first))

  seen = gap(first.sum(0))
  if n <= ENUMERATED:
    signs = np.array([*itertools.product([False, True], repeat=n)])
  else:
    draw = np.random.Generator(np.random.Philox(seed))
    signs = draw.integers(0, 2, (swaps, n), np.int8) > 0
  change = second - first
  # What is equal but for rounding is as large.
  least = seen - 1e-12 * max(1.0, seen)
  # So is one that is no number: of it nothing is shown.
  larger = sum(not gap(first.sum(0) + of_swaps) < least for of_swaps in signs @ change)
  # What was seen is one of the ways, which all of them hold, and a draw may not.
  return larger / len(signs) if n <= ENUMERATED else (larger + 1) / (len(signs) + 1)


def mcnemar(only_first: int, only_second: int) -> float:
  """The exact p, either way (McNemar 1947), of documents that one side alone has right, if either
  had been as likely to: how often both do, or neither, says nothing.
  """
  if min(only_first, only_second) < 0:
    raise ValueError(f'{only_first} and {only_second} documents; give numbers of at least 0')
  n, fewer = only_first + only_second, min(only_first, only_second)
  tail = sum(math.comb(n, k) for k in range(fewer + 1))
  return min(1.0, 2 * tail / 2**n)


def holm(values: Sequence[float]) -> list[float]:
  """p of each of several tests, corrected so that with 95% probability none of those below 0.05 is
  luck (Holm 1979).
  """
  if not all(0 <= p <= 1 for p in values):
    raise ValueError(f'{values} are no probabilities')
  adjusted, reached = [0.0] * len(values), 0.0
  for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
    reached = max(reached, min(1.0, (len(values) - rank) * values[i]))
    adjusted[i] = reached
  return adjusted


def _check_pairs(first, second) -> None:
  if first.shape != second.shape or not len(first):
    raise ValueError(
      f'statistics of {first.shape} and {second.shape} are no pairs; give the same documents, one '
      'at least, in the same order'
    )
