"""Do norms name what is not finite?"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from workdir import unsound


def test_norms_name_what_is_not_finite():
  class Attention(nnx.Module):
    def __init__(self):
      self.q, self.value = nnx.Param(jnp.full((2, 2), 3.0)), nnx.Param(jnp.full((4,), jnp.nan))

  class Model(nnx.Module):
    def __init__(self):
      self.attention, self.embedding = Attention(), nnx.Param(jnp.full((4,), 2.0))

  norms = unsound.norms_by_module(Model())
  assert set(norms) == {'attention', 'attention.q', 'attention.value', 'embedding'}
  assert norms['embedding'] == 4 and norms['attention.q'] == 6
  assert unsound.non_finite(norms) == ['attention', 'attention.value']


def test_norms_of_plain_trees():
  tree = {
    'a': {'value': jnp.array([3.0, 4.0]), 'x': jnp.array([0.0, 12.0])},
    'large': jnp.full((4,), 1e30),
    'half': jnp.full((4,), 300, jnp.float16),
    'zero': jnp.zeros((3,)),
    'scalar': jnp.float32(-2),
  }
  norms = unsound.norms_by_module(tree)
  expected = {'a': 13, 'a.value': 5, 'a.x': 12, 'large': 2e30, 'half': 600, 'zero': 0, 'scalar': 2}
  assert norms.keys() == expected.keys() and unsound.non_finite(norms) == []
  np.testing.assert_allclose([norms[name] for name in expected], list(expected.values()), rtol=1e-6)
