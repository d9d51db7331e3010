"""Is training the same wherever parameters and optimizer state lie, and are they where they are
said to be?
"""

import dataclasses
import functools
import itertools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis.memory import shard_bytes
from model.config import MoEConfig
from model.execution import ExecutionConfig
from model.params import named_leaves
from parallel.mesh import make_mesh
from tests.training.conftest import on, run_here
from tests.training.test_zero_training import batch, setting
from training import spill
from training.config import TrainConfig
from training.disk import OnDisk
from training.optimizer import OPTIMIZERS, OptimizerConfig
from training.program import begin_state, make_program, make_target
from workdir.checkpoint import SPILLED, Checkpoints

SPLIT = {'data': 2, 'fsdp': 4}
HOST = {'offload_optimizer': 'host', 'offload_parameters': True}
DISK = {'offload_optimizer': 'disk'}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Small runs by where they keep the optimizer's state; one state of each at a time."""
  return {
    name: Run(
      directory=tmp_path_factory.mktemp(name), offload_optimizer=name.removeprefix('device')
    )
    for name in ('device', 'disk')
  }


class Run:
  """A run of train.py's step from its first state on, or from the one given to `go`."""

  def __init__(self, mesh=SPLIT, model=(), optimizer='adamw', directory='', **training):
    config = setting(mesh, model, **training)
    # With a small epsilon updates are as large as the learning rate however small the gradient:
    # rounding would show.
    epsilon = {'epsilon': 1e-3} if 'b1' in OPTIMIZERS[optimizer] and optimizer != 'lion' else {}
    self.config = dataclasses.replace(config, optimizer=OptimizerConfig(name=optimizer, **epsilon))
    self.mesh = make_mesh(config.mesh)
    with jax.set_mesh(self.mesh):
      self.make_state, self.step = make_program(self.config)
      self.target = make_target(
        self.config, self.make_state, self.mesh, directory or tempfile.gettempdir()
      )

  def begin(self):
    with jax.set_mesh(self.mesh):
      return begin_state(self.config, self.make_state, self.target)

  def go(self, state, steps=3):
    with jax.set_mesh(self.mesh):
      for _ in range(steps):
        state, metrics, _ = self.step(state, batch())
    return state, metrics


def whole(x) -> np.ndarray:
  return np.asarray(x.read() if isinstance(x, OnDisk) else x)


def assert_same(a, b):
  a, b = named_leaves(a), named_leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    assert whole(a[name]).tobytes() == whole(b[name]).tobytes(), name


