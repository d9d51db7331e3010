"""Where does text come from, and what identifies it?"""

import collections
import csv
import glob
import hashlib
import json
import os
import pathlib
import re
import sys
import sysconfig
import time
from collections.abc import Iterator

import files
from data.config import SourceConfig

# Directories of the standard library that hold tests, third-party packages or byte code.
STDLIB_EXCLUDED = frozenset(
  {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
)
# A file changed less than this many seconds before it was hashed may change again under the same
# mtime (git: "racily clean").
RACY_SECONDS = 2.0


class Problems(collections.Counter):
  """What gave no document, counted by kind: 'undecodable' files or lines, 'unreadable' files,
  'malformed' lines or records, records with 'no_text'.

  Attributes:
    first: where each kind was met first, as 'path:line' or, of a whole file, 'path'.
  """

  def __init__(self):
    super().__init__()
    self.first: dict[str, str] = {}

  def add(self, kind: str, path: str, line: int = 0) -> None:
    """Counts one; line 0: the whole file."""
    self[kind] += 1
    self.first.setdefault(kind, f'{path}:{line}' if line else path)


def paths(source: SourceConfig) -> list[str]:
  """The files of a source, sorted.

  Raises:
    FileNotFoundError: nothing matches.
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
    matches = [
      path
      for path in glob.glob(os.path.expanduser(source.path), recursive=True)
      if os.path.isfile(path)
    ]
    where = f'path={source.path!r} (seen from {os.getcwd()})'
  if not matches:
    raise FileNotFoundError(
      f'a {source.kind!r} source found no file: {where}; correct the path or glob'
    )
  # By their bytes: what a name's characters are depends on the locale.
  return sorted(matches, key=os.fsencode)


def documents(source: SourceConfig, problems: Problems) -> Iterator[str]:
  """Streams the texts of a source in a fixed order.

  Args:
    source: what to read.
    problems: updated while reading, by what gave no document.
  """
  for path in paths(source):
    try:
      if source.kind in ('stdlib', 'text'):
        yield pathlib.Path(path).read_bytes().decode('utf-8-sig')
      elif source.kind == 'jsonl':
        yield from _jsonl(path, source.text_field, problems)
      else:
        yield from _csv(path, source.text_field, problems)
    except UnicodeDecodeError:
      problems.add('undecodable', path)
    except OSError:
      problems.add('unreadable', path)


def _jsonl(path: str, field: str, problems: Problems) -> Iterator[str]:
  with open(path, 'rb') as lines:
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
      text = record.get(field) if isinstance(record, dict) else None
      if isinstance(text, str):
        yield text
      else:
        problems.add('no_text', path, number)


def _csv(path: str, field: str, problems: Problems) -> Iterator[str]:
  # The default of 131,072 characters rejects longer documents.
  csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
  # Bytes that are not UTF-8 become lone surrogates, which cleaning replaces and counts:
  # the rest of the file is kept.
  with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as lines:
    reader = csv.DictReader(lines)
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
      if record[field] is None:
        problems.add('no_text', path, begin)
      else:
        yield record[field]


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
    status = os.stat(path)
    name = os.path.abspath(path)
    entry = memo.get(name)
    if entry is None or entry[:2] != [status.st_size, status.st_mtime_ns]:
      now = time.time()
      with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
      entry = [status.st_size, status.st_mtime_ns, digest]
      if now - status.st_mtime > RACY_SECONDS:
        memo[name], changed = entry, True
    total.update(os.fsencode(os.path.basename(path)) + f'\0{entry[2]}\n'.encode())
  if changed:
    files.replace(memo_file, json.dumps(memo))
  return total.hexdigest()
