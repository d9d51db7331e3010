"""Are results of one evaluation, or of another? By what was asked."""

from collections.abc import Mapping


def differences(was: Mapping, now: Mapping, path: str = '') -> list[str]:
  """In which fields two settings differ, and how."""
  lines = []
  for name in dict.fromkeys([*was, *now]):
    a, b = was.get(name), now.get(name)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      lines += differences(a, b, f'{path}{name}.')
    elif a != b:
      lines.append(f'{path}{name} was {a!r:.80} and is {b!r:.80}')
  return lines
