"""How does a prompt with two answers become rows of an encoder-decoder? As two segments that follow
one another, the chosen answer first, each with a source of its own, which is the prompt.

    record    prompt, chosen, rejected           texts
    example   prompt | chosen | rejected         ids, of which the answers' are learned
    row       source    p p p p q q q q 0        what the encoder reads
              segments  1 1 2 2 3 3 4 4 0
              targets   C C R D D E E 0
              segments  1 1 2 3 3 4 4 0

Rows are otherwise those of data/pairs.py, with the segments of data/preferences.py.

S, T lengths of a row's sources and targets
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from data.batch import SourceBatch
from data.conversations import Example
from data.examples import Fitted
from data.loader import Loader, ValidationBatches
from data.pairs import PLANS, PairRows, Pairs, PairSettings, PairSource, PairWriter, cut_source
from data.preferences import FIELDS
from data.records import PairRecord, PreferenceRecord, TextRecord
from data.shards import written_plan
from data.tokenizer import Tokenizer

SIDES = ('prompt tokens', 'answer tokens')


@dataclasses.dataclass(frozen=True)
class SourceChoice(Example):
  """A source and two targets as one sequence of ids; notes are the lengths of the source and of the
  chosen target, and the margin.

  Attributes:
    kept: how many ids in front are not the source's own, and never cut off.
  """

  kept: int = 0

  @classmethod
  def of(cls, source, chosen, rejected, margin: float, kept: int) -> 'SourceChoice':
    ids = np.concatenate([source, chosen, rejected]).astype(np.int32)
    notes = (float(len(source)), float(len(chosen)), margin)
    return cls(ids, np.arange(len(ids)) >= len(source), notes, kept)

  @property
  def parts(self) -> list[np.ndarray]:
    """Source, chosen, rejected."""
    source, chosen = (int(n) for n in self.notes[:2])
    return np.split(self.ids, [source, source + chosen])


class SourceChoiceWriter:
  """Makes examples of records of two answers; arguments as PairWriter has them."""

  def __init__(self, tokenizer: Tokenizer, prefix: str = ''):
    self._writer = PairWriter(tokenizer, prefix)

  def example(self, place: str, record: PreferenceRecord) -> SourceChoice:
    """Raises ValueError, naming the place, for messages, and for what is empty."""
    answers = {'chosen': record.chosen, 'rejected': record.rejected}
    return self.made(place, answers, record.margin)

  def made(self, place: str, answers: Mapping[str, Any], margin: float) -> SourceChoice:
    """Of two answers, by what errors call them."""
    made = []
    for side, answer in answers.items():
      if not isinstance(answer, TextRecord):
        raise ValueError(
          f'{place}: messages are what decoders read; an encoder-decoder takes a prompt and '
          'answers that are texts'
        )
      pair = PairRecord(answer.prompt, answer.completion)
      made.append(self._writer.example(f'{place}: {side}', pair))
    (source, chosen), (_, rejected) = (
      np.split(pair.ids, [int(pair.scored.argmax())]) for pair in made
    )
    return SourceChoice.of(source, chosen, rejected, margin, made[0].kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceChoiceSettings(PairSettings):
  """What is made of prompts with two answers for an encoder-decoder.

  Attributes:
    prefix: text that stands in front of every prompt: 'summarize: '.
    target_length: T, tokens of a row's answers; 0: data.sequence_length, which is that of its
      prompts, where each stands twice.
    too_long: of prompts of more than half of data.sequence_length tokens: 'drop' the pair, or cut
      the 'left' or the 'right' end off; prefix and </s> are kept.
    target_too_long: of two answers of more than target_length tokens together: 'drop'.

  Raises ValueError for answers that would be cut, and for a weighting: pairs count alike.
  """

  tunes = 'preference_seq2seq'
  formats = ('preference',)
  sides = SIDES
  notes = 3
  differ = True  # whether one answer tells nothing beside itself

  def __post_init__(self):
    super().__post_init__()
    if self.target_too_long != 'drop' or self.weighting != 'token':
      raise ValueError(
        f'objective.target_too_long={self.target_too_long!r} and objective.weighting='
        f'{self.weighting!r} of pairs, whose answers are compared whole and count alike; use '
        "'drop' and 'token'"
      )

  def writer(self, tokenizer):
    return SourceChoiceWriter(tokenizer, self.prefix), tokenizer

  def facts(self, config):
    return super().facts(config) | {'choices': 'source'}

  def lengths(self, example):
    source, chosen, rejected = map(len, example.parts)
    return source, chosen + rejected

  def fitted(self, example, config, reserved=0):
    source, chosen, rejected = example.parts
    length, target_length = self.room(config)
    if self.differ and np.array_equal(chosen, rejected):
      return Fitted(None, dropped='answers_are_the_same')
    if len(chosen) + len(rejected) > target_length:
      return Fitted(None, dropped='answer_too_long')
    most = length // 2 - reserved
    if len(source) <= most:
      return Fitted(example)
    if self.too_long == 'drop':
      return Fitted(None, dropped='prompt_too_long')
    source = cut_source(source, most, example.kept, self.too_long, reserved)
    return Fitted(
      SourceChoice.of(source, chosen, rejected, example.notes[2], example.kept), SIDES[:1]
    )

  def rows_of(self, config, tokenizer):
    length, target_length = self.room(config)
    return SourceChoiceRows(length, self.packing, target_length, tokenizer.pad)


@dataclasses.dataclass(frozen=True)
class SourceChoiceRows(PairRows):
  """How pairs of targets fill rows; a plan's pieces are (begin, length of the source, of the chosen
  and of the rejected target, number of the document).
  """

  def write_plan(self, corpus, directory, shard):
    offsets = np.load(corpus / f'{shard["name"]}.documents.npy')
    notes = np.load(corpus / f'{shard["name"]}.notes.npy')
    sources, chosen = notes[:, 0].astype(np.int64), notes[:, 1].astype(np.int64)
    rejected = np.diff(offsets) - sources - chosen
    targets = np.stack([chosen, rejected], 1)
    room = (self.length, self.target_length)
    order, rows = PLANS[self.packing](np.stack([2 * sources, targets.sum(1)], 1), room)
    number = np.arange(len(sources))
    pieces = np.stack([offsets[:-1], sources, chosen, rejected, number], 1)
    return {
      'sources': int(2 * sources.sum()),
      'pairs': int(targets.sum()),
      'squared_sources': int(2 * np.square(sources).sum()),
      'squared_pairs': int(np.square(targets).sum()),
      'crossed': int((sources[:, None] * targets).sum()),
      **written_plan(directory, shard['name'], pieces[order], rows),
    }

  def source(self, *parts):
    return SourceChoiceSource(*parts, start=self.start)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceChoiceBatch(SourceBatch):
  """As SourceBatch, with `margins` and `reference` as data.preferences.ChoiceBatch has them."""

  margins: Any
  reference: Any

  @classmethod
  def empty(cls, rows: int, length: int, source_length: int) -> 'SourceChoiceBatch':
    each = {name: np.zeros((rows, length), np.float32) for name in FIELDS}
    return cls(**vars(SourceBatch.empty(rows, length, source_length)), **each)

  @classmethod
  def abstract(
    cls,
    rows: int,
    length: int,
    source_length: int,
    sharding: jax.sharding.Sharding | None = None,
  ) -> 'SourceChoiceBatch':
    each = jax.ShapeDtypeStruct((rows, length), np.float32, sharding=sharding)
    batch = SourceBatch.abstract(rows, length, source_length, sharding)
    return cls(**vars(batch), margins=each, reference=each)


@dataclasses.dataclass(frozen=True)
class SourceChoiceSource(PairSource):
  """As PairSource, of rows of pairs of targets."""

  def fill(self, index: int, batch: SourceChoiceBatch, into: int) -> None:
    shard, pieces = self.pieces(index)
    at = [0, 0]
    segment = 0
    for begin, source, *targets, document in pieces:
      prompt, first = shard.tokens[begin : begin + source], begin + source
      for n in targets:
        segment += 1
        read, written = slice(at[0], at[0] + source), slice(at[1], at[1] + n)
        batch.source[into, read] = prompt
        batch.source_positions[into, read] = np.arange(source)
        batch.source_segments[into, read] = segment

        ids = shard.tokens[first : first + n]
        batch.tokens[into, at[1]] = self.start
        batch.tokens[into, at[1] + 1 : at[1] + n] = ids[:-1]
        batch.targets[into, written] = ids
        batch.positions[into, written] = np.arange(n)
        batch.segments[into, written] = segment
        batch.weights[into, written] = 1
        batch.margins[into, written] = shard.notes[document, 2]
        at, first = [at[0] + source, at[1] + n], first + n


class SourceChoices(Pairs):
  """As Pairs, of pairs of targets."""

  def empty(self, rows: int) -> SourceChoiceBatch:
    return SourceChoiceBatch.empty(rows, self.form.target_length, self.form.length)


class SourceChoiceLoader(Loader):
  """As Loader, of SourceChoices."""

  def _empty(self, rows: int) -> SourceChoiceBatch:
    return self._prepared.empty(rows)


class SourceChoiceValidation(ValidationBatches):
  """As ValidationBatches, of SourceChoices."""

  def __init__(self, choices: SourceChoices, config, rows):
    super().__init__(choices, config, rows)
    self._choices = choices

  def _empty(self, rows: int) -> SourceChoiceBatch:
    return self._choices.empty(rows)
