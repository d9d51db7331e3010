"""How does what a policy writes become batches? Prompts are answered by the engine with the weights
of the step, judged meanwhile, scored by the frozen models, credited; and the whole is cut into the
batches of the next steps.

    prompts -> answers and what the sampler thought of them (decode.bulk)
            -> scores (objectives/judges.py), beside the step's thread
            -> log-probabilities by the reference, values by the critic: one forward pass
            -> what each token is credited with (objectives/advantage.py)
            -> epochs x minibatches, each epoch in an order of its own

All of it is a function of the state, the seed and the number of the rollout. Between the first and
the last batch of a rollout the policy moves on, so that a checkpoint has the rest of it.

R answers of a rollout · B rows of a batch · T length
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from data.config import DataConfig
from data.prompts import Prompt, Prompts
from decode.bulk import Written
from objectives import advantage
from objectives.judges import Answer, Judges, totals
from objectives.rollout_rows import AnswerRows, RolloutBatch, packed, unpacked

POLICY = 'policy'  # what a forward pass says of the policy, by name
SPLIT, WHOLE = 'split', 'whole'  # how the weights lie that write
# Of what is left of a rollout, not in positions that older versions saved.
LATER = 'objective.max_new_tokens', 'objective.temperature'
# Of each reward what its scores are a function of, by its name; older positions have none, and what
# another reward was is no matter of this one.
REWARD = 'objective.reward='
# By which sampler and trainer may differ on one token, with the same weights: rounding.
DRIFT = {'float32': 1e-4, 'bfloat16': 0.5, 'float16': 0.1}


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt that is to be answered, and with which seed; seed=None: by the likeliest tokens."""

  prompt: Prompt
  seed: int | None


@runtime_checkable
class Stage(Protocol):
  """What a rollout needs of a run: its models on its mesh, judges, a journal. (workdir/rollouts.py)

  Attributes:
    prompts: see data.prompts. judges: of answers. seed: of the run. dtype: that models compute in.
    log: takes lines for a person.
  """

  prompts: Prompts
  judges: Judges
  seed: int
  dtype: str
  log: Callable[[str], Any]

  def answers(self, models: Mapping[str, Any], asked: Sequence[Question]) -> Iterator:
    """(index, decode.bulk.Written) of each, as they end."""

  def text(self, ids: Sequence[int]) -> str:
    """What an answer of these ids says, without the token that ends it."""

  def said(self, models: Mapping[str, Any], batch: RolloutBatch, names: tuple[str, ...]) -> dict:
    """What Objective.said makes of a batch [B, T], as numpy arrays in every process."""

  def note(self, rollout: int, content: dict) -> None:
    """Keeps what a rollout was, for who reads the run."""


class Replaced(NamedTuple):
  """Answers that others stand in the place of: how many, their tokens, and of how many there was no
  reward.
  """

  answers: int = 0
  tokens: int = 0
  failed: int = 0

  def beside(self, other: 'Replaced') -> 'Replaced':
    return Replaced(*map(sum, zip(self, other)))


@dataclasses.dataclass(frozen=True)
class Answered:
  """Some answers, groups side by side, before they are credited.

  Attributes:
    asked, written: of each. scores: f64 [R], NaN where there is none. failures: why.
    seconds: of each phase. replaced: answers that these stand in the place of, which took their
      share of the seconds.
  """

  asked: list[Question]
  written: list[Written]
  scores: np.ndarray
  failures: list[str]
  seconds: dict[str, float]
  replaced: Replaced = Replaced()

  def groups(self, chosen: Sequence[int], size: int) -> 'Answered':
    """Of groups of this size these alone; the others are to be replaced."""
    rows = [group * size + i for group in chosen for i in range(size)]
    left_out = sorted({*range(len(self.asked))} - {*rows})
    replaced = Replaced(
      len(left_out),
      sum(len(self.written[i].ids) for i in left_out),
      int(np.isnan(self.scores[left_out]).sum()),
    )
    return dataclasses.replace(
      self,
      asked=[self.asked[i] for i in rows],
      written=[self.written[i] for i in rows],
      scores=self.scores[rows],
      replaced=self.replaced.beside(replaced),
    )

  def joined(self, other: 'Answered') -> 'Answered':
    seconds = {name: self.seconds[name] + other.seconds[name] for name in self.seconds}
    return Answered(
      self.asked + other.asked,
      self.written + other.written,
      np.concatenate([self.scores, other.scores]),
      self.failures + other.failures,
      seconds,
      self.replaced.beside(other.replaced),
    )

  @property
  def tokens(self) -> int:
    """All that were written in the seconds."""
    return sum(len(written.ids) for written in self.written) + self.replaced.tokens


