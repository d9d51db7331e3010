"""What is minimised of two answers to one prompt, given how likely a policy and a reference find
them? The losses of direct preference optimisation, by name; nothing here knows a model.

For a pair: p, r the sums over an answer's tokens of log-probabilities by the policy and by the
reference, n how many tokens these are, c the chosen and j the rejected answer.

P pairs
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
  """Two answers to each of some prompts, chosen and rejected in the last axis; f32 [.., P, 2].

  Attributes:
    policy: sums of log-probabilities. reference: the same of the reference, 0 without one.
    lengths: tokens; at least 1 where there is a pair.
  """

  policy: Any
  reference: Any
  lengths: Any

  @property
  def ratios(self) -> Float[Array, '*B P 2']:
    """log of how much likelier the policy finds them than the reference."""
    return self.policy - self.reference

  @property
  def mean_ratios(self) -> Float[Array, '*B P 2']:
    """The same of a token."""
    return self.ratios / jnp.maximum(self.lengths, 1)


@dataclasses.dataclass(frozen=True)
class Variant:
  """A loss of pairs.

  Attributes:
    loss: (rewards [.., P, 2], settings) -> [.., P].
    by_token: whether its rewards are of a token, and not of an answer.
    reference: whether there is one to compare with.
    smoothing: whether a share of labels may be wrong (settings.label_smoothing).
  """

  loss: Callable
  by_token: bool = False
  reference: bool = True
  smoothing: bool = False


def rewards(answers: Answers, variant: str, beta: float) -> Float[Array, '*B P 2']:
  """What a loss compares: beta log(policy / reference), of answers or of their tokens. Here, and
  nowhere else, beta is multiplied with.
  """
  of = VARIANTS[names.check('objective.variant', variant, VARIANTS)]
  return beta * (answers.mean_ratios if of.by_token else answers.ratios)


def losses(answers: Answers, settings) -> Float[Array, '*B P']:
  """Of each pair, in nats or as the variant has it; settings: `variant`, `beta`, `label_smoothing`,
  `gamma` as objectives.preference.Preference has them.
  """
  variant = VARIANTS[names.check('objective.variant', settings.variant, VARIANTS)]
  return variant.loss(rewards(answers, settings.variant, settings.beta), answers, settings)


def differences(rewards: Float[Array, '*B P 2']) -> Float[Array, '*B P']:
  """Of the chosen answer over the rejected one."""
  return rewards[..., 0] - rewards[..., 1]


def _sigmoid(rewards, answers, settings):
  """-log p(chosen is preferred) (Rafailov et al., arXiv:2305.18290, equation 7), where a share of
  the labels is wrong: conservative DPO (Mitchell, 2023).
  """
  d, wrong = differences(rewards), settings.label_smoothing
  return -(1 - wrong) * jax.nn.log_sigmoid(d) - wrong * jax.nn.log_sigmoid(-d)


def _robust(rewards, answers, settings):
  """Of which the mean over wrong labels is that over right ones (Chowdhury et al.,
  arXiv:2403.00409, equation 12).
  """
  d, wrong = differences(rewards), settings.label_smoothing
  right = -(1 - wrong) * jax.nn.log_sigmoid(d) + wrong * jax.nn.log_sigmoid(-d)
  return right / (1 - 2 * wrong)


def _hinge(rewards, answers, settings):
  """arXiv:2305.10425 (SLiC), with rewards in the place of likelihoods."""
  return jax.nn.relu(1 - differences(rewards))


def _ipo(rewards, answers, settings):
  """(h - 1 / 2 beta)^2 (Azar et al., arXiv:2310.12036, equation 17), h of log-probabilities by
  token, as its authors have confirmed; beta is their tau, and multiplied with nowhere.
  """
  return jnp.square(differences(answers.mean_ratios) - 1 / (2 * settings.beta))


def _apo_zero(rewards, answers, settings):
  """Chosen likelier, rejected less likely than the reference finds them (D'Oosterlinck et al.,
  arXiv:2408.06266, equation 5).
  """
  return 1 - jax.nn.sigmoid(rewards[..., 0]) + jax.nn.sigmoid(rewards[..., 1])


def _simpo(rewards, answers, settings):
  """-log sigmoid(d - gamma) of rewards by token (Meng et al., arXiv:2405.14734, equation 6)."""
  return -jax.nn.log_sigmoid(differences(rewards) - settings.gamma)


def _orpo(rewards, answers, settings):
  """beta times -log sigmoid of the log of the ratio of odds, of likelihoods by token (Hong et al.,
  arXiv:2403.07691, equation 7); beta is its lambda.
  """
  likely = answers.mean_ratios
  # odds = p / (1 - p); where p is 1 they are not finite, and no answer is that likely.
  log_odds = likely - jnp.log(-jnp.expm1(jnp.minimum(likely, -1e-7)))
  return -settings.beta * jax.nn.log_sigmoid(differences(log_odds))


VARIANTS = {
  'sigmoid': Variant(_sigmoid, smoothing=True),
  'robust': Variant(_robust, smoothing=True),
  'hinge': Variant(_hinge),
  'ipo': Variant(_ipo, by_token=True),
  'sigmoid_norm': Variant(_sigmoid, by_token=True, smoothing=True),
  'apo_zero': Variant(_apo_zero),
  'simpo': Variant(_simpo, by_token=True, reference=False),
  'orpo': Variant(_orpo, by_token=True, reference=False),
}
