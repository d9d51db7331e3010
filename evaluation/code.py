"""Is a function of a task's file the one that it was? By its source, and by what it uses of that
file: other functions, patterns, constants. What comes from elsewhere is known by its name.
"""

import functools
import hashlib
import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

PLAIN = str | bytes | int | float | complex | None | re.Pattern
AROUND = 'fget', '__func__', '__wrapped__'  # where a property, a method, a cache has its function


def digest(thing: Any) -> str:
  """Of a function, or of an object that has some; the same in every process."""
  written = thing
  while isinstance(written, functools.partial):
    written = written.func
  file = getattr(written, '__module__', '')
  # What Python brings with it is not looked into: it is another with every version.
  parts = '\0'.join(_parts(thing, '' if file == 'builtins' else file, set()))
  return hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()


def _parts(thing: Any, file: str, seen: set[int]) -> Iterator[str]:
  """What a thing is made of, as far as a module has written it."""
  if isinstance(thing, PLAIN):
    yield repr(thing)
    return
  if id(thing) in seen:
    return
  seen.add(id(thing))

  if isinstance(thing, Mapping):
    yield from _parts([*thing.items()], file, seen)
  elif isinstance(thing, Set):
    yield from sorted('\0'.join(_parts(each, file, seen)) for each in thing)
  elif isinstance(thing, Sequence):
    for each in thing:
      yield from _parts(each, file, seen)
  elif isinstance(thing, functools.partial):
    yield from _parts([thing.func, thing.args, thing.keywords], file, seen)
  elif isinstance(thing, types.FunctionType) and thing.__module__ == file:
    yield from _of_function(thing, file, seen)
  elif around := [getattr(thing, name) for name in AROUND if hasattr(thing, name)]:
    yield from _parts([*around, getattr(thing, '__self__', None)], file, seen)
  elif getattr(thing, '__module__', '') != file:
    yield f'{getattr(thing, "__module__", "")}.{getattr(thing, "__qualname__", "")}'
  elif isinstance(thing, type):
    written = [each for each in sorted(vars(thing).items()) if _is_written(*each)]
    yield from _parts([thing.__qualname__, thing.__bases__, written], file, seen)
  else:
    yield from _parts([type(thing), sorted(getattr(thing, '__dict__', {}).items())], file, seen)


def _is_written(name: str, value: Any) -> bool:
  """Whether a class has it by its text, and not by what Python makes of that."""
  return isinstance(value, types.FunctionType) or not name.startswith('_')


def _of_function(function: types.FunctionType, file: str, seen: set[int]) -> Iterator[str]:
  try:
    yield inspect.getsource(function)
  except (OSError, TypeError):  # there is no file of it
    yield from _compiled(function.__code__)
  inner = [cell.cell_contents for cell in function.__closure__ or ()]
  used = sorted(_names(function.__code__) & function.__globals__.keys())
  yield from _parts([inner, [(name, function.__globals__[name]) for name in used]], file, seen)


def _compiled(code: types.CodeType) -> Iterator[str]:
  yield code.co_code.hex()
  for each in code.co_consts:
    yield from _compiled(each) if isinstance(each, types.CodeType) else [repr(each)]


def _names(code: types.CodeType) -> set[str]:
  """Of globals and attributes, in what is defined within, too."""
  inner = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
  return {*code.co_names}.union(*inner)
