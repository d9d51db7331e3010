"""How much better than expected was what a policy wrote? From scores of answers to what each token
is credited with, on the host, in float64, over a whole rollout: what is cut into batches later is
statistics of all of it.

A group is the answers to one prompt. Whatever counts in a mean counts in its denominator, by one
mask; where nothing counts, the result is 0.

R answers · T tokens · M groups · G answers of one
"""

import numpy as np
from jaxtyping import Bool, Float

SMALLEST = 1e-6  # beside a group's standard deviation
FLAT = 1e-8  # beside the variance of what is whitened
KL_STEP, KL_HORIZON = 0.2, 10_000  # of the controller of `adapted`, arXiv:1909.08593, section 2.2

DEVIATION, MEAN, OTHERS = BASELINES = 'deviation', 'mean', 'others'
SIMPLE, UNBIASED = KL_ESTIMATES = 'k1', 'k3'

Scores = Float[np.ndarray, 'M G']
Tokens = Float[np.ndarray, 'R T']


def equal_groups(scores: Scores, counted: Bool[np.ndarray, 'M G']) -> Bool[np.ndarray, 'M']:
  """Groups of which no answer is better than another, or of which fewer than two count: there is
  nothing to learn from them.
  """
  highest = np.where(counted, scores, -np.inf).max(1)
  lowest = np.where(counted, scores, np.inf).min(1)
  return (counted.sum(1) < 2) | (highest == lowest)


def of_groups(scores: Scores, counted: Bool[np.ndarray, 'M G'], baseline: str) -> Scores:
  """Of each answer, against those of its group that count; 0 of those that do not.

  baseline: 'deviation': (r - mean) / (std + 1e-6), std with n - 1 (GRPO, arXiv:2402.03300,
    section 4.1.2); 'mean': r - mean (Dr. GRPO, arXiv:2503.20783); 'others': r - mean of the other
    ones (RLOO, arXiv:2402.14740, equation 8).
  """
  count = counted.sum(1, keepdims=True)
  scores = np.where(counted, scores, 0.0)
  mean = scores.sum(1, keepdims=True) / np.maximum(count, 1)
  surplus = np.where(counted, scores - mean, 0.0)
  # Rounding of a mean must not be what an answer is rewarded for.
  surplus[equal_groups(scores, counted)] = 0.0
  if baseline == MEAN:
    return surplus
  if baseline == OTHERS:
    return surplus * count / np.maximum(count - 1, 1)
  variance = np.square(surplus).sum(1, keepdims=True) / np.maximum(count - 1, 1)
  return surplus / (np.sqrt(variance) + SMALLEST)


def kl(policy: Tokens, reference: Tokens, estimate: str) -> Tokens:
  """Of tokens that the policy drew, with these log-probabilities, an estimate of KL(policy ||
  reference): 'k1', log p - log q, which may be below 0; 'k3', q / p - 1 - log(q / p), which may not
  (Schulman, 2020). Both have it as their mean.
  """
  ratio = policy - reference
  return ratio if estimate == SIMPLE else np.expm1(-ratio) + ratio


def discounted(
  rewards: Tokens, values: Tokens, counted: Bool[np.ndarray, 'R T'], gamma: float, lam: float
) -> tuple[Tokens, Tokens]:
  """(advantages, returns) of the tokens that count, which follow one another: generalised advantage
  estimation (arXiv:1506.02438, equation 16). What comes behind the last one is worth 0, and returns
  are advantages + values.

  gamma: of what comes later. lam: of what is estimated from it.
  """
  rewards, values = (np.where(counted, x, 0.0) for x in (rewards, values))
  advantages = np.zeros_like(rewards)
  later_value = later = np.zeros(len(rewards))
  for t in reversed(range(rewards.shape[1])):
    here = counted[:, t]
    surprise = rewards[:, t] + gamma * later_value - values[:, t]
    advantages[:, t] = np.where(here, surprise + gamma * lam * later, 0.0)
    later, later_value = advantages[:, t], values[:, t]
  return advantages, advantages + values


def whitened(x: Tokens, counted: Bool[np.ndarray, 'R T'], shift: bool = True) -> Tokens:
  """What counts brought to a standard deviation of 1 (with n - 1), and to a mean of 0, or with
  shift=False to the mean that it had; 0 elsewhere.
  """
  count = max(int(counted.sum()), 1)
  mean = np.where(counted, x, 0.0).sum() / count
  variance = np.where(counted, np.square(x - mean), 0.0).sum() / max(count - 1, 1)
  white = (x - mean) / np.sqrt(variance + FLAT)
  return np.where(counted, white if shift else white + mean, 0.0)


def adapted(coefficient: float, divergence: float, target: float, answers: int) -> float:
  """What a penalty on divergence is to be next, so that the divergence of an answer comes to its
  target (arXiv:1909.08593, section 2.2, with the error bounded by 0.2, per 10,000 answers).
  """
  error = float(np.clip(divergence / target - 1, -KL_STEP, KL_STEP))
  return coefficient * (1 + error * answers / KL_HORIZON)
