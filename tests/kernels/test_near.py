"""Is attention of a row and a head at a time that of all at once, and is it where it pays?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention as dispatch, near, reference
from kernels.attention import attention
from kernels.draws import Dropout
from kernels.mask import Mask, Relative
from kernels.scoring import Scoring
from parallel.mesh import MeshConfig, make_mesh

B, T, N, K, H, HV = 3, 20, 6, 2, 8, 4


def operands():
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (B, T, N, H), (B, T, K, H), (B, T, K, HV)
  return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


SEGMENTS = jnp.asarray(np.arange(T)[None] // np.array([[7], [9], [20]]) + 1, jnp.int32)
SCORINGS = {
  'causal': Scoring(scale=0.3),
  'bidirectional': Scoring(Mask(causal=False), scale=0.3),
  'window': Scoring(Mask(window=5), scale=0.3, softcap=2.0),
  'segments': Scoring(Mask().of_segments(SEGMENTS), scale=0.3),
  'positions': Scoring(
    Mask(
      query_positions=jnp.arange(T, dtype=jnp.int32)[None]
      + jnp.arange(B, dtype=jnp.int32)[:, None],
      key_positions=jnp.arange(T, dtype=jnp.int32)[None] + jnp.zeros((B, 1), jnp.int32),
    ),
    scale=0.3,
  ),
  'sinks': Scoring(scale=0.3, sinks=jnp.linspace(-1, 1, N)),
  'relative': Scoring(
    scale=0.3,
    relative=Relative(
      table=jnp.arange(8.0 * N).reshape(8, N) / 20, bidirectional=False, max_distance=12
    ),
  ),
}


@pytest.mark.parametrize('name', SCORINGS)
def test_a_row_and_a_head_at_a_time_is_all_at_once(monkeypatch, one_device, name):
  """Values, and gradients of all that is differentiated."""
  monkeypatch.setattr(near, 'BLOCK', 0)
  monkeypatch.setattr(dispatch, 'BLOCK', 8)
  q, k, v = operands()
  weights = jax.random.normal(jax.random.key(1), (B, T, N, HV))
  scoring = SCORINGS[name]
  learned = {name: getattr(scoring, name) for name in ('sinks', 'relative')}

  def total(attend):
    def of(q, k, v, learned):
      out, lse = attend(q, k, v, dataclasses.replace(scoring, **learned))
      return (out * weights).sum() + (lse * weights[..., 0]).sum()

    return jax.jit(jax.value_and_grad(of, (0, 1, 2, 3)))

  assert near.wanted(q, k, scoring, 8)
  ours = total(attention)(q, k, v, learned)
  expected = total(reference.attention)(q, k, v, learned)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-4)


def test_where_it_is_wanted(one_device):
  """Many scores on one device of a CPU; what draws by a head's number is as it was."""
  q, k = jnp.zeros((4, 512, 8, 8)), jnp.zeros((4, 512, 4, 8))
  assert near.wanted(q, k, Scoring(), 128)
  few = near.BLOCK // (4 * 4 * 8 * 128)
  assert not near.wanted(q, k[:, :few], Scoring(), 128)
  drops = Dropout(keys=jnp.zeros((4, 2), jnp.uint32), rate=0.5)
  assert not near.wanted(q, k, Scoring(dropout=drops), 128)
  with jax.set_mesh(make_mesh(MeshConfig(data=2), jax.devices()[:2])):
    assert not near.wanted(q, k, Scoring(), 128)
