"""Does the documentation hold together? Links and anchors lead somewhere, every page is in the
site's list, pictures and tables are those of the code, and the site builds without a warning.
"""

import dataclasses
import importlib.util
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from benchmarks import zero
from kernels.mask import zigzag
from model import params, transformer
from model.config import ModelConfig
from model.parts import MoEConfig
from objectives.sft import SFT
from parallel.mesh import AXES, MeshConfig, make_mesh
from tests.training.conftest import tiny
from training.program import lower_step
from workdir import metrics, watch

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
ROOMS = [page for page in ROOT.glob('*/README.md') if not page.parent.name.startswith('.')]
PAGES = sorted([*ROOT.glob('*.md'), *DOCS.glob('*.md'), *ROOMS])


def prose(page: pathlib.Path) -> str:
  """A page without its code, where a bracket is no link and a # no heading."""
  text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)
  return re.sub(r'^ {4}.*$', '', text, flags=re.M)


def anchors(page: pathlib.Path) -> set[str]:
  """What # may name of a page, as GitHub and mkdocs alike make it of a heading."""
  headings = re.findall(r'^#+ (.*)$', prose(page), re.M)
  return {
    re.sub(r'[^\w\s-]', '', heading.lower()).strip().replace(' ', '-') for heading in headings
  }


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page):
  for target in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
    path, _, anchor = target.partition('#')
    if target.startswith('http'):
      continue
    there = (page.parent / path).resolve() if path else page
    assert there.exists(), target
    assert there.is_relative_to(ROOT), target
    if anchor:
      assert anchor in anchors(there), f'{target}: {there.name} has {sorted(anchors(there))}'


