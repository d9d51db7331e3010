"""What teaches a policy with a critic beside it, which says at every token what an answer will be
worth? Proximal policy optimisation as it tunes language models (arXiv:1707.06347, arXiv:1909.08593,
arXiv:2403.17031, whose details these are).

    reward of a token   -beta KL(policy || reference), and at an answer's last token its score
    advantages          generalised advantage estimation, whitened over the rollout
    loss                the clipped one of objectives/policy.py, a mean over tokens
                        + value_coefficient / 2 max((v - R)^2, (v clipped about what it was - R)^2)

The score is added at the last token that was written, the one that ends the answer where one does,
and a value is of what stands before its token. Values begin at 0.

B rows of a batch, an answer in each · T length
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import names
from kernels import context
from model import heads
from objectives import advantage
from objectives.answers import REFERENCE
from objectives.experts import EXPERTS, balance, routed
from objectives.laws import final, laid_out
from objectives.objective import MAIN, Role, or_one
from objectives.policy import OfRollouts, check_same_ids
from objectives.rollout import POLICY
from objectives.rollout_rows import RolloutBatch

CRITIC, HEAD, VALUE = 'critic', 'value_head', 'value'  # models, and a term
SEPARATE, SHARED = 'separate', 'shared'


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(OfRollouts):
  """An answer to each prompt, credited token by token.

  Attributes:
    kl: estimate of a token's KL in its reward: 'k1' or 'k3' (objectives/advantage.py).
    kl_target: of an answer, in nats, to which beta is adapted; 0: beta stays.
    critic: whose hidden states values are read off by a linear head: a model of its own that begins
      as the policy does ('separate'), the policy ('shared'), or a model that begins as another run
      did, by its directory: a reward model.
    value_coefficient: weight of the critic's loss. value_clip: how far values may move from what
      they were for the gradient to go on.
    gamma: what later rewards are worth. lam: of advantages (objectives/advantage.py).
    reward_scale: '' or 'whitened': tokens' rewards over their standard deviation in the rollout.
  """

  kind: str = 'ppo'
  beta: float = 0.05
  epochs: int = 4
  kl: str = advantage.SIMPLE
  kl_target: float = 0.0
  critic: str = SEPARATE
  value_coefficient: float = 0.1
  value_clip: float = 0.2
  gamma: float = 1.0
  lam: float = 0.95
  reward_scale: str = ''
  aside = (CRITIC, HEAD)

  @property
  def main_passes(self) -> float:
    """Where it is the critic, too: what it says of a rollout."""
    return self.frozen_passes if self.critic == SHARED else 0.0

  def __post_init__(self):
    super().__post_init__()
    names.check('objective.kl', self.kl, advantage.KL_ESTIMATES)
    names.check('objective.reward_scale', self.reward_scale, ('', 'whitened'))
    self._check_least(kl_target=0, value_coefficient=0)
    for name in ('gamma', 'lam'):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f'objective.{name}={getattr(self, name)} must be in [0, 1]')
    if not self.value_clip > 0:
      raise ValueError(f'objective.value_clip={self.value_clip} must be above 0; inf: no clip')
    if self.kl_target and not self.beta:
      raise ValueError(
        f'objective.kl_target={self.kl_target} adapts objective.beta, which is 0; raise that'
      )
    if not self.critic:
      raise ValueError(
        "objective.critic='' names no critic; it is 'separate', 'shared' or the directory of a run"
      )

  @property
  def adapts(self) -> bool:
    return self.kl_target > 0

  # 1. Models.

  def models(self, config):
    models = super().models(config)
    if self.critic == SEPARATE:
      models[CRITIC] = Role(config, begun=MAIN)
    elif self.critic != SHARED:
      models[CRITIC] = Role(None, directory=self.critic)
    # As wide as what it is on.
    on = models.get(CRITIC, models[MAIN])
    models[HEAD] = dataclasses.replace(
      on, begun='', made=functools.partial(heads.new, labels=1, std=0.0)
    )
    return models

  def accepts(self, models):
    super().accepts(models)
    critic = models.get(CRITIC)
    if critic is None:
      return
    if critic.execution.stored:
      raise ValueError(
        f'objective.critic={self.critic!r} lies in codes ({", ".join(critic.execution.stored)}), '
        'and a critic is trained; name the run that it was made of'
      )
    if critic.moe.experts and critic.moe.bias_rate:
      raise NotImplementedError(
        f'model.moe.bias_rate={critic.moe.bias_rate} balances experts of the policy, and '
        f'objective.critic={self.critic!r} has experts of its own; set it to 0, with '
        "model.moe.balance_loss in its place, or use objective.critic='shared'"
      )
    if critic.V != models[MAIN].V:
      raise ValueError(
        f'objective.critic={self.critic!r} has model.vocabulary={critic.vocabulary} and the policy '
        f'{models[MAIN].vocabulary}: they read other tokens; use a run of the same tokenizer'
      )

  # 2. Batches.

  def read(self, config, log):
    read = super().read(config, log)
    if self.critic not in (SEPARATE, SHARED):
      check_same_ids('critic', self.critic, read.tokenizer)
    return read

  def asked_of(self, first):
    return (*super().asked_of(first), VALUE)

  def said(self, models, batch, names_):
    """As OfRollouts; and 'value', what the critic expects."""
    said = super().said(models, batch, tuple(name for name in names_ if name != VALUE))
    if VALUE in names_:
      model = models.get(CRITIC, models[MAIN])
      laid, parts = laid_out(model, batch)
      values = self._values(models, final(model, laid, parts)[0], laid)
      said[VALUE] = context.in_order(values, parts)
    return said

  def _values(self, models, x, batch) -> Float[Array, 'B T']:
    """Of the critic's final hidden states, 0 where nothing counts."""
    counted = batch.weights > 0
    # No NaN of padding, whose weight is 0, reaches a slope.
    x = jnp.where(counted[..., None], x, 0)
    values = heads.scores(models.get(CRITIC, models[MAIN]), models[HEAD], x)[..., 0]
    return jnp.where(counted, values, 0)

  def credited(self, batch, said, coefficient):
    counted = batch.weights > 0
    policy = np.float64(batch.behaviour)
    reference = np.float64(said.get(REFERENCE, batch.behaviour))
    divergence = np.where(counted, advantage.kl(policy, reference, self.kl), 0.0)
    rewards = batch.scores - coefficient * divergence
    if self.reward_scale:
      rewards = advantage.whitened(rewards, counted, shift=False)
    advantages, returns = advantage.discounted(
      rewards, np.float64(said[VALUE]), counted, self.gamma, self.lam
    )
    more: dict = {'beta': coefficient}
    if self.kl_target:
      answers = int(counted.any(1).sum())
      of_answer = float((policy - reference)[counted].sum() / max(answers, 1))
      more['next_coefficient'] = advantage.adapted(coefficient, of_answer, self.kl_target, answers)
    batch = dataclasses.replace(
      batch,
      advantages=np.float32(advantage.whitened(advantages, counted)),
      returns=np.float32(returns),
      values=np.float32(said[VALUE]),
      reference=np.float32(reference),
    )
    return batch, more

  # 3. Loss, and what is said of it.

  def weights(self, batch):
    tokens = batch.weights.sum()
    return {POLICY: tokens, VALUE: tokens, EXPERTS: routed(self.tokens(batch))}

  def sums(self, models, batch):
    scored = self.score_policy(models, batch)
    batch, x, router = scored.batch, scored.hidden, scored.router
    losses, sums = self.policy_sums(batch, scored.log_ratio, self.clip)
    balanced = balance(router)
    if CRITIC in models:
      x, of_critic = final(models[CRITIC], batch, scored.parts)
      balanced += balance(of_critic)
    values = self._values(models, x, batch)
    misses = value_losses(values, batch, self.value_clip)
    mask = batch.weights
    terms = {
      POLICY: (losses * mask).sum(),
      VALUE: self.value_coefficient * (misses * mask).sum(),
      EXPERTS: balanced,
    }
    left = batch.returns - batch.values
    sums |= self.said_sums(batch, scored.log_ratio) | {
      'misses': (misses * mask).sum(),
      'returns': (batch.returns * mask).sum(),
      'squares': (jnp.square(batch.returns) * mask).sum(),
      'left': (left * mask).sum(),
      'left_squares': (jnp.square(left) * mask).sum(),
    }
    return terms, jax.lax.stop_gradient(sums) | (router or {})

  def metrics(self, terms, weights, sums):
    """As OfRollouts; `value_loss` without its coefficient; `explained`, the share of the variance
    of returns that the critic, as it was, explains.
    """
    said = super().metrics(terms, weights, sums)
    tokens = or_one(sums['tokens'])

    def variance(total, squares):
      return sums[squares] / tokens - jnp.square(sums[total] / tokens)

    of_returns = jnp.maximum(variance('returns', 'squares'), 1e-8)
    said['value_loss'] = sums['misses'] / tokens
    said['explained'] = 1 - variance('left', 'left_squares') / of_returns
    return said


def value_losses(
  values: Float[Array, 'B T'], batch: RolloutBatch, clip: float
) -> Float[Array, 'B T']:
  """Of each token: half of the larger square, with the value as it is and clipped about what it
  was (arXiv:2005.12729, section 2).
  """
  clipped = batch.values + jnp.clip(values - batch.values, -clip, clip)
  misses = jnp.maximum(jnp.square(values - batch.returns), jnp.square(clipped - batch.returns))
  return misses / 2
