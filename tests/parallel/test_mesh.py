"""Is the mesh what its config says, and are impossible ones refused?"""
import math

import jax
import jax.ad_checkpoint
import pytest
from hypothesis import given, strategies as st
from jax.sharding import AxisType

from parallel.mesh import AXES, MeshConfig, make_mesh
from parallel.remat import POLICIES, remat


@given(st.tuples(*[st.integers(1, 4)] * 3), st.sampled_from(['data', 'fsdp', 'tensor', '']), st.integers(1, 64))
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


@pytest.mark.parametrize('sizes, error, words', [
    ({'data': 0}, ValueError, 'mesh.data=0 is not a size'),
    ({'tensor': -2}, ValueError, 'mesh.tensor=-2 is not a size'),
    ({'fsdp': -1}, ValueError, r"mesh has -1 on \['data', 'fsdp'\]; only one"),
    ({'stage': 2}, NotImplementedError, "mesh.stage=2: nothing is split over 'stage' yet"),
])
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


def test_remat_policies_are_checked():
  with pytest.raises(ValueError, match=f"remat='ful' is unknown; did you mean 'full'.*{', '.join(POLICIES)}"):
    remat(abs, 'ful')
  assert remat(abs, 'none') is abs


@pytest.mark.parametrize('name, saved', [('none', 2), ('dots', 1), ('full', 0)])
def test_remat_keeps_what_its_name_says(name, saved, capsys):
  w = jax.numpy.ones((4, 4))
  function = lambda x: jax.numpy.sin(jax.numpy.sin(x @ w)).sum()
  jax.ad_checkpoint.print_saved_residuals(remat(function, name), w)
  lines = capsys.readouterr().out.splitlines()
  computed = [line for line in lines if 'from the argument' not in line and 'from a constant' not in line]
  assert len(computed) == saved, computed
