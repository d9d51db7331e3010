"""What makes a model prefer an answer to another? Their log-probabilities, compared with those of a
frozen model: direct preference optimisation, without a model of rewards.

B rows of a batch · T length · P pairs of a row
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import names
from data import examples
from data.preferences import ChoiceBatch, ChoiceLoader, ChoiceSettings, ChoiceValidation
from kernels import context
from model.logprobs import kl, logprobs, segment_sums
from model.vocabulary import Law
from objectives import compared
from objectives.next_token import router_metrics
from objectives.objective import MAIN, Objective, Role, or_one
from parallel import axes as ax

REFERENCE = 'reference'  # its name among a run's models
BEGUN, NONE = 'begun', 'none'
SIDES = ('chosen', 'rejected')
PAIRS, TOKENS, EXPERTS = 'preference', 'sft', 'experts'  # terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Objective, ChoiceSettings):
  """Packed pairs of answers (data/preferences.py), all alike.

  Attributes:
    variant: of the loss (objectives/compared.py): 'sigmoid' (DPO), 'robust', 'hinge', 'ipo',
      'sigmoid_norm', 'apo_zero'; 'simpo' and 'orpo', which have no reference.
    beta: what rewards are log-ratios times: the larger, the closer to the reference it stays.
      ipo's tau; orpo's lambda; for simpo 2 or so.
    label_smoothing: share of pairs whose labels are thought to be wrong: below 0.5; of 'sigmoid' it
      makes conservative DPO.
    gamma: by how much simpo's chosen reward is to be the higher one.
    sft: weight of the chosen answers' cross-entropy, a mean over their tokens, beside; orpo has 1.
    reference: what likelihoods are compared with: the model as the run 'begun' (for nothing under
      an adapter, where it is the base), the directory of another run, or 'none'.
  """

  kind: str = 'preference'
  variant: str = 'sigmoid'
  beta: float = 0.1
  label_smoothing: float = 0.0
  gamma: float = 0.0
  sft: float = 0.0
  reference: str = BEGUN
  of_records = True

  def __post_init__(self):
    super().__post_init__()
    ChoiceSettings.__post_init__(self)
    names.check('objective.variant', self.variant, compared.VARIANTS)
    self._check_least(sft=0, label_smoothing=0)
    if not 0 < self.beta < math.inf:
      raise ValueError(f'objective.beta={self.beta} must be above 0, and finite')
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
    if not self.reference:
      raise ValueError(
        "objective.reference='' names no model; it is 'begun', the directory of a run, or 'none'"
      )
    if not variant.reference and self.reference != NONE:
      raise ValueError(
        f'objective.variant={self.variant!r} compares with no reference, and objective.reference='
        f"{self.reference!r} would not be read; set objective.reference='none'"
      )

  # 1. Models.

  def models(self, config):
    models = {MAIN: Role(config)}
    if self.reference == BEGUN:
      models[REFERENCE] = Role(config, trained=False, begun=MAIN)
    elif self.reference != NONE:
      models[REFERENCE] = Role(None, trained=False, directory=self.reference)
    return models

  def accepts(self, models):
    config = models[MAIN]
    for name, network in models.items():
      if not network.causal or network.encoder_layers:
        kind = 'an encoder-decoder' if network.encoder_layers else 'an encoder'
        raise NotImplementedError(
          f'objective.kind={self.kind!r} compares what a decoder writes, and {name!r} with '
          f'model.causal={network.causal}, model.encoder_layers={network.encoder_layers} is '
          f'{kind}; use a decoder'
        )
      if network.vocabulary_limit != config.vocabulary_limit or network.V != config.V:
        raise ValueError(
          f'objective.reference={self.reference!r} has model.vocabulary={network.vocabulary} and '
          f'the policy {config.vocabulary}: they read other tokens; use a reference of the same '
          'tokenizer'
        )
    if config.execution.pipeline.schedule == '1f1b':
      raise NotImplementedError(
        f'objective.kind={self.kind!r} compares several answers, and model.execution.pipeline.'
        "schedule='1f1b' is of a loss of tokens; use 'gpipe' or 'circular'"
      )

  # 2. Batches.

  def read(self, config, log):
    return examples.prepare(config, self, log)

  def batches(self, prepared, config, rows):
    return ChoiceLoader(prepared, config, rows)

  def validation_batches(self, prepared, config, rows):
    return ChoiceValidation(prepared, config, rows)

  def batch_like(self, config):
    return ChoiceBatch.abstract(config.batch_size, config.sequence_length)

  def tokens(self, batch):
    return jnp.count_nonzero(batch.segments)

  # 3. Loss.

  def weights(self, batch):
    chosen = batch.weights * (batch.segments % 2)
    weights = {PAIRS: pairs_of(batch), EXPERTS: batch.weights.sum()}
    return weights | ({TOKENS: chosen.sum()} if self.sft else {})

  def sums(self, models, batch):
    scored = self.scored(models, batch)
    answers, real = scored.answers, scored.real
    each = jnp.where(real, compared.losses(answers, self), 0)
    terms = {PAIRS: each.sum(), EXPERTS: balance(scored.router)}
    if self.sft:
      terms[TOKENS] = -self.sft * jnp.where(real, answers.policy[..., 0], 0).sum()
    return terms, self._said(scored) | (scored.router or {})

  def scored(self, models, batch: ChoiceBatch) -> 'Scored':
    """How likely the models find a batch's answers."""
    batch = laid_out(models[MAIN], batch)
    policy, router = token_logprobs(models[MAIN], batch)
    reference = batch.reference
    if REFERENCE in models:
      reference, _ = token_logprobs(models[REFERENCE], batch)
    values = (policy, jax.lax.stop_gradient(reference), jnp.ones_like(policy))
    answers = compared.Answers(*(by_pairs(value, batch) for value in values))
    return Scored(answers, answers.lengths.min(-1) > 0, router)

  def _said(self, scored: 'Scored') -> dict[str, Array]:
    """What metrics are made of."""
    answers, real = scored.answers, scored.real
    rewards = compared.rewards(answers, self.variant, self.beta)

    def total(values):
      return jnp.where(real, jax.lax.stop_gradient(values), 0).sum().astype(jnp.float32)

    sums = {
      'pairs': total(jnp.ones_like(rewards[..., 0])),
      'right': total(rewards[..., 0] > rewards[..., 1]),
      'tokens': total(answers.lengths.sum(-1)),
      'ratios': total(answers.ratios.sum(-1)),
    }
    for i, side in enumerate(SIDES):
      sums[f'rewards_{side}'] = total(rewards[..., i])
      sums[f'policy_{side}'] = total(answers.policy[..., i])
      sums[f'tokens_{side}'] = total(answers.lengths[..., i])
    return sums

  # 4. What is said of it.

  def metrics(self, terms, weights, sums):
    """`loss`; `rewards_chosen`, `rewards_rejected`, `reward_margin`, means over pairs;
    `reward_accuracy`, the share whose chosen reward is the higher one (which none is while the
    policy is its reference); `logprob_chosen`, `logprob_rejected`, of a token, in nats;
    `log_ratio`, of policy to reference, of an answer's token: the simplest estimate of their
    divergence, and that of an answer that was the reference's own.
    """
    said = super().metrics(terms, weights, sums)
    said.pop(EXPERTS, None)
    return said | self._means(sums) | router_metrics(sums)

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
    terms, sums = self.sums(models, batch)
    said = {f'{name}_sum': value for name, value in terms.items() if name != EXPERTS}
    said |= {name: sums[name] for name in self._said_names()}
    if REFERENCE in models:
      said['kl'] = divergence(models, batch)
    return said

  def _said_names(self) -> list[str]:
    sides = [f'{name}_{side}' for name in ('rewards', 'policy', 'tokens') for side in SIDES]
    return ['pairs', 'right', 'tokens', 'ratios', *sides]

  def verdict(self, sums, prepared):
    """`validation_loss`, and what `metrics` says, as validation_..; `validation_kl`, of the laws of
    the next token, policy from reference, a mean over the tokens of answers, in nats.
    """
    del prepared
    loss = sums[f'{PAIRS}_sum'] / sums['pairs']
    if self.sft:
      loss += sums[f'{TOKENS}_sum'] / sums['tokens_chosen']
    said = {f'validation_{name}': float(value) for name, value in self._means(sums).items()}
    said['validation_accuracy'] = said.pop('validation_reward_accuracy')
    if 'kl' in sums:
      said['validation_kl'] = sums['kl'] / sums['tokens']
    return {'validation_loss': loss, **said}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
  """Attributes:
  answers: of all places for pairs in the rows, [B, P, 2]. real: bool [B, P], which there are.
  router: what experts report (Output.router), or None.
  """

  answers: compared.Answers
  real: Array
  router: dict | None


