"""What rows become records, and what is said of those that are none."""

import csv
import gzip
import json

import pytest

from data import config
from data.config import DataConfig, SourceConfig
from data.records import (
  FIELDS,
  FORMATS,
  ChatRecord,
  JudgedRecord,
  LabelRecord,
  PreferenceRecord,
  TextRecord,
  records,
)

CHAT = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'}]


def source(path, **fields):
  return SourceConfig(path=str(path), **{'kind': 'jsonl', **fields})


def jsonl(tmp_path, *rows, name='rows.jsonl'):
  path = tmp_path / name
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def read(path, **fields):
  return [record for _, record in records(source(path, **fields))]


@pytest.mark.parametrize(
  'format, row, record',
  [
    ('chat', {'messages': CHAT, 'id': 3}, ChatRecord(CHAT)),
    ('chat', {'messages': CHAT, 'tools': [{'name': 'f'}]}, ChatRecord(CHAT, [{'name': 'f'}])),
    (
      'sharegpt',
      {
        'system': 'Be brief.',
        'conversations': [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Hello.'}],
      },
      ChatRecord([{'role': 'system', 'content': 'Be brief.'}, *CHAT]),
    ),
    (
      'alpaca',
      {'instruction': 'Add.', 'input': '1 2', 'output': '3'},
      ChatRecord(
        [{'role': 'user', 'content': 'Add.\n\n1 2'}, {'role': 'assistant', 'content': '3'}]
      ),
    ),
    (
      'alpaca',
      {'instruction': 'Hi', 'input': '', 'output': 'Hello.'},
      ChatRecord(CHAT),
    ),
    ('completion', {'prompt': 'a', 'completion': ' b'}, TextRecord('a', ' b')),
    (
      'completion',
      {'prompt': CHAT[:1], 'completion': CHAT[1:]},
      ChatRecord(CHAT, given=1),
    ),
    ('label', {'text': 'a', 'label': 'good '}, LabelRecord('a', 'good')),
    ('label', {'text': 'a', 'label': 0}, LabelRecord('a', '0')),
    (
      'preference',
      {'prompt': 'a', 'chosen': ' b', 'rejected': ' c', 'margin': 2},
      PreferenceRecord(TextRecord('a', ' b'), TextRecord('a', ' c'), 2.0),
    ),
    (
      'preference',
      {'prompt': CHAT[:1], 'chosen': 'Hello.', 'rejected': CHAT[1:], 'tools': [{'name': 'f'}]},
      PreferenceRecord(*[ChatRecord(CHAT, [{'name': 'f'}], given=1)] * 2),
    ),
    (
      'judged',
      {'prompt': CHAT[:1], 'completion': CHAT[1:], 'label': False},
      JudgedRecord(ChatRecord(CHAT, given=1), False),
    ),
  ],
)
def test_a_row_is_the_record_that_its_format_says(tmp_path, format, row, record):
  assert read(jsonl(tmp_path, row), format=format) == [record]


def test_rows_of_every_kind_of_file_are_the_same_records(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  rows = [{'prompt': f'a, "{i}"\n', 'completion': ' b'} for i in range(3)]
  plain = jsonl(tmp_path, *rows)
  with gzip.open(tmp_path / 'rows.jsonl.gz', 'wb') as file:
    file.write(plain.read_bytes())
  (tmp_path / 'rows.csv').write_text(
    'completion,prompt\n' + ''.join(f' b,"a, ""{i}""\n"\n' for i in range(3))
  )
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'rows.parquet')
  expected = [TextRecord(row['prompt'], row['completion']) for row in rows]
  for name in ('rows.jsonl', 'rows.jsonl.gz', 'rows.csv', 'rows.parquet'):
    kind = name.split('.')[1]
    assert read(tmp_path / name, kind=kind, format='completion') == expected, name


def test_nested_columns_of_a_parquet_file_are_messages(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  parquet.write_table(pyarrow.Table.from_pylist([{'messages': CHAT}]), tmp_path / 'a.parquet')
  assert read(tmp_path / 'a.parquet', kind='parquet', format='chat') == [ChatRecord(CHAT)]


def test_messages_of_a_csv_are_json(tmp_path):
  text = json.dumps(CHAT).replace('"', '""')
  (tmp_path / 'a.csv').write_text(f'messages\n"{text}"\n')
  assert read(tmp_path / 'a.csv', kind='csv', format='chat') == [ChatRecord(CHAT)]


@pytest.mark.parametrize(
  'format, row',
  [
    ('completion', {'prompt': CHAT[:1], 'completion': CHAT[1:]}),
    ('completion', {'prompt': '[a]', 'completion': '[1, 2]'}),
    ('preference', {'prompt': CHAT[:1], 'chosen': 'b', 'rejected': CHAT[1:]}),
    ('judged', {'prompt': CHAT[:1], 'completion': CHAT[1:], 'label': True}),
    ('prompt', {'prompt': CHAT[:1]}),
    ('prompt', {'prompt': '[]'}),
  ],
)
def test_messages_of_a_csv_are_those_of_other_files_in_every_format(tmp_path, format, row):
  plain = jsonl(tmp_path, row)
  with open(tmp_path / 'a.csv', 'w', newline='') as file:
    texts = [x if isinstance(x, str) else json.dumps(x) for x in row.values()]
    csv.writer(file).writerows([row, texts])
  (ours,), (theirs,) = (
    read(tmp_path / 'a.csv', kind='csv', format=format),
    read(plain, format=format),
  )
  if format == 'prompt':
    assert (ours.prompt, ours.tools) == (theirs.prompt, theirs.tools)
  else:
    assert ours == theirs


def test_a_text_and_messages_of_a_csv_are_no_pair(tmp_path):
  text = json.dumps(CHAT[1:]).replace('"', '""')
  (tmp_path / 'a.csv').write_text(f'prompt,completion,chosen,rejected\nHi,"{text}","{text}",b\n')
  for format in ('completion', 'preference'):
    with pytest.raises(ValueError, match='must be a text, as the '):
      read(tmp_path / 'a.csv', kind='csv', format=format)


def test_no_tools_are_no_tools(tmp_path):
  """A question has one hash (data.splits), however its rows say that there are none."""
  rows = [{'messages': CHAT} | more for more in ({}, {'tools': None}, {'tools': []})]
  assert read(jsonl(tmp_path, *rows), format='chat') == [ChatRecord(CHAT)] * 3


def test_columns_may_have_other_names(tmp_path):
  path = jsonl(tmp_path, {'question': 'a', 'answer': 'b'})
  columns = ('prompt=question', 'completion=answer')
  assert read(path, format='completion', columns=columns) == [TextRecord('a', 'b')]


@pytest.mark.parametrize(
  'format, row, said',
  [
    ('chat', {'text': 'a'}, "field 'messages' .* must be a list of .*, and is missing .*'text'"),
    ('chat', {'messages': []}, r"field 'messages' .* must be a list of .*, and is \[\]"),
    ('chat', {'messages': 'Hi'}, "field 'messages' .* must be a list of .*, and is 'Hi'"),
    (
      'chat',
      {'messages': [CHAT[0], {'content': 'a'}]},
      r"field 'messages\[1\]' .* must be a message",
    ),
    ('chat', {'messages': CHAT, 'tools': 'f'}, "field 'tools' .* must be a list of JSON schemas"),
    (
      'sharegpt',
      {'conversations': [{'from': 'bing', 'value': 'a'}]},
      r"field 'conversations\[0\]' .* must be a turn, .* from one of human, user, gpt",
    ),
    ('alpaca', {'instruction': 'a', 'output': 3}, "field 'output' .* must be a text, and is 3"),
    ('completion', {'prompt': 'a'}, "field 'completion' .* must be a text, as the other one is"),
    ('completion', {'prompt': 'a', 'completion': CHAT}, "field 'completion' .* must be a text"),
    ('label', {'text': 'a'}, "field 'label' .* must be a name or a whole number, and is missing"),
    ('label', {'text': 'a', 'label': True}, "field 'label' .* must be a name.*, and is True"),
    ('preference', {'prompt': 'a', 'chosen': 'b'}, "field 'rejected' .* must be a text"),
    (
      'preference',
      {'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'margin': 'much'},
      "field 'margin' .* must be a finite number, or nothing, and is 'much'",
    ),
    (
      'judged',
      {'prompt': 'a', 'completion': 'b', 'label': 1},
      "field 'label' .* must be true or false, and is 1",
    ),
  ],
)
def test_a_row_that_is_no_record_is_named(tmp_path, format, row, said):
  good = {
    'chat': {'messages': CHAT},
    'sharegpt': {'conversations': [{'from': 'human', 'value': 'a'}]},
    'alpaca': {'instruction': 'a', 'output': 'b'},
    'completion': {'prompt': 'a', 'completion': 'b'},
    'label': {'text': 'a', 'label': 'b'},
    'preference': {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'},
    'judged': {'prompt': 'a', 'completion': 'b', 'label': True},
  }[format]
  path = jsonl(tmp_path, good, row)
  with pytest.raises(ValueError, match=f'rows.jsonl:2: {said}'):
    read(path, format=format)


@pytest.mark.parametrize(
  'kind, content, said',
  [
    ('jsonl', b'{"prompt": "a", "completion": "b"}\n{"prompt"\n', 'a:2 is not JSON'),
    ('jsonl', b'["a"]\n', 'a:1 holds list, not an object'),
    ('jsonl', b'{"prompt": "\xff"}\n', 'a: not UTF-8'),
    ('csv', b'prompt,completion\na\n', 'a:2: this row does not have the 2 columns'),
    ('csv', b'prompt,completion\na,b,c\n', 'a:2: this row does not have the 2 columns'),
    ('csv', b'prompt,completion\na,"b\n', 'a:2: unexpected end of data'),
  ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, kind, content, said):
  (tmp_path / 'a').write_bytes(content)
  with pytest.raises(ValueError, match=said):
    read(tmp_path / 'a', kind=kind, format='completion')


def test_what_a_source_cannot_be_is_said_at_once():
  with pytest.raises(ValueError, match="source.format='chat' with kind='text'"):
    SourceConfig(kind='text', path='a', format='chat')
  with pytest.raises(ValueError, match='source.text_field=.a. with kind=.jsonl.: leave it'):
    SourceConfig(kind='jsonl', path='a', format='chat', text_field='a')
  with pytest.raises(ValueError, match='source.columns=.* source.format is empty'):
    SourceConfig(kind='jsonl', path='a', text_field='a', columns=('prompt=a',))
  with pytest.raises(ValueError, match='data.validation has sources of its own'):
    DataConfig(validation=(SourceConfig(),))
  with pytest.raises(ValueError, match='data.validation_fraction=0 .* is for data.validation'):
    DataConfig(validation_fraction=0)


def test_a_column_of_no_field_is_refused(tmp_path):
  with pytest.raises(ValueError, match="source.columns='question' is unknown.* Known: prompt"):
    read(jsonl(tmp_path), format='completion', columns=('question=prompt',))


def test_every_format_says_which_fields_it_has():
  assert FIELDS.keys() == FORMATS.keys() == {*config.FORMATS} - {''}


@pytest.mark.parametrize(
  'format, row, said',
  [
    ('sharegpt', {'conversations': [{'from': ['human'], 'value': 'Hi'}]}, 'must be a turn'),
    ('sharegpt', {'conversations': [{'from': {}, 'value': 'Hi'}]}, 'must be a turn'),
    ('preference', {'margin': int('9' * 400)}, 'must be a finite number'),
    ('preference', {'margin': -int('9' * 400)}, 'must be a finite number'),
  ],
)
def test_values_that_cannot_be_looked_up_or_counted_are_told_by_name(tmp_path, format, row, said):
  answers = {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}
  with pytest.raises(ValueError, match=f'rows.jsonl:1: field .* {said}'):
    read(jsonl(tmp_path, answers | row), format=format)
