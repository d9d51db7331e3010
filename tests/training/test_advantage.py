"""Is what tokens are credited with the formulas, over one mask, and never NaN?"""

import numpy as np
import pytest

from objectives import advantage

ALL = np.ones((1, 4), bool)


def test_groups_by_hand():
  scores = np.array([[1.0, 2.0, 3.0, 6.0]])  # mean 3, std with n - 1: sqrt(14 / 3)
  std = np.sqrt(14 / 3)
  expected = np.array([[-2, -1, 0, 3]])
  np.testing.assert_allclose(
    advantage.of_groups(scores, ALL, 'deviation'), expected / (std + 1e-6), rtol=1e-12
  )
  np.testing.assert_allclose(advantage.of_groups(scores, ALL, 'mean'), expected)
  # 1 - (2 + 3 + 6) / 3, ..
  others = [[1 - 11 / 3, 2 - 10 / 3, 0, 6 - 2]]
  np.testing.assert_allclose(advantage.of_groups(scores, ALL, 'others'), others)


@pytest.mark.parametrize('baseline', advantage.BASELINES)
def test_an_answer_without_a_score_is_in_no_statistic(baseline):
  scores = np.array([[1.0, np.nan, 3.0, 6.0]])
  counted = np.isfinite(scores)
  made = advantage.of_groups(scores, counted, baseline)
  alone = advantage.of_groups(scores[:, [0, 2, 3]], np.ones((1, 3), bool), baseline)
  np.testing.assert_allclose(made[:, [0, 2, 3]], alone)
  assert made[0, 1] == 0


@pytest.mark.parametrize('baseline', advantage.BASELINES)
def test_groups_that_teach_nothing_give_nothing(baseline):
  """0 exactly: the mean of three times 0.1 is not 0.1."""
  scores = np.array([[0.1, 0.1, 0.1], [5.0, np.nan, np.nan], [np.nan] * 3, [0.1, 0.2, np.nan]])
  counted = np.isfinite(scores)
  assert advantage.equal_groups(scores, counted).tolist() == [True, True, True, False]
  made = advantage.of_groups(scores, counted, baseline)
  assert np.isfinite(made).all() and (made[:3] == 0).all() and made[3, 0] < 0 < made[3, 1]


def test_discounting_by_hand():
  """The golden values of the notes: gamma 1, lambda 0.95; padding holds what must not be read."""
  rewards = np.array([[0, 0, 0.7, 9, 9], [9, 0, 0, 0.7, 9]])
  values = np.array([[0.1, 0.2, 0.3, 7, 7], [7, 0.1, 0.2, 0.3, 7]])
  counted = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]], bool)
  advantages, returns = advantage.discounted(rewards, values, counted, 1.0, 0.95)
  for row in range(2):
    np.testing.assert_allclose(advantages[row, counted[row]], [0.556, 0.48, 0.4], atol=1e-12)
    np.testing.assert_allclose(returns[row, counted[row]], [0.656, 0.68, 0.7], atol=1e-12)
    assert (advantages[row, ~counted[row]] == 0).all()


def test_discounting_is_a_sum_of_surprises():
  """Equation 16 of the paper, term by term."""
  draw = np.random.default_rng(0)
  rewards, values = draw.normal(size=(2, 1, 6))
  gamma, lam = 0.9, 0.7
  later = [*values[0, 1:], 0.0]
  surprises = rewards[0] + gamma * np.array(later) - values[0]
  expected = [sum((gamma * lam) ** k * surprises[t + k] for k in range(6 - t)) for t in range(6)]
  made, _ = advantage.discounted(rewards, values, np.ones((1, 6), bool), gamma, lam)
  np.testing.assert_allclose(made[0], expected, rtol=1e-12)


def test_whitening_is_of_what_counts():
  x = np.array([[1.0, 2.0, 1e6], [4.0, -1e6, 5.0]])
  counted = np.array([[1, 1, 0], [1, 0, 1]], bool)
  of = x[counted]
  white = advantage.whitened(x, counted)
  np.testing.assert_allclose(white[counted], (of - of.mean()) / of.std(ddof=1), rtol=1e-6)
  assert (white[~counted] == 0).all()
  as_it_was = advantage.whitened(x, counted, shift=False)[counted]
  np.testing.assert_allclose(as_it_was.mean(), of.mean())
  np.testing.assert_allclose(as_it_was.std(ddof=1), 1, rtol=1e-6)
  assert (advantage.whitened(x, np.zeros_like(counted)) == 0).all()


@pytest.mark.parametrize('estimate', advantage.KL_ESTIMATES)
def test_estimates_of_divergence_have_it_as_their_mean(estimate):
  p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
  each = advantage.kl(np.log([p]), np.log([q]), estimate)[0]
  np.testing.assert_allclose((p * each).sum(), (p * np.log(p / q)).sum(), rtol=1e-12)
  assert estimate == 'k1' or (each >= 0).all()


def test_the_penalty_follows_the_divergence():
  assert advantage.adapted(0.1, 6.0, 6.0, 1000) == 0.1
  np.testing.assert_allclose(advantage.adapted(0.1, 60.0, 6.0, 1000), 0.1 * 1.02)
  np.testing.assert_allclose(advantage.adapted(0.1, 0.0, 6.0, 1000), 0.1 * 0.98)
  np.testing.assert_allclose(advantage.adapted(0.1, 6.6, 6.0, 1000), 0.1 * 1.01)
