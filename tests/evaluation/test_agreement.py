"""Are agreement and strengths those of published examples and of brute force?"""

import itertools
import math

import numpy as np
import pytest

from evaluation import rate, ratings
from evaluation.agreement import cohen, cohen_estimate, krippendorff, krippendorff_estimate
from evaluation.strengths import FIRST, SECOND, TIE, Comparison, counted, fitted, strengths
from tests.evaluation.test_ratings import study

# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", part C: 4 observers, 12 units.
_ = math.nan
OBSERVED = np.array(
  [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
  ]
).T
# The American League of 1987: how often the row won against the column (Agresti 2002, table 10.10).
TEAMS = ['Milwaukee', 'Detroit', 'Toronto', 'New York', 'Boston', 'Cleveland', 'Baltimore']
WINS = np.array(
  [
    [0, 7, 9, 7, 7, 9, 11],
    [6, 0, 7, 5, 11, 9, 9],
    [4, 6, 0, 7, 7, 8, 12],
    [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12],
    [4, 4, 5, 6, 6, 0, 6],
    [2, 4, 1, 3, 1, 7, 0],
  ]
)


@pytest.mark.parametrize(
  'scale, alpha', [('nominal', 0.743), ('ordinal', 0.815), ('interval', 0.849)]
)
def test_alpha_is_that_of_krippendorffs_example(scale, alpha):
  assert krippendorff(OBSERVED, scale) == pytest.approx(alpha, abs=5e-4)
  made = krippendorff_estimate(OBSERVED, scale, resamples=200)
  assert made.value == krippendorff(OBSERVED, scale) and made.small
  assert made.low < alpha < made.high and made.n == 11, 'a unit with one rating says nothing'


def brute_alpha(ratings, distance) -> float:
  """1 - mean distance within units / over all pairs of ratings."""
  units = [[x for x in unit if not math.isnan(x)] for unit in ratings]
  units = [unit for unit in units if len(unit) > 1]
  within = sum(
    distance(a, b) / (len(unit) - 1) for unit in units for a, b in itertools.permutations(unit, 2)
  )
  everything = [x for unit in units for x in unit]
  n = len(everything)
  over = sum(distance(a, b) for a, b in itertools.permutations(everything, 2)) / (n * (n - 1))
  return 1 - within / n / over


def test_alpha_is_that_of_brute_force():
  draw = np.random.default_rng(0)
  for _ in range(10):
    ratings = draw.integers(1, 6, (8, 3)).astype(float)
    ratings[draw.random(ratings.shape) < 0.3] = math.nan
    expected = brute_alpha(ratings, lambda a, b: (a - b) ** 2)
    assert krippendorff(ratings, 'interval') == pytest.approx(expected)
    expected = brute_alpha(ratings, lambda a, b: a != b)
    assert krippendorff(ratings, 'nominal') == pytest.approx(expected)


def test_alpha_of_chance_is_nothing_and_of_agreement_all():
  draw = np.random.default_rng(1)
  assert abs(krippendorff(draw.integers(1, 6, (4000, 2)).astype(float), 'ordinal')) < 0.05
  agreed = np.repeat(draw.integers(1, 6, (50, 1)).astype(float), 3, 1)
  assert krippendorff(agreed, 'ordinal') == 1
  assert krippendorff(np.array([[1.0, 2.0], [2.0, 1.0]])) < 0
  assert (
    math.isnan(krippendorff(np.ones((5, 2))))
    and krippendorff_estimate(np.ones((5, 2)), 'nominal') is None
  )
  assert math.isnan(krippendorff(np.array([[1.0, math.nan]])))


def test_kappa_is_that_of_examples():
  """Of 50 grants, both say yes to 20 and no to 15, one alone to 5 and to 10: 0.4. Weighted, it is
  1 - the mean cost over that of all pairs.
  """
  first = np.repeat([1.0, 1, 0, 0], [20, 5, 10, 15])
  second = np.repeat([1.0, 0, 1, 0], [20, 5, 10, 15])
  assert cohen(first, second) == pytest.approx(0.4)
  draw = np.random.default_rng(2)
  a = draw.integers(1, 6, 200).astype(float)
  b = np.clip(a + draw.integers(-1, 2, 200), 1, 5)
  expected = 1 - ((a - b) ** 2).mean() / np.subtract.outer(a, b).__pow__(2).mean()
  assert cohen(a, b, 'quadratic') == pytest.approx(expected)
  expected = 1 - abs(a - b).mean() / abs(np.subtract.outer(a, b)).mean()
  assert cohen(a, b, 'linear') == pytest.approx(expected)
  b[:150] = math.nan
  assert cohen(a, b) == pytest.approx(cohen(a[150:], b[150:]))
  assert math.isnan(cohen(a[:9], b[:9])) and math.isnan(cohen(np.ones(4), np.ones(4)))


