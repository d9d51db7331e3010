"""Do squares of gradients fall where parameters are bfloat16, and are those of checkpoints in which
they could not read as what they are now?
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from model.params import abstract, named_leaves
from parallel.mesh import MeshConfig, make_mesh
from tests.training.test_checkpoint import DATA, PROGRESS, make_state
from tests.training.test_optimizer import SPECS
from training import update
from training.disk import OnDisk
from training.optimizer import OptimizerConfig, make_optimizer
from workdir import former
from workdir.checkpoint import Checkpoints

SHAPES = {'embedding': (64, 32), 'up': (1, 32, 128), 'norm': (1, 32)}
STEPS = 400


def squares(name: str, dtype, **settings) -> dict:
  """What is kept of squared gradients after ten that are large and 390 that are small."""
  config = OptimizerConfig(name=name, learning_rate=1e-6, **settings)
  optimizer = make_optimizer(config, STEPS, {name: SPECS[name] for name in SHAPES})
  parameters = {name: jnp.full(shape, 0.5, dtype) for name, shape in SHAPES.items()}
  state = optimizer.init(parameters)
  part = update.whole(optimizer, parameters, state)

  def step(i, carry):
    size = jnp.where(i < 10, 1.0, 1e-3).astype(dtype)
    return part.update(jnp.array(True), [jnp.full_like(p, size) for p in carry[1]], *carry)

  leaves = jax.tree.leaves(state), jax.tree.leaves(parameters)
  after, _ = jax.jit(lambda carry: jax.lax.fori_loop(0, STEPS, step, carry))(leaves)
  return {
    leaf: np.asarray(x)
    for leaf, x in zip(part.state_names, after, strict=True)
    if former.NARROW.match(f'optimizer.{leaf}')
  }


@pytest.mark.parametrize('name', ['adamw', 'adam8bit', 'muon', 'adafactor'])
def test_squares_fall_in_bfloat16_as_in_f32(name):
  """With b2 = 0.999 they could only rise: a thousandth less is the same number of bfloat16."""
  settings = {} if name == 'adafactor' else {'b2': 0.999}
  narrow, wide = squares(name, jnp.bfloat16, **settings), squares(name, jnp.float32, **settings)
  assert narrow and narrow.keys() == wide.keys()
  for leaf, x in narrow.items():
    # Of signed moments in blocks, whose gradients are 1e-3, the scale is that of the last steps.
    tolerance = 0.05 if '.mu.' in leaf else 0.01
    np.testing.assert_allclose(x, wide[leaf], rtol=tolerance, err_msg=leaf)
    assert x.dtype == wide[leaf].dtype, leaf


@pytest.fixture
def mesh():
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    yield jax.sharding.get_mesh()


def state(dtype, *path):
  """A state whose optimizer has one leaf, at `path`."""
  leaf = jnp.ones(5, dtype) / 3
  for name in reversed(path):
    leaf = {name: leaf}
  return dataclasses.replace(make_state(3), optimizer=(leaf,))


@pytest.mark.parametrize('path', [('squares', 'q'), ('nu', 'q'), ('mu', 'q', 'largest')], ids=str)
@pytest.mark.parametrize('where', ['device', 'disk'])
def test_what_was_bfloat16_is_widened(mesh, tmp_path, path, where):
  """Wherever the state lies that goes on with it."""
  checkpoints = Checkpoints(tmp_path, log=pytest.fail)
  checkpoints.save(3, state('bfloat16', *path), DATA, PROGRESS, None)
  checkpoints.wait()
  target = abstract(lambda: state('float32', *path), mesh)
  if where == 'disk':
    target = dataclasses.replace(
      target,
      optimizer=jax.tree.map(
        lambda x: OnDisk(x.shape, x.dtype, x.sharding, tmp_path), target.optimizer
      ),
    )
  (widened,) = jax.tree.leaves(checkpoints.restore(3, target).optimizer)
  widened = widened.read() if where == 'disk' else widened
  assert widened.dtype == jnp.float32 and (widened == jnp.bfloat16(1 / 3)).all()


def test_what_was_bfloat16_on_disk_is_widened(mesh, tmp_path):
  """It lies in files of a checkpoint, and goes on in files."""

  def on_disk(dtype):
    sharding = NamedSharding(mesh, P(None))
    return {'nu': {'q': OnDisk((5,), jnp.dtype(dtype), sharding, tmp_path)}}

  files = on_disk('bfloat16')
  files['nu']['q'].write(jnp.ones(5, 'bfloat16') / 3)
  before = dataclasses.replace(make_state(3), optimizer=(files,))
  checkpoints = Checkpoints(tmp_path, log=pytest.fail)
  checkpoints.save(3, before, DATA, PROGRESS, None)
  checkpoints.wait()
  target = dataclasses.replace(
    abstract(lambda: make_state(3), mesh), optimizer=(on_disk('float32'),)
  )
  widened = named_leaves(checkpoints.restore(3, target))['optimizer.0.nu.q'].read()
  assert widened.dtype == jnp.float32 and (widened == jnp.bfloat16(1 / 3)).all()


def test_nothing_else_is_taken_for_another_type(mesh, tmp_path):
  checkpoints = Checkpoints(tmp_path, log=pytest.fail)
  checkpoints.save(3, state('bfloat16', 'mu', 'q'), DATA, PROGRESS, None)
  checkpoints.wait()
  with pytest.raises(ValueError, match='does not fit the config'):
    checkpoints.restore(3, abstract(lambda: state('float32', 'mu', 'q'), mesh))
