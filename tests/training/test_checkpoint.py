"""Does a checkpoint hold the state at its save, bit for bit, and is every kind of damage seen,
named and gone back from?
"""

import dataclasses
import errno
import functools
import json
import math
import pkgutil
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from model.params import abstract, named_leaves
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import assert_same
from workdir.checkpoint import Checkpoints

DATA, PROGRESS = {'examples': 24, 'key': 'abc'}, {'best': None, 'waited': 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """A train state in small: every type and some shardings that a real one has."""

  step: jax.Array
  model: dict
  optimizer: tuple


@functools.partial(jax.jit, static_argnames=('seed', 'width'))
def make_state(seed, width=16):
  key = jax.random.key(seed)

  def split(x, *axes):
    return jax.sharding.reshard(x, P(*axes))

  wide = split(jax.random.normal(key, (width, 8)), 'fsdp', 'tensor')
  return State(
    jnp.int32(seed),
    {'wide': wide, 'narrow': split(wide.astype(jnp.bfloat16), None, 'fsdp'), 'norm': jnp.ones(5)},
    (split(jnp.arange(width, dtype=jnp.int8), 'fsdp'), jax.random.key_data(key)),
  )


MESHES = {
  'one': (MeshConfig(), 1),
  'fsdp': (MeshConfig(fsdp=8, data=1), 8),
  'both': (MeshConfig(fsdp=4, tensor=2, data=1), 8),
}


@pytest.fixture
def mesh(request):
  config, devices = MESHES[getattr(request, 'param', 'one')]
  with jax.set_mesh(make_mesh(config, jax.devices()[:devices])) as _:
    yield jax.sharding.get_mesh()


def save(checkpoints, *steps, loss=None):
  """Saves make_state(step) at each step; returns the states' host copies."""
  for step in steps:
    checkpoints.save(step, make_state(step), DATA, PROGRESS, loss and loss[step])
  checkpoints.wait()


class Log(list):
  __call__ = list.append


@pytest.mark.costly
@pytest.mark.parametrize('mesh', MESHES, indirect=True)
def test_what_is_saved_comes_back_bitwise_with_its_shardings(mesh, tmp_path):
  checkpoints = Checkpoints(tmp_path, log=pytest.fail)
  save(checkpoints, 3)
  state = make_state(3)
  target = abstract(lambda: make_state(3), mesh)
  restored = checkpoints.restore(checkpoints.latest(), target)
  assert_same(restored, state)
  assert type(restored) is State
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
  record = checkpoints.record(3)
  assert (record['step'], record['data'], record['progress'], record['cost']) == (
    3,
    DATA,
    PROGRESS,
    None,
  )


def test_another_mesh_restores_the_same_values(tmp_path):
  with jax.set_mesh(make_mesh(MESHES['fsdp'][0])):
    save(Checkpoints(tmp_path), 3)
  for config, devices in MESHES.values():
    with jax.set_mesh(make_mesh(config, jax.devices()[:devices])):
      target = abstract(lambda: make_state(3), jax.sharding.get_mesh())
      restored = Checkpoints(tmp_path).restore(3, target)
      assert_same(restored, make_state(3))
      for x, like in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert x.sharding == like.sharding


def test_the_model_alone_can_be_restored(mesh, tmp_path):
  checkpoints = Checkpoints(tmp_path)
  save(checkpoints, 3)
  assert_same(
    checkpoints.restore(3, abstract(lambda: make_state(3).model, mesh), only='model'),
    make_state(3).model,
  )


@pytest.mark.parametrize('mesh', ['one', 'fsdp'], indirect=True)
def test_a_save_stores_the_state_at_the_save_while_training_goes_on(mesh, tmp_path):
  """Steps that reuse the donated buffers run while the save is being written."""

  @jax.jit
  def fresh():
    return jax.sharding.reshard(jnp.full((1024, 1024), 1.0), P('fsdp', None))

  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  checkpoints = Checkpoints(tmp_path)
  for n in (1, 2, 3):
    x = fresh()
    checkpoints.save(n, {'x': x}, DATA, PROGRESS)
    for _ in range(20):
      x = step(x)
    x.block_until_ready()
    checkpoints.wait()
    assert (
      np.array(checkpoints.restore(n, abstract(lambda: {'x': fresh()}, mesh))['x']) == 1
    ).all()


def test_the_last_and_the_best_are_kept(mesh, tmp_path):
  checkpoints = Checkpoints(tmp_path, keep_last=2)
  losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5, 6: None}
  save(checkpoints, *losses, loss=losses)
  assert checkpoints.steps() == [2, 5, 6] and checkpoints.best() == 2
  assert sorted(path.name for path in checkpoints.directory.iterdir()) == [
    name for step in (2, 5, 6) for name in (f'{step:08d}', f'{step:08d}.json')
  ]
  save(checkpoints, 7, loss={7: 0.5})
  assert checkpoints.steps() == [6, 7] and checkpoints.best() == 7


