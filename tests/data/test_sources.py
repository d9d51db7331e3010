"""Sources: every kind reads what it should, in order;
bad input is counted and loses nothing else.
"""

import bz2
import gzip
import json
import lzma
import os
import sys
import types

import pytest

from data import compressed, sources
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
    (lambda: SourceConfig(path='x'), "set source.kind='text'"),
    (lambda: TokenizerConfig(vocabulary=1e20), 'must be a whole number'),
    (lambda: TokenizerConfig(vocabulary=10**20), r'must be in \[0, 16777216\]'),
    (lambda: TokenizerConfig(training_bytes=10**20), r'must be in \[1000, '),
    (lambda: DataConfig(batch_size=10**9), 'positions, of at most .*; lower'),
    (lambda: DataConfig(batch_size=1e9), 'must be a whole number'),
    (lambda: DataConfig(sequence_length=10**9, batch_size=1), 'must be at most'),
    (lambda: DataConfig(seed=0.5), 'must be a whole number'),
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


PACKERS = {'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress}


@pytest.mark.parametrize('ending', PACKERS)
def test_compressed_files_read_as_others_and_damaged_ones_up_to_the_damage(tmp_path, ending):
  lines = b''.join(b'{"t": "%032x"}\n' % (i * 7**30 % 2**127) for i in range(20_000))
  contents = {'a.jsonl': lines, 'b.csv': b't\none\n"two\nlines"\n', 'c.txt': '\ufeffé'.encode()}
  for name, content in contents.items():
    (tmp_path / f'{name}.{ending}').write_bytes(PACKERS[ending](content))
  kinds = {'a.jsonl': ('jsonl', 't'), 'b.csv': ('csv', 't'), 'c.txt': ('text', '')}
  read_all = {
    name: read(SourceConfig(kind=kind, text_field=field, path=f'{tmp_path}/{name}.{ending}'))
    for name, (kind, field) in kinds.items()
  }
  assert len(read_all['a.jsonl'][0]) == 20_000 and not read_all['a.jsonl'][1]
  assert read_all['b.csv'] == (['one', 'two\nlines'], {})
  assert read_all['c.txt'] == (['é'], {})

  packed = tmp_path / f'a.jsonl.{ending}'
  whole = packed.read_bytes()
  half = len(whole) // 2
  source = SourceConfig(kind='jsonl', text_field='t', path=str(packed))
  for damaged in (whole[:half], b'plain'):
    packed.write_bytes(damaged)
    documents, problems = read(source)
    assert documents == read_all['a.jsonl'][0][: len(documents)]
    assert problems.pop('unreadable') == 1 and not problems
  # Bits that changed are seen at the next checksum: what came before is counted as it is.
  packed.write_bytes(whole[:half] + bytes([whole[half] ^ 255]) * 9 + whole[half + 9 :])
  assert read(source)[1]['unreadable'] == 1


def test_zst_is_read_by_the_library_that_is_there_or_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / 'a.txt.zst').write_bytes(b'packed')
  source = SourceConfig(kind='text', path=f'{tmp_path}/*.zst')
  monkeypatch.setattr(compressed, '_zstandard', lambda: None)
  with pytest.raises(ValueError, match='a.txt.zst needs .*pip install zstandard'):
    sources.paths(source)

  class ZstdError(Exception):
    pass

  # As Python 3.14 has it.
  stub = types.SimpleNamespace(open=lambda file, mode: file, ZstdError=ZstdError, ZstdFile=None)
  monkeypatch.setattr(compressed, '_zstandard', lambda: stub)
  assert read(source) == (['packed'], {})

  def refuse(file, mode):
    raise ZstdError

  stub.open = refuse
  assert read(source) == ([], {'unreadable': 1})


class Packaged:
  """What the package zstandard gives, of another compression: a decompressor of one frame, that
  says what is behind its end, and goes on with no other.
  """

  class ZstdError(Exception):
    pass

  class ZstdDecompressor:
    def decompressobj(self):
      return Packaged.OneFrame()

    def stream_reader(self, file):
      raise AssertionError('it gives no lines, and ends where a file is cut off')

  class OneFrame:
    def __init__(self):
      self._inner = bz2.BZ2Decompressor()

    def decompress(self, data):
      try:
        return self._inner.decompress(data)
      except (OSError, EOFError) as error:
        raise Packaged.ZstdError from error

    eof = property(lambda self: self._inner.eof)
    unused_data = property(lambda self: self._inner.unused_data)

  @staticmethod
  def open(file, mode):
    raise AssertionError('what this gives has no lines, and reads one frame')

  @staticmethod
  def compress(data):
    return bz2.compress(data)


@pytest.fixture(params=['package', 'like it'])
def zstandard(request, monkeypatch):
  """The package where it is, and one like it."""
  if request.param == 'package':
    return pytest.importorskip('zstandard')
  monkeypatch.setattr(compressed, '_zstandard', lambda: Packaged)
  return Packaged


