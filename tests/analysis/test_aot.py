"""Does a missing compiler say so?"""
import pytest
from jax.experimental import topologies

from analysis import aot


@pytest.mark.parametrize('name, said, platform', [
    ('v5e:4x4', 'JAX TPU support not installed; cannot generate TPU topology.', 'tpu'),
    ('h100:1x1x8', 'topology not implemented for cuda', 'cuda'),
])
def test_without_a_compiler_an_error_says_what_to_install(name, said, platform, monkeypatch):
  """What jax says without libtpu and without the CUDA plugin."""
  def refuse(**_):
    raise RuntimeError(said)
  monkeypatch.setattr(topologies, 'get_topology_desc', refuse)
  with pytest.raises(ImportError, match=rf'no compiler for {platform} is installed \(.*\); pip install -e .\[plan\] for TPUs'):
    aot.topology(name)
