"""What makes a model prefer an answer to another? Their log-probabilities, compared with those of a
frozen model: direct preference optimisation, without a model of rewards.

B rows of a batch · T length · P pairs of a row
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array

import names
from data.preferences import ChoiceSettings
from objectives import answers, compared
from objectives.answers import NONE, REFERENCE, OfAnswers, Scored
from objectives.experts import EXPERTS, balance, routed, router_metrics
from objectives.laws import laid_out
from objectives.objective import MAIN, or_one

PAIRS, CHOSEN = 'preference', 'sft'  # terms
SIDES = ('chosen', 'rejected')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparing(OfAnswers):
  """Pairs of answers, all alike, whoever reads them.

  Attributes:
    variant: of the loss (objectives/compared.py): 'sigmoid' (DPO), 'robust', 'hinge', 'ipo',
      'sigmoid_norm', 'apo_zero'; 'simpo' and 'orpo', which have no reference.
    beta: what rewards are log-ratios times: the larger, the closer to the reference it stays.
      ipo's tau; orpo's lambda; for simpo 2 or so.
    label_smoothing: share of pairs whose labels are thought to be wrong: below 0.5; of 'sigmoid' it
      makes conservative DPO.
    gamma: by how much simpo's chosen reward is to be the higher one.
    sft: weight of the chosen answers' cross-entropy, a mean over their tokens, beside; orpo has 1.
  """

  variant: str = 'sigmoid'
  label_smoothing: float = 0.0
  gamma: float = 0.0
  sft: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    names.check('objective.variant', self.variant, compared.VARIANTS)
    self._check_least(sft=0, label_smoothing=0)
    self._check_variant()

  def _check_variant(self) -> None:
    """Raises ValueError for what the variant does not read, or needs."""
    variant = compared.VARIANTS[self.variant]
    if self.label_smoothing and not variant.smoothing:
      those = [name for name, other in compared.VARIANTS.items() if other.smoothing]
      raise ValueError(
        f'objective.label_smoothing={self.label_smoothing} is not of objective.variant='
        f'{self.variant!r}; leave it 0, or use one of {", ".join(those)}'
      )
    if self.label_smoothing >= 0.5:
      raise ValueError(
        f'objective.label_smoothing={self.label_smoothing} says that labels are wrong as often as '
        'right; it must be below 0.5'
      )
    if self.gamma and self.variant != 'simpo' or not math.isfinite(self.gamma):
      raise ValueError(
        f"objective.gamma={self.gamma} is a finite margin of objective.variant='simpo', and this "
        f'is {self.variant!r}; leave it 0'
      )
    if self.variant == 'orpo' and self.sft != 1:
      raise ValueError(
        f"objective.variant='orpo' is cross-entropy and odds: objective.sft={self.sft} must be 1, "
        'and objective.beta weighs the odds'
      )
    if not variant.reference and self.reference != NONE:
      raise ValueError(
        f'objective.variant={self.variant!r} compares with no reference, and objective.reference='
        f"{self.reference!r} would not be read; set objective.reference='none'"
      )

  # 1. Loss.

  def weights(self, batch):
    chosen = batch.weights * (batch.segments % 2)
    weights = {PAIRS: answers.pairs_of(batch), EXPERTS: routed(self.tokens(batch))}
    return weights | ({CHOSEN: chosen.sum()} if self.sft else {})

  def sums(self, models, batch):
    scored = answers.score(models, *laid_out(models[MAIN], batch))
    each = jnp.where(scored.real, compared.losses(scored.answers, self), 0)
    terms = {PAIRS: each.sum(), EXPERTS: balance(scored.router)}
    if self.sft:
      chosen = jnp.where(scored.real, scored.answers.policy[..., 0], 0)
      terms[CHOSEN] = -self.sft * chosen.sum()
    return terms, self._said(scored) | (scored.router or {})

  def _said(self, scored: Scored) -> dict[str, Array]:
    """What metrics are made of."""
    of, total = scored.answers, scored.total
    rewards = compared.rewards(of, self.variant, self.beta)
    sums = {
      'pairs': total(jnp.ones_like(rewards[..., 0])),
      'right': total(rewards[..., 0] > rewards[..., 1]),
      'tokens': total(of.lengths.sum(-1)),
      'ratios': total(of.ratios.sum(-1)),
    }
    for i, side in enumerate(SIDES):
      sums[f'rewards_{side}'] = total(rewards[..., i])
      sums[f'policy_{side}'] = total(of.policy[..., i])
      sums[f'tokens_{side}'] = total(of.lengths[..., i])
    return sums

  # 2. What is said of it.

  def metrics(self, terms, weights, sums):
    """`loss`; `rewards_chosen`, `rewards_rejected`, `reward_margin`, means over pairs;
    `reward_accuracy`, the share whose chosen reward is the higher one (which none is while the
    policy is its reference); `logprob_chosen`, `logprob_rejected`, of a token, in nats;
    `log_ratio`, of policy to reference, of an answer's token: the simplest estimate of their
    divergence, where answers are the policy's own.
    """
    said = super().metrics(terms, weights, sums)
    said.pop(EXPERTS, None)
    if not self.sft:
      said.pop(PAIRS, None)
    return said | self._means(sums) | router_metrics(sums, weights[EXPERTS])

  def _means(self, sums):
    pairs = or_one(jnp.asarray(sums['pairs']))
    chosen, rejected = (sums[f'rewards_{side}'] / pairs for side in SIDES)
    likely = {
      f'logprob_{side}': sums[f'policy_{side}'] / or_one(jnp.asarray(sums[f'tokens_{side}']))
      for side in SIDES
    }
    said = {
      'rewards_chosen': chosen,
      'rewards_rejected': rejected,
      'reward_margin': chosen - rejected,
      'reward_accuracy': sums['right'] / pairs,
      **likely,
    }
    if self.reference != NONE:
      said['log_ratio'] = sums['ratios'] / or_one(jnp.asarray(sums['tokens']))
    return said

  def judged(self, models, batch):
    batch, parts = laid_out(models[MAIN], batch)
    scored = answers.score(models, batch, parts)
    sums = self._said(scored) | {'loss': scored.total(compared.losses(scored.answers, self))}
    if REFERENCE in models:
      sums['kl'] = answers.divergence(models, batch, parts)
    return sums

  def verdict(self, sums, prepared):
    """`validation_loss`, and what `metrics` says, as validation_..; `validation_kl`, of the laws of
    the next token, policy from reference, a mean over the tokens of answers, in nats. (Of a
    reference that is stored, no laws are known.)
    """
    del prepared
    loss = sums['loss'] / sums['pairs']
    if self.sft:
      loss -= self.sft * sums['policy_chosen'] / sums['tokens_chosen']
    said = {f'validation_{name}': float(value) for name, value in self._means(sums).items()}
    said['validation_accuracy'] = said.pop('validation_reward_accuracy')
    if 'kl' in sums:
      said['validation_kl'] = sums['kl'] / sums['tokens']
    return {'validation_loss': loss, **said}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Comparing, ChoiceSettings):
  """Packed pairs of answers that a decoder writes (data/preferences.py)."""

  kind: str = 'preference'

  def __post_init__(self):
    super().__post_init__()
    ChoiceSettings.__post_init__(self)