def test_zst_is_read_line_by_line_over_its_frames_to_the_end(tmp_path, zstandard):
  lines = [json.dumps({'t': f'{i} ' + os.urandom(400).hex()}) + '\n' for i in range(200)]
  packed = b''.join(
    zstandard.compress(''.join(lines[at : at + 70]).encode()) for at in (0, 70, 140)
  )
  source = SourceConfig(kind='jsonl', path=f'{tmp_path}/*.zst', text_field='t')
  file = tmp_path / 'a.jsonl.zst'
  file.write_bytes(packed)
  assert read(source) == ([json.loads(line)['t'] for line in lines], {})
  for damaged in (packed[: len(packed) // 2], packed[:-1], packed + b'more', packed[:2]):
    file.write_bytes(damaged)
    assert read(source)[1].get('unreadable') == 1
  for content, texts in ((b't\nhello\nworld\n', ['hello', 'world']), (b'', [])):
    (tmp_path / 'b.csv.zst').write_bytes(zstandard.compress(content))
    columns = SourceConfig(kind='csv', path=f'{tmp_path}/b.csv.zst', text_field='t')
    assert read(columns) == (texts, {})


@pytest.mark.parametrize('rest', ['', '\n', '\n7,seven\n8,eight\n', '\n7,seven'])
def test_an_unclosed_quote_is_counted_and_its_record_is_no_document(tmp_path, rest):
  (tmp_path / 'a.csv').write_text('id,t\n1,one\n\n2,"two ""2""\n"\n3,"three' + rest)
  problems = sources.Problems()
  source = SourceConfig(kind='csv', path=f'{tmp_path}/a.csv', text_field='t')
  assert list(sources.documents(source, problems)) == ['one', 'two "2"\n']
  assert problems == {'unclosed_quote': 1}
  assert problems.first == {'unclosed_quote': f'{tmp_path}/a.csv:6'}
  (tmp_path / 'a.csv').write_text('id,"t\n1,one\n')
  with pytest.raises(ValueError, match='a.csv: a quote in the line of its columns is never closed'):
    read(source)
  for whole, last in (('id,t\n1,one', 'one'), ('id,t\n1,"one"', 'one'), ('id,t\n1,"a"b\n', 'ab')):
    (tmp_path / 'a.csv').write_text(whole)
    assert read(source) == ([last], {})


def test_a_wrong_field_lists_the_keys_that_are_there(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"body": "x", "n": 3}\n{"text": 4}\n')
  source = SourceConfig(kind='jsonl', path=f'{tmp_path}/a.jsonl', text_field='text')
  with pytest.raises(
    ValueError, match=r"none of 2 .*'text'; keys .*: body \(str\), n \(int\), text"
  ):
    read(source)


def test_a_folder_is_told_from_a_glob(tmp_path):
  (tmp_path / 'a.txt').write_text('one')
  with pytest.raises(FileNotFoundError, match=r"is a folder: path='.*/\*\*/\*' takes all files"):
    sources.paths(SourceConfig(kind='text', path=f'{tmp_path}/'))
  assert read(SourceConfig(kind='text', path=f'{tmp_path}/**/*')) == (['one'], {})


def test_stars_enter_no_directory_by_a_link(tmp_path, monkeypatch):
  (tmp_path / 'a' / 'b' / '.hidden').mkdir(parents=True)
  for i in range(40):
    (tmp_path / 'a' / f'link{i}').symlink_to(tmp_path)
  files = {'top.txt', 'a/one.txt', 'a/b/two.txt', 'a/b/three.md'}
  for file in files:
    (tmp_path / file).write_text(file)
  (tmp_path / 'a' / 'b' / '.hidden' / 'no.txt').write_text('no')
  (tmp_path / 'a' / 'file.txt').symlink_to(tmp_path / 'top.txt')
  monkeypatch.chdir(tmp_path)
  for root in (f'{tmp_path}/', ''):
    for pattern, expected in {
      '**/*.txt': {'top.txt', 'a/one.txt', 'a/file.txt', 'a/b/two.txt'},
      '**': files | {'a/file.txt'},
      '**/b/**/*.txt': {'a/b/two.txt'},
      'a/**/**/two.*': {'a/b/two.txt'},
      'a/*/*.md': {'a/b/three.md'},
    }.items():
      matched = sources.paths(SourceConfig(kind='text', path=root + pattern))
      assert sorted(os.path.relpath(path) for path in matched) == sorted(expected), pattern


def test_a_row_with_more_values_than_columns_is_counted_and_not_cut(tmp_path):
  (tmp_path / 'a.csv').write_text('id,t,n\n1,Hello, world,3\n2,whole,4\n3,short\n4,"a, b",5\n')
  problems = sources.Problems()
  source = SourceConfig(kind='csv', path=f'{tmp_path}/*.csv', text_field='t')
  assert list(sources.documents(source, problems)) == ['whole', 'short', 'a, b']
  assert problems == {'malformed': 1} and problems.first == {'malformed': f'{tmp_path}/a.csv:2'}


def test_an_empty_file_of_columns_has_no_documents(tmp_path):
  (tmp_path / 'a.csv').write_text('t\none\n')
  (tmp_path / 'b.csv').write_text('')
  (tmp_path / 'c.csv').write_bytes(b'\xef\xbb\xbf')
  source = SourceConfig(kind='csv', path=f'{tmp_path}/*.csv', text_field='t')
  assert read(source) == (['one'], {})
  (tmp_path / 'd.csv').write_text('"')
  with pytest.raises(ValueError, match='d.csv: a quote in the line of its columns'):
    read(source)
