"""Do the blocks of Python that the pages print run? All of a page, in order, as one program in an
empty directory; a block with a title is that file.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import pytest

from kernels import attention
from model import families
from objectives import kinds
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import corpus, on, run_here

__all__ = ['corpus']  # a fixture

ROOT = pathlib.Path(__file__).parents[1]
QUICK = (
  'adaptation',
  'add-family',
  'add-objective',
  'add-kernel-feature',
  'alignment',
  'data',
  'evaluate',
  'scores',
  'safety',
)
OF_A_RUN = ('first-hour', 'generation', 'metrics')  # in runs/first and runs/tiny
ELSEWHERE = ('training',)  # a config, which tests/test_docs.py builds


def blocks(name: str) -> list[tuple[str, str]]:
  """(title or '', code) of every block of a page."""
  page = (ROOT / 'docs' / f'{name}.md').read_text()
  return re.findall(r'^```python(?: title="([^"]+)")?\n(.*?)^```', page, re.M | re.S)


@pytest.fixture
def registries(monkeypatch, tmp_path):
  """What a page adds to the lists of the code is gone behind the test."""
  monkeypatch.chdir(tmp_path)
  for module, name in ((families, 'FAMILIES'), (families, 'TYPES'), (kinds, 'KINDS')):
    monkeypatch.setattr(module, name, dict(getattr(module, name)))
  honours = {backend: set(fields) for backend, fields in attention.HONOURS.items()}
  monkeypatch.setattr(attention, 'HONOURS', honours)
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):  # leaving it undoes a page's own
    yield monkeypatch


def run(name: str, monkeypatch, leave_out: str = 'import transformers') -> None:
  """A page's blocks, without those that hold a text."""
  namespace = {'__name__': '__main__'}
  for title, code in blocks(name):
    if leave_out and leave_out in code:
      continue
    if not title:
      exec(compile(code, f'docs/{name}.md', 'exec'), namespace)
      continue
    module = types.ModuleType(title.removesuffix('.py').replace('/', '.'))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, title, 'exec'), module.__dict__)


@pytest.mark.parametrize('name', QUICK)
def test_a_page_runs(name, registries):
  assert blocks(name)
  run(name, registries)


def test_no_page_with_code_is_left_out():
  pages = {page.stem for page in (ROOT / 'docs').glob('*.md') if blocks(page.stem)}
  assert pages == {*QUICK, *OF_A_RUN, *ELSEWHERE}


@pytest.fixture(scope='module')
def begun(tmp_path_factory, corpus):
  """A directory with the run that pages open, which reads as much as they ask for."""
  directory = tmp_path_factory.mktemp('begun')
  run_here(on(corpus, model={'max_length': 256}), directory / 'runs' / 'tiny')
  shutil.copytree(directory / 'runs' / 'tiny', directory / 'runs' / 'first')
  return directory


@pytest.mark.slow
@pytest.mark.parametrize('name', OF_A_RUN)
def test_a_page_of_a_run_runs(name, begun):
  """In a process of its own: two commands' flags do not go together in one."""
  code = '\n'.join(code for _, code in blocks(name))
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=begun, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.oracle
def test_the_family_of_the_page_computes_what_transformers_computes(registries):
  pytest.importorskip('transformers', reason='transformers is not installed')
  run('add-family', registries, leave_out='')
