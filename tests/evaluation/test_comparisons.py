"""Do intervals hold what they say, in a simulation, and are tests of two sides on the same
documents those of their definitions?
"""

import itertools
import math
import statistics

import numpy as np
import pytest

from evaluation import paired
from evaluation.intervals import mean_of, percentiles, resampled_sums, summed, wilson
from evaluation.metrics import f1_of_counts
from evaluation.unpaired import auc, compared, rate_difference

TRIALS = 1000


def mean(total):
  return float(total[0] / total[1])


def with_ones(values):
  return np.stack([values, np.ones(len(values))], 1)


def skewed(draw, n):
  """Scores as ROUGE gives them: many near 0, all within [0, 1]."""
  return draw.beta(0.7, 2, n)


def test_intervals_cover_95_percent():
  """Of a mean; of a difference and a ratio of two systems that find the same documents hard."""
  draw, n = np.random.default_rng(7), 100
  inside = {'mean': 0, 'difference': 0, 'ratio': 0}
  truth = {'mean': 0.7 / 2.7, 'difference': 0.3 * (2 / 3 - 0.7 / 2.7), 'ratio': 0.7}
  for trial in range(TRIALS):
    first = skewed(draw, n)
    second, third = 0.7 * first + 0.3 * draw.beta(2, 1, n), first * draw.uniform(0.4, 1, n)
    sums = resampled_sums(np.stack([first, second, third], 1), trial)
    drawn = {
      'mean': sums[:, 0] / n,
      'difference': (sums[:, 1] - sums[:, 0]) / n,
      'ratio': sums[:, 2] / sums[:, 0],
    }
    for name, values in drawn.items():
      low, high = percentiles(values, n)
      inside[name] += low <= truth[name] <= high
  for name, count in inside.items():
    assert abs(count / TRIALS - 0.95) <= 0.015, name


def test_estimates_are_of_those_draws():
  """What the simulation is of is what is given out."""
  draw = np.random.default_rng(8)
  first, second = with_ones(skewed(draw, 50)), with_ones(skewed(draw, 50))
  one, other = (np.array([mean(t) for t in resampled_sums(x, 3)]) for x in (first, second))

  def assert_is(made, drawn):
    assert (made.low, made.high) == pytest.approx(percentiles(drawn, 50)) and made.n == 50

  assert_is(summed(first, mean, 3), one)
  assert_is(paired.difference(first, second, mean, 3), other - one)
  assert_is(paired.ratio(first, second, mean, 0.05, 3), (other - 0.05) / (one - 0.05))


def test_percentiles_are_those_of_students_law():
  """Of all quantiles of a normal law: at n = 100, Student's 1.9842 times sqrt(100 / 99)."""
  from scipy.special import ndtri

  drawn = ndtri((np.arange(200_000) + 0.5) / 200_000)
  low, high = percentiles(drawn, 100)
  assert -low == pytest.approx(high)
  assert high == pytest.approx(1.98422 * math.sqrt(100 / 99), abs=2e-4)
  assert percentiles([math.nan, 1.0, 2.0], 1) == (1, 2)


@pytest.mark.parametrize('n, p', [(10, 0.5), (10, 0.3), (20, 0.2), (50, 0.1)])
def test_wilsons_interval_covers_from_ten_records_on_the_mean_over_shares(n, p):
  """Of so few records there are few intervals, and by the share it is more or less: on the mean
  over shares near p, 95%.
  """
  shares = np.linspace(max(p - 0.1, 0.02), p + 0.1, 41)
  intervals = [wilson(k, n) for k in range(n + 1)]
  inside = [
    sum(
      math.comb(n, k) * q**k * (1 - q) ** (n - k)
      for k, each in enumerate(intervals)
      if each.low <= q <= each.high
    )
    for q in shares
  ]
  assert abs(np.mean(inside) - 0.95) <= 0.015


def test_sums_are_of_documents_that_are_drawn_alike():
  statistics = np.random.default_rng(0).integers(0, 9, (30, 3)).astype(float)
  sums = resampled_sums(statistics, 4, 500)
  assert (sums == resampled_sums(statistics, 4, 500)).all()
  assert (sums != resampled_sums(statistics, 5, 500)).any()
  both = resampled_sums(np.concatenate([statistics, statistics[::-1]], 1), 4, 500)
  assert (both[:, :3] == sums).all(), 'what is beside a document is drawn with it'
  ones = resampled_sums(np.eye(30), 4, 500)
  assert (ones.sum(1) == 30).all() and (ones @ statistics == sums).all()
  # n draws with putting back: of each document 1 on average, with variance 1 - 1 / n.
  assert abs(ones.mean() - 1) < 1e-12 and abs(ones.var() - 29 / 30) < 0.03


