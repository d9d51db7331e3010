"""What teaches a model what another one, larger or better, says of every token? Distillation: a
divergence from the teacher's law to the student's, on the batches of any other objective.

    forward_kl   KL(teacher || student)             covers all that the teacher may say
    reverse_kl   KL(student || teacher)             keeps to what the teacher would say
    jsd          beta KL(teacher || m) + (1 - beta) KL(student || m), m their mixture (GKD, Agarwal
                 et al., arXiv:2306.13649, equation 1)

    loss = (1 - cross_entropy) T^2 divergence + cross_entropy (-log p of the target)

Both laws are at temperature T, and T^2 keeps the gradient as large as it is at 1 (Hinton et al.,
arXiv:1503.02531, section 2); -log p is at 1. What weighs nothing in a batch counts nowhere.

B rows of a batch · T length · D, V width and vocabulary, of which only V is that of both models
"""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import names
from data import tokenizers
from data.extra import same_ids
from data.said import ROWS, WithSaid, batch_of
from model import logprobs, loss
from model.vocabulary import Law
from model.weights import int8
from objectives import coarse
from objectives.asked import Asked
from objectives.denoise import MaskedLM, SpanCorruption
from objectives.experts import EXPERTS, balance, routed, router_metrics
from objectives.laws import final, laid_out, law
from objectives.next_token import NextToken
from objectives.objective import MAIN, Objective, Role, in_bfloat16, or_one
from objectives.seq2seq import Seq2Seq
from objectives.sft import SFT
from parallel import axes as ax

