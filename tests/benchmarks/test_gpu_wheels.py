"""Is what a machine with a GPU still needs what setup.cfg asks for, and no more?"""

import zipfile

import pytest
from packaging.requirements import Requirement

from benchmarks import gpu_wheels

REQUIRES = {
  'a': ['b>=2', 'c; sys_platform == "win32"', 'd[more]'],
  'b': ['e<3'],
  'd': ['f; extra == "more"', 'g; extra == "less"'],
  'e': [],
  'f': ['E>=1,!=1.5'],
}


def walk(roots, *there):
  there = {gpu_wheels.named(line): Requirement(line) for line in there}
  met, unknown = gpu_wheels.walk(roots, lambda r: REQUIRES.get(r.name.lower()), there)
  return {name: str(r.specifier) for name, r in met.items()}, unknown


def test_what_is_needed_is_what_is_required_in_turn():
  met, unknown = walk(['a>=1'])
  assert met == {'a': '>=1', 'b': '>=2', 'd': '', 'e': '!=1.5,<3,>=1', 'f': ''} and not unknown
  # Of what the machine holds, what only that needs is not needed either.
  assert walk(['a'], 'b', 'd==9') == ({'a': ''}, [])
  assert walk(['h', 'e']) == ({'h': '', 'e': ''}, ['h'])


def test_what_is_held_in_a_version_that_someone_does_not_want_is_needed():
  """Whoever asks, and be it a wheel's wheel; those who could live with it are heeded, too."""
  assert walk(['a'], 'b==1.9', 'd==9')[0] == {'a': '', 'b': '>=2', 'e': '<3'}
  assert walk(['a'], 'b==2', 'd==9')[0] == {'a': ''}
  # b wants e below 3, which 2.5 is; f, that comes later, does not want 1.5.
  assert walk(['a'], 'e==2.5')[0].keys() == {'a', 'b', 'd', 'f'}
  assert walk(['a'], 'e==1.5')[0]['e'] == '!=1.5,<3,>=1'


def test_nothing_that_setup_asks_for_is_neither_held_nor_listed():
  core, optional = gpu_wheels.asked_for()
  met, _ = gpu_wheels.needed(gpu_wheels.HELD, gpu_wheels.OPTIONAL)
  held = gpu_wheels.holding(gpu_wheels.HELD)
  assert {gpu_wheels.named(line) for line in core} <= met.keys() | held.keys()
  assert not met.keys() & held.keys()
  assert {'grain', 'datasketch', 'array-record', 'beartype', 'outlines-core'} <= met.keys()
  assert 'jax' not in met and 'torch' not in met
  assert optional['outlines-core'].startswith('outlines-core>=')


def test_a_requirement_more_is_a_wheel_more(monkeypatch):
  monkeypatch.setattr(gpu_wheels, 'asked_for', lambda: (['jax>=0.10', 'zzz>=3'], {'opt': 'opt>1'}))
  assert [*gpu_wheels.needed('jax', '')[0]] == ['zzz']
  assert [*gpu_wheels.needed('jax', 'Opt')[0]] == ['zzz', 'opt']
  with pytest.raises(ValueError, match="'other' is unknown. Known: opt"):
    gpu_wheels.needed('jax', 'other')


def test_a_list_of_the_machine_is_what_it_holds(tmp_path, monkeypatch):
  """With versions, one of which is too old here; and no more than is listed."""
  monkeypatch.setattr(gpu_wheels, 'asked_for', lambda: (['jax>=0.10.2', 'rich>=14', 'own>=2'], {}))
  listed = tmp_path / 'there.txt'
  listed.write_text('# pip\njax==0.11.2\nrich==13.1\nown @ file:///src/own\n')
  met, _ = gpu_wheels.needed(str(listed), '', lambda r: [])
  assert {name: str(r.specifier) for name, r in met.items()} == {'rich': '>=14'}
  listed.write_text('jax==0.11.2\nrich==15.0\nown==2.1+local\n')
  assert gpu_wheels.needed(str(listed), '', lambda r: [])[0] == {}


def wheel(directory, name, *requires):
  path = directory / f'{name}-py3-none-any.whl'
  lines = [f'Requires-Dist: {line}' for line in requires]
  with zipfile.ZipFile(path, 'w') as files:
    files.writestr(f'{name}.dist-info/METADATA', '\n'.join(['Metadata-Version: 2.1', *lines, '']))


def test_a_wheel_says_itself_what_it_requires(tmp_path, monkeypatch):
  """Where it is there, pip is not asked."""
  monkeypatch.setattr(gpu_wheels.subprocess, 'run', None)
  wheel(tmp_path, 'Some_Thing-1.0', 'other>=2', 'never; extra == "x"')
  wheel(tmp_path, 'other-2.5')
  met, _ = gpu_wheels.walk(['some.thing'], lambda r: gpu_wheels.download(r, tmp_path))
  assert [*met] == ['some-thing', 'other']
  gpu_wheels.check(met, gpu_wheels.wheels(tmp_path))
  met['other'] = Requirement('other>=3')
  with pytest.raises(RuntimeError, match=r'other-2.5-py3-none-any.whl is not other>=3: delete it'):
    gpu_wheels.check(met, gpu_wheels.wheels(tmp_path))