def test_a_difference_of_equals_is_nothing_and_of_a_shift_exact():
  first = with_ones(skewed(np.random.default_rng(1), 120))
  made = paired.difference(first, first, mean)
  assert (made.value, made.low, made.high) == (0, 0, 0)
  moved = first + [0.25, 0]
  made = paired.difference(first, moved, mean)
  np.testing.assert_allclose([made.value, made.low, made.high], 0.25, atol=1e-12)
  same = paired.ratio(first, first, mean, chance=0.1)
  assert (same.value, same.low, same.high) == (1, 1, 1)


def binomial(k: int, n: int, p: float) -> float:
  return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def test_differences_of_rates_cover_95_percent_by_counting():
  """Of all that two groups can show, by how likely each is."""
  for first, second in ((0.5, 0.4), (0.9, 0.6), (0.1, 0.1), (0.3, 0.05)):
    held = 0.0
    chances = [[binomial(k, 100, p) for k in range(101)] for p in (first, second)]
    for a, b in itertools.product(range(101), repeat=2):
      if (likely := chances[0][a] * chances[1][b]) > 1e-7:
        made = rate_difference(a, 100, b, 100)
        held += likely * (made.low <= first - second <= made.high)
    assert abs(held - 0.95) <= 0.015, (first, second, held)


@pytest.mark.slow
def test_macro_f1_and_what_tells_sets_apart_cover_95_percent():
  """F1 of three labels, of which one is rare; the AUC of two sets, apart by a deviation."""
  draw, n = np.random.default_rng(11), 100
  cells = np.array([[0.4, 0.06, 0.04], [0.05, 0.2, 0.05], [0.05, 0.05, 0.1]])
  truth = {
    'macro F1': f1_of_counts(cells.diagonal(), cells.sum(0) + cells.sum(1)),
    'AUC': statistics.NormalDist().cdf(1 / math.sqrt(2)),
  }
  inside = dict.fromkeys(truth, 0)
  for trial in range(TRIALS):
    true, said = np.divmod(draw.choice(9, n, p=cells.ravel()), 3)
    hit = np.eye(3)[true] * (true == said)[:, None]
    sums = resampled_sums(np.concatenate([hit, np.eye(3)[true] + np.eye(3)[said]], 1), trial, 400)
    drawn = {'macro F1': (2 * sums[:, :3] / np.maximum(sums[:, 3:], 1)).mean(1)}
    first, second = draw.normal(1, 1, n), draw.normal(0, 1, n)
    times = draw.multinomial(n, np.full(n, 1 / n), (2, 400)).astype(float)
    above = (first[:, None] > second).astype(float)
    drawn['AUC'] = ((times[0] @ above) * times[1]).sum(1) / n**2
    for name, values in drawn.items():
      low, high = percentiles(values, n)
      inside[name] += low <= truth[name] <= high
  for name, count in inside.items():
    assert abs(count / TRIALS - 0.95) <= 0.015, name
  # The resamples are those of the library.
  made = compared(first, second, auc, 0, 400)
  assert made.value == above.mean()
  np.testing.assert_allclose((made.low, made.high), percentiles(drawn['AUC'], n), atol=0.03)


def test_the_mean_of_estimates_is_covered_by_its_interval():
  """Of three shares, of many records and of fewer."""
  draw, held = np.random.default_rng(0), 0
  truth = (0.5, 0.2, 0.8)
  for _ in range(2000):
    made = [wilson(int(draw.binomial(n, p)), n) for p, n in zip(truth, (100, 150, 60))]
    mean = mean_of(made)
    held += mean.low <= sum(truth) / 3 <= mean.high
  assert abs(held / 2000 - 0.95) < 0.015 and mean.n == 60
  alone, same = mean_of(made[:1]), made[0]
  assert (alone.value, alone.low, alone.high) == pytest.approx((same.value, same.low, same.high))