def answered(
  stage: Stage,
  models: Mapping[str, Any],
  asked: Sequence[Question],
  missing_end: float = 0.0,
  scaled: int = 0,
) -> Answered:
  """Answered with the policy's weights, judged while the others are written.

  missing_end: what an answer that did not end by itself has less. scaled: of how many side by side
    each judge's scores are brought to one scale (judges.totals).
  Raises FloatingPointError where the policy's scores are not finite.
  """
  began = time.perf_counter()
  written: dict[int, Written] = {}
  submitted = []
  for index, answer in stage.answers(models, asked):
    if answer.broken:
      raise FloatingPointError(
        f'the policy found no finite scores behind {asked[index].prompt.place}; take an earlier '
        'checkpoint, and a lower optimizer.learning_rate'
      )
    written[index] = answer
    submitted.append(index)
    text = stage.text(answer.ids[: len(answer.ids) - answer.ended])
    stage.judges.submit(Answer(asked[index].prompt, tuple(answer.ids), text))
  ended = time.perf_counter()
  said = stage.judges.scores()
  # Which answer ends first is of no account: from here on they are in the order of the prompts.
  each = np.empty_like(said.each)
  each[:, submitted] = said.each
  unended = np.array([not written[i].ended for i in range(len(asked))])
  scores = totals(each, stage.judges.weights, scaled) - missing_end * unended
  seconds = {'generate': ended - began, 'judge': time.perf_counter() - ended}
  return Answered(
    list(asked), [written[i] for i in range(len(asked))], scores, said.failures, seconds
  )


def laid_out(
  answers: Answered, form: AnswerRows, group: int = 1, masked: bool = False
) -> RolloutBatch:
  """The answers, so many to a prompt, as rows of this form, not credited yet.

  masked: whether what did not end by itself counts nowhere (DAPO's overlong filtering).
  """
  batch = form.empty(len(answers.written))
  failed = ~np.isfinite(answers.scores)
  for row, (asked, written) in enumerate(zip(answers.asked, answers.written)):
    places = form.fill(batch, row, asked.prompt.ids, written.ids)
    batch.behaviour[row, places] = written.processed
    left_out = failed[row] or masked and not written.ended
    batch.weights[row, places] = 0 if left_out else 1
    last = places.stop - 1
    batch.last[row, last] = 1
    batch.lengths[row, last] = len(written.ids)
    batch.ended[row, last] = written.ended
    batch.failed[row, last] = failed[row]
    batch.scores[row, last] = 0 if failed[row] else answers.scores[row]
  if group > 1:
    counted = (batch.weights.max(1) > 0).reshape(-1, group)
    equal = advantage.equal_groups(answers.scores.reshape(-1, group), counted)
    batch.equal[:] = batch.last * np.repeat(equal, group)[:, None]
  return batch


@dataclasses.dataclass
class Learning:
  """What is learned from a rollout: since when, and from how many tokens, each epoch's."""

  since: float
  tokens: int = 0

  def rate(self) -> float:
    """Tokens a second, of all that it took, evaluations and checkpoints on the way included."""
    return self.tokens / (time.perf_counter() - self.since)


