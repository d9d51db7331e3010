"""What teaches a model by what it writes itself? A score of each answer: policy gradients, with the
ratio to the policy that wrote it clipped (PPO, arXiv:1707.06347, equation 7).

    ratio   = policy / behaviour, of a token or of an answer
    loss    = -min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A) + beta KL(policy || reference)

`grpo` credits answers against those of their group, without a critic; `ppo` is objectives/ppo.py.
Log-probabilities are at the temperature that answers are drawn at, everywhere.

B rows of a batch, an answer in each · T length
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import files
import names
from data import tokenizers
from data.extra import same_ids
from data.tokenizer import Tokenizer
from objectives import advantage
from objectives.answers import BEGUN, NONE, REFERENCE
from objectives.experts import EXPERTS, balance, routed, router_metrics
from objectives.laws import final, laid_out, target_logprobs
from objectives.objective import MAIN, Role, or_one
from objectives.own_text import OfOwnText
from objectives.rollout import POLICY
from objectives.rollout_rows import RolloutBatch

TOKEN, ANSWER, LONGEST = 'token', 'answer', 'longest'  # what counts alike
TOKENS, MEANS, SUMS = 'tokens', 'means', 'sums'  # of what ratios are
LEARNED, MASKED = 'learned', 'masked'
AS_IS, BY_GROUP = '', 'group'


@dataclasses.dataclass(frozen=True)
class Credit:
  """Of the losses without a critic.

  Attributes:
    baseline: of advantages (objectives/advantage.py). counts: what counts alike: each 'token', each
      'answer', or an answer as if it were the 'longest'. ratios: of 'tokens', or of answers the
      'means' or 'sums' of theirs.
  """

  baseline: str
  counts: str
  ratios: str = TOKENS


VARIANTS = {
  'grpo': Credit(advantage.DEVIATION, ANSWER),
  'dr_grpo': Credit(advantage.MEAN, LONGEST),
  'dapo': Credit(advantage.DEVIATION, TOKEN),
  'rloo': Credit(advantage.OTHERS, ANSWER, SUMS),
  'gspo': Credit(advantage.DEVIATION, ANSWER, MEANS),
}


class Reading(NamedTuple):
  """Attributes:
  batch: laid out in `parts` (objectives/laws.py). hidden: final states of the policy, [B, T, D];
    None where prompts are shared.
  log_ratio: how many nats likelier it finds each target than who wrote it, [B, T], 0 where none
    counts. router: what experts report, or None.
  """

  batch: RolloutBatch
  parts: int
  hidden: Any
  log_ratio: Any
  router: dict | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfRollouts(OfOwnText):
  """What learns from scores of its own answers.

  Attributes:
    reward: what scores answers: Python files with a function reward(text, record) -> float, and
      directories of runs of objective.kind='reward'.
    reward_weights: of each; none: 1 of all.
    reward_timeout: seconds that a file's function may take for an answer.
    missing_end: what an answer that did not end by itself has less.
    reference: what the policy is to stay near where beta > 0: itself as the run 'begun' (for
      nothing under an adapter, where it is the base), or the directory of another run.
    beta: weight of KL(policy || reference).
    clip: by how much the ratio of policy to behaviour may move from 1.
    stop_kl: nats a token by which the policy may have moved from what wrote the answers, for
      another epoch to begin; 0: all are gone through.
  """

  reward: tuple[str, ...] = ()
  reward_weights: tuple[float, ...] = ()
  reward_timeout: float = 10.0
  missing_end: float = 0.0
  reference: str = BEGUN
  beta: float = 0.0
  clip: float = 0.2
  stop_kl: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    self._check_least(beta=0, stop_kl=0, missing_end=0)
    for name, most in (('reward_timeout', math.inf), ('clip', 1)):
      value = getattr(self, name)
      if not 0 < value < most:
        raise ValueError(f'objective.{name}={value} must be above 0, and below {most}')
    if not self.reference or self.reference == NONE:
      raise ValueError(
        f"objective.reference={self.reference!r} names no model; it is 'begun' or the directory of "
        'a run, and without one objective.beta=0'
      )
    if self.reference != BEGUN and not self.beta:
      raise ValueError(
        f'objective.reference={self.reference!r} would not be read: objective.beta=0; raise that'
      )
    for reward in self.reward:
      files.check_local('objective.reward', reward)
    if self.reward_weights and len(self.reward_weights) != len(self.reward):
      raise ValueError(
        f'objective.reward_weights={self.reward_weights} are not of the {len(self.reward)} entries '
        'of objective.reward; give one for each'
      )
    if not all(map(math.isfinite, self.reward_weights)):
      raise ValueError(f'objective.reward_weights={self.reward_weights} must be finite')
    if self.stop_kl and self.epochs == 1:
      raise ValueError(
        f'objective.stop_kl={self.stop_kl} is looked at before another epoch, and '
        'objective.epochs=1 has none; leave it 0'
      )

  loss_unit = ''

  @property
  def penalty(self) -> float:
    return self.beta

  # 1. Models.

  def models(self, config):
    models = {MAIN: Role(config)}
    if self.beta and self.reference == BEGUN:
      models[REFERENCE] = Role(config, trained=False, begun=MAIN)
    elif self.beta:
      models[REFERENCE] = Role(None, trained=False, directory=self.reference)
    return models

  def accepts(self, models):
    super().accepts(models)
    config = models[MAIN]
    reference = models.get(REFERENCE)
    if reference is not None and reference.V != config.V:
      raise ValueError(
        f'objective.reference={self.reference!r} has model.vocabulary={reference.vocabulary} and '
        f'the policy {config.vocabulary}: they read other tokens; use a reference of the same '
        'tokenizer'
      )

  # 2. Batches.

  def read(self, config, log):
    if not self.reward:
      raise ValueError(
        'objective.reward is empty: nothing says what an answer is worth; give a Python file or a '
        'run, as in --config.objective.reward=configs/rewards/arithmetic.py'
      )
    read = super().read(config, log)
    if self.reference != BEGUN:
      check_same_ids('reference', self.reference, read.tokenizer)
    return read

  def forward_flops(self, network, config, document_length):
    # The head meets the answers only (objectives/laws.py).
    unscored = (1 - self.max_new_tokens / config.sequence_length) * 2 * network.D * network.V
    return super().forward_flops(network, config, document_length) - unscored

  def asked_of(self, first):
    return (*super().asked_of(first), *([REFERENCE] if self.beta else []))

  # 3. Loss, and what is said of it.

  def policy_sums(self, batch, log_ratio: Float[Array, 'B T'], high: float):
    """What is minimised of each token, before it is weighed, and the sums of its metrics.

    log_ratio: of policy to behaviour, of each token or spread over an answer.
    """
    A, mask = batch.advantages, batch.weights
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - self.clip, 1 + high)
    losses = -jnp.minimum(ratio * A, clipped * A)
    stopped = ((ratio < 1 - self.clip) & (A < 0)) | ((ratio > 1 + high) & (A > 0))
    sums = {'clipped': (stopped * mask).sum()}
    return losses, sums

  def said_sums(self, batch, log_ratio: Float[Array, 'B T']) -> dict[str, Array]:
    """Sums of metrics that all kinds have; log_ratio: of each token, 0 where none counts."""
    apart = batch.reference - batch.behaviour
    sums = {
      'tokens': jnp.ones_like(log_ratio),
      'surprise': -batch.behaviour,
      'ratios': jnp.abs(log_ratio),
      'moved': jnp.expm1(log_ratio) - log_ratio,
      'kl': jnp.expm1(apart) - apart,
    }
    counted = {name: (x * batch.weights).sum().astype(jnp.float32) for name, x in sums.items()}
    return self.answer_sums(batch) | counted

  def metrics(self, terms, weights, sums):
    """`loss`; `reward`, `answer_length`, `ended` (OfOwnText.of_answers); `failed_rewards` and
    `equal_groups`, shares of answers. Per token, in nats: `entropy`, the mean of -log p of what was
    drawn, which estimates it; `policy_kl`, by how much the policy has moved from what wrote them,
    and `log_ratio`, the mean of its absolute value, which in the first step of a rollout is the
    drift between sampler and trainer; with beta, `kl` of the writing policy from the reference.
    `clip_fraction`: of tokens whose gradient the clip stops.
    """
    said = super().metrics(terms, weights, sums)
    said.pop(EXPERTS, None)
    tokens, answers = or_one(sums['tokens']), or_one(sums['last'])
    said |= self.of_answers(sums) | {
      'failed_rewards': sums['failed'] / answers,
      'entropy': sums['surprise'] / tokens,
      'policy_kl': sums['moved'] / tokens,
      'log_ratio': sums['ratios'] / tokens,
      'clip_fraction': sums['clipped'] / tokens,
    }
    if self.beta:
      said['kl'] = sums['kl'] / tokens
    if self.group > 1:
      said['equal_groups'] = sums['equal'] / answers
    return said | router_metrics(sums, weights[EXPERTS])

  def judged(self, models, batch):
    del models
    return self.answer_sums(batch)

  def verdict(self, sums, prepared):
    """`validation_loss`, the mean reward with its sign turned; `validation_reward`, of the answers
    that have one, `validation_failed_rewards`, the share of those that have none;
    `validation_answer_length`, `validation_ended`.
    """
    del prepared
    said = {f'validation_{name}': float(x) for name, x in self.of_answers(sums).items()}
    said['validation_failed_rewards'] = float(sums['failed'] / max(sums['last'], 1))
    return {'validation_loss': -said['validation_reward'], **said}

  def score_policy(self, models, batch) -> 'Reading':
    """What the policy says of a batch."""
    batch, parts = laid_out(models[MAIN], batch)
    x, router = final(models[MAIN], batch, parts)
    with jax.named_scope('loss'):
      policy = target_logprobs(models[MAIN], x, batch, self.temperature, self.max_new_tokens, parts)
    log_ratio = jnp.where(batch.weights > 0, policy - batch.behaviour, 0)
    return Reading(batch, parts, x, log_ratio, router)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(OfRollouts):
  """Several answers to each prompt, each credited against the others (GRPO, arXiv:2402.03300).

  Attributes:
    variant: 'grpo'; 'dr_grpo', without the division by the group's deviation and by lengths;
      'dapo', in which each token counts alike; 'rloo', a leave-one-out baseline and ratios of
      answers; 'gspo', ratios of answers by the token (arXiv:2507.18071).
    group: answers to each prompt.
    clip_high: how far above 1 the ratio may go; 0: as clip.
    resamplings: how often groups in which no answer is better than another are replaced by those of
      other prompts (DAPO's dynamic sampling, arXiv:2503.14476).
    unended: whether an answer that did not end by itself is 'learned' from or 'masked'.
    reward_scale: '': several rewards are added as they are; 'group': each over its mean and
      deviation in the group, first.
    shared_prompts: whether models that learn from a group, or score it, read its prompt once, with
      all answers behind it (objectives/shared_prompts.py). A group then stays in one batch, and
      what balances experts weighs a prompt once.
  """

  kind: str = 'grpo'
  variant: str = 'grpo'
  group: int = 8
  clip_high: float = 0.0
  resamplings: int = 0
  unended: str = LEARNED
  reward_scale: str = AS_IS
  shared_prompts: bool = False

  def __post_init__(self):
    super().__post_init__()
    names.check('objective.variant', self.variant, VARIANTS)
    names.check('objective.unended', self.unended, (LEARNED, MASKED))
    names.check('objective.reward_scale', self.reward_scale, (AS_IS, BY_GROUP))
    self._check_least(group=2, clip_high=0, resamplings=0)

  @property
  def masked(self) -> bool:
    return self.unended == MASKED

  @property
  def rows(self) -> int:
    return self.group if self.shared_prompts else 1

  @property
  def record(self) -> str:
    return f'a group of objective.group={self.group}, of objective.shared_prompts=True'

  @property
  def joined(self) -> int:
    return self.rows

  def check_mesh(self, config, sizes):
    if self.shared_prompts:
      names.imported('objectives.shared_prompts.check_mesh')(self, config, sizes)

  def forward_flops(self, network, config, document_length):
    if not self.shared_prompts:
      return super().forward_flops(network, config, document_length)
    return names.imported('objectives.shared_prompts.forward_flops')(self, network, config)

  def tokens(self, batch):
    if not self.shared_prompts:
      return super().tokens(batch)
    return names.imported('objectives.shared_prompts.tokens')(batch, self.group)

  def row_tokens(self, config):
    if not self.shared_prompts:
      return super().row_tokens(config)
    return names.imported('objectives.shared_prompts.places')(self, config) / self.group

  def credited(self, batch, said, coefficient):
    del coefficient
    counted = batch.weights.max(1) > 0
    scores = batch.scores.sum(1, dtype=np.float64)
    each = advantage.of_groups(
      scores.reshape(-1, self.group),
      counted.reshape(-1, self.group),
      VARIANTS[self.variant].baseline,
    )
    advantages = np.float32(each.reshape(-1, 1) * batch.weights)
    reference = said.get(REFERENCE, batch.behaviour)
    return dataclasses.replace(batch, advantages=advantages, reference=reference), {}

  def weights(self, batch):
    answers = (batch.weights.max(1) > 0).sum().astype(jnp.float32)
    counts = {
      TOKEN: batch.weights.sum(),
      ANSWER: answers,
      LONGEST: answers * self.max_new_tokens,
    }
    return {
      POLICY: counts[VARIANTS[self.variant].counts],
      EXPERTS: routed(self.tokens(batch)),
    }

  def score_policy(self, models, batch):
    if not self.shared_prompts:
      return super().score_policy(models, batch)
    policy, router = self._of_groups(models[MAIN], batch)
    log_ratio = jnp.where(batch.weights > 0, policy - batch.behaviour, 0)
    return Reading(batch, 1, None, log_ratio, router)

  def sums(self, models, batch):
    batch, _, _, log_ratio, router = self.score_policy(models, batch)
    variant, mask = VARIANTS[self.variant], batch.weights
    lengths = jnp.maximum(mask.sum(1, keepdims=True), 1)
    ratios = log_ratio
    if variant.ratios != TOKENS:
      of_answer = log_ratio.sum(1, keepdims=True)
      of_answer = of_answer / lengths if variant.ratios == MEANS else of_answer
      ratios = jnp.broadcast_to(of_answer, log_ratio.shape)
    losses, sums = self.policy_sums(batch, ratios, self.clip_high or self.clip)
    if self.beta:
      apart = jnp.where(mask > 0, batch.reference - batch.behaviour - log_ratio, 0)
      losses += self.beta * (jnp.expm1(apart) - apart)
    each = losses * mask
    # A mean over an answer's tokens, or the sum of them.
    total = (each / lengths if variant.counts == ANSWER else each).sum()
    terms = {POLICY: total, EXPERTS: balance(router)}
    sums = jax.lax.stop_gradient(sums | self.said_sums(batch, log_ratio))
    return terms, sums | (router or {})


def check_same_ids(name: str, directory: str, tokenizer: Tokenizer) -> None:
  """Raises ValueError where the run of objective.NAME reads other ids than the policy."""
  base = tokenizers.load(files.place(directory) / 'tokenizer')
  if not same_ids(base, tokenizer):
    raise ValueError(
      f'the tokenizer of objective.{name}={directory} ({base.kind}, {base.vocabulary:,} ids) is '
      f'not that of the policy ({tokenizer.kind}, {tokenizer.vocabulary:,} ids); use a {name} of '
      'the same tokenizer'
    )
