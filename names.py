"""Is this name known? One check for every name that comes from a config or a command line."""
import difflib
from collections.abc import Iterable


def check(what: str, name: str, known: Iterable[str]) -> str:
  """`name` if it is among the known ones; ValueError that lists them, the nearest first, otherwise.

  what: where the name stands, e.g. 'model.norm'.
  """
  known = list(known)
  if name not in known:
    near = difflib.get_close_matches(str(name), known, 1)
    raise ValueError(f'{what}={name!r} is unknown' + (f'; did you mean {near[0]!r}?' if near else '.') + f' Known: {", ".join(known)}')
  return name