TEACHER = 'teacher'  # its name among a run's models
FORWARD, REVERSE, JSD = DIVERGENCES = 'forward_kl', 'reverse_kl', 'jsd'
HALF = 0.5
STORED = {'': None, 'bfloat16': in_bfloat16, 'int8': int8.in_bytes}
TOP = ('top_ids', 'top_logs')  # what a teacher said, beside rows
SUMMED = ('nll', 'tokens', 'correct', 'divergence')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distilling(Objective):
  """What a student learns of a teacher; the kinds below are this on batches of others.

  Attributes:
    teacher: directory of the run that teaches, as it is now; it knows the same ids. It may be of
      another width, depth and family, and runs as this run's execution says.
    teacher_stored: how it lies in memory: '' as it was saved, 'bfloat16' or 'int8'.
    divergence: 'forward_kl', 'reverse_kl' or 'jsd'. beta: of 'jsd', between 0 and 1.
    temperature: T, by which logits of both are divided.
    cross_entropy: share of the loss that is the cross-entropy of the text, from 0 to 1.
    stored_top_k: of each token, how many ids the teacher is asked about once, before the first
      step, and then never again: its likeliest; all others count as one (objectives/coarse.py). 0:
      it is held, and says all of every batch.
  """

  teacher: str = ''
  teacher_stored: str = ''
  divergence: str = FORWARD
  beta: float = HALF
  temperature: float = 1.0
  cross_entropy: float = 0.0
  stored_top_k: int = 0

  # Without annotations: facts of a kind. Whether an epoch has the same rows as the one before.
  same_rows = True
  # Soft tokens are ids that a teacher has not.
  prompted = False

  def __post_init__(self):
    super().__post_init__()
    names.check('objective.divergence', self.divergence, DIVERGENCES)
    names.check('objective.teacher_stored', self.teacher_stored, STORED)
    if self.divergence != JSD and self.beta != HALF:
      raise ValueError(
        f'objective.beta={self.beta} is of objective.divergence={JSD!r}, and not read with '
        f'{self.divergence!r}; leave it out'
      )
    if not 0 < self.beta < 1:
      raise ValueError(
        f'objective.beta={self.beta} must be between 0 and 1, both excluded; near 0 the divergence '
        f'goes like {FORWARD!r}, near 1 like {REVERSE!r}: use these'
      )
    if not 0 < self.temperature < math.inf:
      raise ValueError(f'objective.temperature={self.temperature} must be above 0, and finite')
    if not 0 <= self.cross_entropy <= 1:
      raise ValueError(
        f'objective.cross_entropy={self.cross_entropy} is a share of the loss: from 0 to 1'
      )
    if self.z_loss and not self.cross_entropy:
      raise ValueError(
        f'objective.z_loss={self.z_loss} is added to the cross-entropy, of which '
        'objective.cross_entropy=0 takes nothing; leave it out, or raise that'
      )
    self._check_least(stored_top_k=0)
    if self.stored_top_k and not self.same_rows:
      raise NotImplementedError(
        f'objective.stored_top_k={self.stored_top_k} of objective.kind={self.kind!r}, whose noise '
        'is drawn anew for every row: nothing can be said of it beforehand; use 0'
      )

  # 1. Models.

  def models(self, config):
    if not self.teacher:
      raise ValueError(
        "objective.teacher='' names no run to learn from; give its directory, as in "
        '--config.objective.teacher=runs/large'
      )
    if self.stored_top_k:
      return super().models(config)
    stored = STORED[self.teacher_stored]
    teacher = Role(None, trained=False, directory=self.teacher, stored=stored)
    return super().models(config) | {TEACHER: teacher}

  def accepts(self, models):
    student, teacher = models[MAIN], models.get(TEACHER)
    super().accepts(models)
    if student.execution.pipeline.schedule == '1f1b':
      raise NotImplementedError(
        f'objective.kind={self.kind!r} has a second model, the teacher, and '
        "model.execution.pipeline.schedule='1f1b' is of one; use 'gpipe' or 'circular'"
      )
    if teacher is None:  # looked at where it is asked
      return
    try:
      super().accepts({MAIN: teacher})
    except (NotImplementedError, ValueError) as error:
      raise type(error)(f'the teacher, objective.teacher={self.teacher}: {error}') from error
    if teacher.execution.stored and self.teacher_stored:
      raise ValueError(
        f'objective.teacher_stored={self.teacher_stored!r} of objective.teacher={self.teacher}, '
        f'which lies in codes already ({", ".join(teacher.execution.stored)}); leave it out'
      )
    sizes = [(network.V, network.table_rows) for network in (student, teacher)]
    if student.V and sizes[0] != sizes[1]:
      raise ValueError(
        f'model.vocabulary={student.V} (in tables of {student.table_rows} rows) and that of '
        f'objective.teacher={self.teacher}, {teacher.V} (of {teacher.table_rows}), differ, and a '
        'divergence is between laws of the same ids; begin the student with model.vocabulary='
        f'{teacher.V} and model.vocabulary_multiple={teacher.vocabulary_multiple}'
      )

  # 2. Batches: those of the kind that is distilled on.

  def read(self, config, log):
    prepared = super().read(config, log)
    base = tokenizers.load(pathlib.Path(self.teacher) / 'tokenizer')
    if not same_ids(base, prepared.tokenizer):
      raise ValueError(
        f'the tokenizer of the data ({prepared.tokenizer.kind}, {prepared.tokenizer.vocabulary:,} '
        f'ids) is not that of objective.teacher={self.teacher} ({base.kind}, {base.vocabulary:,} '
        'ids), and a divergence between laws of other ids means nothing; give both the same '
        f"(data.tokenizer.path={self.teacher}/tokenizer), or tune on the teacher's own text "
        '(generate.py, objective.kind=sft)'
      )
    return prepared

  @property
  def completed_by(self) -> str:
    return 'workdir.said.kept' if self.stored_top_k else ''

  def asked(self) -> Asked:
    """What the teacher is to say of all rows once, before the first step, so that no step needs it;
    the data that `batches` is given then has it (data/said.py).
    """
    K = self.stored_top_k
    live = dataclasses.replace(self, stored_top_k=0)
    key = ['likeliest', K, self.temperature, self.teacher_stored]

    def answer(teacher, batch):
      read, _ = final(teacher, batch, 1)
      said = law(teacher, read, self.temperature)
      return dict(zip(TOP, logprobs.likeliest(said, batch.weights, K)))

    fields = dict(zip(TOP, (('uint32', K), ('float32', K))))
    return Asked(TEACHER, live, key, fields, answer)

  def batches(self, prepared, config, rows):
    if isinstance(prepared, WithSaid):
      return prepared.batches(config, rows)
    return super().batches(prepared, config, rows)

  def validation_batches(self, prepared, config, rows):
    if isinstance(prepared, WithSaid):
      return prepared.validation_batches(config, rows)
    return super().validation_batches(prepared, config, rows)

  def batch_like(self, config):
    rows = super().batch_like(config)
    if not self.stored_top_k:
      return rows
    return batch_of(rows, self.asked().fields, jax.ShapeDtypeStruct)

  def tokens(self, batch):
    return super().tokens(rows_of(batch))

  # 3. Loss, and what is said of it.

  def weights(self, batch):
    return super().weights(rows_of(batch)) | {EXPERTS: routed(self.tokens(batch))}

  def sums(self, models, batch):
    student, rows, parts = models[MAIN], rows_of(batch), 1
    if not self.stored_top_k:
      rows, parts = laid_out(student, rows)

    x, router = final(student, rows, parts)
    if not self.stored_top_k:
      # Laid out as the student's: a teacher of other heads attends by positions.
      read, _ = final(models[TEACHER], rows, parts)
    with jax.named_scope('loss'):
      nll, sums = self._cross_entropy(student, x, rows)
      said = law(student, x, self.temperature)
      if self.stored_top_k:
        each = self._diverged_from(batch, said)
      else:
        teacher = jax.lax.stop_gradient(law(models[TEACHER], read, self.temperature))
        each = self._diverged(teacher, said, rows.weights)
      divergence = (each * rows.weights).sum()

    total = (1 - self.cross_entropy) * self.temperature**2 * divergence + nll
    sums = sums | {'divergence': divergence} | (router or {})
    return {self.term: total, EXPERTS: balance(router)}, sums

  def _cross_entropy(self, student, x, batch):
    """Its share of the loss, and sums of loss.cross_entropy, which are said of every run."""
    config, scored = student.config, student.scored(x)
    if not self.cross_entropy:
      scored = jax.lax.stop_gradient(scored)  # without a second pass for a gradient
    nll, sums = loss.cross_entropy(
      *scored,
      batch.targets,
      batch.weights,
      self.z_loss,
      config.logit_softcap,
      vocabulary=config.vocabulary_limit,
    )
    return (self.cross_entropy * nll if self.cross_entropy else jnp.float32(0)), sums

  def _diverged(self, teacher: Law, student: Law, weights) -> Float[Array, 'B T']:
    if self.divergence == FORWARD:
      return logprobs.kl(teacher, student, weights)
    if self.divergence == REVERSE:
      return logprobs.kl(student, teacher, weights)
    return logprobs.jsd(teacher, student, weights, self.beta)

  def _diverged_from(self, batch, student: Law) -> Float[Array, 'B T']:
    """Of a batch with what the teacher said of its likeliest ids."""
    weights = batch[ROWS].weights
    ids, teacher = (ax.place(batch[name], 'batch', 'length', None) for name in TOP)
    ours = logprobs.logprobs_of(student, ids, weights)
    if self.divergence == FORWARD:
      each = coarse.kl(teacher, ours)
    elif self.divergence == REVERSE:
      each = coarse.kl(ours, teacher)
    else:
      each = coarse.jsd(teacher, ours, self.beta)
    return jnp.where(weights != 0, each, 0)

  def metrics(self, terms, weights, sums):
    """Beside those of the kind that is distilled on: `divergence` at the temperature, without T^2,
    and `cross_entropy`, of which `loss` is made.
    """
    said = super().metrics(terms, weights, sums) | router_metrics(sums, weights[EXPERTS])
    divergence = sums['divergence'] / or_one(sums['tokens'])
    nll = said['loss']
    return said | {
      'loss': self._mixed(divergence, nll),
      'divergence': divergence,
      'cross_entropy': nll,
    }

  def judged(self, models, batch):
    _, sums = self.sums(models, batch)
    kept = {name: sums[name] for name in SUMMED}
    if self.of_records:
      kept['examples'] = rows_of(batch).segments.max(1).sum().astype(jnp.float32)
    return kept

  def verdict(self, sums, prepared):
    """Beside that of the kind that is distilled on: `validation_loss` is of what is minimised, and
    made of `validation_divergence` and `validation_cross_entropy`.
    """
    said = super().verdict(sums, prepared)
    divergence, nll = sums['divergence'] / sums['tokens'], said['validation_loss']
    return said | {
      'validation_loss': self._mixed(divergence, nll),
      'validation_divergence': divergence,
      'validation_cross_entropy': nll,
    }

  def _mixed(self, divergence, nll):
    """The loss, of means over tokens."""
    share = self.cross_entropy
    return (1 - share) * self.temperature**2 * divergence + share * nll


def rows_of(batch):
  """Without what is said of them."""
  return batch[ROWS] if isinstance(batch, dict) else batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distil(Distilling, NextToken):
  """On texts as pretraining reads them (objectives/next_token.py)."""

  kind: str = 'distil'
  term = 'distil'
  of_pairs = 'distil_span_corruption'


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilSFT(Distilling, SFT):
  """On what the assistant says in records (objectives/sft.py)."""

  kind: str = 'distil_sft'
  term = 'distil'
  of_pairs = 'distil_seq2seq'


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilSeq2Seq(Distilling, Seq2Seq):
  """On targets of records, by encoder-decoders (objectives/seq2seq.py)."""

  kind: str = 'distil_seq2seq'
  term = 'distil'


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilSpanCorruption(Distilling, SpanCorruption):
  """On the noise of texts, by encoder-decoders (objectives/denoise.py)."""

  kind: str = 'distil_span_corruption'
  same_rows = False
  term = 'distil'


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilMaskedLM(Distilling, MaskedLM):
  """On the masks of texts, by encoders (objectives/denoise.py)."""

  kind: str = 'distil_masked_lm'
  same_rows = False
  term = 'distil'