def test_a_loss_that_is_not_finite_is_never_the_best(mesh, tmp_path):
  """NaN is neither lower nor higher than a number: where it came first, it was the lowest."""
  checkpoints = Checkpoints(tmp_path, keep_last=1)
  save(checkpoints, 1, 2, loss={1: math.nan, 2: -math.inf})
  assert checkpoints.steps() == [2] and checkpoints.best() is None
  save(checkpoints, 3, 4, 5, loss={3: 1.0, 4: 0.5, 5: 2.0})
  assert checkpoints.steps() == [4, 5] and checkpoints.best() == 4


def test_a_step_can_be_saved_again(mesh, tmp_path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(2, make_state(9), DATA, PROGRESS)
  save(checkpoints, 2)
  assert_same(
    checkpoints.restore(checkpoints.latest(), abstract(lambda: make_state(2), mesh)), make_state(2)
  )


def test_a_failed_save_raises_at_the_next_wait(mesh, tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)
  save(checkpoints, 1)
  monkeypatch.setattr(
    'files.replace', lambda *_: (_ for _ in ()).throw(OSError('no space left on device'))
  )
  checkpoints.save(2, make_state(2), DATA, PROGRESS)
  with pytest.raises(OSError, match='no space left'):
    checkpoints.wait()
  assert checkpoints.latest() == 1


@pytest.fixture
def blocked(monkeypatch):
  """(name) -> what it stands for does not return until the test ends, and then does what it did."""
  answers = threading.Event()

  def block(name):
    real = pkgutil.resolve_name(name)

    def wait(*given, **how):
      answers.wait(60)  # a test that is wrong fails, and does not hang
      return real(*given, **how)

    monkeypatch.setattr(name, wait)
    return answers

  yield block
  answers.set()


class Clock:
  """Seconds that pass each time somebody looks."""

  def __init__(self, passing):
    self.now, self.passing = 0.0, passing

  def monotonic(self):
    self.now += self.passing
    return self.now


GIVEN_UP = (
  r'^checkpoint 2 in {}/checkpoints is not written after 3,600 s: does its disk answer\? What was '
  r'saved before is whole\. .* raise train\.save_timeout$'
)


def test_a_save_that_the_disk_does_not_begin_is_given_up(mesh, tmp_path, monkeypatch, blocked):
  """Nor does the thread that trains wait for the disk itself, whoever waits there."""
  checkpoints = Checkpoints(tmp_path)
  save(checkpoints, 1)
  answers, clock = blocked('workdir.checkpoint.Checkpoints._remove'), Clock(passing=3600)
  monkeypatch.setattr('workdir.checkpoint.time', clock)
  with pytest.raises(TimeoutError, match=GIVEN_UP.format(tmp_path)):
    checkpoints.save(2, make_state(2), DATA, PROGRESS)
  assert Checkpoints(tmp_path).latest() == 1
  answers.set()
  clock.passing = clock.now = 0
  save(checkpoints, 2)
  assert Checkpoints(tmp_path).latest() == 2


def test_a_save_that_the_disk_does_not_end_is_given_up(mesh, tmp_path, monkeypatch, blocked):
  checkpoints, clock = Checkpoints(tmp_path), Clock(passing=0)
  save(checkpoints, 1)
  answers = blocked('workdir.checkpoint.files.replace')
  monkeypatch.setattr('workdir.checkpoint.time', clock)
  checkpoints.save(2, make_state(2), DATA, PROGRESS)
  clock.passing = 3600
  for _ in range(2):
    with pytest.raises(TimeoutError, match=GIVEN_UP.format(tmp_path)):
      checkpoints.wait()
  assert Checkpoints(tmp_path).latest() == 1
  answers.set()
  clock.passing = clock.now = 0
  checkpoints.wait()
  assert Checkpoints(tmp_path).latest() == 2


def test_a_save_within_its_time_that_raises_a_timeout_raises_that(mesh, tmp_path, monkeypatch):
  def replace(*_):
    raise TimeoutError(errno.ETIMEDOUT, 'Connection timed out', 'x')

  monkeypatch.setattr('workdir.checkpoint.files.replace', replace)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, make_state(1), DATA, PROGRESS)
  with pytest.raises(TimeoutError, match='Connection timed out'):
    checkpoints.wait()
  checkpoints.wait()


