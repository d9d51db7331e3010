"""What do objectives share that learn from what the trained model writes itself? Prompts, answers
by the engine (objectives/rollout.py), and what is said of them.

B rows of a batch, an answer in each · T length
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import names
from data import prompts
from kernels import context
from objectives.laws import final, laid_out, target_logprobs
from objectives.objective import MAIN, Objective, or_one
from objectives.rollout import POLICY, SPLIT, WHOLE, HeldOut, Rollouts
from objectives.rollout_rows import AnswerRows, RolloutBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfOwnText(Objective):
  """What learns from its own answers to prompts (data/prompts.py).

  Attributes:
    template: file of the chat template, for a tokenizer that has none; it becomes the run's.
    max_new_tokens: of an answer; a prompt has data.sequence_length less this.
    temperature: at which answers are drawn, and logits divided wherever they are compared.
    epochs: how often a rollout is learned from. minibatches: batches of data.batch_size rows that
      a rollout is cut into; a step learns from one.
    rollout_rows: answers that are written side by side, each with a cache of
      data.sequence_length; 0: all of a rollout.
    rollout_weights: what writes: 'split' over the mesh as the model is trained, so that what
      mesh.fsdp splits is gathered at every token; or 'whole' along fsdp for as long as a rollout
      takes, where memory has room for that.
  """

  template: str = ''
  max_new_tokens: int = 256
  temperature: float = 1.0
  epochs: int = 1
  minibatches: int = 1
  rollout_rows: int = 0
  rollout_weights: str = SPLIT

  # Without annotations: facts of a kind, no settings; some kinds have them as such.
  of_records = True
  completed_by = 'workdir.rollouts.staged'
  reward = reward_weights = ()
  reward_timeout = missing_end = stop_kl = 0.0
  reward_scale = ''
  group = 1  # answers to a prompt
  shared_prompts = False  # whether a model reads the prompt of a group once
  resamplings = 0  # of groups that teach nothing
  masked = False  # whether what did not end by itself counts nowhere
  of_sources, prefix = False, ''  # whether an encoder reads prompts; text in front of each
  penalty = 0.0  # with which divergence is taken off rewards, at first
  adapts = False  # whether that moves from rollout to rollout

  def __post_init__(self):
    super().__post_init__()
    self._check_least(max_new_tokens=1, epochs=1, minibatches=1, rollout_rows=0)
    names.check('objective.rollout_weights', self.rollout_weights, (SPLIT, WHOLE))
    if not 0 < self.temperature < math.inf:
      raise ValueError(f'objective.temperature={self.temperature} must be above 0, and finite')

  @property
  def frozen_passes(self) -> float:
    """A rollout is scored once, and learned from in each epoch."""
    return 1 / self.epochs

  # 1. Models.

  def accepts(self, models):
    config = models[MAIN]
    for name, network in models.items():
      self._check_network(name, network)
    if config.execution.pipeline.schedule == '1f1b':
      raise NotImplementedError(
        f'objective.kind={self.kind!r} writes with the model that it trains, and '
        "model.execution.pipeline.schedule='1f1b' splits it over stages; use mesh.fsdp or "
        'mesh.tensor'
      )
    if config.moe.experts and config.moe.dispatch == 'capacity':
      raise ValueError(
        "model.moe.dispatch='capacity' drops tokens in training that writing does not drop: their "
        "log-probabilities would differ; use 'dropless'"
      )

  def _check_network(self, name: str, network) -> None:
    """Raises NotImplementedError for a model that is no decoder."""
    if not network.causal or network.encoder_layers:
      kind = 'an encoder-decoder' if network.encoder_layers else 'an encoder'
      raise NotImplementedError(
        f'objective.kind={self.kind!r} learns from what a decoder writes, and {name!r} with '
        f'model.causal={network.causal}, model.encoder_layers={network.encoder_layers} is {kind}; '
        "use a decoder, or for a T5 objective.kind='grpo_seq2seq', 'gkd_seq2seq' or "
        "'preference_seq2seq'"
      )

  # 2. Batches.

  def longest_prompt(self, config) -> int:
    """Tokens. Raises ValueError where there is no room for any."""
    longest = config.sequence_length - self.max_new_tokens
    if longest < 1:
      raise ValueError(
        f'objective.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in '
        f'data.sequence_length={config.sequence_length}; lower it, or raise that'
      )
    return longest

  def answer_rows(self, config, pad: int) -> AnswerRows:
    """How prompts and answers lie in rows; pad: what padding is."""
    del pad
    return AnswerRows(config.sequence_length)

  def read(self, config, log):
    longest = self.longest_prompt(config)
    answers = config.batch_size * self.minibatches
    if answers % self.group:
      raise ValueError(
        f'a rollout of data.batch_size={config.batch_size} x objective.minibatches='
        f'{self.minibatches} answers is of no whole groups of objective.group={self.group}; make '
        'it a multiple'
      )
    writer = functools.partial(prompts.PromptWriter, encoder=self.of_sources, prefix=self.prefix)
    uses = self.group * self.epochs
    return prompts.prepare(config, self.template, longest, uses, log, writer)

  def batches(self, prepared, config, rows):
    return Rollouts(prepared, self, config, rows)

  def validation_batches(self, prepared, config, rows):
    return HeldOut(prepared, self, config, rows)

  def batch_like(self, config):
    return self.answer_rows(config, 0).abstract(config.batch_size)

  def tokens(self, batch):
    return jnp.count_nonzero(batch.segments)

  def asked_of(self, first: bool) -> tuple[str, ...]:
    """What of `said` a rollout needs; first: of a process, which compares sampler and trainer."""
    return (POLICY,) if first else ()

  def said(self, models, batch: RolloutBatch, names_: tuple[str, ...]) -> dict[str, Array]:
    """By name of a model, f32 [B, T]: its log-probabilities of the targets. Not differentiated."""
    return {
      name: jnp.where(batch.weights > 0, self._targets(models[name], batch), 0) for name in names_
    }

  def _targets(self, model, batch) -> Float[Array, 'B T']:
    """In order, whatever the layout that the mesh computes in."""
    if self.shared_prompts:
      return self._of_groups(model, batch)[0]
    batch, parts = laid_out(model, batch)
    x, _ = final(model, batch, parts)
    scores = target_logprobs(model, x, batch, self.temperature, self.max_new_tokens, parts)
    return context.in_order(scores, parts)

  def _of_groups(self, model, batch) -> tuple[Float[Array, 'B T'], dict | None]:
    """The same, of prompts that are read once, and what the router reports."""
    of_targets = names.imported('objectives.shared_prompts.target_logprobs')
    return of_targets(model, batch, self.group, self.temperature, self.max_new_tokens)

  def credited(
    self, batch: RolloutBatch, said: dict[str, np.ndarray], coefficient: float
  ) -> tuple[RolloutBatch, dict]:
    """The rollout [R, T] with what each token is credited with, and what is to be noted of it.

    said: of `asked_of`. coefficient: `penalty`, as it has been adapted; 'next_coefficient' among
      the notes is the next one.
    """
    del said, coefficient
    return batch, {}

  # 3. What is said of it.

  def answer_sums(self, batch: RolloutBatch) -> dict[str, Array]:
    """Sums over the answers of a batch, also those that count nowhere."""
    names_ = ('last', 'lengths', 'scores', 'failed', 'ended', 'equal')
    return {name: getattr(batch, name).sum().astype(jnp.float32) for name in names_}

  def of_answers(self, sums) -> dict[str, Array]:
    """Means of them: `answer_length` in tokens; `ended`, the share that ended by itself; where
    answers are judged `reward`, of those that have one; NaN where none has.
    """
    answers = or_one(jnp.asarray(sums['last']))
    said = {'answer_length': sums['lengths'] / answers, 'ended': sums['ended'] / answers}
    if self.reward:
      judged = jnp.asarray(sums['last'] - sums['failed'])
      said['reward'] = jnp.where(judged > 0, sums['scores'] / or_one(judged), jnp.nan)
    return said
