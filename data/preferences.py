"""How does a prompt with two answers become rows? As two segments that follow one another, the
chosen answer first, each behind a prompt of its own; the two are in one row, whatever the packing.

    record    prompt, chosen, rejected (data/records.py)
    example   prompt chosen | prompt rejected     ids, of which the answers' are learned
    row       tokens    p p C C p p R q D D D q E 0
              segments  1 1 1 1 2 2 2 3 3 3 3 4 4 0

So odd segments are chosen, even ones rejected, and a pair is scored by one forward pass, in one
microbatch, on one device. What each half is alone is what supervised finetuning makes of it
(data/conversations.py).

T length of a row
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from data.batch import Batch
from data.conversations import Example, ExampleWriter
from data.examples import Fitted, Packed
from data.loader import Loader, ValidationBatches
from data.records import PreferenceRecord
from data.shards import PLANS, PackedSource, Rows, written_plan
from data.tokenizer import Tokenizer

SIDES = ('chosen tokens', 'rejected tokens')
REFERENCE, MARGINS = FIELDS = 'reference', 'margins'


@dataclasses.dataclass(frozen=True)
class Choice(Example):
  """Two answers behind one prompt, as one sequence of ids, of which the answers' are learned; notes
  are where the rejected half begins, and the margin.
  """

  @classmethod
  def of(cls, chosen: Example, rejected: Example, margin: float = 0.0) -> 'Choice':
    ids = np.concatenate([chosen.ids, rejected.ids]).astype(np.int32)
    scored = np.concatenate([chosen.scored, rejected.scored])
    return cls(ids, scored, (float(len(chosen.ids)), margin))

  @property
  def halves(self) -> tuple[Example, Example]:
    """Chosen, rejected."""
    begin = int(self.notes[0])
    return (
      Example(self.ids[:begin], self.scored[:begin]),
      Example(self.ids[begin:], self.scored[begin:]),
    )


class ChoiceWriter:
  """Makes examples of records of two answers, for one tokenizer and one template; arguments as
  ExampleWriter has them.
  """

  def __init__(self, tokenizer: Tokenizer, template: str = ''):
    self._writer = ExampleWriter(tokenizer, template)

  def example(self, place: str, record: PreferenceRecord) -> Choice:
    """Raises ValueError, naming place and answer, for one that makes no example."""
    chosen, rejected = (
      trimmed(self._writer.example(f'{place}: {side}', getattr(record, side)))
      for side in ('chosen', 'rejected')
    )
    return Choice.of(chosen, rejected, record.margin)


def trimmed(example: Example) -> Example:
  """Without what follows the last token that is learned, which nothing of it reads."""
  end = int(np.flatnonzero(example.scored)[-1]) + 1
  return Example(example.ids[:end], example.scored[:end])


def shorter(example: Example, by: int, side: str) -> Example | None:
  """With so many tokens less of its prompt, off the 'left' or the 'right' end of it; None where no
  token would be left before the answer.
  """
  prompt = int(example.scored.argmax())
  if prompt - by < 1:
    return None
  gone = np.arange(by) + (0 if side == 'left' else prompt - by)
  return Example(np.delete(example.ids, gone), np.delete(example.scored, gone))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceSettings(Packed):
  """What is made of prompts with two answers.

  Attributes:
    template: file of the chat template, for a tokenizer that has none; it becomes the run's.
    too_long: what becomes of two answers with their prompts of more than data.sequence_length
      tokens together: 'drop', or cut the 'left' or the 'right' end of both prompts off, alike.

  Raises ValueError for names that are unknown, and for a weighting: pairs count alike.
  """

  template: str = ''
  tunes = 'preference'
  formats = ('preference',)
  sides = SIDES
  notes = 2
  differ = True  # whether one answer tells nothing beside itself
  unread = 1  # tokens at the end of an answer that are targets only

  def __post_init__(self):
    super().__post_init__()
    if self.weighting != 'token':
      raise ValueError(
        f'objective.weighting={self.weighting!r} is of answers that are learned one by one; pairs '
        "count alike, and a pair's answers by the sums of their tokens or, with "
        "objective.variant='sigmoid_norm' or 'ipo', by their means; leave it 'token'"
      )

  def writer(self, tokenizer):
    template = self._template()
    writer = ChoiceWriter(tokenizer, template)
    return writer, tokenizer.with_template(template) if template else tokenizer

  def _template(self) -> str:
    return pathlib.Path(self.template).expanduser().read_text() if self.template else ''

  def facts(self, config):
    return {
      'choices': 1,  # what is written of one
      'template': self._template(),
      'too_long': [self.too_long, config.sequence_length],
    }

  def lengths(self, example):
    return tuple(len(half.ids) for half in example.halves)

  def fitted(self, example, config, reserved=0):
    halves = example.halves
    if self.differ and all(
      np.array_equal(*field) for field in zip(*(vars(half).values() for half in halves))
    ):
      return Fitted(None, dropped='answers_are_the_same')
    read = sum(len(half.ids) - self.unread for half in halves)
    over = read + 2 * reserved - config.sequence_length
    if over <= 0:
      return Fitted(example)
    if self.too_long == 'drop':
      return Fitted(None, dropped='too_long')
    cut = [shorter(half, -(-over // 2), self.too_long) for half in halves]
    if None in cut:
      return Fitted(None, self.sides, 'no_prompt_left_when_truncated')
    return Fitted(Choice.of(*cut, example.notes[1]), self.sides)

  def rows_of(self, config, tokenizer):
    del tokenizer
    return ChoiceRows(config.sequence_length, self.packing)


@dataclasses.dataclass(frozen=True)
class ChoiceRows(Rows):
  """How pairs of answers fill rows; a plan's pieces are (begin, begin of the rejected half, end,
  number of the document).

  Attributes:
    unread: tokens at the end of an answer that take no room.
  """

  unread: int = 1

  def write_plan(self, corpus, directory, shard):
    """As Rows.write_plan, of whole pairs; their halves are what the squares are of."""
    offsets = np.load(corpus / f'{shard["name"]}.documents.npy')
    notes = np.load(corpus / f'{shard["name"]}.notes.npy')
    middles = offsets[:-1] + notes[:, 0].astype(np.int64)
    halves = np.stack([middles - offsets[:-1], offsets[1:] - middles], 1) - self.unread
    order, rows = PLANS[self.packing](halves.sum(1), self.length)
    pieces = np.stack([offsets[:-1], middles, offsets[1:], np.arange(len(middles))], 1)
    return {
      'pairs': int(halves.sum()),
      'squared_pairs': int(np.square(halves).sum()),
      **written_plan(directory, shard['name'], pieces[order], rows),
    }

  def source(self, *parts):
    return ChoiceSource(*parts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChoiceBatch(Batch):
  """Rows of pairs of answers; segments 1, 3, .. are chosen, and 2, 4, .. the rejected ones of the
  same pairs; weights are 1 where an answer is predicted.

  Attributes:
    margins: f32 [B, T], of its pair at each token; of judged answers, 1 for what is wanted.
    reference: f32 [B, T], log-probabilities of the targets by a frozen model, where they are stored
      (objective.reference); 0 elsewhere.
  """

  margins: Any
  reference: Any

  @classmethod
  def empty(cls, rows: int, length: int) -> 'ChoiceBatch':
    each = {name: np.zeros((rows, length), np.float32) for name in FIELDS}
    return cls(**vars(Batch.empty(rows, length)), **each)

  @classmethod
  def abstract(
    cls, rows: int, length: int, sharding: jax.sharding.Sharding | None = None
  ) -> 'ChoiceBatch':
    each = jax.ShapeDtypeStruct((rows, length), np.float32, sharding=sharding)
    return cls(**vars(Batch.abstract(rows, length, sharding)), margins=each, reference=each)


@dataclasses.dataclass(frozen=True)
class ChoiceSource(PackedSource):
  """As PackedSource, of rows of pairs of answers."""

  def fill(self, index: int, batch: ChoiceBatch, into: int) -> None:
    shard, pieces = self.pieces(index)
    at = segment = 0
    for begin, middle, end, document in pieces:
      for first, last in ((begin, middle), (middle, end)):
        n, segment = last - first - 1, segment + 1
        here = slice(at, at + n)
        ids = shard.tokens[first:last]
        batch.tokens[into, here] = ids[:-1]
        batch.targets[into, here] = ids[1:]
        batch.positions[into, here] = np.arange(n, dtype=np.int32)
        batch.segments[into, here] = segment
        batch.weights[into, here] = shard.scored[first + 1 : last]
        batch.margins[into, here] = shard.notes[document, 1]
        at += n


class ChoiceLoader(Loader):
  """As Loader, of pairs of answers."""

  def _empty(self, rows: int) -> ChoiceBatch:
    return ChoiceBatch.empty(rows, self._config.sequence_length)


class ChoiceValidation(ValidationBatches):
  """As ValidationBatches, of pairs of answers."""

  def _empty(self, rows: int) -> ChoiceBatch:
    return ChoiceBatch.empty(rows, self._config.sequence_length)
