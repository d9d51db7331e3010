"""What do objectives share that compare how likely a policy and a frozen reference find answers?
Models, batches, log-probabilities of answers; each packed beside the one that it is compared with
(data/preferences.py).

B rows of a batch · T length · P pairs of a row
"""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from data import examples, preferences, tokenizers
from data.extra import same_ids
from data.preferences import ChoiceBatch, ChoiceLoader, ChoiceValidation
from model.logprobs import kl, logprobs, segment_sums
from objectives import compared
from objectives.asked import Asked
from objectives.laws import final, law
from objectives.objective import MAIN, Objective, Role
from parallel import axes as ax

REFERENCE = 'reference'  # its name among a run's models
BEGUN, NONE = 'begun', 'none'


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

  def total(self, values: Array) -> Float[Array, '']:
    """The sum of [B, P] over the pairs that there are, for metrics."""
    values = jax.lax.stop_gradient(values)
    return jnp.where(self.real, values, 0).sum().astype(jnp.float32)


class OfChoices(Objective):
  """What is said of pairs of answers in packed rows, whoever reads them: with settings of
  data.preferences.ChoiceSettings.
  """

  of_records = True
  loss_unit = 'nats/pair'

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfAnswers(OfChoices):
  """Packed answers, each with the one that it is compared with.

  Attributes:
    beta: what rewards are log-ratios times: the larger, the closer to the reference it stays.
    reference: what likelihoods are compared with: the model as the run 'begun' (for nothing under
      an adapter, where it is the base), the directory of another run, or 'none'.
    stored_reference: whether the reference is asked once, before the first step, how likely it
      finds all answers, and is then neither held nor run; 'begun' needs config.init.
  """

  beta: float = 0.1
  reference: str = BEGUN
  stored_reference: bool = False

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.beta < math.inf:
      raise ValueError(f'objective.beta={self.beta} must be above 0, and finite')
    if not self.reference:
      raise ValueError(
        "objective.reference='' names no model; it is 'begun', the directory of a run, or 'none'"
      )
    if self.stored_reference and self.reference == NONE:
      raise ValueError(
        "objective.stored_reference=True with objective.reference='none': there is nothing to "
        'store; leave it out'
      )

  def models(self, config):
    models = {MAIN: Role(config)}
    if self.stored_reference:
      return models
    if self.reference == BEGUN:
      models[REFERENCE] = Role(config, trained=False, begun=MAIN)
    elif self.reference != NONE:
      models[REFERENCE] = Role(None, trained=False, directory=self.reference)
    return models

  def accepts(self, models):
    config = models[MAIN]
    for name, network in models.items():
      self._check_network(name, network)
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

  def begins(self, init, adapter):
    if not self.stored_reference or self.reference != BEGUN:
      return
    if adapter.kind:
      raise ValueError(
        f"objective.stored_reference=True with adapter.kind={adapter.kind!r}: the reference "
        "'begun' is the base that the adapter lies on, and takes no memory of its own; leave it out"
      )
    if not init:
      raise ValueError(
        "objective.stored_reference=True with objective.reference='begun' and config.init='': what "
        'is stored is known by the checkpoint that said it, and a model that begins here has none; '
        'give config.init, or the directory of a run as objective.reference'
      )

  @property
  def completed_by(self) -> str:
    return 'workdir.said.in_rows' if self.stored_reference else ''

  def asked(self) -> Asked:
    """How likely the reference finds the tokens of all answers."""
    live = dataclasses.replace(self, stored_reference=False)

    def answer(reference, batch):
      scores, _ = token_logprobs(reference, batch, 1)
      return {preferences.REFERENCE: scores[..., None]}

    return Asked(REFERENCE, live, ['logprobs'], {preferences.REFERENCE: ('float32', 1)}, answer)

  def _check_network(self, name, network) -> None:
    if network.causal and not network.encoder_layers:
      return
    kind, remedy = 'an encoder', 'use a decoder'
    if network.encoder_layers:
      kind = 'an encoder-decoder'
      remedy = f"use a decoder, or for targets of a source objective.kind='{self.kind}_seq2seq'"
    raise NotImplementedError(
      f'objective.kind={self.kind!r} compares what a decoder writes, and {name!r} with '
      f'model.causal={network.causal}, model.encoder_layers={network.encoder_layers} is {kind}; '
      f'{remedy}'
    )

  def read(self, config, log):
    prepared = super().read(config, log)
    if self.reference not in (BEGUN, NONE):
      base = tokenizers.load(pathlib.Path(self.reference) / 'tokenizer')
      if not same_ids(base, prepared.tokenizer):
        raise ValueError(
          f'the tokenizer of objective.reference={self.reference} ({base.kind}, '
          f'{base.vocabulary:,} ids) is not that of the data ({prepared.tokenizer.kind}, '
          f'{prepared.tokenizer.vocabulary:,} ids); use a reference of the same tokenizer'
        )
    return prepared


def score(models, batch, parts: int) -> Scored:
  """How likely the models find the answers of a batch that is laid out (objectives/laws.py); of a
  reference that is not among them, batch.reference says it.
  """
  policy, router = token_logprobs(models[MAIN], batch, parts)
  reference = batch.reference
  if REFERENCE in models:
    reference, _ = token_logprobs(models[REFERENCE], batch, parts)
  values = (policy, jax.lax.stop_gradient(reference), jnp.ones_like(policy))
  answers = compared.Answers(*(by_pairs(value, batch) for value in values))
  return Scored(answers, answers.lengths.min(-1) > 0, router)


def token_logprobs(model, batch, parts: int) -> tuple[Float[Array, 'B T'], dict | None]:
  """log p of every target that weighs something, 0 elsewhere, of a batch that is laid out; and what
  experts report.
  """
  x, router = final(model, batch, parts)
  with jax.named_scope('loss'):
    return logprobs(law(model, x, 1.0), batch.targets, batch.weights), router


def by_pairs(values: Float[Array, 'B T'], batch) -> Float[Array, 'B P 2']:
  """Sums over the answers' tokens, of odd and even segments."""
  B, T = values.shape
  most = T // 2  # pairs of a row: an answer has a token
  sums = segment_sums(values, batch.weights, batch.segments, 2 * most)
  return sums.reshape(B, most, 2, out_sharding=ax.out('batch', None, None))


def pairs_of(batch) -> Float[Array, '']:
  """How many pairs there are: the last segment of a row is its last pair's second answer."""
  return (batch.segments.max(1) // 2).sum().astype(jnp.float32)


def divergence(models, batch, parts: int) -> Float[Array, '']:
  """KL of the policy's law of the next token from the reference's, summed over the tokens of the
  answers, of a batch that is laid out.
  """
  policy, reference = (
    law(models[name], final(models[name], batch, parts)[0], 1.0) for name in (MAIN, REFERENCE)
  )
  return (kl(policy, reference, batch.weights) * batch.weights).sum()
