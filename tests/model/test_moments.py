"""Are mean and standard deviation of log-probabilities those of the whole law?"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.moments import moments
from model.vocabulary import CHUNK, Law
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

B, T, D, V, LIMIT = 4, 6, 8, 24, 21


@pytest.mark.parametrize('sizes, chunk', [(None, 5 * B * T), ({'tensor': 2, 'data': 4}, CHUNK)])
def test_moments_are_those_of_the_law(sizes, chunk):
  """By numpy in float64, over the whole vocabulary; of a law that is cut, tempered and capped."""
  draw = np.random.default_rng(0)
  x, head = 2 * draw.normal(size=(B, T, D)), draw.normal(size=(V, D))
  temperature = np.linspace(0.5, 2, B)
  targets, weights = draw.integers(0, LIMIT, (B, T)), (draw.random((B, T)) < 0.7).astype(float)
  logits = 6 * np.tanh(x @ head.T / 6) / temperature[:, None, None]
  p = np.exp(logits[..., :LIMIT])
  p /= p.sum(-1, keepdims=True)
  mean = (p * np.log(p)).sum(-1)
  std = np.sqrt((p * np.log(p) ** 2).sum(-1) - mean**2)
  logprob = np.take_along_axis(np.log(p), targets[..., None], -1)[..., 0]

  mesh = jax.set_mesh(make_mesh(MeshConfig(**sizes))) if sizes else contextlib.nullcontext()
  with mesh:
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, head, temperature)]
    if sizes:
      axes = (('batch', None, None), ('vocab', None), ('batch',))
      arrays = [ax.place(a, *names) for a, names in zip(arrays, axes)]
    law = Law(*arrays, softcap=6.0, vocabulary=LIMIT)
    put = [jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)]
    put = [ax.place(a, 'batch', 'length') for a in put] if sizes else put
    found = jax.jit(moments, static_argnames='chunk')(law, *put, chunk=chunk)
  for got, expected in zip(found, (logprob, mean, std)):
    np.testing.assert_allclose(got, expected * weights, atol=2e-5)
