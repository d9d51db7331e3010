"""How does an answer that was judged become rows? As data.preferences has pairs, with the answer to
another prompt in the place of the rejected one: what a policy finds of such tells how far it is
from its reference, whatever was judged (Ethayarajh et al., arXiv:2402.01306, section 4.1).

    record    prompt a, answer a, wanted     the next other one: prompt b, answer b
    example   a A | a B                      of the second b B | b A
    margin    1 where it is wanted, else 0
"""

import dataclasses
from collections.abc import Iterator

from data.conversations import Example, ExampleWriter
from data.examples import Fitted
from data.preferences import Choice, ChoiceSettings, trimmed
from data.records import ChatRecord, JudgedRecord, Record, TextRecord
from data.splits import question
from data.tokenizer import Tokenizer

SIDES = ('judged tokens', 'mismatched tokens')


@dataclasses.dataclass(frozen=True)
class Mismatched:
  """A judged record, and its prompt with the answer of another."""

  record: JudgedRecord
  other: ChatRecord | TextRecord


def mismatched(placed: Iterator[tuple[str, Record]]) -> Iterator[tuple[str, Mismatched]]:
  """Each record of a source with the answer of the last one before it that has another prompt; the
  first ones, that have none, with that of the first one behind them.

  Raises ValueError, naming the place, for a source of one prompt, and for a text beside messages.
  """
  last = other = None  # the record before this one, and the last one of another prompt than that
  waiting: list[tuple[str, JudgedRecord]] = []
  for place, record in placed:
    if last is not None and _prompt(record) != _prompt(last):
      other = last
    last = record
    if other is None:
      waiting.append((place, record))
      continue
    for first in waiting:
      yield first[0], _with_answer(*first, record)
    waiting = []
    yield place, _with_answer(place, record, other)
  if waiting:
    raise ValueError(
      f'{waiting[0][0]}: the only prompt of its source, and a judged answer is compared with that '
      'to another prompt; add records'
    )


def _prompt(record: JudgedRecord):
  """What is answered."""
  answer = record.answer
  if isinstance(answer, TextRecord):
    return answer.prompt
  return answer.messages[: answer.given], answer.tools


def _with_answer(place: str, record: JudgedRecord, other: JudgedRecord) -> Mismatched:
  own, theirs = record.answer, other.answer
  if type(own) is not type(theirs):
    raise ValueError(
      f'{place}: a text beside messages: all prompts of a source are the one or the other'
    )
  if isinstance(own, TextRecord):
    return Mismatched(record, TextRecord(own.prompt, theirs.completion))
  messages = [*own.messages[: own.given], *theirs.messages[theirs.given :]]
  return Mismatched(record, ChatRecord(messages, own.tools, own.given))


class JudgedWriter:
  """Makes examples of `mismatched` records; arguments as ExampleWriter has them."""

  def __init__(self, tokenizer: Tokenizer, template: str = ''):
    self._writer = ExampleWriter(tokenizer, template)

  def example(self, place: str, record: Mismatched) -> Choice:
    """Raises ValueError, naming the place, for an answer that makes no example."""
    own, other = (
      trimmed(self._writer.example(place, each)) for each in (record.record.answer, record.other)
    )
    return Choice.of(own, other, float(record.record.label))


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedSettings(ChoiceSettings):
  """What is made of prompts with an answer that was judged.

  Attributes:
    too_long: what becomes of an answer and another one with their prompts of more than
      data.sequence_length tokens together, when the other one is cut down to one token: 'drop', or
      cut the 'left' or the 'right' end of both prompts off, alike.
  """

  tunes = 'kto'
  formats = ('judged',)
  sides = SIDES
  differ = False

  def writer(self, tokenizer):
    template = self._template()
    writer = JudgedWriter(tokenizer, template)
    return writer, tokenizer.with_template(template) if template else tokenizer

  def facts(self, config):
    return super().facts(config) | {'choices': 'judged, beside another prompt'}

  def completed(self, placed):
    return mismatched(placed)

  def question(self, record):
    return question(record.record)

  def identity(self, example):
    own, _ = example.halves
    return own.ids.tobytes() + own.scored.tobytes() + bytes([int(example.notes[1])])

  def fitted(self, example, config, reserved=0):
    own, other = example.halves
    over = len(example.ids) - 2 + 2 * reserved - config.sequence_length
    least = int(other.scored.argmax()) + 1
    if over <= 0 or len(other.ids) == least:
      return super().fitted(example, config, reserved)
    # Of the other answer only a statistic is read: its end is what gives way.
    keep = slice(max(len(other.ids) - over, least))
    other = trimmed(Example(other.ids[keep], other.scored[keep]))
    fitted = super().fitted(Choice.of(own, other, example.notes[1]), config, reserved)
    return Fitted(fitted.example, fitted.cut or SIDES[1:], fitted.dropped)
