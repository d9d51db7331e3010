"""What is a record to tune on, and which fields of a row say what? Rows of JSONL, CSV and Parquet
files, read by a format that is named and never guessed.

A record is a conversation (`messages`, perhaps with `tools`), a prompt with its completion, or a
source with its target, a text with its label, a prompt with two answers of which one is preferred,
or with one that was judged, or a prompt alone. What a row has besides its format's fields is not
read, but for what judges the answers to a prompt.
"""

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import files
import names
from data import compressed, parquet
from data.config import SourceConfig
from data.sources import paths

Row = dict[str, Any]
SHOWN = 60  # characters of a value, in a message


@dataclasses.dataclass(frozen=True)
class ChatRecord:
  """Messages as chat templates take them.

  Attributes:
    messages: [{'role': .., 'content': ..}, ..].
    tools: what the assistant may call, as JSON schemas; None for none.
    given: how many messages are a prompt, of which nothing is scored.
  """

  messages: list[dict]
  tools: list | None = None
  given: int = 0


@dataclasses.dataclass(frozen=True)
class TextRecord:
  """A text, and the text that follows it."""

  prompt: str
  completion: str


@dataclasses.dataclass(frozen=True)
class PairRecord:
  """A text that an encoder reads, and the text that a decoder is to write of it."""

  source: str
  target: str


@dataclasses.dataclass(frozen=True)
class LabelRecord:
  """A text, and which of several labels it has."""

  text: str
  label: str


@dataclasses.dataclass(frozen=True)
class PreferenceRecord:
  """A prompt with two answers, each as it would be without the other.

  Attributes:
    chosen, rejected: the prompt with either.
    margin: by how much the chosen one is better, for who reads it; 0 where nothing is said.
  """

  chosen: ChatRecord | TextRecord
  rejected: ChatRecord | TextRecord
  margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class JudgedRecord:
  """A prompt with an answer, and whether it is wanted."""

  answer: ChatRecord | TextRecord
  label: bool


@dataclasses.dataclass(frozen=True)
class PromptRecord:
  """A prompt that a model is to answer.

  Attributes:
    prompt: a text, or messages. tools: as of ChatRecord.
    row: all that its row says: what a reward may read.
  """

  prompt: str | list[dict]
  tools: list | None
  row: Row


Record = (
  ChatRecord
  | TextRecord
  | PairRecord
  | LabelRecord
  | PreferenceRecord
  | JudgedRecord
  | PromptRecord
)


def records(source: SourceConfig) -> Iterator[tuple[str, Record]]:
  """The records of a source in a fixed order, each behind its place, 'file:line'.

  Raises ValueError for a row that is none, naming place, field, and what was expected; and for a
    file that cannot be read.
  """
  read = FORMATS[source.format]
  fields = _Fields(source)
  for path in paths(source):
    for place, row in rows(source.kind, path):
      yield place, read(fields.of(place, row))


def rows(kind: str, path: str) -> Iterator[tuple[str, Row]]:
  """Rows of one file, each behind its place. Raises ValueError for what holds none."""
  try:
    yield from READERS[kind](path)
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: not UTF-8 ({error.reason}); save it as UTF-8') from error
  except compressed.damaged() as error:
    raise ValueError(f'{path} cannot be read to its end: {error}') from error


def json_rows(path: str) -> Iterator[tuple[str, Row]]:
  """Of a file with a JSON object in each line; empty lines are none."""
  with compressed.opened(path) as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        place = f'{path}:{number}'
        yield place, files.json_object(line.decode('utf-8-sig'), place)


def csv_rows(path: str) -> Iterator[tuple[str, Row]]:
  """Of a file with a line of columns; its values are texts. A row's line is its first one."""
  csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
  with (
    compressed.opened(path) as file,
    io.TextIOWrapper(file, encoding='utf-8-sig', newline='') as lines,
  ):
    reader = csv.DictReader(lines, strict=True)
    columns, place = reader.fieldnames or [], f'{path}:1'
    try:
      while True:
        place = f'{path}:{reader.line_num + 1}'
        row = next(reader, None)
        if row is None:
          return
        if None in row or None in row.values():
          raise ValueError(
            f'{place}: this row does not have the {len(columns)} columns of the first '
            f'line ({", ".join(columns)}); quote values that hold commas'
          )
        yield place, row
    except csv.Error as error:
      raise ValueError(f'{place}: {error}; mend the row') from error


READERS = {'jsonl': json_rows, 'csv': csv_rows, 'parquet': parquet.rows}


