"""Which records are held out? By a hash of what each asks, whatever is answered: a prompt that is
held out is in no record that is trained on, however many answers it has, and in whatever format.
"""

import hashlib
import json
from collections.abc import Sequence

from data.conversations import ASSISTANT
from data.records import (
  ChatRecord,
  JudgedRecord,
  LabelRecord,
  PairRecord,
  PreferenceRecord,
  PromptRecord,
  Record,
  Row,
  TextRecord,
)

ASKS_NOTHING = ('system', 'developer', ASSISTANT)


def question(record: Record) -> bytes:
  """What a record asks: its prompt, source or text, or its messages before the first answer to one;
  where that is nothing, all of the record.
  """
  if isinstance(record, PreferenceRecord):
    return question(record.chosen)
  if isinstance(record, JudgedRecord):
    return question(record.answer)
  if isinstance(record, ChatRecord):
    return _messages(record.messages, record.tools, record.given)
  if isinstance(record, PromptRecord):
    if not isinstance(record.prompt, str):
      return _messages(record.prompt, record.tools, len(record.prompt))
    return _text(record.prompt or json.dumps(record.row, sort_keys=True, default=str))
  if isinstance(record, TextRecord):
    return _text(record.prompt or record.completion)
  if isinstance(record, PairRecord):
    return _text(record.source)
  assert isinstance(record, LabelRecord)
  return _text(record.text)


def share_of(asked: bytes) -> float:
  """Of all hashes, the share that is below that of what `question` gave; below the share that is to
  be held out, its record is.
  """
  digest = hashlib.blake2b(asked, digest_size=16).digest()
  return int.from_bytes(digest[:8], 'little') / 2.0**64


def _text(text: str) -> bytes:
  return text.encode('utf-8', 'surrogatepass')


def _messages(messages: Sequence[Row], tools: list | None, given: int) -> bytes:
  """given: how many of them are a prompt, whose answers are none."""
  asked = [message['role'] not in ASKS_NOTHING for message in messages]
  answers = (
    i
    for i, message in enumerate(messages)
    if i >= given and message['role'] == ASSISTANT and any(asked[:i])
  )
  # As chat templates have it, a value that is None is one that is missing.
  before = [
    {key: value for key, value in message.items() if value is not None}
    for message in messages[: next(answers, len(messages))]
  ]
  return _text(json.dumps([before, tools], sort_keys=True, default=str))
