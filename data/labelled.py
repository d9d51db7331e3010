"""How do texts with labels become examples, and which of them are held out? By a hash of the text
alone, so that whoever asks a model, in whatever words, and whoever tunes one, hold out the same.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from data.batch import Batch, LabelBatch
from data.config import DataConfig
from data.conversations import Example
from data.loader import Loader, ValidationBatches
from data.records import LabelRecord, Record, records
from data.splits import question, share_of
from data.template import PREFIX, TARGET, Asking, Template
from data.tokenizer import Tokenizer

Placed = tuple[str, LabelRecord]  # behind its place, 'file:line'
OVER = ('tokens', 'labels')


def split(config: DataConfig) -> tuple[list[Placed], list[Placed]]:
  """The records to train on, or to show, and those that are held out, as training splits them.

  Raises ValueError for a source of another format, and where one of the two is empty.
  """
  for field, of in (('sources', config.sources), ('validation', config.validation)):
    for i, source in enumerate(of):
      if source.format != 'label':
        raise ValueError(
          f'data.{field}[{i}].format={source.format!r} has no labels; classification is of records '
          f'with a text and a label: --config.data.{field}[{i}].format=label'
        )
  seen: set[bytes] = set()

  def fresh(sources) -> Iterator[tuple[bytes, Placed]]:
    for source in sources:
      for place, record in records(source):
        # Two records of one text are one record, and the first of them counts.
        asked = question(record)
        digest = hashlib.blake2b(asked, digest_size=16).digest()
        if not (config.clean.exact_duplicates and digest in seen):
          seen.add(digest)
          yield asked, (place, record)

  train, held_out = [], []
  for asked, placed in fresh(config.sources):
    (held_out if share_of(asked) < config.validation_fraction else train).append(placed)
  held_out += [placed for _, placed in fresh(config.validation)]
  if not train or not held_out:
    raise ValueError(
      f'{len(train)} records are to train on and {len(held_out)} held out; change '
      f'data.validation_fraction={config.validation_fraction}, or name files by data.validation'
    )
  return train, held_out


class LabelWriter:
  """Makes examples of labelled texts, to train on; the label is its first word in the template.

  Args:
    over: 'tokens': a decoder learns all ids of the word, and the end of text behind them; 'labels':
      of the word, which is one id, nothing else.

  In the example of an encoder the word's id comes behind its row, and the mask is where it belongs.
  Raises ValueError as template.Asking, and where 'labels' meets a word of several ids.
  """

  def __init__(self, template: Template, tokenizer: Tokenizer, form: str, over: str):
    self.asking, self._over = Asking(template, tokenizer, form), over
    if form == TARGET:
      raise ValueError(f'form={form!r} answers a source; its examples are of answers.AnswerWriter')
    self._words = {}
    for word in self.asking.words:
      self._words.setdefault(word.label, word.ids)
    long = next((word for word in self.asking.words if len(word.ids) > 1), None)
    if over == 'labels' and long is not None:
      raise ValueError(
        "objective.over='labels' is a choice between words of one token each, and "
        f'{tokenizer.decode(long.ids)!r} of label {template.labels[long.label]!r} has '
        f"{len(long.ids)}; give other words, or use objective.over='tokens'"
      )

  def example(self, place: str, record: Record) -> Example:
    """Raises ValueError, naming the place, for no labelled text, and for an unknown label."""
    read, number = asked(self.asking, place, record)
    word = self._words[number]
    if self.asking.form == PREFIX and self._over == 'tokens':
      word = (*word, self.asking.tokenizer.eos)
    ids = np.array([*read, *word], np.int32)
    return Example(ids, np.arange(len(ids)) >= len(read))


def asked(asking: Asking, place: str, record: Record) -> tuple[tuple[int, ...], int]:
  """What a model reads for a record, and the number of its label. Raises as LabelWriter.example."""
  if not isinstance(record, LabelRecord):
    raise ValueError(
      f"{place}: objective.kind='classify' takes records of a text and a label; set "
      'source.format=label'
    )
  try:
    number = asking.template.number(place, record)
    return asking.ids(record.text), number
  except ValueError as error:
    said = str(error)
    raise ValueError(said if said.startswith(place) else f'{place}: {said}') from error


def in_place(batch, row: int, mask: int) -> None:
  """Moves what is learned at the end of each example of a row of an encoder's batch to where its
  mask is.
  """
  in_places(batch, row, np.flatnonzero(batch.tokens[row] == mask))


def in_places(batch, row: int, at: np.ndarray) -> None:
  """Moves what is learned in a row, one target of each example, to these places, one of each."""
  learned = np.flatnonzero(batch.weights[row])
  targets, weights = batch.targets[row, learned], batch.weights[row, learned]
  batch.weights[row] = 0
  batch.targets[row, at], batch.weights[row, at] = targets, weights


class _Labelled:
  """What both loaders make of rows."""

  def __init__(self, prepared, config: DataConfig, rows, asking: Asking, over: str):
    self._asking, self._over = asking, over
    super().__init__(prepared, config, rows)

  def _empty(self, rows: int) -> Batch:
    if self._over == 'tokens':
      return super()._empty(rows)
    words = self._asking.words
    batch = LabelBatch.empty(rows, self._config.sequence_length, len(words))
    batch.choices[:] = [word.ids[0] for word in words]
    batch.labels[:] = [word.label for word in words]
    return batch

  def _fill(self, index: int, batch: Batch, into: int) -> None:
    super()._fill(index, batch, into)
    if self._asking.mask is not None:
      in_place(batch, into, self._asking.mask)


class LabelLoader(_Labelled, Loader):
  """As Loader, of examples of a LabelWriter."""


class LabelValidation(_Labelled, ValidationBatches):
  """As ValidationBatches, of examples of a LabelWriter."""