def test_a_ratio_is_that_above_chance_and_nothing_at_chance():
  first, second = with_ones(np.full(100, 0.75)), with_ones(np.full(100, 0.375))
  assert paired.ratio(first, second, mean).value == 0.5
  assert paired.ratio(first, second, mean, chance=0.25).value == 0.25
  assert paired.ratio(first, second, mean, chance=0.75) is None
  noisy = with_ones((np.arange(100) % 2).astype(float))
  assert paired.ratio(noisy, noisy, mean, chance=0.45) is None, 'its interval holds 0.45'
  assert paired.ratio(noisy, noisy, mean, chance=0.2).value == 1


def test_a_permutation_test_is_that_of_all_swaps():
  """By brute force; and with all differences of one sign only both extremes are as far."""
  draw = np.random.default_rng(3)
  first, second = draw.normal(0, 1, (2, 9))
  d = second - first
  ways = [abs(np.dot(signs, d)) for signs in itertools.product([1, -1], repeat=9)]
  expected = np.mean([way >= abs(d.sum()) - 1e-12 for way in ways])
  assert paired.permutation_test(with_ones(first), with_ones(second), mean) == expected
  better = paired.permutation_test(with_ones(first), with_ones(first + 1 + abs(d)), mean)
  assert better == 2 / 2**9
  assert paired.permutation_test(with_ones(first), with_ones(first), mean) == 1


def test_a_permutation_test_of_many_documents_is_near_the_normal_law():
  draw = np.random.default_rng(5)
  first = draw.normal(0, 1, 300)
  second = first + draw.normal(0.1, 1, 300)
  d = second - first
  z = abs(d.sum()) / math.sqrt((d**2).sum())
  expected = math.erfc(z / math.sqrt(2))
  made = paired.permutation_test(with_ones(first), with_ones(second), mean, seed=1)
  assert made == pytest.approx(expected, abs=0.02) and 0.001 < made < 0.5
  # Of no difference, p is as often below any level as the level says.
  values = [
    paired.permutation_test(
      with_ones(x := draw.normal(0, 1, 20)), with_ones(x + draw.normal(0, 1, 20)), mean, swaps=199
    )
    for _ in range(200)
  ]
  assert np.mean(np.array(values) <= 0.1) == pytest.approx(0.1, abs=0.05)


def test_a_test_of_a_value_that_is_no_mean():
  """Of a share of sums, as BLEU is one: swapping both answers of a document swaps both sums."""
  draw = np.random.default_rng(2)
  first, second = draw.integers(0, 9, (2, 8, 2)) + [0.0, 5.0]

  def share(total):
    return float(total[0] / total[1])

  def swapped(signs):
    signs = np.array(signs)[:, None]
    one, other = np.where(signs, second, first).sum(0), np.where(signs, first, second).sum(0)
    return abs(share(one) - share(other))

  seen = swapped([False] * 8)
  ways = [swapped(signs) for signs in itertools.product([False, True], repeat=8)]
  assert paired.permutation_test(first, second, share) == np.mean(np.array(ways) >= seen - 1e-12)


@pytest.mark.parametrize('b, c, p', [(1, 7, 0.0703), (6, 16, 0.0525), (0, 0, 1.0), (5, 5, 1.0)])
def test_mcnemars_test_is_that_of_published_examples(b, c, p):
  """The two of Fagerland, Lydersen and Laake (2013); and what says nothing."""
  assert paired.mcnemar(b, c) == paired.mcnemar(c, b) == pytest.approx(p, abs=5e-5)


def test_holms_correction_is_that_of_a_worked_example():
  np.testing.assert_allclose(paired.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
  assert paired.holm([0.5, 0.9]) == [1.0, 1.0] and paired.holm([]) == []
  with pytest.raises(ValueError, match='no probabilities'):
    paired.holm([1.5])


def test_what_are_no_pairs_is_refused():
  with pytest.raises(ValueError, match='are no pairs'):
    paired.difference(np.ones((3, 2)), np.ones((4, 2)), mean)
  with pytest.raises(ValueError, match='-1 and 3 documents'):
    paired.mcnemar(-1, 3)
  with pytest.raises(ValueError, match='no records'):
    resampled_sums(np.ones((0, 2)))


def test_nothing_is_shown_of_what_is_no_number():
  """inf less inf is no difference: swapping shows none, however often it is tried."""
  for n in (5, 30):
    sides = np.full((2, n, 2), 800.0)
    assert paired.permutation_test(*sides, lambda total: math.inf, swaps=100) == 1
