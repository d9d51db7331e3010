"""What makes a model say how good an answer is? A number at one of its tokens, higher for the
answer that people chose than for the one that they rejected: a reward model (Bradley and Terry,
1952, as in arXiv:2009.01325, equation 1).

    loss = -log sigmoid(r_chosen - r_rejected - margin) + centring (r_chosen + r_rejected)^2

B rows of a batch · T length · P pairs of a row
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import names
from data.preferences import ChoiceBatch
from data.rewarded import RewardedSettings
from kernels.mask import Mask
from model import heads
from objectives.answers import OfChoices, by_pairs, pairs_of
from objectives.classify_head import FIRST, HEAD, LAST, check_head, unscored
from objectives.experts import EXPERTS, balance, routed, router_metrics
from objectives.laws import laid_out
from objectives.objective import MAIN, Role, or_one

PAIRS = 'reward'  # a term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(OfChoices, RewardedSettings):
  """Packed pairs of answers (data/rewarded.py), all alike, and a head of one number
  (model/heads.py): N(0, 1 / sqrt(D + 1)), bias 0.

  Attributes:
    pooled: which token of an answer it is read at: a decoder's 'last', which is the end of the
      answer, or an encoder's 'first'.
    margins: whether rewards are to be apart by the records' `margin`, where they have one.
    centring: weight of the square of the pair's sum, which keeps rewards about 0
      (arXiv:2312.09244, where it is 0.01).
  """

  kind: str = 'reward'
  pooled: str = LAST
  margins: bool = True
  centring: float = 0.0
  gives_rewards = True

  def __post_init__(self):
    super().__post_init__()
    RewardedSettings.__post_init__(self)
    names.check('objective.pooled', self.pooled, (FIRST, LAST))
    self._check_least(centring=0)

  @property
  def by_first(self) -> bool:
    return self.pooled == FIRST

  # 1. Models.

  def models(self, config):
    return {MAIN: Role(config), HEAD: Role(config, made=functools.partial(heads.new, labels=1))}

  def accepts(self, models):
    check_head(self, models[MAIN], 'a decoder, or an encoder')

  # 2. Batches.

  def forward_flops(self, network, config, document_length):
    return super().forward_flops(network, config, document_length) + unscored(network)

  # 3. Loss, and what is said of it.

  def weights(self, batch):
    return {PAIRS: pairs_of(batch), EXPERTS: routed(self.tokens(batch))}

  def sums(self, models, batch):
    batch, parts = laid_out(models[MAIN], batch)
    rewards, router = rewards_of(models[MAIN], models[HEAD], batch, parts)
    real = by_pairs(jnp.ones_like(batch.weights), batch).min(-1) > 0
    margins = by_pairs(batch.margins, batch)[..., 0] if self.margins else 0.0
    each = losses(rewards, margins, self.centring)

    def total(values):
      return jnp.where(real, values, 0).sum().astype(jnp.float32)

    chosen, rejected = rewards[..., 0], rewards[..., 1]
    sums = {
      'pairs': total(jnp.ones_like(chosen)),
      'right': total(chosen > rejected),
      'chosen': total(chosen),
      'rejected': total(rejected),
      'squares': total(jnp.square(rewards).sum(-1)),
    }
    sums = jax.lax.stop_gradient(sums)
    return {PAIRS: total(each), EXPERTS: balance(router)}, sums | (router or {})

  def metrics(self, terms, weights, sums):
    """`loss`; `accuracy`, the share of pairs whose chosen reward is the higher one; means of
    rewards.
    """
    said = super().metrics(terms, weights, sums)
    # The loss of pairs, which is `loss`, and no reward.
    for name in (PAIRS, EXPERTS):
      said.pop(name, None)
    return said | _means(sums) | router_metrics(sums, weights[EXPERTS])

  def judged(self, models, batch):
    terms, sums = self.sums(models, batch)
    names_ = ('pairs', 'right', 'chosen', 'rejected', 'squares')
    return {'loss': terms[PAIRS]} | {name: sums[name] for name in names_}

  def verdict(self, sums, prepared):
    """`validation_loss` in nats a pair, and what `metrics` says, as validation_..; and
    `validation_reward_std`, of all answers.
    """
    del prepared
    said = {f'validation_{name}': float(value) for name, value in _means(sums).items()}
    mean = (sums['chosen'] + sums['rejected']) / (2 * sums['pairs'])
    variance = max(sums['squares'] / (2 * sums['pairs']) - mean**2, 0.0)
    loss = {'validation_loss': sums['loss'] / sums['pairs']}
    return loss | said | {'validation_reward_std': variance**0.5}


def losses(
  rewards: Float[Array, '*B P 2'], margins: Float[Array, '*B P'] | float, centring: float = 0.0
) -> Float[Array, '*B P']:
  """Of each pair, chosen and rejected in the last axis."""
  chosen, rejected = rewards[..., 0], rewards[..., 1]
  apart = -jax.nn.log_sigmoid(chosen - rejected - margins)
  return apart + centring * jnp.square(chosen + rejected) if centring else apart


def rewards_of(
  model, head: heads.Head, batch: ChoiceBatch, parts: int
) -> tuple[Float[Array, 'B P 2'], dict | None]:
  """Rewards of a batch's answers, laid out in these parts, 0 where there is none; what experts
  report.
  """
  x, _, router = model(batch.tokens, batch.positions, batch.segments, laid=Mask(zigzag=parts))
  with jax.named_scope('loss'):
    # What is not read off is 0: no NaN of padding, whose weight is 0, reaches a slope.
    x = jnp.where((batch.weights != 0)[..., None], x, 0)
    return by_pairs(heads.scores(model, head, x)[..., 0], batch), router


def _means(sums):
  pairs = or_one(jnp.asarray(sums['pairs']))
  chosen, rejected = sums['chosen'] / pairs, sums['rejected'] / pairs
  return {
    'accuracy': sums['right'] / pairs,
    'reward_chosen': chosen,
    'reward_rejected': rejected,
    'reward_margin': chosen - rejected,
  }
