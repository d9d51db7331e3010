"""Is each option of generation declared once, and do all who read it read the same?"""

import ast
import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from decode import options
from decode.options import COMMAND, LAW, TABLE, Options
from decode.sampling import Sampling, make_sampling
from decode.table import Range, Where

ROOT = pathlib.Path(__file__).parents[2]


def test_every_option_is_a_field_with_the_tables_default():
  fields = {field.name: field.default for field in dataclasses.fields(Options)}
  assert fields == {name: row.default for name, row in TABLE.items()}
  assert all(f'\n    {name}: {row.help}'[:60] in Options.__doc__ for name, row in TABLE.items())
  assert {row.where for row in COMMAND} == {Where.COMMAND} and not fields.keys() & {
    row.name for row in COMMAND
  }


def test_the_law_has_its_options_types_and_defaults():
  made = make_sampling(2)
  assert {field.name for field in dataclasses.fields(Sampling)} == {*LAW} - {'logit_bias'} | {
    'bias'
  }
  for name in {*LAW} - {'logit_bias', 'seed'}:
    column = getattr(made, name)
    assert column.dtype == TABLE[name].type and column.tolist() == [TABLE[name].default] * 2
  with pytest.raises(
    ValueError, match="option='temprature' is unknown; did you mean 'temperature'"
  ):
    make_sampling(2, temprature=1.0)


def test_every_flag_has_the_tables_default_and_help():
  """Of a process of its own: flags are defined once in a process, some by train.py, too."""
  program = (
    'import generate, json\n'
    'print(json.dumps({name: (flag.default, generate.flags.FLAGS[name].help)'
    ' for name, flag in generate.OPTIONS.items()}))'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=True
  )
  flags = json.loads(done.stdout)
  rows = {row.name: row for row in (*TABLE.values(), *COMMAND) if row.flag}
  assert flags.keys() == rows.keys() and TABLE.keys() - rows.keys() == {'constraint'}
  for name, (default, help_) in flags.items():
    row = rows[name]
    read = default if row.choices is None else row.choices[default]
    assert read == (list(row.default) if row.default == () else row.default), name
    assert row.help in help_, name


def declared(name: str, tree: ast.AST) -> list[int]:
  """Lines where a source gives a name, such as min_p, a value as a declaration does: a field or a
  constant, a parameter's default, an entry of a dict, a first argument with constants behind it.
  """
  lines = []
  for node in ast.walk(tree):
    match node:
      case ast.AnnAssign(target=ast.Name(id=found), value=ast.expr()) if found == name:
        lines.append(node.lineno)
      case ast.Assign(targets=[ast.Name(id=found)], value=ast.Constant()) if found == name:
        lines.append(node.lineno)
      case ast.arguments():
        with_default = node.args[len(node.args) - len(node.defaults) :]
        with_default += [a for a, d in zip(node.kwonlyargs, node.kw_defaults) if d is not None]
        lines += [a.lineno for a in with_default if a.arg == name]
      case ast.Dict():
        lines += [k.lineno for k in node.keys if isinstance(k, ast.Constant) and k.value == name]
      case ast.Call(args=[ast.Constant(value=found), *others]) if found == name:
        lines += [node.lineno] * any(isinstance(other, ast.Constant) for other in others)
  return sorted(lines)


@pytest.mark.parametrize('name', [name for name in LAW if name not in ('seed', 'temperature')])
def test_an_option_of_the_law_is_declared_once(name):
  found = [
    f'{path.relative_to(ROOT)}:{line}'
    for path in (*ROOT.glob('decode/*.py'), ROOT / 'generate.py')
    for line in declared(name, ast.parse(path.read_text()))
  ]
  assert len(found) == 1 and found[0].startswith('decode/options.py'), found


def test_declarations_are_seen():
  source = (
    'min_p: Any = 0.0\n'
    'def f(a, min_p=0.0): pass\n'
    'def f(*, min_p=0.0): pass\n'
    "x = {'min_p': 0.0}\n"
    "DEFINE_float('min_p', 0.0, 'help')\n"
    'min_p: Any\n'
    'def f(min_p): pass\n'
    'f(min_p=0.5)\n'
    "getattr(x, 'min_p')\n"
  )
  assert declared('min_p', ast.parse(source)) == [1, 2, 3, 4, 5]


def test_defaults_are_in_their_ranges():
  for row in TABLE.values():
    if row.range is not None:
      assert row.range.holds(row.default), row
    if row.choices is not None:
      assert row.default in row.choices.values(), row


def test_ranges_hold_their_ends_or_do_not():
  x = np.array([-1, 0, 0.5, 1, 2, math.inf, math.nan])
  for ends, expected in (
    ('[]', [False, True, True, True, False, False, False]),
    ('[)', [False, True, True, False, False, False, False]),
    ('(]', [False, False, True, True, False, False, False]),
    ('()', [False, False, True, False, False, False, False]),
  ):
    assert Range(0, 1, ends).holds(x).tolist() == expected
  assert Range(ends='()').holds(x).tolist() == [True] * 5 + [False] * 2
  assert (str(Range(0, 2**31)), str(Range(0, 1, '(]')), str(Range(ends='()'))) == (
    '[0, 2**31)',
    '(0, 1]',
    '(-inf, inf)',
  )


def test_the_page_is_the_table():
  page = (ROOT / 'docs' / 'options.md').read_text()
  assert page == options.page(), 'python -m decode.options > docs/options.md'
  assert all(f'| `{name}`' in page for name in [*TABLE, *(row.name for row in COMMAND)])


@pytest.mark.parametrize('name', ['max_new_tokens', 'num_samples', 'beams', 'chunk', 'lookup'])
@pytest.mark.parametrize('value', [-2, True])
def test_whole_numbers_are_judged_by_their_range(name, value):
  least = TABLE[name].range.least
  with pytest.raises(ValueError, match=f'{name}=.* must be at least {least}, and whole'):
    Options(**{name: value})


@pytest.mark.parametrize(
  'name, value',
  [
    ('max_new_tokens', 10**12),
    ('num_samples', 10**6),
    ('beams', 10**6),
    ('chunk', 10**8),
    ('lookup', 10**9),
  ],
)
def test_what_no_machine_holds_is_refused_before_anything_is_traced(name, value):
  with pytest.raises(ValueError, match=f'{name}={value} must be at most {TABLE[name].range.most}'):
    Options(**{name: value})