def test_every_page_is_in_the_list_of_the_site_once():
  def named(entry):
    if isinstance(entry, str):
      return [entry]
    return [
      page
      for part in (entry.values() if isinstance(entry, dict) else entry)
      for page in named(part)
    ]

  listed = named(yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav'])
  assert len(listed) == len(set(listed))
  assert {page.name for page in DOCS.glob('*.md')} == {page for page in listed if '/' not in page}
  assert {str(page.relative_to(ROOT)) for page in ROOMS} == {page for page in listed if '/' in page}


# Pictures.


@pytest.fixture(scope='module')
def pictures():
  spec = importlib.util.spec_from_file_location('pictures', DOCS / 'pictures.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_pictures_are_those_that_the_code_draws(pictures):
  drawn = {f'{name}.svg': draw().svg() for name, draw in pictures.PICTURES.items()}
  kept = {path.name: path.read_text() for path in pictures.HERE.glob('*.svg')}
  assert drawn == kept, 'python docs/pictures.py draws them anew'


def test_the_picture_of_axes_is_where_arrays_lie(pictures):
  """By the shards that a model and its batch have, and by words: what README and pages say."""
  tokens, residual, stored, computing, experts, table = range(6)
  expected = {
    'data': {tokens: 1, residual: 1},
    'fsdp': {tokens: 1, residual: 1, stored: 1, experts: 1, table: 2},
    'tensor': {residual: 2, stored: 2, computing: 2, experts: 2, table: 1},
    'context': {tokens: 2, residual: 2, stored: 1, experts: 1, table: 2},
    'expert': {tokens: 1, residual: 1, stored: 1, experts: 0, table: 2},
    'stage': {stored: 0, computing: 0, table: 1},
  }
  for axis in AXES:
    found = {
      column: split.index(True) for column, split in enumerate(pictures.splits(axis)) if any(split)
    }
    assert found == expected[axis], axis

  config = ModelConfig(
    vocabulary=64, width=32, layers=4, heads=4, moe=MoEConfig(experts=4, first=3)
  )
  for axis in AXES:
    sizes = tuple(pictures.DEVICES if name == axis else 1 for name in AXES)
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    if axis == 'stage':
      continue  # layers with and without experts do not split over stages
    with use_abstract_mesh(mesh):
      model = params.abstract(lambda: transformer.init(config, 0), mesh)
    leaves = params.named_leaves(model)
    split = list(pictures.splits(axis))
    for name, column, dims in (
      ('stack.blocks.0.feed_forward.up', stored, (1, 2)),
      ('embedding.tokens', table, (0, 1)),
    ):
      spec = leaves[name].sharding.spec
      for dim, is_split in zip(dims, split[column][1:]):
        assert (dim < len(spec) and spec[dim] is not None) == is_split, (axis, name, spec)


@pytest.mark.parametrize('stage', ('1', '2', '3'))
def test_the_picture_of_zero_is_the_formula(pictures, stage):
  """Of a model without tables, of which the formula knows the rest."""
  config = zero.setting(
    ModelConfig(
      vocabulary=1,
      width=64,
      layers=2,
      heads=4,
      max_length=8,
      execution=dataclasses.replace(ModelConfig().execution, dtype='bfloat16'),
    ),
    pictures.DEVICES,
    zero=int(stage),
  )
  count = 10**9
  parts = zero.formula(config, pictures.DEVICES, count)
  drawn = pictures.held(stage)
  names = ('parameters', 'optimizer', 'gradients', 'whole weights', 'whole gradients')
  np.testing.assert_allclose(drawn, [parts[name] / count for name in names], atol=1e-6)


def test_zig_zag_shares_the_work(pictures):
  assert set(pictures.work(zigzag(8, 4))) == {8.0}
  assert pictures.work(np.arange(8)) == [2.0, 6.0, 10.0, 14.0]


# Tables.


def written(config) -> set[str]:
  """Names of what a step and an evaluation of this config say."""
  mesh, objective = make_mesh(MeshConfig(), jax.devices()[:1]), config.objective
  lowered, state = lower_step(config, mesh)
  with jax.set_mesh(mesh):
    batch = objective.batch_like(config.data)
    sums = jax.eval_shape(objective.judged, state.models, batch)
  prepared = types.SimpleNamespace(bytes_of=lambda tokens: 1.0)
  verdict = objective.verdict({name: 1.0 for name in sums}, prepared)
  return {*lowered.out_info[1], *verdict}


@pytest.mark.slow
def test_every_key_of_a_line_is_in_the_table():
  experts = MoEConfig(experts=4, balance_loss=0.01)
  half = dataclasses.replace(tiny().model.execution, dtype='float16')
  known = written(tiny()) | written(tiny(model={'moe': experts}))
  known |= written(tiny(model={'execution': half}))
  for weighting in ('token', 'example'):
    known |= written(dataclasses.replace(tiny(), objective=SFT(weighting=weighting)))
  window = watch._Window()
  window.add(1, {'loss': float('nan')}, 8, 1.0, True)
  window.add(2, {'loss': 1.0}, 8, 1.0, False)
  known |= set(window.line()) | set(watch.memory())
  # Of train.py's evaluation, of the totals, and of what a CPU does not tell.
  known |= {'gzip_bits_per_byte', 'xz_bits_per_byte', 'mfu', 'tokens', 'train_seconds'}
  known |= {'wall_seconds', 'chip_seconds', 'device_bytes', 'device_share'}
  assert known == set(metrics.KEYS)


# The site.


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_other(tmp_path):
  pytest.importorskip('mkdocs', reason='mkdocs-material is not installed')
  pytest.importorskip('material', reason='mkdocs-material is not installed')
  done = subprocess.run(
    [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path / 'site')],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  for page in (tmp_path / 'site').rglob('*.html'):
    fetched = re.findall(
      r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text()
    )
    assert not fetched, (page, fetched)

  def text(name):
    return re.sub(r'<[^>]+>', '', (tmp_path / 'site' / name).read_text())

  for name, has in (
    ('config.html', ('remat_offload', 'learning_rate', 'replicas that share parameters')),
    ('commands.html', ('--stopped_code', '--topology', '--examples', '--ignore_key')),
    ('metrics.html', ('expert_load_max', 'first_step_seconds')),
  ):
    for words in has:
      assert words in text(name), (name, words)
    assert 'generated:' not in (tmp_path / 'site' / name).read_text()