def laid_out(model, batch):
  """The batch as a model on this mesh reads it."""
  run = model.config.execution
  return context.lay_out(batch, context.groups(run.context, model.config.N, model.config.K))


def token_logprobs(model, batch) -> tuple[Float[Array, 'B T'], dict | None]:
  """log p of every target that weighs something, 0 elsewhere, of a batch as `laid_out`; and what
  experts report.
  """
  law, router = law_of(model, batch)
  with jax.named_scope('loss'):
    return logprobs(law, batch.targets, batch.weights), router


def law_of(model, batch) -> tuple[Law, dict | None]:
  """What a model says comes next, of a batch as `laid_out`; and what experts report."""
  config = model.config
  parts = context.groups(config.execution.context, config.N, config.K)
  x, _, router = model(batch.tokens, batch.positions, batch.segments, zigzag=parts)
  law = Law(*model.scored(x), softcap=config.logit_softcap, vocabulary=config.vocabulary_limit)
  return law, router


def by_pairs(values: Float[Array, 'B T'], batch) -> Float[Array, 'B P 2']:
  """Sums over the answers' tokens, of chosen and rejected ones."""
  B, T = values.shape
  most = T // 2  # pairs of a row: an answer has a token
  sums = segment_sums(values, batch.weights, batch.segments, 2 * most)
  return sums.reshape(B, most, 2, out_sharding=ax.out('batch', None, None))


def pairs_of(batch) -> Float[Array, '']:
  """How many pairs there are: the last segment of a row is its last pair's rejected answer."""
  return (batch.segments.max(1) // 2).sum().astype(jnp.float32)


def balance(router: dict | None) -> Array:
  """What balances experts, a sum over tokens; 0 without any."""
  return jnp.float32(0) if router is None else router['balance_loss'] + router['router_z_loss']


def divergence(models, batch) -> Float[Array, '']:
  """KL of the policy's law of the next token from the reference's, summed over answers' tokens."""
  batch = laid_out(models[MAIN], batch)
  (policy, _), (reference, _) = (law_of(models[name], batch) for name in (MAIN, REFERENCE))
  return (kl(policy, reference, batch.weights) * batch.weights).sum()
