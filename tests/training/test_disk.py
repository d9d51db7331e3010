"""Is what lies in files copied so that any mesh reads it, no file has two writers, and all of it is
on the disk before others count on it?
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from model.params import abstract, named_leaves
from parallel import hosts
from parallel.mesh import MeshConfig, make_mesh
from tests.training.test_checkpoint import DATA, PROGRESS, make_state
from training import disk
from training.disk import OnDisk
from workdir.checkpoint import SPILLED, Checkpoints

SHAPE = (6, 8, 4)
SPLITS = [
  P(),
  P(None, 'fsdp', 'tensor'),
  P('fsdp', None, 'tensor'),
  P(None, ('fsdp', 'tensor'), None),
  P(None, 'tensor', None),
]


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def filled(mesh, split, directory) -> OnDisk:
  x = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
  sharding = NamedSharding(mesh, split)
  return OnDisk(SHAPE, x.dtype, sharding, directory).filled(jax.device_put(x, sharding))


@pytest.mark.parametrize('split', SPLITS, ids=str)
@pytest.mark.parametrize('other', SPLITS, ids=str)
def test_every_mesh_reads_what_another_wrote(mesh, split, other, tmp_path, monkeypatch):
  monkeypatch.setattr(disk, 'COPIED', 1)  # a layer at a time
  kept, path = filled(mesh, split, tmp_path), tmp_path / 'copy' / 'x'
  disk.reserve(path, kept)
  kept.export(path)
  like = OnDisk(SHAPE, np.float32, NamedSharding(mesh, other), tmp_path)
  expected = np.asarray(kept.read())
  np.testing.assert_array_equal(like.load(path, kept.parts).read(), expected)
  abstract_ = jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=NamedSharding(mesh, other))
  np.testing.assert_array_equal(disk.stored(path, abstract_, kept.parts), expected)


def test_what_older_versions_kept_in_one_file_is_read(mesh, tmp_path):
  expected = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
  expected.tofile(tmp_path / 'x')
  like = OnDisk(SHAPE, np.float32, NamedSharding(mesh, SPLITS[1]), tmp_path)
  np.testing.assert_array_equal(like.load(tmp_path / 'x', None).read(), expected)


def test_no_file_has_two_writers(mesh, tmp_path, monkeypatch):
  """Two hosts of four devices each: two pages of a file that both write would be undone."""
  kept = filled(mesh, P('data', 'fsdp', 'tensor'), tmp_path)
  path = tmp_path / 'copy' / 'x'
  disk.reserve(path, kept)
  opened, hosts_, write = [], np.array_split(np.array(mesh.devices).ravel(), 2), disk._write

  def spied(file, x, offset):
    if file is not kept._file:
      opened[-1].add(os.readlink(f'/proc/self/fd/{file.fileno()}'))
    write(file, x, offset)

  monkeypatch.setattr(disk, '_write', spied)
  shards = dict(kept.shards)
  for devices in hosts_:
    opened.append(set())
    kept.__dict__['shards'] = {device: shards[device] for device in devices}
    kept.export(path)
  assert opened[0] | opened[1] == {str(file) for file in path.parent.iterdir()}
  assert opened[0] and opened[1] and not opened[0] & opened[1]
  np.testing.assert_array_equal(
    disk.stored(path, jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=kept.sharding), kept.parts),
    np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE),
  )


def test_it_is_on_the_disk_before_the_others_hear_of_it(tmp_path, monkeypatch):
  """And a checkpoint knows each file by what it holds."""
  done = []
  fsync, barrier = os.fsync, hosts.barrier
  monkeypatch.setattr(
    os, 'fsync', lambda file: (done.append(os.readlink(f'/proc/self/fd/{file}')), fsync(file))
  )
  monkeypatch.setattr(hosts, 'barrier', lambda name: (done.append(name), barrier(name)))
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, data=1), jax.devices()[:2])):
    mesh = jax.sharding.get_mesh()

    def on_disk():
      return OnDisk((4, 6), np.float32, NamedSharding(mesh, P(None, 'fsdp')), tmp_path)

    x = jnp.arange(24.0).reshape(4, 6)
    kept = on_disk().filled(jax.device_put(x, on_disk().sharding))
    state = dataclasses.replace(make_state(3), optimizer=({'mu': {'q': kept}},))
    checkpoints = Checkpoints(tmp_path, log=pytest.fail)
    checkpoints.save(3, state, DATA, PROGRESS, None)
    checkpoints.wait()
    target = dataclasses.replace(
      abstract(lambda: make_state(3), mesh), optimizer=({'mu': {'q': on_disk()}},)
    )
    restored = named_leaves(checkpoints.restore(3, target))['optimizer.0.mu.q']
  np.testing.assert_array_equal(restored.read(), x)
  files = [f'optimizer.0.mu.q.0_{i}' for i in range(2)]
  told = done.index('checkpoint 3 holds what was on disk')
  assert [name.rpartition('/')[2] for name in done[told - 2 : told]] == files
  assert checkpoints.problems(3) == []
  assert {f'{SPILLED}/{name}' for name in files} <= checkpoints.record(3)['files'].keys()