@pytest.fixture(scope='module')
def three(tmp_path_factory):
  """A run's directory with whole checkpoints 1, 2 and 3, to be copied and harmed."""
  directory = tmp_path_factory.mktemp('three')
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    save(Checkpoints(directory, keep_last=3), 1, 2, 3)
  return directory


@pytest.fixture
def copy(three, tmp_path):
  shutil.copytree(three, tmp_path / 'run')
  log = Log()
  return Checkpoints(tmp_path / 'run', keep_last=3, log=log), log


def flip(path, position, bit=0):
  data = bytearray(path.read_bytes())
  data[position] ^= 1 << bit
  path.write_bytes(data)


def files_of(checkpoints, step):
  return [
    path for path in sorted((checkpoints.directory / f'{step:08d}').rglob('*')) if path.is_file()
  ]


def test_every_file_is_guarded_against_changes_truncation_and_loss(copy):
  checkpoints, log = copy
  assert checkpoints.latest() == 3 and not log
  guarded = files_of(checkpoints, 3)
  assert len(guarded) >= 5 and sum(path.stat().st_size for path in guarded) > 800
  for path in guarded:
    whole = path.read_bytes()
    harms = [('is missing', path.unlink), ('bytes', lambda: path.write_bytes(whole + b'0'))]
    if whole:
      harms += [
        ('was changed', lambda: flip(path, len(whole) // 2)),
        ('was changed', lambda: flip(path, 0, 7)),
        ('was changed', lambda: flip(path, -1)),
        ('bytes', lambda: path.write_bytes(whole[:-1])),
        ('bytes', lambda: path.write_bytes(b'')),
      ]
    for said, harm in harms:
      harm()
      assert checkpoints.latest() == 2
      (line,) = log
      assert (
        'WARNING: checkpoint 3 is damaged and will not be used' in line
        and str(path) in line
        and said in line
      )
      log.clear()
      path.write_bytes(whole)
    assert checkpoints.latest() == 3 and not log


def test_every_bit_of_the_record_is_guarded(copy):
  """A digit of the data loader's position that changes is still good JSON."""
  checkpoints, log = copy
  path = checkpoints.directory / '00000003.json'
  whole = path.read_bytes()
  for position in range(len(whole)):
    flip(path, position, position % 8)
    with pytest.raises(ValueError, match='00000003.json is damaged'):
      checkpoints.record(3)
    path.write_bytes(whole)
  for cut in range(0, len(whole), 7):
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match='00000003.json is damaged'):
      checkpoints.record(3)
  assert checkpoints.latest() == 2
  assert 'checkpoint 3 is damaged' in log[0] and str(path) in log[0]


def test_a_half_written_directory_is_named_and_not_used(copy):
  checkpoints, log = copy
  (checkpoints.directory / '00000003.json').unlink()
  (checkpoints.directory / '00000004.orbax-checkpoint-tmp').mkdir()
  assert checkpoints.latest() == 2 and checkpoints.steps() == [1, 2]
  assert len(log) == 2
  assert str(checkpoints.directory / '00000003') in log[0] and 'has no record' in log[0]
  assert '00000004.orbax-checkpoint-tmp' in log[1]


def test_only_what_a_run_writes_is_removed(copy, mesh):
  checkpoints, log = copy
  for name in ('backup', '00000003.mine', '3', '00000003 (copy)'):
    shutil.copytree(checkpoints.directory / '00000003', checkpoints.directory / name)
  shutil.copy(checkpoints.directory / '00000003.json', checkpoints.directory / '3.json')
  left = ('00000004', '00000004.spilled', '00000004.orbax-checkpoint-tmp', '123456789')
  for name in left:
    (checkpoints.directory / name).mkdir()
  assert checkpoints.steps() == [1, 2, 3]
  assert checkpoints.latest() == 3 and len(log) == len(left)
  save(checkpoints, 5)
  names = {path.name for path in checkpoints.directory.iterdir()}
  assert {'backup', '00000003.mine', '3', '3.json', '00000003 (copy)'} < names
  assert not names & {*left}


def test_a_record_without_its_directory_is_damaged(copy):
  checkpoints, log = copy
  shutil.rmtree(checkpoints.directory / '00000003')
  assert checkpoints.latest() == 2 and 'is missing' in log[0]


def test_damage_upon_damage_goes_back_further_and_at_last_stops(copy):
  checkpoints, log = copy
  flip(files_of(checkpoints, 3)[0], 0)
  (checkpoints.directory / '00000002.json').write_text('{}')
  assert checkpoints.latest() == 1 and len(log) == 2
  files_of(checkpoints, 1)[0].unlink()
  with pytest.raises(
    ValueError,
    match=r'all checkpoints in .* are damaged: \[1, 2, 3\]; remove that directory to start over',
  ):
    checkpoints.latest()


def test_no_checkpoint_is_no_error(tmp_path):
  assert Checkpoints(tmp_path, log=pytest.fail).latest() is None


def test_what_asks_for_one_all_the_same_is_told_that_there_is_none(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  step = checkpoints.latest()
  for ask in (
    lambda: checkpoints.record(step),
    lambda: checkpoints.reference(step),
    lambda: checkpoints.restore(step, {}),
    lambda: checkpoints.model({}),
  ):
    with pytest.raises(FileNotFoundError, match='holds no checkpoint; train with train.py --work'):
      ask()


def test_after_damage_the_new_checkpoints_are_the_ones_that_are_kept(copy, mesh):
  """The damaged one has a later step; it must neither count as one of the last nor as the best, nor
  stay, nor what a kill left.
  """
  checkpoints, _ = copy
  flip(files_of(checkpoints, 3)[0], 0)
  (checkpoints.directory / '00000007').mkdir()
  resumed = Checkpoints(checkpoints.directory.parent, keep_last=1, log=Log())
  assert resumed.latest() == 2
  resumed.save(2, make_state(2), DATA, PROGRESS)
  resumed.wait()
  assert sorted(path.name for path in checkpoints.directory.iterdir()) == [
    '00000002',
    '00000002.json',
  ]
  assert resumed.latest() == 2


def test_the_best_of_a_past_that_was_gone_back_from_does_not_stay(mesh, tmp_path):
  """Step 3, damaged, had the lowest loss; what goes on from 1 has a best of its own."""
  checkpoints = Checkpoints(tmp_path, keep_last=1, log=Log())
  save(checkpoints, 1, 3, loss={1: 2.0, 3: 0.5})
  flip(files_of(checkpoints, 3)[0], 0)
  save(checkpoints, 1, 2, loss={1: 2.0, 2: 2.5})
  assert checkpoints.steps() == [1, 2] and checkpoints.best() == 1


def test_a_checkpoint_of_another_model_is_refused_by_names(copy, mesh):
  checkpoints, _ = copy
  target = abstract(lambda: make_state(3, width=24), mesh)
  model = {name: x for name, x in target.model.items() if name != 'norm'} | {
    'new': target.model['norm']
  }
  with pytest.raises(ValueError) as error:
    checkpoints.restore(3, dataclasses.replace(target, model=model))
  for part in (
    'checkpoint 3',
    'does not fit',
    'model.new: not in the checkpoint',
    'model.norm: in the checkpoint only',
    "model.wide: ((16, 8), 'float32') in the checkpoint, ((24, 8), 'float32') in the model",
    'optimizer.0',
  ):
    assert part in str(error.value)


def test_leaves_have_their_names():
  assert list(named_leaves({'b': 1, 'a': [2, {'c': 3}]}, 'model')) == [
    'model.a.0',
    'model.a.1.c',
    'model.b',
  ]
  assert json.loads(json.dumps(DATA)) == DATA