class _Fields:
  """Which column each field of a source's format is in."""

  def __init__(self, source: SourceConfig):
    self._kind, self._format, self._columns = source.kind, source.format, {}
    for entry in source.columns:
      field, _, column = entry.partition('=')
      known = [name for name, _ in FIELDS[source.format]]
      names.check('source.columns', field, known)
      if not column:
        raise ValueError(
          f'source.columns has {entry!r}; write FIELD=COLUMN, as in {field}=question'
        )
      self._columns[field] = column

  def of(self, place: str, row: Row) -> '_Reader':
    return _Reader(place, row, self._columns, self._format, texts=self._kind == 'csv')


@dataclasses.dataclass(frozen=True)
class _Reader:
  """A row whose fields are asked for by what they must be. texts: all values are, and what is more
  than a text is JSON in one.
  """

  place: str
  row: Row
  columns: Mapping[str, str]
  format: str
  texts: bool

  def value(self, field: str) -> Any:
    """None where it is not there."""
    return self.row.get(self.columns.get(field, field))

  def text(self, field: str, default: str | None = None) -> str:
    value = self.value(field)
    if value is None and default is not None:
      return default
    if not isinstance(value, str):
      raise self.wrong(field, 'a text')
    return value

  def is_text(self, field: str) -> bool:
    """Whether it is one; in files of texts, one that is no list of messages."""
    value = self.value(field)
    if not self.texts or not isinstance(value, str) or not value.lstrip().startswith('['):
      return isinstance(value, str)
    try:
      parsed = json.loads(value)
    except (ValueError, RecursionError):
      return True
    return not parsed or not all(isinstance(x, Mapping) and 'role' in x for x in parsed)

  def name(self, field: str) -> str:
    """A text that is not empty, or a whole number as one."""
    value = self.value(field)
    if isinstance(value, int) and not isinstance(value, bool):
      return str(value)
    if not isinstance(value, str) or not value.strip():
      raise self.wrong(field, 'a name or a whole number')
    return value.strip()

  def number(self, field: str, default: float) -> float:
    """A finite one, or a text that is one in files of texts."""
    value = self.value(field)
    if value is None or self.texts and value == '':
      return default
    if self.texts and isinstance(value, str):
      value = files.parsed(value, f'{self.place}: {field}')
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared as it is: a whole number may be beyond what becomes a float.
    if not number or not abs(value) <= sys.float_info.max:
      raise self.wrong(field, 'a finite number, or nothing')
    return float(value)

  def truth(self, field: str) -> bool:
    value = self.value(field)
    if self.texts and isinstance(value, str):
      value = {'true': True, 'false': False}.get(value.strip().lower())
    if not isinstance(value, bool):
      raise self.wrong(field, 'true or false')
    return value

  def items(self, field: str, of: str, optional: bool = False) -> list | None:
    value = self.value(field)
    if optional and value in (None, ''):
      return None
    if self.texts and isinstance(value, str):
      value = files.parsed(value, f'{self.place}: {field}')
    if isinstance(value, str) or not isinstance(value, Sequence) or not (value or optional):
      raise self.wrong(field, f'a list of {of}')
    return [*value] or None

  def messages(self, field: str) -> list[dict]:
    given = self.items(field, '{"role": .., "content": ..}')
    for i, message in enumerate(given):
      if not isinstance(message, Mapping) or not isinstance(message.get('role'), str):
        raise self.wrong(f'{field}[{i}]', 'a message, {"role": .., "content": ..}', message)
    return [dict(message) for message in given]

  def wrong(self, field: str, expected: str, value: Any = ...) -> ValueError:
    column = self.columns.get(field, field)
    if value is ... and column not in self.row:
      seen = f'is missing (this row has {", ".join(map(repr, self.row)) or "nothing"})'
    else:
      shown = repr(self.value(field) if value is ... else value)
      seen = f'is {shown[:SHOWN]}{"..." * (len(shown) > SHOWN)}'
    return ValueError(
      f'{self.place}: field {column!r} of format {self.format!r} must be {expected}, and {seen}; '
      'mend the row, set source.format, or name the column by source.columns'
    )


def _chat(row: _Reader) -> ChatRecord:
  return ChatRecord(row.messages('messages'), row.items('tools', 'JSON schemas', optional=True))


# Who speaks, as ShareGPT's rows spell it, and as chat templates do.
SPEAKERS = {
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
  'system': 'system',
  'tool': 'tool',
}


def _sharegpt(row: _Reader) -> ChatRecord:
  messages = []
  for i, turn in enumerate(row.items('conversations', '{"from": .., "value": ..}')):
    speaker = turn.get('from') if isinstance(turn, Mapping) else None
    known = isinstance(speaker, str) and speaker in SPEAKERS
    if not known or not isinstance(turn.get('value'), str):
      speakers = ', '.join(SPEAKERS)
      expected = f'a turn, {{"from": .., "value": ..}}, from one of {speakers}'
      raise row.wrong(f'conversations[{i}]', expected, turn)
    messages.append({'role': SPEAKERS[speaker], 'content': turn['value']})
  return ChatRecord(
    _behind_system(row, messages), row.items('tools', 'JSON schemas', optional=True)
  )


