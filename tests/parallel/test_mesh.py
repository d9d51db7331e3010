"""Is the mesh what its config says, and are impossible ones refused?"""

import dataclasses
import math
import random

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.sharding import AxisType

from parallel.mesh import AXES, MeshConfig, make_mesh


@given(
  st.tuples(*[st.integers(1, 4)] * 3),
  st.sampled_from(['data', 'fsdp', 'tensor', '']),
  st.integers(1, 64),
)
def test_sizes_multiply_to_the_devices_or_raise(wanted, free, devices):
  sizes = dict(zip(('data', 'fsdp', 'tensor'), wanted))
  config = MeshConfig(**sizes | ({free: -1} if free else {}))
  fixed = math.prod(wanted) // (sizes[free] if free else 1)
  if devices % fixed if free else devices != fixed:
    with pytest.raises(ValueError, match=f'{devices}'):
      config.resolve(devices)
  else:
    resolved = config.resolve(devices)
    assert tuple(resolved) == AXES and all(resolved[a] == n for a, n in sizes.items() if a != free)
    assert resolved['data'] * resolved['fsdp'] * resolved['tensor'] == devices


@pytest.mark.parametrize(
  'sizes, error, words',
  [
    ({'data': 0}, ValueError, 'mesh.data=0 is not a size'),
    ({'tensor': -2}, ValueError, 'mesh.tensor=-2 is not a size'),
    ({'fsdp': -1}, ValueError, r"mesh has -1 on \['data', 'fsdp'\]; only one"),
    (
      {'zero': 4},
      ValueError,
      'mesh.zero=4 must be 1, 2 or 3; for copies of everything use mesh.data',
    ),
  ],
)
def test_impossible_configs_raise(sizes, error, words):
  with pytest.raises(error, match=words):
    MeshConfig(**sizes)


def test_mesh_that_does_not_fit_raises():
  with pytest.raises(ValueError, match='needs 4 devices, 8 are here; set one axis to -1'):
    make_mesh(MeshConfig(data=2, fsdp=2))
  with pytest.raises(ValueError, match='cannot divide 8 devices: the fixed axes take 3'):
    make_mesh(MeshConfig(fsdp=3))


@pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto], ids=str)
def test_mesh(axis_type):
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), axis_type=axis_type)
  assert mesh.axis_names == AXES and mesh.axis_types == (axis_type,) * 6
  assert list(mesh.shape.values()) == [2, 2, 1, 1, 1, 2]
  part = make_mesh(MeshConfig(tensor=2), jax.devices()[4:6], axis_type)
  assert [d.id for d in part.devices.flat] == [4, 5] and part.axis_types == (axis_type,) * 6


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh's layout asks of a device."""

  id: int
  slice_index: int
  coords: tuple[int, int, int]
  platform: str = 'tpu'
  device_kind: str = 'TPU v5'
  core_on_chip: int = 0


def devices_of(slices, shape=(2, 2, 4), **kinds):
  """Slices of this shape, x fastest, as libtpu describes them (v5p:2x2x4)."""
  coords = [(x, y, z) for z in range(shape[2]) for y in range(shape[1]) for x in range(shape[0])]
  return [
    Device(s * 100000 + i, s, xyz, **kinds) for s in range(slices) for i, xyz in enumerate(coords)
  ]


def crossed(mesh) -> set[str]:
  """The axes along which the slice changes."""
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  return {axis for i, axis in enumerate(AXES) if (np.diff(slices, axis=i) != 0).any()}


def layout(slices, shape=(2, 2, 4), stage=1, kinds={}, **sizes):
  return make_mesh(MeshConfig(stage=stage, **sizes), devices_of(slices, shape, **kinds))


@pytest.mark.parametrize(
  'slices, sizes, axes',
  [
    (2, {'fsdp': 4, 'tensor': 4}, ['data']),
    (2, {'data': 4, 'fsdp': 4, 'tensor': 2}, ['data']),
    (2, {'data': 1, 'stage': 4, 'tensor': 8}, ['stage']),
    (4, {'data': 2, 'stage': 2, 'fsdp': 16}, ['data', 'stage']),
  ],
  ids=str,
)
def test_only_data_and_stage_cross_slices(slices, sizes, axes):
  mesh = layout(slices, **sizes)
  assert crossed(mesh) == set(axes) and len(set(mesh.devices.flat)) == 16 * slices


