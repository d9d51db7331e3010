"""Is this name known, and what does it stand for? One check for every name that comes from a config
or a command line, and one for what is there without a name.
"""

import difflib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

from absl import app


def check(what: str, name: str, known: Iterable[str]) -> str:
  """`name` if it is among the known ones; ValueError that lists them, the nearest first, otherwise.

  what: where the name stands, e.g. 'model.norm'.
  """
  known = list(known)
  if name not in known:
    near = difflib.get_close_matches(str(name), known, 1)
    raise ValueError(
      f'{what}={name!r} is unknown'
      + (f'; did you mean {near[0]!r}?' if near else '.')
      + f' Known: {", ".join(known)}'
    )
  return name


def imported(path: str) -> Any:
  """What 'package.module.name' stands for, its module imported now. Tables have kinds by such
  texts, so that a run loads, and a reader meets, the kind that is asked for and no other.
  """
  module, _, name = path.rpartition('.')
  return getattr(importlib.import_module(module), name)


def only_flags(arguments: Sequence[str], example: str) -> None:
  """Raises absl's UsageError for what stands on a command line and is no flag;
  arguments are those of main().
  """
  if arguments[1:]:
    raise app.UsageError(f'{arguments[1:]} are no flags; flags begin with --, as in {example}')
