"""How many processes may work here, and how does one begin without doing again what its parent was
started by?
"""

import contextlib
import os
import sys
import types
from collections.abc import Iterator


def cpus() -> int:
  """That this process may use, where the system says (macOS does not), or that there are."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


@contextlib.contextmanager
def without_main() -> Iterator[None]:
  """A block in which processes begin that import nothing of `__main__`. Otherwise each runs anew
  what their parent was started by, which may be a command's imports, or a script that prepares a
  corpus at its top level, and would wait there for itself.
  """
  main, sys.modules['__main__'] = sys.modules['__main__'], types.ModuleType('__main__')
  try:
    yield
  finally:
    sys.modules['__main__'] = main
