"""How well does a model classify by prompting? Scores of labels, what calibration makes of them,
and what is said of both.

n records · L labels
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

import names
from data.records import LabelRecord
from data.template import CLOZE, PREFIX, Asking, Template, form_of
from decode.choices import choice_scores
from decode.loaded import LoadedModel
from evaluation.intervals import Estimate
from evaluation.metrics import classified, confusion
from evaluation.prompts import Shots

# Texts that say nothing, of which a fair model would find all labels as likely (Zhao et al. 2021,
# arXiv:2102.09690).
CONTENT_FREE = ('N/A', '', '[MASK]')
CALIBRATIONS = ('none', 'contextual', 'pmi')


def asking_of(model: LoadedModel, template: Template) -> Asking:
  """A template for a loaded model. Raises ValueError where it does not fit."""
  config = model.model.config
  return Asking(template, model.tokenizer, form_of(config.causal, config.encoder_layers))


@dataclasses.dataclass(frozen=True)
class Scores:
  """What a model says of records.

  Attributes:
    labels: f64 [n, L], see Asking.label_scores.
    free: f64 [texts, L], the same of CONTENT_FREE.
    truth: int [n].
    prompts: digest of all that was asked, words included.
    cut: how many prompts were cut on the left to fit the context.
  """

  labels: np.ndarray
  free: np.ndarray
  truth: np.ndarray
  prompts: str
  cut: int


def scored(
  model: LoadedModel,
  asking: Asking,
  records: Sequence[tuple[str, LabelRecord]],
  shots: Shots,
) -> Scores:
  """Scores of records, each behind its place; shots: what is shown before each.

  Raises ValueError, naming the place, for a label that the template does not have, and for what the
  model cannot read.
  """
  if not records:
    raise ValueError('there are no records to classify; see data.validation_fraction')
  template = asking.template
  truth = np.array([template.number(place, record) for place, record in records])
  digest = hashlib.blake2b(digest_size=16)
  digest.update(json.dumps([asking.form, template.values()], sort_keys=True).encode())

  asked = [(record.text, shots.before(record.text)) for _, record in records]
  asked += [(text, shots.before()) for text in CONTENT_FREE]
  for text, shown in asked:
    digest.update(json.dumps([*template.asked(text, shown)]).encode())
  digest.update(json.dumps(truth.tolist()).encode())

  scores, cut = label_scores(model, asking, asked)
  check_finite(scores, records)
  n = len(records)
  return Scores(scores[:n], scores[n:], truth, digest.hexdigest(), int(cut.sum()))


def label_scores(
  model: LoadedModel, asking: Asking, asked: Sequence[tuple[str, Sequence[LabelRecord]]]
) -> tuple[np.ndarray, np.ndarray]:
  """(f64 [n, L], see Asking.label_scores; bool [n], which prompts were cut on the left to fit the
  context) of texts, each with the examples that are shown before it.
  """
  words = [word.ids for word in asking.words]
  limit = model.context - (max(map(len, words)) if asking.form == PREFIX else 0)
  whole = [asking.ids(text, shown) for text, shown in asked]
  ids = [asking.fitted(each, limit) for each in whole]
  sums = choice_scores(model, ids, words, asking.mask if asking.form == CLOZE else -1)
  cut = np.array([len(a) < len(b) for a, b in zip(ids, whole)])
  return asking.label_scores(sums), cut


def check_finite(scores: np.ndarray, records: Sequence[tuple[str, LabelRecord]]) -> None:
  """Raises FloatingPointError for scores, those of CONTENT_FREE behind those of records, that are
  no numbers, naming the first record that has them.
  """
  wrong = np.flatnonzero(~np.isfinite(scores).all(1))
  if len(wrong):
    i = int(wrong[0])
    place = records[i][0] if i < len(records) else 'a text without content'
    raise FloatingPointError(f'{place}: the scores of its labels are not finite: {scores[i]}')


def probabilities(
  scores: Float[np.ndarray, 'B L'], free: Float[np.ndarray, 'S L'], calibration: str = 'none'
) -> np.ndarray:
  """Of labels, [n, L], which sum to 1.

  'contextual' divides by the mean of the probabilities of the labels of content-free texts (Zhao et
  al. 2021: W = diag(p)^-1, b = 0); 'pmi' by exp of the score behind the empty text (Holtzman et al.
  2021, arXiv:2104.08315).
  """
  names.check('calibration', calibration, CALIBRATIONS)
  if calibration == 'contextual':
    scores = scores - np.log(_softmax(free).mean(0))[None]
  if calibration == 'pmi':
    scores = scores - free[CONTENT_FREE.index('')][None]
  return _softmax(scores)


def _softmax(scores):
  p = np.exp(scores - scores.max(1, keepdims=True))
  return p / p.sum(1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Result:
  """What is said of a model by one way to ask.

  Attributes:
    settings: template, shots, seed, calibration and the like, JSON-able.
    labels: names.
    metrics: see metrics.classified.
    confusion: [L true, L said].
    prompts: digest of the exact prompt set.
  """

  settings: dict
  labels: tuple[str, ...]
  metrics: dict[str, Estimate]
  confusion: np.ndarray
  prompts: str

  @classmethod
  def of(
    cls, scores: Scores, template: Template, calibration: str, seed: int, settings: Mapping
  ) -> 'Result':
    """From scores. seed: of the bootstrap, and of the shots; settings: what else there is to say,
    JSON-able.
    """
    p = probabilities(scores.labels, scores.free, calibration)
    counts = confusion(scores.truth, p.argmax(1), len(template.labels))
    settings = {
      **settings,
      'calibration': calibration,
      'seed': seed,
      'normalise': template.normalise,
      'cut': scores.cut,
    }
    metrics = classified(scores.truth, p, seed)
    return cls(settings, template.labels, metrics, counts, scores.prompts)

  def values(self) -> dict:
    """JSON-able."""
    metrics = {name: estimate.values() for name, estimate in self.metrics.items()}
    return {
      'task': 'classify',
      **self.settings,
      'n': self.metrics['accuracy'].n,
      'metrics': metrics,
      'labels': [*self.labels],
      'confusion': self.confusion.tolist(),
      'prompts': self.prompts,
    }


def confusion_text(labels: Sequence[str], counts: np.ndarray) -> str:
  """A matrix as lines: a row is what is true, a column what was said, in the same order."""
  width = max(map(len, labels))
  cells = max(len(str(int(counts.max()))), len(str(len(labels)))) + 1
  numbers = ''.join(f'{i:>{cells}}' for i in range(1, len(labels) + 1))
  lines = [f'{"true, as said:":>{width + 4}}{numbers}']
  for i, (label, row) in enumerate(zip(labels, counts.tolist(), strict=True), 1):
    lines.append(f'{i:>3} {label:<{width}}' + ''.join(f'{x:>{cells}}' for x in row))
  return '\n'.join(lines)


def confusion_picture(labels: Sequence[str], counts: np.ndarray, title: str) -> bytes:
  """The matrix as a PNG: shares of what is true in colour, and how many as numbers."""
  from matplotlib.figure import Figure

  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  size = 2.5 + 0.45 * len(labels)
  figure = Figure(figsize=(size + 1, size), layout='constrained')
  axes = figure.subplots()
  image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
  for i, row in enumerate(counts.tolist()):
    for j, count in enumerate(row):
      if count:
        axes.text(
          j, i, count, ha='center', va='center', color='white' if shares[i, j] > 0.5 else 'black'
        )
  axes.set_xticks(range(len(labels)), labels, rotation=45, ha='right', rotation_mode='anchor')
  axes.set_yticks(range(len(labels)), labels)
  axes.set(xlabel='said', ylabel='true')
  axes.set_title(title, fontsize=9)
  figure.colorbar(image, shrink=0.8, label='share of what is true')
  file = io.BytesIO()
  figure.savefig(file, dpi=120, format='png')
  return file.getvalue()
