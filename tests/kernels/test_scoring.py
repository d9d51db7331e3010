"""Is what a call asks of attention one value: static numbers, arrays that are leaves, and nothing
dropped?
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import draw

from kernels import cached
from kernels.attention import attention
from kernels.cached import Held
from kernels.mask import Mask, Relative
from kernels.scoring import Scoring

TABLE = Relative(table=jnp.ones((4, 2)), bidirectional=False, max_distance=9)
EVERYTHING = Scoring(
  Mask(window=3, prefix=jnp.array([2])), softcap=2.0, sinks=jnp.zeros(2), relative=TABLE, scale=0.5
)


def test_arrays_are_leaves_and_numbers_structure():
  leaves, structure = jax.tree.flatten(EVERYTHING)
  assert [x.shape for x in leaves] == [(1,), (2,), (4, 2)]
  other = jax.tree.structure(dataclasses.replace(EVERYTHING, softcap=3.0))
  assert structure != other and isinstance(hash(structure), int)
  assert jax.tree.unflatten(structure, leaves) == EVERYTHING


def test_what_is_set_is_named():
  assert Scoring().fields() == {'causal'}
  assert EVERYTHING.fields() == {'causal', 'window', 'prefix', 'softcap', 'sinks', 'relative'}


def test_a_scale_that_is_not_given_follows_the_width():
  assert Scoring().scaled(16).scale == 0.25 and EVERYTHING.scaled(16) is EVERYTHING


def test_a_soft_cap_that_is_traced_raises():
  q = draw(1, 4, 2, 8)
  with pytest.raises(ValueError, match='must be a number when attention is traced: make it static'):
    jax.jit(lambda cap: attention(q, q, q, Scoring(softcap=cap), backend='reference'))(2.0)


@pytest.mark.parametrize('backend', ['reference', 'blocked', 'xla'])
def test_a_scale_may_be_traced(backend):
  """And differentiated, through the blocks that are computed again, too."""
  q, k = draw(1, 6, 2, 8), draw(1, 6, 2, 8, seed=1)

  def loss(scale):
    return jnp.sum(jnp.sin(attention(q, k, k, Scoring(scale=scale), backend=backend)[0]))

  found = jax.jit(jax.grad(loss))(0.3)
  wanted = (loss(0.301) - loss(0.299)) / 0.002
  np.testing.assert_allclose(found, wanted, rtol=2e-2)


@pytest.mark.parametrize(
  'mask, words',
  [
    (Mask(causal=False), 'not causal=False'),
    (Mask(prefix=jnp.array([2])), r"not \['prefix'\]; use kernels.attention"),
  ],
)
def test_a_cache_drops_no_part_of_a_mask(mask, words):
  held = Held(jnp.zeros((1, 1, 2, 8, 8)), jnp.zeros((1, 1, 2, 8, 8)))
  with pytest.raises(NotImplementedError, match=words):
    cached.attention(draw(1, 1, 2, 8), held, 0, jnp.array([3]), jnp.array([[2]]), Scoring(mask))
