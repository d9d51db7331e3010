"""Do people who rate the same things agree, more than by chance? 1: always, 0: as by chance, below:
less.

U units, things that were rated · R raters; nan where one rated nothing
"""

import math

import numpy as np
from jaxtyping import Float

import names
from evaluation.intervals import RESAMPLES, Estimate, percentiles

SCALES = ('nominal', 'ordinal', 'interval')
WEIGHTS = ('none', 'linear', 'quadratic')


def krippendorff(ratings: Float[np.ndarray, 'U R'], scale: str = 'nominal') -> float:
  """Krippendorff's alpha: 1 - disagreement that was seen / that by chance. For any number of
  raters, and gaps.

  scale: what sets two values apart: 'nominal', being different; 'ordinal', how many ratings lie
    between them; 'interval', their difference; both squared.
  nan where no thing has two ratings, or all of these are the same.
  """
  names.check('scale', scale, SCALES)
  _, matrix = _coincidences(ratings)
  return _alpha(matrix, _distances(ratings, matrix, scale))


def krippendorff_estimate(
  ratings: Float[np.ndarray, 'U R'], scale: str, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate | None:
  """With the percentile interval of a bootstrap over units; None where alpha is undefined.

  A resample of which all ratings are the same says nothing, and is left out.
  """
  names.check('scale', scale, SCALES)
  each, matrix = _coincidences(ratings)
  said = _alpha(matrix, _distances(ratings, matrix, scale))
  if math.isnan(said):
    return None
  draw = np.random.Generator(np.random.Philox(seed))
  drawn = []
  for _ in range(resamples):
    matrix = each[draw.integers(0, len(each), len(each))].sum(0)
    drawn.append(_alpha(matrix, _distances(ratings, matrix, scale)))
  return Estimate(said, *percentiles(drawn, len(each)), len(each), 'bootstrap')


def cohen(
  first: Float[np.ndarray, 'U'], second: Float[np.ndarray, 'U'], weights: str = 'none'
) -> float:
  """Cohen's kappa of two raters, of what both rated. weights: of disagreements, by the ranks of the
  values: 'none': all are the same, 'linear', 'quadratic' (Cohen 1968).

  nan where nothing was rated by both, or chance leaves nothing to disagree on.
  """
  return float(_kappa(*_counted(first, second, weights)))


def cohen_estimate(
  first: Float[np.ndarray, 'U'],
  second: Float[np.ndarray, 'U'],
  weights: str = 'none',
  seed: int = 0,
  resamples: int = RESAMPLES,
) -> Estimate | None:
  """With the percentile interval of a bootstrap over what both rated; None where it is undefined.

  A resample in which chance leaves nothing to disagree on says nothing, and is left out.
  """
  counts, cost = _counted(first, second, weights)
  said, n = float(_kappa(counts, cost)), int(counts.sum())
  if math.isnan(said):
    return None
  # To draw units is to draw how often which two values come.
  draw = np.random.Generator(np.random.Philox(seed))
  drawn = draw.multinomial(n, counts.ravel() / n, resamples).reshape(-1, *counts.shape)
  return Estimate(said, *percentiles(_kappa(drawn, cost), n), n, 'bootstrap')


def _counted(first, second, weights: str) -> tuple[np.ndarray, np.ndarray]:
  """How often two raters gave which values, [V, V], and what each two of these cost, [V, V]."""
  names.check('weights', weights, WEIGHTS)
  both = ~(np.isnan(first) | np.isnan(second))
  values, ranks = np.unique(np.concatenate([first[both], second[both]]), return_inverse=True)
  a, b = ranks.reshape(2, -1)
  counts = np.zeros((len(values), len(values)))
  np.add.at(counts, (a, b), 1)
  apart = np.abs(np.subtract.outer(np.arange(len(values)), np.arange(len(values))))
  return counts, {'none': apart > 0, 'linear': apart, 'quadratic': apart**2}[weights]


def _kappa(counts: np.ndarray, cost: np.ndarray) -> np.ndarray:
  """Of counts [.., V, V]; nan where nothing is expected to be apart."""
  rows, columns, n = counts.sum(-1), counts.sum(-2), counts.sum((-1, -2))
  expected = np.einsum('...i,ij,...j->...', rows, cost, columns) / np.maximum(n, 1)
  seen = (cost * counts).sum((-1, -2))
  # What is expected to cost nothing does not.
  return np.where(expected > 0, 1 - seen / np.where(expected > 0, expected, 1), math.nan)


def _coincidences(ratings) -> tuple[np.ndarray, np.ndarray]:
  """How often two raters gave a unit which values, [units with two ratings, V, V], and their sum: a
  unit of m ratings has m (m - 1) pairs, which count 1 / (m - 1) each.
  """
  values = _values(ratings)
  counts = np.stack([(ratings == value).sum(1) for value in values], 1).astype(np.float64)
  counts = counts[counts.sum(1) > 1]
  pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(values))
  each = pairs / (counts.sum(1) - 1)[:, None, None]
  return each, each.sum(0)


def _values(ratings) -> np.ndarray:
  values = np.unique(ratings[~np.isnan(ratings)])
  return values if len(values) else np.zeros(1)


def _distances(ratings, matrix, scale: str) -> np.ndarray:
  """[V, V], squared."""
  values = _values(ratings)
  if scale == 'nominal':
    return 1 - np.eye(len(values))
  if scale == 'ordinal':
    # Ratings below a value, and half of those that are it: between two values, their difference.
    counts = matrix.sum(0)
    values = np.cumsum(counts) - counts / 2
  return np.subtract.outer(values, values) ** 2


def _alpha(matrix, distances) -> float:
  counts = matrix.sum(0)
  expected = (np.outer(counts, counts) * distances).sum()
  if not expected:
    return math.nan
  return float(1 - (counts.sum() - 1) * (matrix * distances).sum() / expected)
