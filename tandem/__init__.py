"""How does another project use Tandem? `from tandem import Generator, train`.

In the repository the rooms (`data`, `model`, ...) are beside this package; a wheel holds them
inside it, so that nothing of theirs lies in site-packages. They import each other by their plain
names, which importing this package makes theirs: its directory comes first in sys.path. A module of
the person's own under such a name, `model.py` beside a script as an example, is then hidden; one
that was imported before is named in an error.
"""

import importlib
import importlib.util
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE if (HERE / 'model').is_dir() else HERE.parent
NAMES = (
  *('analysis', 'benchmarks', 'compression', 'configs', 'data', 'decode', 'evaluation', 'kernels'),
  *('launch', 'model', 'objectives', 'parallel', 'remote', 'serving', 'training', 'workdir'),
  *('commands', 'convert', 'evaluate', 'files', 'generate', 'names', 'plan', 'serve', 'train'),
)
# What `from tandem import ..` gives, imported when it is asked for.
PUBLIC = {
  'Generator': 'decode.generator.Generator',
  'Engine': 'decode.engine.Engine',
  'Config': 'training.config.Config',
  'train': 'train.run',
  'open_run': 'workdir.open.open_run',
}


def _claim() -> None:
  """Makes the names of the rooms ours. Raises ImportError where somebody else has one of them."""
  sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT))]
  importlib.invalidate_caches()
  for name in NAMES:
    module = sys.modules.get(name)
    spec = module.__spec__ if module else importlib.util.find_spec(name)
    place = getattr(module, '__file__', None) or (spec and spec.origin)
    if place is None and spec is not None:  # a directory without __init__.py
      place = next(iter(spec.submodule_search_locations or ()), None)
    if place is None or not pathlib.Path(place).resolve().is_relative_to(ROOT):
      raise ImportError(
        f'tandem needs the name {name!r} for a module of its own, and {place or "nothing"} has it; '
        'import tandem before that, or give yours another name'
      )


def __getattr__(name: str):
  if name not in PUBLIC:
    raise AttributeError(f'tandem has no {name!r}; it has {", ".join(PUBLIC)}')
  module, _, attribute = PUBLIC[name].rpartition('.')
  return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
  return [*globals(), *PUBLIC]


_claim()
