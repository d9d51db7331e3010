"""Is a checkpoint in a bucket what was saved, or not used?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import files
from parallel.mesh import MeshConfig, make_mesh
from remote import local
from tests.remote.conftest import BOTH
from workdir import arrays
from workdir.checkpoint import Checkpoints


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  models: dict


def state(seed: int, split: bool = True) -> State:
  """Leaves of several types: split over eight devices, or on one."""
  draw = np.random.default_rng(seed)
  mesh = make_mesh(
    MeshConfig(data=1, fsdp=8) if split else MeshConfig(), jax.devices()[: 1 + 7 * split]
  )

  def put(x, *axes):
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))

  leaves = {
    'wide': put(draw.normal(size=(16, 3)).astype(np.float32), 'fsdp'),
    'half': put(jnp.asarray(draw.normal(size=(8, 8)), jnp.bfloat16), None, 'fsdp'),
    'count': put(np.int32(seed)),
    'zeros': put(np.zeros((8, 2), np.float32), 'fsdp'),
  }
  return State({'policy': leaves})


def saved(place, *steps, **options) -> Checkpoints:
  checkpoints = Checkpoints(place, log=said.append, **options)
  for step in steps:
    checkpoints.save(step, state(step), {}, {})
  checkpoints.wait()
  return checkpoints


said: list[str] = []


def same(a, b) -> None:
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert x.dtype == y.dtype and x.sharding == y.sharding


@BOTH
def test_what_was_saved_is_restored_bit_for_bit_onto_any_mesh(bucket, tmp_path):
  checkpoints = saved(bucket / 'run', 2, 6, chunk_bytes=16, keep_last=1)
  assert checkpoints.steps() == [6] and checkpoints.latest() == 6
  for split in (True, False):
    same(checkpoints.restore(6, state(0, split)), state(6, split))
  chunks = [key for key in checkpoints.record(6)['files'] if 'wide/' in key]
  assert len(chunks) == 1 + 16, 'of 16 bytes at most, each of a shard'
  # A copy is read on a disk, and one of a disk's in a bucket.
  copy = tmp_path / 'copy'
  local.bring(bucket / 'run', copy, (bucket / 'run').found())
  on_disk = Checkpoints(copy)
  assert on_disk.latest() == 6
  same(on_disk.restore(6, state(0)), state(6))


@pytest.mark.slow
def test_what_orbax_wrote_on_a_disk_is_read_from_a_bucket(bucket, tmp_path):
  saved(tmp_path, 2)
  staging = local.Staging(bucket / 'up')
  staging.directory = tmp_path
  staging.send()
  checkpoints = Checkpoints(bucket / 'up')
  assert checkpoints.latest() == 2
  same(checkpoints.restore(2, state(0)), state(2))


@BOTH
def test_objects_that_were_changed_are_named_and_their_checkpoint_is_not_used(bucket):
  checkpoints = saved(bucket / 'run', 2, 4)
  place = checkpoints.directory / '00000004' / 'models.policy.wide' / '0.0'
  whole = place.read_bytes()
  for content, problem in (
    (whole[:-1], f'{place} has {len(whole) - 1} bytes, {len(whole)} were written'),
    (whole[:-1] + bytes([whole[-1] ^ 1]), f'{place} was changed'),
    (None, f'{place} is missing'),
  ):
    place.unlink() if content is None else files.replace(place, content)
    assert problem in checkpoints.problems(4)[0]
    said.clear()
    assert checkpoints.latest() == 2 and problem in said[0]
  # And what a listing cannot tell of is no zeros.
  with pytest.raises(OSError, match='00000004'):
    arrays.read(checkpoints.directory / '00000004', flat(state(0)), [])


def flat(tree: State) -> dict:
  return {f'models.policy.{name}': x for name, x in tree.models['policy'].items()}


@BOTH
@pytest.mark.slow
def test_what_a_killed_writer_left_is_not_used_and_goes_with_the_next_save(bucket):
  checkpoints = saved(bucket / 'run', 2)
  writer = arrays.BucketWriter(2**20)
  writer.begin(checkpoints.directory / '00000004', flat(state(4)))
  writer.finish(checkpoints.directory / '00000004')  # and no record
  said.clear()
  assert checkpoints.latest() == 2 and '00000004 has no record' in said[0]
  saved(bucket / 'run', 6)
  assert not (checkpoints.directory / '00000004').exists()


@pytest.mark.parametrize(
  'bucket', ['s3', pytest.param('gs', marks=pytest.mark.long)], indirect=True
)
@pytest.mark.slow
def test_a_bucket_that_fails_now_and_then_holds_the_same(bucket, proxy):
  count = iter(range(10**6))
  proxy.faults = lambda method, path: None if next(count) % 4 else 503
  checkpoints = saved(bucket / 'run', 2)
  same(checkpoints.restore(checkpoints.latest(), state(0)), state(2))


@BOTH
@pytest.mark.slow
def test_a_save_that_a_bucket_refuses_fails_by_name(bucket, proxy):
  checkpoints = saved(bucket / 'run', 2)

  def refused(method, path):  # Cloud Storage has slashes of keys as %2F
    return 403 if method in ('PUT', 'POST') and '00000004' in path else None

  proxy.faults = refused
  with pytest.raises(OSError, match='00000004: .*give credentials'):
    checkpoints.save(4, state(4), {}, {})
    checkpoints.wait()
  assert checkpoints.latest() == 2
