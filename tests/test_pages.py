"""Does every page read in one look?
Lengths of files, of functions, of argument lists and of lines, as the formatter lays them out.
"""

import ast
import collections
import functools
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILE = 500  # lines; tests apart, which are lists of laws
FUNCTION = 80  # lines, with those of functions inside
ARGUMENTS = 10  # but for self, *args and **kwargs
LINE = 100  # characters
KINDS = ('file', 'function', 'arguments', 'line')

# Bodies of Pallas kernels: a ref for every operand, result and scratch, which Pallas passes one by
# one.
BODIES = {
  ('kernels/cached_tpu.py', '_kernel'),
  ('kernels/flash_tpu_bodies.py', 'backward'),
}

# What is still beyond a limit, and is being opened up. A place is a file or a folder, with the name
# of a function where it is one. An entry that nothing needs any more is an error, so that the table
# only shrinks.
LATER = {
  'file': {},
  'function': {},
  'arguments': {
    'tests/decode/test_sampling.py law64',
  },
  'line': {},
}


def pages() -> Iterator[pathlib.Path]:
  for path in sorted(ROOT.rglob('*.py')):
    if not any(part.startswith('.') for part in path.relative_to(ROOT).parts):
      yield path


def beyond(path: str, text: str) -> Iterator[tuple[str, str, str]]:
  """(kind, place, what is wrong) of everything in a file that passes a limit."""
  lines = text.splitlines()
  if len(lines) > FILE and not path.startswith('tests/'):
    yield 'file', path, f'{len(lines)} lines, of at most {FILE}; open it up into files'
  for number, line in enumerate(lines, 1):
    if len(line) > LINE:
      yield 'line', path, f'line {number} has {len(line)} characters, of at most {LINE}'

  for function in ast.walk(ast.parse(text)):
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
      continue
    place = f'{path} {function.name}'
    length = function.end_lineno - function.lineno + 1
    if length > FUNCTION:
      yield 'function', place, f'{length} lines, of at most {FUNCTION}; open it up'
    count = len(arguments(function))
    if count > ARGUMENTS and (path, function.name) not in BODIES:
      yield 'arguments', place, f'{count} arguments, of at most {ARGUMENTS}; pass one request value'


def arguments(function: ast.FunctionDef) -> list[str]:
  given = function.args
  named = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
  return [name for name in named if name not in ('self', 'cls')]


@functools.cache
def found() -> dict[str, dict[str, list[str]]]:
  """kind -> place -> what is wrong there."""
  problems = {kind: collections.defaultdict(list) for kind in KINDS}
  for path in pages():
    for kind, place, problem in beyond(str(path.relative_to(ROOT)), path.read_text()):
      problems[kind][place].append(problem)
  return problems


def covers(entry: str, place: str) -> bool:
  """Whether an entry of the table is this place, or a folder around it."""
  return place == entry or place.startswith(f'{entry}/')


@pytest.mark.parametrize('kind', KINDS)
def test_pages_keep_within_the_limits(kind):
  wrong = {
    place: problems[0]
    for place, problems in found()[kind].items()
    if not any(covers(entry, place) for entry in LATER[kind])
  }
  assert not wrong


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_left_for_later_is_still_so(kind):
  needless = {
    entry for entry in LATER[kind] if not any(covers(entry, place) for place in found()[kind])
  }
  assert not needless, 'within the limit by now: take it out of LATER'


def test_no_two_classes_share_a_name():
  places = collections.defaultdict(list)
  for path in pages():
    name = str(path.relative_to(ROOT))
    if name.startswith('tests/'):
      continue
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
        places[node.name].append(name)
  twins = {name: where for name, where in places.items() if len(where) > 1}
  assert not twins


def test_bodies_of_kernels_are_still_those():
  for path, name in BODIES:
    functions = [
      node
      for node in ast.walk(ast.parse((ROOT / path).read_text()))
      if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert any(len(arguments(function)) > ARGUMENTS for function in functions), (path, name)


def test_what_passes_a_limit_is_seen():
  body = '\n'.join(f'  {n}' for n in range(FUNCTION - 1))
  names = ', '.join(f'a{n}' for n in range(ARGUMENTS))
  head = f'def f(self, {names}):\n{body}\n'
  fits = head + '#' * LINE + '\n' * (FILE - FUNCTION)
  assert not list(beyond('page.py', fits))
  assert [kind for kind, *_ in beyond('page.py', fits + '\n')] == ['file']
  assert not list(beyond('tests/page.py', fits + '\n'))
  assert [kind for kind, *_ in beyond('page.py', fits.replace('#\n', '##\n'))] == ['line']
  assert [kind for kind, *_ in beyond('page.py', head + '  1\n')] == ['function']
  assert [kind for kind, *_ in beyond('page.py', fits.replace('a0', 'a0, b', 1))] == ['arguments']