def test_every_other_axis_across_slices_is_refused():
  with pytest.raises(
    ValueError, match='mesh.data=1 and mesh.stage=1 do not divide over 2 slices.*a multiple of 2'
  ):
    layout(2, data=1, fsdp=32)
  with pytest.raises(ValueError, match='mesh.data=3 and mesh.stage=1 do not divide over 2 slices'):
    layout(2, (2, 1, 3), data=3, fsdp=4)
  with pytest.raises(ValueError, match=r'different numbers of devices, \{0: 16, 1: 8\}'):
    make_mesh(MeshConfig(), devices_of(2)[:24])


@pytest.mark.parametrize(
  'sizes, axes',
  [({'data': 1, 'fsdp': 8, 'tensor': 4}, {'fsdp'}), ({'data': 2, 'fsdp': 16}, {'data'})],
  ids=str,
)
def test_any_axis_may_cross_nodes_of_gpus_but_the_inner_ones_do_last(sizes, axes):
  assert crossed(layout(2, **sizes, kinds={'platform': 'gpu', 'device_kind': 'H100'})) == axes


@pytest.mark.parametrize('slices', [1, 2])
@pytest.mark.parametrize(
  'sizes', [{'fsdp': 4, 'tensor': 4}, {'fsdp': 8, 'tensor': 2}, {'fsdp': 2, 'tensor': 8}], ids=str
)
def test_a_group_of_tensor_is_a_box_of_the_torus_in_whatever_order_devices_come(slices, sizes):
  devices = devices_of(slices)
  random.Random(1).shuffle(devices)
  for group in make_mesh(MeshConfig(**sizes), devices).devices.reshape(-1, sizes['tensor']):
    assert math.prod(np.ptp([device.coords for device in group], axis=0) + 1) == len(group)


def sides(group) -> list[int]:
  """Of the box that devices lie in, the longest first."""
  return sorted((np.ptp([device.coords for device in group], axis=0) + 1).tolist(), reverse=True)


@pytest.mark.parametrize(
  'shape, expert, box',
  [
    ((4, 8, 8), 8, [4, 2, 1]),  # jax itself has a line of 8 there
    ((4, 4, 8), 8, [4, 2, 1]),
    ((4, 4, 4), 4, [4, 1, 1]),  # a ring, which is as good as 2 x 2, and leaves rings to fsdp
    ((4, 4, 4), 16, [4, 4, 1]),
    ((8, 8, 8), 8, [8, 1, 1]),  # a ring is as good as 4 x 2; of 2 x 2 x 2 jax knows nothing
    ((2, 2, 4), 2, [2, 1, 1]),
  ],
  ids=str,
)
@pytest.mark.parametrize('slices', [1, 2])
def test_what_sends_to_all_lies_in_a_box(shape, expert, box, slices):
  """Through the middle of a box pass as many links as its cross section has: an all-to-all takes as
  long as its longest side, or half of that where it is a ring.
  """
  devices = devices_of(slices, shape)
  random.Random(1).shuffle(devices)
  mesh = make_mesh(MeshConfig(data=slices, fsdp=-1, expert=expert), devices)
  assert len(set(mesh.devices.flat)) == len(devices)
  assert mesh.shape['expert'] == expert and mesh.shape['data'] == slices
  for group in np.moveaxis(mesh.devices, AXES.index('expert'), -1).reshape(-1, expert):
    assert sides(group) == box and len({device.slice_index for device in group}) == 1


def test_where_links_are_a_switch_there_is_no_box():
  gpus = devices_of(1, (4, 8, 8), platform='gpu', device_kind='H100')
  mesh = make_mesh(MeshConfig(data=1, fsdp=32, expert=8), gpus)
  assert [device.id for device in mesh.devices.flat] == [*range(256)]


def test_devices_of_a_topology_form_meshes(monkeypatch):
  pytest.importorskip('libtpu', reason='libtpu describes the topology: pip install -e .[plan]')
  from jax.experimental import topologies

  for name, value in {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }.items():
    monkeypatch.setenv(name, value)
  two = topologies.get_topology_desc(
    platform='tpu', topology_name='v5p:2x2x2', num_slices=2
  ).devices
  assert crossed(make_mesh(MeshConfig(fsdp=4, tensor=2), two)) == {'data'}
  one = topologies.get_topology_desc(platform='tpu', topology_name='v6e:4x4').devices
  assert list(make_mesh(MeshConfig(fsdp=8, tensor=2), one).shape.values()) == [1, 8, 1, 1, 1, 2], (
    'splits a physical axis'
  )
