"""Are results of one evaluation, or of another? By what was asked."""

import pathlib
import re
from collections.abc import Iterator, Mapping

import files

# What older versions wrote nothing of: where a side has none, it is no difference.
LATER = 'chat_template', 'code', 'directed'


def differences(was: Mapping, now: Mapping, path: str = '') -> list[str]:
  """In which fields two settings differ, and how."""
  lines = []
  for name in dict.fromkeys([*was, *now]):
    if name in LATER and not (name in was and name in now):
      continue
    a, b = was.get(name), now.get(name)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += differences(a, b, f'{path}{name}.')
    elif a != b:
      lines.append(f'{path}{name} was {a!r:.80} and is {b!r:.80}')
  return lines


def settings_in(output: pathlib.Path) -> Iterator[tuple[pathlib.Path, dict]]:
  """(file, what it holds) of all tasks of a directory that were begun."""
  for path in sorted(output.glob('*-*.json')):
    if re.fullmatch(r'.+-\d+', path.stem):
      content = files.json_object(path.read_bytes(), path)
      if isinstance(content.get('settings'), dict):
        yield path, content
