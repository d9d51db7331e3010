"""How does an answer that was judged become a part of rows of an encoder-decoder? As
data/source_choices.py has two answers, with that to another prompt in the place of the rejected one
(data/judged.py).
"""

import dataclasses

from data.examples import Fitted
from data.judged import Mismatched, mismatched
from data.source_choices import SIDES, SourceChoice, SourceChoiceSettings, SourceChoiceWriter
from data.splits import question


class SourceJudgedWriter(SourceChoiceWriter):
  """Makes examples of `mismatched` records."""

  def example(self, place: str, record: Mismatched) -> SourceChoice:
    """Raises ValueError, naming the place, for messages, and for what is empty."""
    answers = {'the answer': record.record.answer, 'that to another prompt': record.other}
    return self.made(place, answers, float(record.record.label))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceJudgedSettings(SourceChoiceSettings):
  """What is made of prompts with an answer that was judged, for an encoder-decoder.

  Attributes:
    target_length: T, tokens of a row's answers, of which each stands beside that to another prompt;
      0: data.sequence_length, which is that of its prompts, where each stands twice.
    target_too_long: of an answer of more than target_length tokens together with one token of the
      other, whose end gives way: 'drop'.
  """

  tunes = 'kto_seq2seq'
  formats = ('judged',)
  differ = False

  def writer(self, tokenizer):
    return SourceJudgedWriter(tokenizer, self.prefix), tokenizer

  def facts(self, config):
    return super().facts(config) | {'choices': 'judged source'}

  def completed(self, placed):
    return mismatched(placed)

  def question(self, record):
    return question(record.record)

  def identity(self, example):
    source, own, _ = example.parts
    alone = SourceChoice.of(source, own, own[:0], example.notes[2], example.kept)
    return super().identity(alone)

  def fitted(self, example, config, reserved=0):
    source, own, other = example.parts
    _, target_length = self.room(config)
    # Of the other answer only a statistic is read: its end is what gives way.
    left = max(target_length - len(own), 1)
    if len(other) <= left:
      return super().fitted(example, config, reserved)
    cut = SourceChoice.of(source, own, other[:left], example.notes[2], example.kept)
    fitted = super().fitted(cut, config, reserved)
    return fitted if fitted.dropped else Fitted(fitted.example, fitted.cut or SIDES[1:])
