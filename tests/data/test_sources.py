"""Sources: every kind reads what it should, in order;
bad input is counted and loses nothing else.
"""

import json
import os
import sys

import pytest

from data import sources
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig


def read(source):
  problems = sources.Problems()
  return list(sources.documents(source, problems)), dict(problems)


def test_text_globs_are_sorted_and_undecodable_files_counted(tmp_path):
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'b.txt').write_bytes('\ufeffsecond\r\n'.encode())
  (tmp_path / 'a.txt').write_text('first')
  (tmp_path / 'c.txt').write_bytes(b'\xff\xfe\xfa')
  (tmp_path / 'sub' / 'd.txt').write_text('fourth')
  assert read(SourceConfig(kind='text', path=f'{tmp_path}/**/*.txt')) == (
    ['first', 'second\r\n', 'fourth'],
    {'undecodable': 1},
  )


def test_jsonl_counts_every_bad_line_and_keeps_the_others(tmp_path):
  lines = [
    json.dumps({'t': 'one\ntwo'}).encode(),
    b'',
    b'{"t": ',
    b'[1]',
    b'{"t": 3}',
    b'{"u": "x"}',
    b'{"t": "\xff"}',
    b'{"t": "\\ud800"}',
    b'{"t": "last"}',
  ]
  (tmp_path / 'a.jsonl').write_bytes(b'\n'.join(lines))
  assert read(SourceConfig(kind='jsonl', path=str(tmp_path / 'a.jsonl'), text_field='t')) == (
    ['one\ntwo', '\ud800', 'last'],
    {'malformed': 1, 'no_text': 3, 'undecodable': 1},
  )


def test_csv_reads_quoted_newlines_and_long_fields(tmp_path):
  long = 'x' * 200_000
  (tmp_path / 'a.csv').write_text(f'id,body\n1,"two\nlines, ""quoted"""\n2,{long}\n3\n')
  assert read(SourceConfig(kind='csv', path=str(tmp_path / 'a.csv'), text_field='body')) == (
    ['two\nlines, "quoted"', long],
    {'no_text': 1},
  )
  with pytest.raises(ValueError, match="no column 'text'; its columns: id, body"):
    read(SourceConfig(kind='csv', path=str(tmp_path / 'a.csv'), text_field='text'))


def test_stdlib_is_the_librarys_own_source_without_tests():
  found = sources.paths(SourceConfig())
  assert found == sorted(found)
  names = {os.path.basename(path) for path in found}
  assert {'argparse.py', 'dataclasses.py'} <= names
  assert not any(sources.STDLIB_EXCLUDED.intersection(path.split(os.sep)) for path in found)
  assert 5e6 < sum(map(os.path.getsize, found)) < 5e7


def test_nothing_found_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError, match='correct the path or glob'):
    sources.paths(SourceConfig(kind='text', path=f'{tmp_path}/*.txt'))


def test_digest_follows_content_and_remembers_only_old_files(tmp_path):
  file, memo = tmp_path / 'a.txt', tmp_path / 'memo.json'
  file.write_text('one')
  first = sources.content_digest([str(file)], memo)
  assert not memo.exists()  # it has just been written: it could change again under the same mtime
  os.utime(file, (1e9, 1e9))
  assert sources.content_digest([str(file)], memo) == first
  assert list(json.loads(memo.read_text())) == [str(file)]
  file.write_text('two')
  os.utime(file, (1e9 + 1, 1e9 + 1))
  assert sources.content_digest([str(file)], memo) != first


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: SourceConfig(kind='json'), "did you mean 'jsonl'"),
    (lambda: SourceConfig(kind='text'), 'give a file or a glob'),
    (lambda: SourceConfig(path='x'), "leave it ''"),
    (lambda: SourceConfig(kind='jsonl', path='x'), 'name the field'),
    (lambda: SourceConfig(kind='text', path='x', text_field='t'), 'whole file'),
    (lambda: SourceConfig(weight=0.0), 'must be positive'),
    (lambda: CleanConfig(filters='pros'), "did you mean 'prose'"),
    (lambda: CleanConfig(anonymise=('mail',)), "did you mean 'email'"),
    (lambda: CleanConfig(near_duplicates=0.2), r'\[0.5, 1\]'),
    (lambda: TokenizerConfig(kind='bytes'), "did you mean 'byte'"),
    (lambda: TokenizerConfig(kind='byte', path='x.model'), "kind='byte' has nothing to load"),
    (lambda: TokenizerConfig(vocabulary=300), '>= 512'),
    (lambda: DataConfig(sources=()), 'at least one'),
    (lambda: DataConfig(batch_size=0), '>= 1'),
    (lambda: DataConfig(validation_fraction=1.0), 'between 0 and 1'),
    (lambda: DataConfig(split='head'), 'Known: hash, tail'),
    (lambda: DataConfig(seed=-1), '2\\*\\*32'),
  ],
)
def test_impossible_configs_are_refused_with_a_remedy(make, message):
  with pytest.raises(ValueError, match=message):
    make()


HARD_JSON = [
  b'9' * 5000,
  b'[' * 100_000,
  b'{"t": ' * 100_000,
  b'{"t": "\xff"}',
  b'{"t": 1e',
  b'\x00',
]


def test_a_line_that_no_parser_likes_is_counted_with_its_place(tmp_path, monkeypatch):
  file = tmp_path / 'a.jsonl'
  for hard in HARD_JSON:
    file.write_bytes(b'{"t": "one"}\n\n%b\n%b\n{"t": "two"}\n' % (hard, hard))
    problems = sources.Problems()
    source = SourceConfig(kind='jsonl', path=str(file), text_field='t')
    assert list(sources.documents(source, problems)) == ['one', 'two']
    (kind,) = problems
    assert problems[kind] == 2 and problems.first == {kind: f'{file}:3'}
  (tmp_path / 'a.csv').write_text('t\none\n' + 'x' * 5000 + '\ntwo\n')
  monkeypatch.setattr(sys, 'maxsize', 4000)  # csv's own limit, which else takes 2 GB
  source = SourceConfig(kind='csv', path=str(tmp_path / 'a.csv'), text_field='t')
  assert read(source) == (['one', 'two'], {'malformed': 1})


def test_a_damaged_memo_is_made_anew(tmp_path):
  file, memo = tmp_path / 'a.txt', tmp_path / 'sources.json'
  file.write_text('one')
  os.utime(file, (1e9, 1e9))
  digest, whole = sources.content_digest([str(file)], memo), memo.read_bytes()
  entry = json.loads(whole)[str(file)]
  shapes = [[*entry[:2], 7], [*entry[:2], 'zz'], entry[:2], 7, None, {}]
  others = [json.dumps({str(file): shape}).encode() for shape in shapes]
  for damaged in (*HARD_JSON, b'', b'[]', b'7', whole[:-9], *others):
    memo.write_bytes(damaged)
    assert sources.content_digest([str(file)], memo) == digest
    assert memo.read_bytes() == whole