def test_kappa_has_the_interval_of_a_bootstrap_over_what_both_rated():
  draw = np.random.default_rng(3)
  a = draw.integers(1, 6, 120).astype(float)
  b = np.clip(a + draw.integers(-1, 2, 120), 1, 5)
  a[100:] = math.nan
  made = cohen_estimate(a, b, 'quadratic', resamples=4000)
  assert made.value == cohen(a, b, 'quadratic') and made.n == 100 and not made.small
  assert made == cohen_estimate(a, b, 'quadratic', resamples=4000)
  drawn = []
  for _ in range(1000):
    units = draw.integers(0, 100, 100)
    drawn.append(cohen(a[units], b[units], 'quadratic'))
  np.testing.assert_allclose([made.low, made.high], np.quantile(drawn, [0.025, 0.975]), atol=0.015)
  assert cohen_estimate(np.ones(4), np.ones(4)) is None
  assert cohen_estimate(a[100:], b[100:]) is None


@pytest.mark.parametrize('count, left_out', [(5, 0), (6, 5)])
def test_pairs_of_raters_that_are_not_shown_are_counted(count, left_out, tmp_path, capsys):
  of, raters = study(tmp_path), [f'rater {i}' for i in range(count)]
  for k, name in enumerate(raters):
    for item in range(4):
      of.save(name, ratings.Unit(item), {'preference': (item + k) % 3})
  said = rate._agreement(of, raters, (0, 200))
  every = count * (count - 1) // 2
  kappas = said['kappa']['preference']
  assert len(kappas) == every and kappas['rater 0, rater 1']['n'] == 4
  out = capsys.readouterr().out
  assert out.count(', rater') == every - left_out
  assert (f'NOTE: {left_out} of {every} pairs of raters are not shown' in out) == bool(left_out)


def test_strengths_are_those_of_agrestis_example():
  made = fitted(np.stack([WINS, 0 * WINS], -1).astype(float), prior=0.0)
  expected = [1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0]
  np.testing.assert_allclose(made - made[-1], expected, atol=6e-5)


def test_of_two_systems_the_strengths_are_in_closed_form():
  """With ties as Davidson has them: the ratio of wins; ties say that the law has many."""
  counts = np.zeros((2, 2, 2))
  counts[0, 1] = 30, 6
  counts[1, 0] = 10, 6
  made = fitted(counts, prior=0.0)
  np.testing.assert_allclose(made, [math.log(3) / 2, -math.log(3) / 2], atol=1e-9)
  half = fitted(counts, prior=0.5)
  assert half[0] - half[1] == pytest.approx(math.log(30.5 / 10.5))


def test_the_likelihood_has_its_maximum_there():
  """By finite differences, of Davidson's law for three systems with ties."""
  draw = np.random.default_rng(4)
  counts = draw.integers(1, 9, (3, 3, 2)).astype(float)
  counts[..., 1] += counts[..., 1].T
  counts[range(3), range(3)] = 0

  def likelihood(s, t):
    total = 0
    for i, j in itertools.combinations(range(3), 2):
      terms = np.array([s[i], s[j], t + (s[i] + s[j]) / 2])
      law = terms - np.logaddexp.reduce(terms)
      total += law @ [counts[i, j, 0], counts[j, i, 0], counts[i, j, 1] + counts[j, i, 1]]
    return total

  made = fitted(counts, prior=0.0)
  best_t = max(np.linspace(-3, 3, 6001), key=lambda t: likelihood(made, t))
  best = likelihood(made, best_t)
  for i, step in itertools.product(range(3), (-0.02, 0.02)):
    assert likelihood(made + step * np.eye(3)[i], best_t) < best


def test_what_always_wins_has_no_strength_without_a_prior():
  counts = np.zeros((2, 2, 2))
  counts[0, 1, 0] = 7
  with pytest.raises(ValueError, match='no finite strengths .*give a prior of 0.5'):
    fitted(counts, prior=0.0)
  made = fitted(counts)
  assert made[0] - made[1] == pytest.approx(math.log(7.5 / 0.5))
  apart = np.zeros((4, 4, 2))
  apart[0, 1, 0] = apart[1, 0, 0] = apart[2, 3, 0] = apart[3, 2, 0] = 5
  with pytest.raises(ValueError, match='no finite strengths'):
    fitted(apart)


def test_strengths_have_intervals_over_documents():
  draw = np.random.default_rng(6)
  comparisons = []
  for i in range(150):
    outcome = int(draw.choice([FIRST, SECOND, TIE], p=[0.5, 0.3, 0.2]))
    # Which side it was shown on is no matter; three raters of a document say the same.
    sides = ('a', 'b') if i % 2 else ('b', 'a')
    if i % 2 == 0 and outcome != TIE:
      outcome = 1 - outcome
    comparisons += [Comparison(str(i), *sides, outcome)] * 3
  made = strengths(comparisons, resamples=300)
  one = strengths(comparisons[::3], resamples=300)
  gap = made['a'].value - made['b'].value
  assert gap == pytest.approx(math.log(5 / 3), abs=0.4) and made['a'].n == 150
  assert made['a'].low < gap / 2 < made['a'].high
  width = made['a'].high - made['a'].low
  assert width == pytest.approx(one['a'].high - one['a'].low, rel=0.05), 'copies are no news'
  again = counted(comparisons, ['a', 'b'])
  assert again[..., 0].sum() + again[..., 1].sum() == 450
  with pytest.raises(ValueError, match='rate some pairs'):
    strengths([])
  with pytest.raises(ValueError, match='a is compared with itself'):
    counted([Comparison('1', 'a', 'a', TIE)], ['a'])