def _alpaca(row: _Reader) -> ChatRecord:
  asked, about = row.text('instruction'), row.text('input', default='')
  messages = [
    {'role': 'user', 'content': f'{asked}\n\n{about}' if about else asked},
    {'role': 'assistant', 'content': row.text('output')},
  ]
  return ChatRecord(_behind_system(row, messages))


def _behind_system(row: _Reader, messages: list[dict]) -> list[dict]:
  system = row.text('system', default='')
  return [{'role': 'system', 'content': system}, *messages] if system else messages


def _completion(row: _Reader) -> Record:
  texts = [field for field in ('prompt', 'completion') if row.is_text(field)]
  if len(texts) == 2:
    return TextRecord(row.value('prompt'), row.value('completion'))
  if texts:
    other = 'completion' if texts == ['prompt'] else 'prompt'
    raise row.wrong(other, 'a text, as the other one is')
  prompt, completion = row.messages('prompt'), row.messages('completion')
  tools = row.items('tools', 'JSON schemas', optional=True)
  return ChatRecord([*prompt, *completion], tools, given=len(prompt))


def _preference(row: _Reader) -> PreferenceRecord:
  chosen, rejected = (_answered(row, field) for field in ('chosen', 'rejected'))
  return PreferenceRecord(chosen, rejected, row.number('margin', default=0.0))


def _judged(row: _Reader) -> JudgedRecord:
  return JudgedRecord(_answered(row, 'completion'), row.truth('label'))


def _answered(row: _Reader, field: str) -> ChatRecord | TextRecord:
  """The prompt with the answer of a field, as `_completion` has both; a text behind messages is a
  turn of the assistant.
  """
  if row.is_text('prompt'):
    if not row.is_text(field):
      raise row.wrong(field, 'a text, as the prompt is')
    return TextRecord(row.value('prompt'), row.value(field))
  prompt, tools = row.messages('prompt'), row.items('tools', 'JSON schemas', optional=True)
  if row.is_text(field):
    answer = [{'role': SPEAKERS['gpt'], 'content': row.value(field)}]
  else:
    answer = row.messages(field)
  return ChatRecord([*prompt, *answer], tools, given=len(prompt))


def _prompt(row: _Reader) -> PromptRecord:
  prompt = row.value('prompt') if row.is_text('prompt') else row.messages('prompt')
  return PromptRecord(prompt, row.items('tools', 'JSON schemas', optional=True), row.row)


def _pair(row: _Reader) -> PairRecord:
  return PairRecord(row.text('source'), row.text('target'))


def _label(row: _Reader) -> LabelRecord:
  return LabelRecord(row.text('text'), row.name('label'))


FORMATS: dict[str, Callable[[_Reader], Record]] = {
  'chat': _chat,
  'sharegpt': _sharegpt,
  'alpaca': _alpaca,
  'completion': _completion,
  'pair': _pair,
  'label': _label,
  'preference': _preference,
  'judged': _judged,
  'prompt': _prompt,
}
# The fields of each format, and what they say.
FIELDS = {
  'chat': (
    ('messages', '[{"role": .., "content": ..}, ..]'),
    ('tools', 'JSON schemas, or nothing'),
  ),
  'sharegpt': (
    ('conversations', '[{"from": "human", "value": ..}, ..]'),
    ('system', 'a text, or nothing'),
    ('tools', 'JSON schemas, or nothing'),
  ),
  'alpaca': (
    ('instruction', 'a text'),
    ('input', 'a text behind it, or nothing'),
    ('output', 'the answer'),
    ('system', 'a text, or nothing'),
  ),
  'completion': (
    ('prompt', 'a text, or messages'),
    ('completion', 'the text that follows, or messages'),
    ('tools', 'JSON schemas, or nothing'),
  ),
  'pair': (
    ('source', 'a text'),
    ('target', 'the text that is written of it'),
  ),
  'label': (
    ('text', 'a text'),
    ('label', 'which one it is, a name or a whole number'),
  ),
  'preference': (
    ('prompt', 'a text, or messages'),
    ('chosen', 'the answer that is preferred, a text, or messages'),
    ('rejected', 'the other one, a text, or messages'),
    ('margin', 'by how much it is preferred, a number, or nothing'),
    ('tools', 'JSON schemas, or nothing'),
  ),
  'judged': (
    ('prompt', 'a text, or messages'),
    ('completion', 'an answer, a text, or messages'),
    ('label', 'whether it is wanted, true or false'),
    ('tools', 'JSON schemas, or nothing'),
  ),
  'prompt': (
    ('prompt', 'a text, or messages'),
    ('tools', 'JSON schemas, or nothing'),
  ),
}
