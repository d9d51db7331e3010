"""How is a directory in the cache known to be intact? How it came there is in data/building.py."""

import json
import pathlib
import zlib
from collections.abc import Sequence

import files

INDEX = 'index.json'  # written last: a directory without it is not finished
CHECK_BYTES = 2**28  # more than this is not read at every start just to verify its checksums


class CorruptShardError(ValueError):
  """A file of a prepared corpus isn't what was written."""


def record(directory: pathlib.Path, name: str) -> dict:
  """Name, size and CRC-32 of a file in a directory, for its index."""
  return {
    'name': name,
    'bytes': (directory / name).stat().st_size,
    'crc32': _crc32(directory / name),
  }


def _crc32(path: pathlib.Path) -> int:
  checksum = 0
  with open(path, 'rb') as file:
    while block := file.read(2**22):
      checksum = zlib.crc32(block, checksum)
  return checksum


def check(directory: pathlib.Path, records: Sequence[dict], contents: bool) -> None:
  """Compares files with their records.

  Args:
    directory: where the files are.
    records: from `record`.
    contents: also read them and compare checksums.

  Raises:
    CorruptShardError: a file is missing, has another size, or another checksum.
  """
  for entry in records:
    path = directory / entry['name']
    if not path.is_file():
      raise CorruptShardError(f'{path} is missing; {_remedy(directory)}')
    if path.stat().st_size != entry['bytes']:
      raise CorruptShardError(
        f'{path} has {path.stat().st_size} bytes but {entry["bytes"]} were written '
        f'(truncated or overwritten); {_remedy(directory)}'
      )
    if contents and _crc32(path) != entry['crc32']:
      raise CorruptShardError(
        f'{path} has the right size but not the checksum {entry["crc32"]:08x} that it was '
        f'written with (bits have changed); {_remedy(directory)}'
      )


def write_index(directory: pathlib.Path, records: list[dict], report: dict) -> None:
  """Writes the index of a directory: its files' records and a report."""
  index = files.sealed({'report': report, 'files': records})
  files.replace(directory / INDEX, json.dumps(index, indent=1))


def read_index(directory: pathlib.Path) -> dict:
  """The index that `write_index` wrote: 'report' and 'files'.
  Raises CorruptShardError when it can't be parsed, has another form, or was changed.
  """
  place = directory / INDEX
  try:
    index = files.unsealed(files.json_object(place.read_bytes(), place), place, 'it is not trusted')
  except ValueError as error:
    raise CorruptShardError(f'{error}; {_remedy(directory)}') from error
  if not (
    isinstance(index.get('report'), dict)
    and isinstance(index.get('files'), list)
    and all(
      isinstance(entry, dict) and {'name', 'bytes', 'crc32'} <= entry.keys()
      for entry in index['files']
    )
  ):
    raise CorruptShardError(
      f'{directory / INDEX} is no index of files with names, sizes and checksums; '
      + _remedy(directory)
    )
  return index


def _remedy(directory: pathlib.Path) -> str:
  return f'delete {directory} and run again: it is prepared anew from the sources'
