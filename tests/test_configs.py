"""Does every file under configs/ build, resolve, and lower on meshes,
with nothing large left whole on every device?
"""

import dataclasses
import functools
import importlib.util
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import plan
from analysis import aot
from data.config import DataConfig
from model import params, transformer
from model.params import abstract
from objectives.next_token import NextToken
from objectives.seq2seq import Seq2Seq
from parallel import axes
from parallel.mesh import AXES, MeshConfig, make_mesh
from training import config as configs, reference, state as states
from training.config import Config
from training.optimizer import make_optimizer
from training.program import check_models, lower_step, make_program
from training.step import make_step

ROOT = pathlib.Path(__file__).parents[1]
FILES = reference.config_files()


def module_of(path: pathlib.Path):
  spec = importlib.util.spec_from_file_location(f'configs_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


DECLARED = {
  path: module_of(path).TOPOLOGY for path in FILES if hasattr(module_of(path), 'TOPOLOGY')
}


def load(path: pathlib.Path) -> Config:
  module = module_of(path)
  assert module.__doc__ and f'--config={path.relative_to(ROOT)}' in module.__doc__, (
    f'{path}: the docstring gives the command'
  )
  config = module.get_config()
  assert isinstance(config, Config)
  if config.init and isinstance(config.objective, Seq2Seq) and not config.model.encoder_layers:
    # Its model is that of the run that it begins with.
    model = dataclasses.replace(config.model, encoder_layers=1, position='relative')
    config = dataclasses.replace(config, model=model)
  vocabulary = config.data.tokenizer.vocabulary or {'byte': 259, 'char': 80}.get(
    config.data.tokenizer.kind, 4096
  )
  return config.resolve(vocabulary)


def lower(config: Config, mesh_config: MeshConfig, devices=None):
  """The abstract state on the mesh, and the lowered train step; of an encoder-decoder whose
  objective train.py refuses, the forward pass.
  """
  mesh = make_mesh(mesh_config, devices)
  config.check_mesh(dict(mesh.shape))
  if config.adapter.kind or len(config.objective.models(config.model)) > 1:
    lowered, state = lower_step(config, mesh)
    return state, lowered
  with jax.set_mesh(mesh):
    model = jax.eval_shape(functools.partial(transformer.init, config.model, config.train.seed))
    optimizer = make_optimizer(
      config.optimizer, config.train.steps, params.specs({'policy': model})
    )
    state = abstract(functools.partial(states.init, config, optimizer), mesh)
    rows = jax.NamedSharding(mesh, axes.spec('batch', 'length'))
    tokens = jax.ShapeDtypeStruct(
      (config.data.batch_size, config.data.sequence_length), jnp.int32, sharding=rows
    )
    if config.model.encoder_layers and config.objective == NextToken():
      with pytest.raises(NotImplementedError, match='is an encoder-decoder; use a decoder'):
        check_models(config)
      return state, jax.jit(
        lambda state, tokens: state.models['policy'](tokens, source=tokens).hidden
      ).lower(state, tokens)
    batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
      config.objective.batch_like(config.data),
    )
    return state, make_step(config, optimizer).lower(state, batch)


@pytest.fixture(autouse=True)
def runs_that_are_not_there(monkeypatch):
  """A teacher, which a config names, is a network at its defaults here."""
  default = Config().resolve(4096)
  monkeypatch.setattr(configs, 'load', lambda directory: default)


def test_there_are_configs():
  assert ROOT / 'configs' / 'tiny.py' in FILES


@pytest.mark.slow
@pytest.mark.parametrize(
  'path', [path for path in FILES if path not in DECLARED], ids=lambda path: path.stem
)
def test_it_lowers_as_it_is(path):
  config = load(path)
  _, lowered = lower(
    config,
    config.mesh,
    jax.devices()[: max(1, math.prod(size for size in config.mesh.sizes().values() if size > 0))],
  )
  assert 'stablehlo' in lowered.as_text()[:10_000]


@pytest.mark.slow
@pytest.mark.parametrize(
  'path',
  [
    pytest.param(
      path,
      marks=[pytest.mark.slow] * (path.stem in ('gemma3_27b', 'llama3_70b', 'deepseek_v3')),
      id=path.stem,
    )
    for path in FILES
  ],
)
def test_nothing_large_is_replicated_under_fsdp(path):
  config = load(path)
  rows = config.data.batch_size // config.train.accumulation
  shards = math.gcd(8, rows, config.model.width)
  assert shards >= 2, f'{path}: {rows} rows of width {config.model.width} cannot be split over fsdp'
  state, lowered = lower(config, MeshConfig(fsdp=shards, data=1), jax.devices()[:shards])
  leaves = jax.tree_util.tree_leaves_with_path(state)
  total = sum(x.size * x.dtype.itemsize for _, x in leaves)
  whole = {
    jax.tree_util.keystr(p): x.size * x.dtype.itemsize
    for p, x in leaves
    if x.sharding.is_fully_replicated
  }
  large = {name: size for name, size in whole.items() if size > max(4096, total // 1000)}
  assert not large, f'bytes on every device, of {total} in all: {large}'
  assert 'stablehlo' in lowered.as_text()[:10_000]


def test_the_models_declare_where_they_train():
  declared = {path.stem for path in DECLARED}
  assert declared == {path.stem for path in FILES if path.parent.name == 'models'} - {
    'flan_t5_xl'
  }, 'no objective trains it yet'


@pytest.mark.parametrize('path', DECLARED, ids=lambda path: path.stem)
def test_nothing_large_is_replicated_on_the_declared_topology(path):
  config, topology = load(path), DECLARED[path]
  devices = math.prod(int(n) for n in topology.partition(':')[2].split('x'))
  sizes = config.mesh.resolve(devices)
  config.check_mesh(sizes)
  mesh = AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
  with jax.sharding.use_abstract_mesh(mesh):
    state = abstract(make_program(config)[0], mesh)
  leaves = params.named_leaves(state)
  total = sum(x.size for x in leaves.values())
  whole = {
    name: x.shape
    for name, x in leaves.items()
    if x.sharding.is_fully_replicated and x.size > total // devices // 100
  }
  assert not whole, f'more than a hundredth of a device\'s share, on all {devices}: {whole}'
  held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves.values())
  assert held <= 1.02 * total / devices, (
    f'a device holds {held * devices / total:.3f} times its share'
  )


# The compiler works on each for a minute and more.
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('path', DECLARED, ids=lambda path: path.stem)
def test_it_compiles_for_the_declared_topology_and_fits(path):
  try:
    devices = aot.topology(DECLARED[path])
  except ImportError as error:
    pytest.skip(f'{DECLARED[path]} cannot be compiled for: {error}')
  with jax.default_matmul_precision('default'):  # as train.py leaves it
    made = plan.make_plan(module_of(path).get_config(), devices)
  assert made.fits, made.problem or f'{made.memory.peak / 1e9:.2f} GB of {made.available / 1e9:.2f}'


def test_the_default_data_needs_no_download():
  assert [source.kind for source in load(ROOT / 'configs' / 'tiny.py').data.sources] == ['stdlib']
  assert DataConfig().sources[0].path == ''
