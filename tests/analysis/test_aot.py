"""Does a missing compiler say so, and can a part of a host be compiled for?"""

import pytest
from jax.experimental import topologies

from analysis import aot


@pytest.mark.parametrize(
  'name, said, platform',
  [
    ('v5e:4x4', 'JAX TPU support not installed; cannot generate TPU topology.', 'tpu'),
    ('h100:1x1x8', 'topology not implemented for cuda', 'cuda'),
  ],
)
def test_without_a_compiler_an_error_says_what_to_install(name, said, platform, monkeypatch):
  """What jax says without libtpu and without the CUDA plugin."""

  def refuse(**_):
    raise RuntimeError(said)

  monkeypatch.setattr(topologies, 'get_topology_desc', refuse)
  with pytest.raises(
    ImportError,
    match=rf'no compiler for {platform} is installed \(.*\); pip install -e .\[plan\] for TPUs',
  ):
    aot.topology(name)


@pytest.mark.parametrize(
  'name, devices',
  [
    ('v5e:1x1', 1),
    ('v6e:2x1', 2),
    ('v5p:1x1x1', 1),
    ('v4:1x1x1', 1),
    ('tpu7x:1x1x1', 2),
    ('v5e:2x2', 4),
  ],
)
def test_a_part_of_a_host(name, devices, topology):
  assert len(topology(name)) == devices


@pytest.mark.parametrize(
  'name, said',
  [
    ('v5e:4x4x4', 'v5e has 2 sides, not 3; write it as in v5e:4x4'),
    ('v6e:16', 'v6e has 2 sides, not 1'),
    ('v5p:4', 'v5p has 2 or 3 sides, not 1; write it as in v5p:4x4x4'),
    ('v5p:2x2x2x2', 'has 2 or 3 sides, not 4'),
    ('0*v5p:2x2x1', 'has no chips; slices and sides are at least 1'),
    ('v5p:0x2x2', 'has no chips'),
    ('h100:1x0x8', 'has no chips'),
    ('99999999*v5e:16x16', 'chips, of at most 100,000; give a smaller one'),
  ],
)
def test_what_is_no_topology_is_refused_before_a_compiler_is_asked(monkeypatch, name, said):
  monkeypatch.setattr(topologies, 'get_topology_desc', lambda **_: pytest.fail('asked'))
  with pytest.raises(ValueError, match=said):
    aot.topology(name)