def assert_close(a, b, atol):
  for (name, x), y in zip(named_leaves(a).items(), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(
      np.asarray(x, np.float32),
      np.asarray(y, np.float32),
      err_msg=name,
      atol=atol,
      rtol=1e-6 if x.dtype == jnp.float32 else 2**-7,
    )


@functools.cache
def plain(*setting_):
  """What a run with everything on the device has after three steps; copied, for steps donate."""
  mesh, model, optimizer, training = (dict(x) if isinstance(x, tuple) else x for x in setting_)
  run = Run(mesh, model, optimizer, **training)
  return jax.tree.map(np.asarray, run.go(run.begin()))


def check(where, mesh=SPLIT, model=(), optimizer='adamw', **training):
  """Three steps are those of a run on the device, up to rounding: a compiler fuses multiplications
  and additions as a program lets it.

  Moments in 8 bits differ where a value is halfway between two codes.
  """

  def frozen(x):
    return tuple(dict(x).items())

  expected, metrics = plain(frozen(mesh), frozen(model), optimizer, frozen(training))
  run = Run(mesh, model, optimizer, **training, **where)
  state, measured = run.go(run.begin())
  assert_close(
    state.models['policy'], expected.models['policy'], 5e-5 if optimizer == 'adam8bit' else 2e-6
  )
  assert_close(measured, metrics, 1e-5)
  assert [x.shape for x in jax.tree.leaves(state.optimizer)] == [
    x.shape for x in jax.tree.leaves(expected.optimizer)
  ]
  return state, expected


@pytest.mark.slow
def test_in_the_hosts_memory():
  state, _ = check(HOST)
  kinds = {name: x.sharding.memory_kind for name, x in named_leaves(state.models['policy']).items()}
  assert (
    kinds['stack.blocks.0.attention.q']
    == kinds['stack.blocks.0.feed_forward.down']
    == 'pinned_host'
  )
  assert kinds['embedding.tokens'] == kinds['stack.norm.scale'] == 'device'
  assert all(
    x.sharding.memory_kind == 'pinned_host' for x in jax.tree.leaves(state.optimizer) if x.ndim
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'where',
  [HOST, {'offload_parameters': True}, {'offload_optimizer': 'host'}],
  ids=['both', 'parameters', 'optimizer'],
)
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_every_optimizer_in_the_hosts_memory(optimizer, where):
  check(where, optimizer=optimizer)


@pytest.mark.slow
@pytest.mark.parametrize(
  'where, setting_',
  list(
    itertools.product(
      [HOST, DISK | {'offload_parameters': True}],
      [
        {'model': {'execution': ExecutionConfig(remat='dots')}},
        {'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2}},
        {'mesh': {'data': 2, 'fsdp': 2, 'context': 2}},
        {
          'mesh': {'data': 2, 'fsdp': 2, 'expert': 2},
          'model': {
            'moe': MoEConfig(
              experts=4, per_token=2, feed_forward=16, selection_bias=True, bias_rate=0.01
            )
          },
        },
        {'model': {'execution': ExecutionConfig(remat='full', parameter_dtype='bfloat16')}},
      ],
    )
  ),
  ids=str,
)
def test_with_everything_else(where, setting_):
  check(where, **setting_)


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_every_optimizer_on_disk(optimizer, monkeypatch):
  monkeypatch.setattr(spill, 'SLICE', 1)  # a layer at a time
  check(DISK, optimizer=optimizer)


@pytest.mark.slow
def test_on_disk_goes_on_from_the_device_and_back(runs, tmp_path):
  """State on disk and on the device can follow each other; on disk a resumed run is the same bit
  for bit.
  """
  expected, _ = jax.tree.map(lambda x: np.array(x), runs['device'].go(runs['device'].begin()))
  for one, other in (('disk', 'device'), ('device', 'disk'), ('disk', 'disk')):
    checkpoints = Checkpoints(tmp_path / f'from {one}' / other, log=lambda _: None)
    with jax.set_mesh(runs[one].mesh):
      state, _ = runs[one].go(runs[one].begin(), 2)
      checkpoints.save(2, state, {}, {})
      uninterrupted, _ = runs[one].go(state, 1)  # changes the files that were copied
      uninterrupted = jax.tree.map(lambda x: whole(x).copy(), uninterrupted)
      checkpoints.wait()
      assert checkpoints.problems(2) == []
      state = checkpoints.restore(2, runs[other].target)
    state, _ = runs[other].go(state, 1)
    assert_close(state.models['policy'], expected.models['policy'], 2e-6)
    if one == other:
      assert_same(state, uninterrupted)


@pytest.mark.slow
def test_from_disk_to_the_hosts_memory_and_back(runs, tmp_path):
  disk, host, checkpoints = runs['disk'], Run(**HOST), Checkpoints(tmp_path, log=lambda _: None)
  with jax.set_mesh(disk.mesh):
    state, step = disk.go(disk.begin(), 1)[0], 1
    before = {name: whole(x).copy() for name, x in named_leaves(state).items()}
    for run in (host, disk):
      checkpoints.save(step, state, {}, {})
      checkpoints.wait()
      state, step = checkpoints.restore(step, run.target), step + 1
      assert_same({name: whole(x) for name, x in named_leaves(state).items()}, before)


@pytest.mark.slow
def test_on_disk_moves_to_another_mesh(runs, tmp_path):
  run, checkpoints = runs['disk'], Checkpoints(tmp_path, log=lambda _: None)
  with jax.set_mesh(run.mesh):
    state, _ = run.go(run.begin(), 1)
    checkpoints.save(1, state, {}, {})
    checkpoints.wait()
  other = Run({'data': 1, 'fsdp': 2, 'tensor': 4}, **DISK)
  with jax.set_mesh(other.mesh):
    assert_same(checkpoints.restore(1, other.target), state)


@pytest.mark.slow
def test_a_killed_writer_leaves_nothing_that_counts(runs, tmp_path):
  """Killed between the copy of what was on disk and the rest; and a changed byte of the copy is
  seen.
  """
  run, checkpoints = runs['disk'], Checkpoints(tmp_path, log=lambda _: None)
  with jax.set_mesh(run.mesh):
    state = run.begin()
    left = checkpoints.directory / f'00000003.{SPILLED}'
    left.mkdir(parents=True)
    (left / 'half').write_text('half')
    assert checkpoints.latest() is None
    checkpoints.save(1, state, {}, {})
    checkpoints.wait()
  assert checkpoints.latest() == 1 and not left.exists()
  files = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
  assert files and not list(files[0].directory.iterdir())  # a killed process leaves no scratch
  copy = next((checkpoints.directory / '00000001' / SPILLED).iterdir())
  data = bytearray(copy.read_bytes())
  data[0] ^= 1
  copy.write_bytes(data)
  assert 'was changed' in checkpoints.problems(1)[0]


@pytest.mark.slow
def test_a_step_that_is_not_finite_leaves_no_trace_on_disk(runs):
  run = runs['disk']
  state, _ = run.go(run.begin(), 1)
  before = {
    name: whole(x).copy()
    for name, x in named_leaves((state.models['policy'], state.optimizer)).items()
  }
  state = dataclasses.replace(
    state, scale=dataclasses.replace(state.scale, scale=jnp.float32(jnp.inf))
  )
  state, _ = run.go(state, 1)
  assert state.scale.skipped_steps == 1 and state.step == 2
  after = {
    name: whole(x) for name, x in named_leaves((state.models['policy'], state.optimizer)).items()
  }
  assert_same(after, before)


@pytest.mark.slow
def test_nothing_of_it_is_in_memory(runs):
  """Of a state on disk no array is left on a device, and a step takes and makes only slices."""
  run = runs['disk']
  state = run.begin()
  assert all(isinstance(x, OnDisk) for x in jax.tree.leaves(state.optimizer) if x.ndim)
  in_files = sum(x.nbytes for x in jax.tree.leaves(state.optimizer) if x.ndim)
  assert in_files == 2 * sum(x.nbytes for x in jax.tree.leaves(state.models['policy']))
  assert shard_bytes(run.target.optimizer, 'disk') == pytest.approx(
    in_files / 4, rel=0.02
  )  # vectors are not split
  assert shard_bytes(run.target.optimizer) < 100


def test_what_cannot_work_is_an_error():
  with pytest.raises(
    ValueError, match="train.offload_optimizer='disc' is unknown; did you mean 'disk'"
  ):
    TrainConfig(offload_optimizer='disc')
  with pytest.raises(ValueError, match='train.spill_dir'):
    TrainConfig(spill_dir='/somewhere')
  with pytest.raises(ValueError, match="use model.execution.remat='full'"):
    setting(SPLIT, {'execution': ExecutionConfig(remat='none')}, offload_parameters=True)
  with pytest.raises(NotImplementedError, match="use model.execution.remat='full'"):
    setting(SPLIT, {'execution': ExecutionConfig(remat='sqrt')}, offload_parameters=True)
  with pytest.raises(NotImplementedError, match='use accumulation=1'):
    setting(SPLIT, accumulation=2, offload_parameters=True)
  with pytest.raises(ValueError, match='use mesh.zero=3'):
    setting(SPLIT | {'zero': 1}, offload_parameters=True)
  with pytest.raises(NotImplementedError, match='mesh.stage=2'):
    setting({'data': 2, 'fsdp': 2, 'stage': 2}, offload_parameters=True).check_mesh(
      {'data': 2, 'fsdp': 2, 'stage': 2, 'expert': 1, 'context': 1, 'tensor': 1}
    )


@pytest.mark.slow
def test_a_run_of_the_command_goes_on_from_disk(corpus, tmp_path):
  """Four steps on disk are two, and two more of the same command."""

  def config(steps):
    return on(corpus, train={'steps': steps, 'offload_optimizer': 'disk'})

  run_here(config(4), tmp_path / 'straight')
  for steps in (2, 4):
    run_here(config(steps), tmp_path / 'twice')
  files = [
    sorted((tmp_path / name / 'checkpoints' / '00000004' / SPILLED).iterdir())
    for name in ('straight', 'twice')
  ]
  assert files[0] and [f.name for f in files[0]] == [f.name for f in files[1]]
  assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files))
