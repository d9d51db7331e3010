"""Do imports run one way? Every room knows only those below it in DESIGN's list,
and no two files know each other.

Late imports, within functions, count like any other.
"""

import ast
import functools
import graphlib
import pathlib
import subprocess
from collections.abc import Callable, Iterable

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# The top of the house first. What is not there yet has its place already.
ROOMS = (
  ['tandem', 'setup', 'notebooks', 'docs'],
  ['benchmarks', 'launch'],
  ['train', 'generate', 'evaluate', 'serve', 'plan', 'convert'],
  ['configs'],
  ['analysis'],
  ['workdir'],
  ['training'],
  ['objectives'],
  ['evaluation'],
  ['serving'],
  ['decode'],
  ['compression'],
  ['model'],
  ['kernels'],
  ['data'],
  ['parallel'],
  ['files', 'names', 'commands', 'remote'],
)
FLOOR = {name: len(ROOMS) - i for i, names in enumerate(ROOMS) for name in names}
# Generator.load('runs/x') is where a person begins who has a directory; python -m data.prepare
# with train.py's --config, one who has a corpus.
EXCEPTIONS = {('decode.generator', 'workdir.open'), ('data.preparing', 'training.overrides')}
# That a reader of train.py meets: by imports, late ones too, as DESIGN asks for it. Of what a table
# names and imports when it is asked for (objectives, optimizers, tokenizers) a run has one or two.
MOST_IMPORTED = 6_000


@functools.cache
def modules() -> dict[str, pathlib.Path]:
  """Every module outside tests by name; a package is its __init__."""
  listed = subprocess.run(
    ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '*.py'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()
  paths = [pathlib.Path(name) for name in listed if (ROOT / name).exists()]
  return {
    '.'.join(path.with_suffix('').parts).removesuffix('.__init__'): ROOT / path
    for path in paths
    if path.parts[0] != 'tests'
  }


@functools.cache
def imports(module: str) -> frozenset[str]:
  """The project's modules that a module imports, at any depth of its text."""
  known, reached = modules(), set()
  for node in ast.walk(ast.parse(known[module].read_text())):
    if isinstance(node, ast.Import):
      reached |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{module} imports relative to itself'
      whole = {f'{node.module}.{alias.name}' for alias in node.names}
      reached |= {name if name in known else node.module for name in whole}
  return frozenset(reached & known.keys() - {module})


def closure(module: str, follow: Callable[[str], Iterable[str]]) -> set[str]:
  """What is read with a module: what `follow` says of it and of those, and the packages of all."""
  reached, waiting = set(), [module]
  while waiting:
    name = waiting.pop()
    if name not in reached:
      reached.add(name)
      package = name.rpartition('.')[0]
      waiting += [*follow(name), *([package] if package in modules() else [])]
  return reached


def statements(names: Iterable[str]) -> int:
  """How many statements modules have together, at any depth."""
  return sum(
    isinstance(node, ast.stmt)
    for name in names
    for node in ast.walk(ast.parse(modules()[name].read_text()))
  )


def test_every_file_has_a_room():
  assert {name.split('.')[0] for name in modules()} <= FLOOR.keys()


def test_no_two_test_files_share_a_name():
  """pytest knows them by it, and leaves one out."""
  names = [path.name for path in (ROOT / 'tests').rglob('test_*.py')]
  assert len(names) == len(set(names))


def test_no_import_points_up():
  upward = {
    (module, name)
    for module in modules()
    for name in imports(module)
    if FLOOR[name.split('.')[0]] > FLOOR[module.split('.')[0]]
  }
  assert upward - EXCEPTIONS == set()
  assert EXCEPTIONS <= upward, 'an exception that is not needed any more goes'


def test_no_two_files_know_each_other():
  graph = {
    module: imports(module) - {name for where, name in EXCEPTIONS if where == module}
    for module in modules()
  }
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    pytest.fail(f'a circle: {" -> ".join(error.args[1])}')


def test_a_reader_of_training_meets_little():
  assert statements(closure('train', imports)) <= MOST_IMPORTED
