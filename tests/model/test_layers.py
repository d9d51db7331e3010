"""Do the parts of a block compute what the papers say?"""

import math

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st

from model import layers
from model.config import RopeConfig
from model.params import param


@pytest.mark.parametrize('kind, biases', [('rms', 'all'), ('layer', 'none'), ('layer', 'all')])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_norm(kind, biases, dtype):
  config = laws.make_config(norm=kind, biases=biases, norm_epsilon=1e-3)
  norm = laws.randomised(layers.Norm(config, 16, nnx.Rngs(0)))
  biased = (kind, biases) == ('layer', 'all')
  assert (norm.bias is not None) == biased
  x = jnp.asarray(np.random.default_rng(1).normal(2, 3, (2, 3, 16)), dtype)
  actual = norm(x)
  assert actual.dtype == x.dtype
  y = np.asarray(x, np.float64)
  mean = y.mean(-1, keepdims=True) if kind == 'layer' else 0
  expected = (y - mean) / np.sqrt(((y - mean) ** 2).mean(-1, keepdims=True) + 1e-3)
  expected = expected * np.asarray(norm.scale[...]) + (np.asarray(norm.bias[...]) if biased else 0)
  tolerance = 1e-5 if dtype == 'float32' else 1e-2
  np.testing.assert_allclose(
    np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance
  )


def turned(x, position, base=100.0):
  positions = jnp.full((1, 1), position, jnp.int32)
  return np.asarray(
    layers.rotate(x[None, None], layers.rope_angles(positions, x.shape[-1], RopeConfig(base=base)))
  )[0, 0]


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(0, 2**31))
@settings(max_examples=40)
def test_rotary_positions_are_relative(a, b, shift, seed):
  q, k = np.random.default_rng(seed).normal(size=(2, 3, 8)).astype(np.float32)

  def product(a, b):
    return (turned(jnp.asarray(q), a) * turned(jnp.asarray(k), b)).sum(-1)

  np.testing.assert_allclose(product(a, b), product(a + shift, b + shift), atol=1e-3)
  np.testing.assert_allclose(
    np.linalg.norm(turned(jnp.asarray(q), a), axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5
  )


def test_rotary_frequencies():
  cosines, sines = layers.rope_angles(
    jnp.asarray([[0, 1, 7]], jnp.int32), 6, RopeConfig(base=1000.0)
  )
  angles = np.outer([0, 1, 7], [1, 0.1, 0.01])
  np.testing.assert_allclose(cosines[0], np.cos(angles), atol=1e-6)
  np.testing.assert_allclose(sines[0], np.sin(angles), atol=1e-6)
  turn = (jnp.full((1, 1, 1), f(math.pi / 2)) for f in (math.cos, math.sin))
  np.testing.assert_allclose(
    layers.rotate(jnp.asarray([[[[1.0, 0.0]]]]), layers.Angles(*turn))[0, 0, 0], [0, 1], atol=1e-6
  )


def test_parameters_name_their_axes():
  with pytest.raises(ValueError, match=r'shape \(2, 3\) has 2 dimensions, axes .* name 1'):
    param(nnx.Rngs(0), (2, 3), ('embed',), 1.0)
  p = param(nnx.Rngs(0), (40, 50), ('embed', None), 0.5, dtype='bfloat16')
  assert (
    p[...].dtype == jnp.bfloat16 and abs(float(jnp.std(p[...].astype(jnp.float32))) - 0.5) < 0.05
  )
  for init, value in (('ones', 1), ('zeros', 0)):
    assert (param(nnx.Rngs(0), (3,), ('norm',), init)[...] == value).all()


def test_activations_are_of_the_named_kind():
  x = np.linspace(-3, 3, 13)
  expected = {
    'silu': x / (1 + np.exp(-x)),
    'relu': np.maximum(x, 0),
    'relu2': np.maximum(x, 0) ** 2,
    'gelu': 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    'gelu_exact': np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]),
  }
  assert expected.keys() == layers.ACTIVATIONS.keys()
  for name, values in expected.items():
    np.testing.assert_allclose(
      jax.jit(layers.ACTIVATIONS[name])(jnp.asarray(x, jnp.float32)), values, atol=1e-5
    )