class Rollouts:
  """Batches of what the policy wrote (objectives.objective.Batches).

  Args:
    rows: of all rows of a batch, those that this process takes.
  """

  def __init__(self, stage: Stage, settings, config: DataConfig, rows: Sequence[int]):
    self._stage, self._settings, self._config, self._rows = stage, settings, config, list(rows)
    self._form = settings.answer_rows(config, stage.prompts.tokenizer.pad)
    self._rollouts = self._prompt = 0  # begun, and of all prompts the next one
    self._coefficient = settings.penalty
    self._batch: RolloutBatch | None = None
    self._left: list[list[int]] = []  # rows of each batch to come
    self._learning: Learning | None = None
    self._checked = False

  def take(self, state) -> RolloutBatch:
    """The next batch of this rollout, or the first one of the next."""
    minibatches, dropped = self._settings.minibatches, 0
    if self._left and len(self._left) % minibatches == 0 and self._strayed(state):
      dropped, self._left = len(self._left) // minibatches, []
    if not self._left:
      self._begin(state.models, dropped)
    chosen = self._left.pop(0)
    if self._learning:
      self._learning.tokens += int((self._batch.weights[chosen] > 0).sum())
    return self._batch.cut([chosen[row] for row in self._rows])

  def state(self) -> dict:
    rest = {}
    if self._left:
      # A copy: a checkpoint writes it while batches are taken.
      rest = {'left': [*self._left], 'batch': packed(self._batch), **self._sizes()}
    return {
      'rollouts': self._rollouts,
      'prompt': self._prompt,
      'coefficient': self._coefficient,
      **self._identity(),
      **rest,
    }

  def restore(self, position: dict) -> None:
    now = self._identity() | (self._sizes() if 'left' in position else {})
    differing = [
      f'{name}: {position.get(name)!r} then, {value!r} now'
      for name, value in now.items()
      if position.get(name, value if name.startswith((*LATER, REWARD)) else None) != value
    ]
    if differing:
      raise ValueError(
        'the prompts, the rewards, or what a rollout is cut into, have changed since this position '
        f'was saved ({"; ".join(differing)}); use the config, and rewards, that it was saved with, '
        'or begin a run with --config.init'
      )
    self._rollouts, self._prompt = position['rollouts'], position['prompt']
    if self._settings.adapts:
      self._coefficient = position['coefficient']
    self._left = position.get('left', [])
    self._batch = unpacked(position['batch']) if self._left else None

  def _identity(self) -> dict:
    rewards = {f'{REWARD}{name}': of for name, of in self._stage.judges.of.items()}
    return {'key': self._stage.prompts.key, 'seed': self._stage.seed, **rewards}

  def _sizes(self) -> dict:
    """What the rest of a rollout depends on, besides."""
    return {
      'data.batch_size': self._config.batch_size,
      'objective.minibatches': self._settings.minibatches,
      'objective.max_new_tokens': self._settings.max_new_tokens,
      # At which the law was that its answers were drawn from.
      'objective.temperature': self._settings.temperature,
      # Of which all answers stay together, where their prompt is shared.
      **({'objective.group': self._settings.group} if self._settings.shared_prompts else {}),
      **self._form.sizes,
    }

  def _begin(self, models: Mapping[str, Any], dropped: int) -> None:
    """A rollout. dropped: epochs of the one before it that were not gone through."""
    settings, B = self._settings, self._config.batch_size
    # The last step's: what they take is no time of writing.
    jax.block_until_ready(models)
    learned = {'learn': self._learning.rate()} if self._learning else {}
    answers = self._answers(models, B * settings.minibatches // settings.group)
    for line in answers.failures[:3]:
      self._stage.log(f'WARNING: {line}')
    if len(answers.failures) > 3:
      self._stage.log(f'WARNING: and {len(answers.failures) - 3} more of this rollout')
    if not np.isfinite(answers.scores).any():
      raise FloatingPointError(
        f'none of the {len(answers.scores)} answers of rollout {self._rollouts} has a reward'
        + ''.join(f': {line}' for line in answers.failures[:1])
      )
    batch = laid_out(answers, self._form, settings.group, settings.masked)

    began = time.perf_counter()
    asked = settings.asked_of(first=not self._checked)
    said = self._said(models, batch, asked)
    if not self._checked:
      self._checked = self._check(batch, said[POLICY])
    batch, more = settings.credited(batch, said, self._coefficient)
    seconds = answers.seconds | {'score': time.perf_counter() - began}
    stopped = {'dropped_epochs': dropped} if settings.stop_kl else {}
    rates = {'tokens_per_second': {'generate': answers.tokens / seconds['generate']} | learned}
    self._note(answers, batch, seconds, more | stopped | rates)
    self._coefficient = more.pop('next_coefficient', self._coefficient)

    orders = np.random.default_rng([self._stage.seed, 1, self._rollouts])
    records = np.arange(len(batch.tokens)).reshape(-1, settings.rows)
    self._batch, self._left = batch, []
    for epoch in range(settings.epochs):
      order = orders.permutation(records) if settings.minibatches > 1 else records
      self._left += order.reshape(-1, B).tolist()
    self._rollouts += 1
    self._learning = Learning(time.perf_counter())

  def _answers(self, models, groups: int) -> Answered:
    """Of so many prompts; with dynamic sampling others in the place of those whose answers are all
    alike, as long as there are tries left.
    """
    settings = self._settings
    answers = self._next(models, groups)
    for _ in range(settings.resamplings):
      counted = np.isfinite(answers.scores)
      if settings.masked:  # as `laid_out` counts
        counted &= [written.ended for written in answers.written]
      counted = counted.reshape(-1, settings.group)
      equal = advantage.equal_groups(answers.scores.reshape(-1, settings.group), counted)
      if not equal.any():
        break
      kept = answers.groups(np.flatnonzero(~equal).tolist(), settings.group)
      answers = kept.joined(self._next(models, int(equal.sum())))
    return answers

  def _next(self, models, groups: int) -> Answered:
    """Answered to the next prompts."""
    prompts, seed, asked = self._stage.prompts, self._stage.seed, []
    for index in range(self._prompt, self._prompt + groups):
      prompt = prompts.order(seed, index)
      # Of an answer's own: no other answer of the run shares its noise.
      seeds = np.random.SeedSequence([seed, 2, index]).generate_state(self._settings.group)
      asked += [Question(prompt, int(each)) for each in seeds]
    self._prompt += groups
    scaled = self._settings.group if self._settings.reward_scale == 'group' else 0
    return answered(self._stage, models, asked, self._settings.missing_end, scaled)

  def _said(self, models, batch: RolloutBatch, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What the models say of all rows, a batch at a time."""
    if not names:
      return {}
    B = self._config.batch_size
    parts = [
      self._stage.said(models, batch.cut(range(first, first + B)), names)
      for first in range(0, len(batch.tokens), B)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}

  def _check(self, batch: RolloutBatch, policy: np.ndarray) -> bool:
    """Whether anything was there to compare. Raises FloatingPointError where sampler and trainer
    do not agree about the policy.
    """
    counted = batch.weights > 0
    if not counted.any():
      self._stage.log(
        f'WARNING: no answer of rollout {self._rollouts} counts: nothing is learned from it, and '
        'sampler and trainer are compared at the next one'
      )
      return False
    drift = np.where(counted, np.abs(policy - batch.behaviour), 0.0)
    most, limit = float(drift.max()), DRIFT[self._stage.dtype]
    self._stage.log(
      f'rollout: sampler and trainer agree on log-probabilities to {most:.2g} nats (on average '
      f'{drift.sum() / counted.sum():.2g}; limit {limit:g} in {self._stage.dtype})'
    )
    if not most <= limit:
      row, column = np.unravel_index(int(drift.argmax()), drift.shape)
      raise FloatingPointError(
        f'the sampler and the trainer differ by {most:.3g} nats on a token (row {row}, place '
        f'{column}), of at most {limit:g} in {self._stage.dtype}: what is learned would not be of '
        'what was written. On hardware whose f32 products are of lower precision set '
        "model.execution.dtype='bfloat16', or JAX_DEFAULT_MATMUL_PRECISION=highest"
      )
    return True

  def _strayed(self, state) -> bool:
    """Whether the policy is too far from what it was for another epoch; if so, it is told."""
    settings = self._settings
    if not settings.stop_kl:
      return False
    policy = self._said(state.models, self._batch, (POLICY,))[POLICY]
    counted = self._batch.weights > 0
    moved = advantage.kl(self._batch.behaviour, policy, advantage.UNBIASED)
    moved = float(np.where(counted, moved, 0).sum() / max(counted.sum(), 1))
    if not moved > settings.stop_kl:
      return False
    left = len(self._left) // settings.minibatches
    self._stage.log(
      f'rollout {self._rollouts - 1}: {left} of objective.epochs={settings.epochs} are dropped, as '
      f'the policy has moved by {moved:.3g} nats a token, more than objective.stop_kl='
      f'{settings.stop_kl:g}'
    )
    return True

  def _note(self, answers: Answered, batch: RolloutBatch, seconds: dict, more: dict) -> None:
    shown = range(min(self._settings.group, 4))
    # JSON has no NaN.
    rewards = [float(x) if np.isfinite(x) else None for x in answers.scores[shown]]
    replaced = {'replaced': answers.replaced.answers} if self._settings.resamplings else {}
    self._stage.note(
      self._rollouts,
      {
        'rollout': self._rollouts,
        'prompt': answers.asked[0].prompt.text,
        'answers': [self._stage.text(answers.written[i].ids) for i in shown],
        'rewards': rewards,
        'reward': float(np.nanmean(answers.scores)),
        'tokens': answers.tokens,
        'ended': int(batch.ended.sum()),
        'failed': int(batch.failed.sum()) + answers.replaced.failed,
        'equal': int(batch.equal.sum()),
        'seconds': seconds,
        **replaced,
        **more,
      },
    )


class HeldOut:
  """Held-out prompts, answered by the models of an evaluation: one answer each, as in training,
  with the same draws each time.
  """

  def __init__(self, stage: Stage, settings, config: DataConfig, rows: Sequence[int]):
    self._stage, self._config, self._rows = stage, config, list(rows)
    self._form = settings.answer_rows(config, stage.prompts.tokenizer.pad)
    self._missing_end = settings.missing_end

  def of(self, models: Mapping[str, Any]) -> Iterator[RolloutBatch]:
    """Batches of the answers, the last one filled up with padding."""
    prompts, B = self._stage.prompts.validation, self._config.batch_size
    for first in range(0, len(prompts), B):
      here = prompts[first : first + B]
      seeds = np.random.SeedSequence([self._stage.seed, 3, first]).generate_state(len(here))
      asked = [Question(prompt, int(seed)) for prompt, seed in zip(here, seeds)]
      answers = answered(self._stage, models, asked, self._missing_end)
      for line in answers.failures[:1]:
        self._stage.log(f'WARNING: {line}')
      filled, empty = laid_out(answers, self._form), self._form.empty(B - len(here))
      whole = jax.tree.map(lambda x, none: np.concatenate([x, none]), filled, empty)
      yield whole.cut(self._rows)
