"""What has a measurement found before it was interrupted? Lines of a file, each written when it is
known, that go with the settings in the first one. What is there is not asked again; the file goes
when the results are written.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import files
from evaluation.differences import differences


class Journal:
  """Values by part and number.

  Raises ValueError, by what differs, for a file of other settings.
  """

  def __init__(self, path: pathlib.Path | None = None, settings: Mapping[str, Any] = {}):
    """path: of the file; None: nothing is kept. settings: all that decides the values, JSON-able;
    what it does not name may differ.
    """
    self._path, self._found = path, {}
    if path is None:
      return
    content = path.read_bytes() if path.exists() else b''
    whole = content[: content.rfind(b'\n') + 1]  # a last line that was cut short is none
    if not whole:
      files.replace(path, json.dumps({'settings': settings}) + '\n')
      return
    first, *lines = [
      files.json_object(line, f'{path}:{i}') for i, line in enumerate(whole.splitlines(), 1)
    ]
    now = json.loads(json.dumps(settings))
    if apart := differences(_held(path, first, 'settings'), now):
      raise ValueError(
        f'{path} is of a measurement that was interrupted, and asked otherwise '
        f'({"; ".join(apart)}); ask as it did to go on with it, remove it, or give another --output'
      )
    if len(whole) < len(content):
      os.truncate(path, len(whole))
    for line in lines:
      part, i, value = (_held(path, line, name) for name in ('part', 'i', 'value'))
      self._found.setdefault(part, {})[i] = value

  def __len__(self) -> int:
    return sum(map(len, self._found.values()))

  def part(self, name: str) -> 'JournalPart':
    """The values of one part."""
    return JournalPart(self, name, self._found.get(name, {}))

  def add(self, part: str, i: int, value: Any) -> None:
    """Writes a value, JSON-able, which has come of the i-th question of a part."""
    if self._path is None:
      return
    with open(self._path, 'a', encoding='utf-8') as file:
      file.write(json.dumps({'part': part, 'i': i, 'value': value}) + '\n')
      file.flush()
      os.fsync(file.fileno())

  def end(self) -> None:
    """The results are written: nothing is gone on with."""
    if self._path is not None:
      self._path.unlink()


def _held(path: pathlib.Path, line: Mapping[str, Any], name: str) -> Any:
  if name not in line:
    raise ValueError(f'{path} has a line without {name!r}, and is no journal; remove it')
  return line[name]


class JournalPart:
  """Of a part: values that are there, and a place for more."""

  def __init__(self, journal: Journal, part: str, values: Mapping[int, Any]):
    self.values, self._journal, self._part = values, journal, part

  def add(self, i: int, value: Any) -> None:
    """Another one."""
    self._journal.add(self._part, i, value)


def nothing_kept() -> JournalPart:
  """Where nothing is kept."""
  return Journal().part('')
