"""Do the blocks of Python that the pages print run? All of a page, in order, as one program in an
empty directory; a block with a title is that file.
"""

import pathlib
import re
import sys
import types

import jax
import pytest

from kernels import attention
from model import families
from objectives import kinds
from parallel.mesh import MeshConfig, make_mesh

ROOT = pathlib.Path(__file__).parents[1]
# Those of generation need a run; test_the_page_of_generation_runs makes one.
QUICK = ('add-family', 'add-objective', 'add-kernel-feature', 'data')


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


@pytest.mark.oracle
def test_the_family_of_the_page_computes_what_transformers_computes(registries):
  pytest.importorskip('transformers', reason='transformers is not installed')
  run('add-family', registries, leave_out='')
