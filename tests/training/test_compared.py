"""Are the losses of two answers what their papers say, to the last digit?"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.answers import NONE
from objectives.compared import VARIANTS, Answers, losses, rewards
from objectives.preference import Preference

# Worked out by hand, of two pairs (beta 0.1, labels wrong at 0.1).
CHOSEN, REJECTED = ([-12, -30.5], [-13, -29], [6, 10]), ([-15, -28], [-14, -29.5], [5, 12])
GOLDEN = {
  ('sigmoid', 0.0): 0.7262471,
  ('sigmoid', 0.1): 0.7212471,
  ('robust', 0.1): 0.7324971,
  ('hinge', 0.0): 1.05,
  ('ipo', 0.0): 24.6467014,
  ('sigmoid_norm', 0.0): 0.6909868,
  ('apo_zero', 0.0): 1.0124507,
}


def answers(chosen=CHOSEN, rejected=REJECTED, dtype=jnp.float32):
  pairs = np.stack([chosen, rejected], -1)
  return Answers(*(jnp.asarray(x, dtype) for x in pairs))


def settings(variant, **fields):
  fields = {'reference': NONE} | fields if not VARIANTS[variant].reference else fields
  fields = {'sft': 1.0} | fields if variant == 'orpo' else fields
  fields = {'label_smoothing': 0.1} | fields if variant == 'robust' else fields
  return Preference(variant=variant, **fields)


@pytest.mark.parametrize('variant, smoothing', GOLDEN)
def test_golden(variant, smoothing):
  made = losses(answers(), Preference(variant=variant, label_smoothing=smoothing))
  assert abs(float(made.mean()) - GOLDEN[variant, smoothing]) < 1e-6 * max(
    1, GOLDEN[variant, smoothing]
  )


def test_golden_without_a_reference():
  """Of the same answers by the formulas of the papers."""
  pc, pr = (np.array(side[0]) / side[2] for side in (CHOSEN, REJECTED))
  likely = dataclasses.replace(answers(), reference=jnp.zeros((2, 2)))
  d = 2.0 * (pc - pr) - 0.5
  made = losses(likely, Preference(variant='simpo', beta=2.0, gamma=0.5, reference=NONE))
  np.testing.assert_allclose(made, np.log1p(np.exp(-d)), rtol=1e-6)
  odds = [np.exp(p) / (1 - np.exp(p)) for p in (pc, pr)]
  made = losses(likely, settings('orpo', beta=0.3))
  np.testing.assert_allclose(made, 0.3 * np.log1p(odds[1] / odds[0]), rtol=1e-6)


def by_hand(policy, reference, lengths, made):
  """The mean over pairs by the formulas of the papers, in float64."""
  ratios, wrong = policy - reference, made.label_smoothing
  (c, r), (cm, rm) = ratios.T, (ratios / lengths).T

  def lost(d):
    """-log sigmoid(d)."""
    return np.log1p(np.exp(-d))

  def smoothed(d):
    return (1 - wrong) * lost(d) + wrong * lost(-d)

  def odds(p):
    return np.exp(p) / (1 - np.exp(p))

  likely = (policy / lengths).T  # of a reference there is none
  b = made.beta
  robust = (1 - wrong) * lost(b * (c - r)) - wrong * lost(b * (r - c))
  each = {
    'sigmoid': smoothed(b * (c - r)),
    'sigmoid_norm': smoothed(b * (cm - rm)),
    'robust': robust / (1 - 2 * wrong),
    'hinge': np.maximum(1 - b * (c - r), 0),
    'ipo': (cm - rm - 1 / (2 * b)) ** 2,
    'apo_zero': 1 - 1 / (1 + np.exp(-b * c)) + 1 / (1 + np.exp(-b * r)),
    'simpo': lost(b * (cm - rm) - made.gamma),
    'orpo': b * np.log1p(odds(likely[1]) / odds(likely[0])),
  }
  return each[made.variant].mean()


CASES = [(variant, {}) for variant in VARIANTS]
CASES += [(name, {'label_smoothing': 0.3}) for name, of in VARIANTS.items() if of.smoothing]
CASES += [('simpo', {'beta': 2.0, 'gamma': 0.5})]


@pytest.mark.parametrize('variant, fields', CASES, ids=str)
def test_losses_and_gradients_are_the_formulas(variant, fields):
  """In float64, to its last digits; slopes by finite differences of the formula."""
  draw, made = np.random.default_rng(4), settings(variant, **{'beta': 0.3} | fields)
  lengths = draw.integers(1, 9, (7, 2)).astype(np.float64)
  policy, reference = (-lengths * draw.uniform(0.5, 3, lengths.shape) for _ in range(2))
  reference = reference if VARIANTS[variant].reference else 0 * reference
  expected = by_hand(policy, reference, lengths, made)
  slopes, step = np.zeros_like(policy), 1e-5
  for place, moved in enumerate(step * np.eye(policy.size).reshape(-1, *policy.shape)):
    ahead, behind = (by_hand(policy + h * moved, reference, lengths, made) for h in (1, -1))
    slopes.flat[place] = (ahead - behind) / (2 * step)
  with jax.enable_x64(True):

    def mean(policy):
      return losses(Answers(policy, jnp.asarray(reference), jnp.asarray(lengths)), made).mean()

    loss, gradient = jax.value_and_grad(mean)(jnp.asarray(policy))
    assert gradient.dtype == np.float64
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize('variant', VARIANTS)
def test_swapped_answers_flip_what_is_compared(variant):
  made, swapped = settings(variant), answers(REJECTED, CHOSEN)
  a, b = (rewards(x, variant, 0.1) for x in (answers(), swapped))
  assert (a == b[..., ::-1]).all() and not (a == b).all()

  def pull(x):
    return jax.grad(lambda policy: losses(dataclasses.replace(x, policy=policy), made).sum())(
      x.policy
    )

  # The chosen answer is drawn up and the rejected one down, which one that may be.
  for x in (answers(), swapped):
    slope = pull(x)
    assert (slope[:, 0] <= 0).all() and (slope[:, 1] >= 0).all() and (slope != 0).any()


def test_a_policy_that_is_its_reference_loses_ln_2_exactly():
  same = dataclasses.replace(answers(), reference=answers().policy)
  for smoothing in (0.0, 0.1):
    made = losses(same, Preference(label_smoothing=smoothing))
    assert (made == np.float32(math.log(2))).all()


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'variant': 'sigmod'}, "objective.variant='sigmod' is unknown; did you mean 'sigmoid'"),
    ({'beta': 0.0}, 'objective.beta=0.0 must be above 0'),
    ({'variant': 'hinge', 'label_smoothing': 0.1}, 'use one of sigmoid, robust, sigmoid_norm'),
    ({'label_smoothing': 0.5}, 'it must be below 0.5'),
    ({'gamma': 1.0}, "gamma=1.0 is a finite margin of objective.variant='simpo'"),
    ({'variant': 'simpo'}, "would not be read; set objective.reference='none'"),
    ({'variant': 'orpo', 'reference': NONE}, 'objective.sft=0.0 must be 1'),
    ({'reference': ''}, "it is 'begun', the directory of a run, or 'none'"),
    ({'sft': -1.0}, 'objective.sft=-1.0 must be at least 0'),
  ],
)
def test_what_a_variant_does_not_read_is_refused(fields, said):
  with pytest.raises(ValueError, match=said):
    Preference(**fields)
