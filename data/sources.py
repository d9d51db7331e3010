"""Where does text come from, and what identifies it?"""

import collections
import csv
import errno
import glob
import hashlib
import io
import json
import os
import pathlib
import re
import secrets
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import files
import names
from data import compressed
from data.config import SourceConfig

# Directories of the standard library that hold tests, third-party packages or byte code.
STDLIB_EXCLUDED = frozenset(
  {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
)
# A file changed less than this many seconds before it was hashed may change again under the same
# mtime (git: "racily clean").
RACY_SECONDS = 2.0
SHOWN = 20  # keys of records, in a message
# What a disk says that fails, and not a file that is damaged: a wait may mend it, and what the file
# holds is not lost.
OF_DISKS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class Problems(collections.Counter):
  """What gave no document, counted by kind: 'undecodable' files or lines, 'unreadable' files,
  'malformed' lines or records, records with 'no_text', an 'unclosed_quote' (what it swallowed is
  one).

  Attributes:
    first: where each kind was met first, as 'path:line' or, of a whole file, 'path'.
  """

  def __init__(self):
    super().__init__()
    self.first: dict[str, str] = {}

  def add(self, kind: str, path: str, line: int | str = 0) -> None:
    """Counts one; line 0: the whole file."""
    self[kind] += 1
    self.first.setdefault(kind, f'{path}:{line}' if line else path)


def paths(source: SourceConfig) -> list[str]:
  """The files of a source, sorted.

  Raises:
    FileNotFoundError: nothing matches.
    ValueError: a .zst file, and nothing that reads it.
  """
  if source.kind == 'stdlib':
    root = sysconfig.get_path('stdlib')
    matches = []
    for directory, inner, names in os.walk(root):
      # site-packages alone may hold 10,000 files.
      inner[:] = [name for name in inner if name not in STDLIB_EXCLUDED]
      matches += [os.path.join(directory, name) for name in names if name.endswith('.py')]
    where = f'the standard library at {root}'
  else:
    matches = found(source.path)
    where = f'path={source.path!r} (seen from {os.getcwd()})'
    if os.path.isdir(os.path.expanduser(source.path)):
      where += f", which is a folder: path='{source.path.rstrip('/')}/**/*' takes all files in it"
  if not matches:
    raise FileNotFoundError(
      f'a {source.kind!r} source found no file: {where}; correct the path or glob'
    )
  compressed.check(matches)
  # By their bytes: what a name's characters are depends on the locale.
  return sorted(matches, key=os.fsencode)


def found(pattern: str) -> list[str]:
  """The files that a glob matches."""
  if files.remote(pattern):
    return [str(place) for place in files.place(pattern).matching()]
  if files.of_hub(pattern):
    pattern = names.imported('remote.hub.pattern')(pattern)
  return [path for path in set(_matches(os.path.expanduser(pattern))) if os.path.isfile(path)]


def size(path: str) -> int:
  """In bytes."""
  return files.place(path).stat().st_size


def _matches(pattern: str) -> Iterator[str]:
  """What a glob matches, some of it more than once. '**' enters no directory by a link, as
  glob.glob does: a few links to the directories above them make 2^40 paths.
  """
  parts = pattern.split('/')
  if '**' not in parts:
    yield from glob.glob(pattern)
    return
  at = parts.index('**')
  after = '/'.join(parts[at + 1 :]) or '*'
  for root in glob.glob('/'.join(parts[:at]) + '/') if at else ['.']:
    for directory, inner, _ in os.walk(root):
      inner[:] = [name for name in inner if not name.startswith('.')]
      yield from _matches(os.path.join(glob.escape(directory), after))


def documents(source: SourceConfig, problems: Problems) -> Iterator[str]:
  """Streams the texts of a source in a fixed order.

  Args:
    source: what to read.
    problems: updated while reading, by what gave no document.

  Raises:
    ValueError: no record of any file has the field that should hold the text.
  """
  keys: dict[str, str] = {}
  documents = 0
  for path in paths(source):
    for text in of_file(source, path, problems, keys):
      documents += 1
      yield text
  check_found(source, documents, problems, keys)


def check_found(
  source: SourceConfig, documents: int, problems: Problems, keys: dict[str, str]
) -> None:
  """Raises ValueError where no record of a source has the field that should hold the text;
  `keys` are those that records without it have.
  """
  if keys and not documents:
    shown = ', '.join(f'{key} ({kind})' for key, kind in [*keys.items()][:SHOWN])
    raise ValueError(
      f'path={source.path!r}: none of {problems["no_text"]} records has a text under the key '
      f'{source.text_field!r}; keys there, with the types of their values: {shown}. Set '
      'source.text_field to one that holds text (str)'
    )


class Span:
  """The lines of a file that begin at bytes of [begin, end).

  Attributes:
    lines: how many have been read.
  """

  def __init__(self, begin: int, end: int):
    self._begin, self._end, self.lines = begin, end, 0

  def of(self, file: BinaryIO) -> Iterator[bytes]:
    """Those lines."""
    at = self._begin
    if at:
      # Whoever reads what is before this has the line that goes on here.
      file.seek(at - 1)
      at += len(file.readline()) - 1
    for line in file:
      if at >= self._end:
        return
      at += len(line)
      self.lines += 1
      yield line


def of_file(
  source: SourceConfig,
  path: str,
  problems: Problems,
  keys: dict[str, str],
  span: Span | None = None,
) -> Iterator[str]:
  """The texts of one file, or of a span of one whose lines are records; updates `problems`, and
  `keys` by those of records without a text. Raises OSError where the disk or the bucket fails.
  """
  try:
    yield from _texts(source, path, problems, keys, span)
  except UnicodeDecodeError:
    problems.add('undecodable', path)
  except compressed.damaged() as error:
    if isinstance(error, files.BucketError) or getattr(error, 'errno', None) in OF_DISKS:
      raise
    problems.add('unreadable', path)


def _texts(
  source: SourceConfig, path: str, problems: Problems, keys: dict[str, str], span: Span | None
) -> Iterator[str]:
  if source.kind in ('stdlib', 'text'):
    with compressed.opened(path) as file:
      text = file.read().decode('utf-8-sig')
    yield text
  elif source.kind == 'jsonl':
    with compressed.opened(path) as file:
      lines = span.of(file) if span else file
      yield from _jsonl(lines, path, source.text_field, problems, keys)
  elif source.kind == 'parquet':
    for place, row in names.imported('data.parquet.rows')(path):
      yield from _field(row, source.text_field, problems, keys, *place.rsplit(':', 1))
  else:
    yield from _csv(path, source.text_field, problems)


def _jsonl(
  lines: Iterable[bytes], path: str, field: str, problems: Problems, keys: dict[str, str]
) -> Iterator[str]:
  """Texts of a file; of the records without one, gathers keys with the types of their values."""
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      record = files.parsed(line.decode('utf-8-sig'), path)
    except UnicodeDecodeError:
      problems.add('undecodable', path, number)
      continue
    except ValueError:
      problems.add('malformed', path, number)
      continue
    yield from _field(record, field, problems, keys, path, number)


def _field(
  record, field: str, problems: Problems, keys: dict[str, str], path: str, place
) -> Iterator[str]:
  """The text that a record has in a field; of one without, gathers keys with their types."""
  text = record.get(field) if isinstance(record, dict) else None
  if isinstance(text, str):
    yield text
    return
  problems.add('no_text', path, place)
  if isinstance(record, dict) and len(keys) < SHOWN:
    keys |= {str(key)[:40]: type(value).__name__ for key, value in record.items()}


def _csv(path: str, field: str, problems: Problems) -> Iterator[str]:
  # The default of 131,072 characters rejects longer documents.
  csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
  # Bytes that are not UTF-8 become lone surrogates, which cleaning replaces and counts:
  # the rest of the file is kept.
  with (
    compressed.opened(path) as file,
    io.TextIOWrapper(file, encoding='utf-8-sig', errors='surrogateescape', newline='') as lines,
  ):
    ended = []
    reader = csv.DictReader(_with_end(lines, ended))
    if reader.fieldnames == [_END] and reader.line_num == 1:
      return  # an empty file
    if any(_END in name for name in reader.fieldnames):
      raise ValueError(f'{path}: a quote in the line of its columns is never closed; close it')
    if field not in (reader.fieldnames or ()):
      raise ValueError(
        f'{path} has no column {field!r}; its columns: {", ".join(reader.fieldnames or ())}. '
        'Set source.text_field to one of them'
      )
    while True:
      begin = reader.line_num + 1
      try:
        record = next(reader, None)
      except csv.Error:
        problems.add('malformed', path, begin)
        continue
      if record is None:
        return
      if ended and _END in str([*record.values()]):
        # It swallowed the rest of the file, which is no document.
        if record[reader.fieldnames[0]] != _END:
          problems.add('unclosed_quote', path, begin)
        return
      if None in record:
        problems.add('malformed', path, begin)  # with more values than there are columns
      elif record[field] is None:
        problems.add('no_text', path, begin)
      else:
        yield record[field]


_END = f'end {secrets.token_hex(16)}'  # no file can hold what can't be guessed


def _with_end(lines: Iterable[str], ended: list) -> Iterator[str]:
  """The lines, and a last one that becomes a record of its own, if no quote is open before it."""
  yield from lines
  ended.append(True)
  yield _END


def _remembered(memo_file: pathlib.Path) -> dict[str, list]:
  """The entries of a memo that are whole. What can't be read is forgotten: it is only a memo."""
  try:
    memo = files.parsed(memo_file.read_bytes(), memo_file)
  except (OSError, ValueError):
    return {}
  if not isinstance(memo, dict):
    return {}
  return {
    name: entry
    for name, entry in memo.items()
    if isinstance(entry, list)
    and len(entry) == 3
    and isinstance(entry[2], str)
    and re.fullmatch('[0-9a-f]{32}', entry[2])
  }


def content_digest(names: list[str], memo_file: pathlib.Path) -> str:
  """Digest (hex) of the files' names and bytes.

  Reading 1 GB to hash it costs a second at every start, so (size, mtime) -> digest is remembered in
  `memo_file`, as make and git do; unlike make, an entry is trusted only if the file had been left
  alone for RACY_SECONDS when hashed.
  """
  memo = _remembered(memo_file)
  changed = False
  total = hashlib.blake2b(digest_size=16)
  for path in names:
    status = files.place(path).stat()
    name = path if files.remote(path) else os.path.abspath(path)
    version = [status.st_size, status.tag if files.remote(path) else status.st_mtime_ns]
    entry = memo.get(name)
    if entry is None or entry[:2] != version:
      now = time.time()
      with files.stream(path) as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
      entry = [*version, digest]
      if now - status.st_mtime > RACY_SECONDS:
        memo[name], changed = entry, True
    total.update(os.fsencode(os.path.basename(path)) + f'\0{entry[2]}\n'.encode())
  if changed:
    files.replace(memo_file, json.dumps(memo))
  return total.hexdigest()
