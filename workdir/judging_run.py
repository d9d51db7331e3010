"""Which answers refuse, by a run that was trained to tell? A classifier, one of whose labels says
so, or a reward model, whose rewards of answers to what is to be refused are high where they do.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

import names
from data.classes import ids_of, within
from data.conversations import ExampleWriter
from data.preferences import shorter, trimmed
from data.records import ChatRecord, TextRecord
from data.template import Template
from decode.generator import Generator
from evaluation import classify
from evaluation.attacks import LABELS, UNSAFE
from evaluation.heads import scores_of
from parallel.mesh import MeshConfig
from training.config import Config
from workdir.head import WORDS, head_of, labels_by
from workdir.open import config_of
from workdir.reward import open_reward

ANSWER, BOTH, CHAT = READS = ('answer', 'both', 'chat')


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
  """How a run is to judge.

  Attributes:
    workdir, checkpoint, mesh: which run, where.
    label: of a classifier, the one that refusals have. threshold: of a reward model, the reward
      from which on an answer is as good as a refusal; None: 0, its mean over the answers that it
      was normalised by.
    reads: 'answer', the answer alone; 'both', the prompt and the answer; 'chat', the two as turns,
      by the chat template of the run. '': of a classifier the answer, of a reward model turns where
      it has a template, otherwise both.

  Raises ValueError for an unknown `reads`.
  """

  workdir: str | os.PathLike
  checkpoint: str = 'last'
  mesh: MeshConfig = MeshConfig(data=1)
  label: str = ''
  threshold: float | None = None
  reads: str = ''

  def __post_init__(self):
    if self.reads:
      names.check('--judge_reads', self.reads, READS)


@dataclasses.dataclass(frozen=True)
class RunJudge:
  """Judges answers: (prompts, answers) -> of each whether it refuses.

  Attributes:
    said: how it does. labels: of which prompts' answers it can tell (evaluation.safety.LABELS).
  """

  said: str
  labels: tuple[str, ...]
  _judged: Callable[[Sequence[str], Sequence[str]], np.ndarray]

  def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    # Nothing is no refusal, as the rules have it; and no example of anything.
    full = [i for i, answer in enumerate(answers) if answer.strip()]
    refused = np.zeros(len(answers), bool)
    if full:
      refused[full] = self._judged([prompts[i] for i in full], [answers[i] for i in full])
    return refused.tolist()


def judge_of(asked: JudgeRequest, log: Callable[[str], object] = print) -> RunJudge:
  """The judge that a run is. Raises ValueError for a run that is none, and for what is asked of the
  other kind.
  """
  config = config_of(asked.workdir)
  kind = config.objective.kind
  rewards = getattr(config.objective, 'gives_rewards', False)
  if not (rewards or labels_by(config)):
    raise ValueError(
      f'--judge_run={asked.workdir} was trained with objective.kind={kind!r}, and tells no '
      'refusals; give a classifier (configs/classify.py) or a reward model (configs/reward.py)'
    )
  wrong = ('label', asked.label) if rewards else ('threshold', asked.threshold)
  if wrong[1] not in ('', None):
    raise ValueError(
      f'--judge_{wrong[0]}={wrong[1]} is not of a run of objective.kind={kind!r}; leave it out'
    )
  if asked.reads == (ANSWER if rewards else CHAT):
    raise ValueError(
      f'--judge_reads={asked.reads} is not of a run of objective.kind={kind!r}; use '
      + (f'{BOTH} or {CHAT}' if rewards else f'{ANSWER} or {BOTH}')
    )
  return _by_reward(asked, log) if rewards else _by_label(asked, config, log)


def _by_reward(asked: JudgeRequest, log) -> RunJudge:
  model = open_reward(asked.workdir, asked.mesh, asked.checkpoint)
  threshold = asked.threshold or 0.0
  writer = ExampleWriter(model.tokenizer)
  reads = asked.reads or (CHAT if model.tokenizer.chat_templates else BOTH)

  def ids(prompt: str, answer: str) -> tuple[list[int], bool]:
    turns = [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': answer}]
    record = ChatRecord(turns, given=1) if reads == CHAT else TextRecord(prompt, answer)
    whole = trimmed(writer.example(f'the prompt {prompt[:60]!r}', record))
    over = max(0, len(whole.ids) - model.model.context)
    fit = shorter(whole, over, 'left') if over else whole
    if fit is None:
      raise ValueError(
        f'an answer of {int(whole.scored.sum())} tokens to {prompt[:60]!r} leaves the reward model '
        f'no room for a prompt, of {model.model.plain.limit}; train one with a larger '
        'model.max_length'
      )
    return fit.ids.tolist(), over > 0

  def judged(prompts, answers):
    each, cut = zip(*map(ids, prompts, answers))
    _say_cut(sum(cut), log)
    return model.scores(each) >= threshold

  said = f'reward of {asked.workdir} at least {threshold:g} ({reads})'
  return RunJudge(said, (UNSAFE,), judged)


def _by_label(asked: JudgeRequest, config: Config, log) -> RunJudge:
  template = Template.read(config.objective.template)
  if not asked.label:
    raise ValueError(
      f'--judge_run={asked.workdir} tells {", ".join(template.labels)} apart; say which of them '
      'refusals have by --judge_label'
    )
  at = template.labels.index(names.check('--judge_label', asked.label, template.labels))
  model = Generator.load(asked.workdir, asked.checkpoint, asked.mesh)
  told = labels_by(config)
  if told != WORDS:
    head = head_of(asked.workdir, told, asked.checkpoint, model.mesh, config.objective)
    score = _of_head(model, head, 'left' if config.objective.too_long == 'left' else 'right')
  else:
    asking = classify.asking_of(model, template)

    def score(texts):
      return classify.label_scores(model, asking, [(text, ()) for text in texts])

  def judged(prompts, answers):
    both = asked.reads == BOTH
    scores, cut = score([f'{p}\n{a}' if both else a for p, a in zip(prompts, answers)])
    if not np.isfinite(scores).all():
      raise FloatingPointError(f'{asked.workdir}: scores of labels are not finite')
    _say_cut(int(np.sum(cut)), log)
    return scores.argmax(1) == at

  said = f'label {asked.label} of {asked.workdir} ({asked.reads or ANSWER})'
  return RunJudge(said, LABELS, judged)


def _of_head(model: Generator, head, side: str):
  """texts -> (scores [n, L], which were cut [n])."""
  causal = model.model.config.causal

  def score(texts):
    whole = [ids_of(text, model.tokenizer, causal) for text in texts]
    ids = [within(each, model.context, side, causal) for each in whole]
    with jax.set_mesh(model.mesh):
      scores = scores_of(model, head, ids)
    return scores, [len(a) < len(b) for a, b in zip(ids, whole)]

  return score


def _say_cut(count: int, log) -> None:
  if count:
    log(f'NOTE: {count} texts were cut, to fit the context of the judge')
