"""Are draws jax.random's, a share of what it says, and the same wherever their places lie?"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import draws
from kernels.attention import attention
from kernels.draws import Dropout
from kernels.mask import Mask, zigzag
from kernels.scoring import Scoring
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

KEY = jax.random.key(3, impl='threefry2x32')


def keys(rows=4):
  return draws.keys_of_rows(jax.random.key_data(KEY), rows)


def test_keys_and_bits_are_those_of_jax_random():
  rows = jax.vmap(lambda row: jax.random.fold_in(KEY, row))(jnp.arange(4))
  np.testing.assert_array_equal(keys(), jax.random.key_data(rows))
  np.testing.assert_array_equal(
    draws.folded(keys(), 0, 9),
    jax.random.key_data(jax.vmap(jax.random.fold_in, (0, None))(rows, 9)),
  )
  # A token's place is the upper word of a counter, what it has the lower one.
  made = draws.by_token(keys(), jnp.zeros((4, 2, 3, 5)))
  first = jax.vmap(lambda key: jax.random.bits(key, (15,)))(rows)
  np.testing.assert_array_equal(made[:, 0].reshape(4, 15), first)
  assert len(np.unique(made)) == made.size


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_a_share_is_left_out_and_the_mean_stays(rate):
  x = jnp.ones((4, 64, 512))
  y = np.asarray(Dropout(keys=keys(), rate=rate).of_tokens(x))
  error = math.sqrt(rate * (1 - rate) / x.size)
  assert abs((y == 0).mean() - rate) < 4 * error
  assert abs(y.mean() - 1) < 4 * error / (1 - rate)
  np.testing.assert_allclose(y[y > 0], 1 / (1 - rate), rtol=1e-6)
  # No row, token or column is like another.
  for axis in range(3):
    assert (np.diff(y, axis=axis) != 0).any(tuple({0, 1, 2} - {axis})).all()


def test_noise_is_uniform():
  made = np.asarray(draws.uniform(draws.by_token(keys(), jnp.zeros((4, 64, 256)))))
  assert -1 <= made.min() < -0.999 and 0.999 < made.max() < 1
  assert abs(made.mean()) < 4 / math.sqrt(3 * made.size)
  assert abs((made**2).mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / made.size)


def test_tokens_draw_what_they_do_in_order():
  x = jnp.ones((4, 16, 8))
  dropout = Dropout(keys=keys(), rate=0.5)
  laid_out = dataclasses.replace(dropout, parts=4).of_tokens(x)
  np.testing.assert_array_equal(laid_out, dropout.of_tokens(x)[:, zigzag(16, 4)])


def test_blocks_of_weights_draw_what_the_whole_does():
  weights = jnp.ones((4, 2, 3, 8, 10))
  dropout = Dropout(keys=keys(), rate=0.5)
  queries, sources = slice(2, 6), slice(3, 10)
  part = dropout.block(queries, sources).of_weights(weights[:, :, :, queries, sources])
  np.testing.assert_array_equal(part, dropout.of_weights(weights)[:, :, :, queries, sources])
  # Heads are counted through, however keys share them out.
  np.testing.assert_array_equal(
    dropout.of_weights(weights.reshape(4, 6, 1, 8, 10)).reshape(weights.shape),
    dropout.of_weights(weights),
  )


MESHES = [
  pytest.param({'data': 8}, marks=pytest.mark.slow),
  {'fsdp': 4, 'tensor': 2, 'data': 1},
  {'context': 2, 'tensor': 2, 'data': 2},
]
TOKENS = 'batch', 'length', 'feed_forward'
WEIGHTS = 'batch', 'kv_heads', 'group', None, None


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_eight_devices_draw_what_one_does(mesh):
  """Each for its own places, without a word to the others."""
  x, weights = jnp.ones((8, 8, 16)), jnp.ones((8, 2, 2, 8, 8))

  def run(key, x, weights):
    rows = draws.folded(draws.keys_of_rows(key, 8), 5, jnp.uint32(3))
    dropout = Dropout(keys=rows, rate=0.5)
    return dropout.of_tokens(x), dropout.of_weights(weights)

  key = jax.random.key_data(KEY)
  alone = jax.jit(run)(key, x, weights)
  with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
    placed = ax.place(x, *TOKENS), ax.place(weights, *WEIGHTS)
    compiled = jax.jit(run).lower(key, *placed).compile()
    many = compiled(key, *placed)
    assert many[0].sharding.spec == ax.spec(*TOKENS)
  for a, b in zip(many, alone, strict=True):
    np.testing.assert_array_equal(a, b)
  text = compiled.as_text()
  assert not [name for name in ('all-gather', 'all-reduce', 'all-to-all') if name in text]


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['reference', 'blocked'])
def test_attention_mixes_what_is_left_of_its_weights(backend, monkeypatch):
  """By hand, with gradients that are differences; in blocks, too."""
  monkeypatch.setattr('kernels.attention.BLOCK', 4)
  draw = np.random.default_rng(0)
  q, k, v = (jnp.float32(draw.normal(size=(4, 8, heads, 6))) for heads in (4, 2, 2))
  dropout = Dropout(keys=keys(), rate=0.4)
  scoring = Scoring(Mask(), dropout=dropout)

  def mixed(q, k, v):
    return attention(q, k, v, scoring, backend=backend)[0]

  scores = np.einsum('btnh,bsnh->bnts', q, np.repeat(k, 2, 2)) / math.sqrt(6)
  scores = np.where(np.tri(8, dtype=bool), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  kept = np.asarray(dropout.of_weights(jnp.ones((4, 2, 2, 8, 8)))).reshape(4, 4, 8, 8)
  wanted = np.einsum('bnts,bsnh->btnh', weights * kept, np.repeat(v, 2, 2))
  np.testing.assert_allclose(jax.jit(mixed)(q, k, v), wanted, rtol=1e-5, atol=1e-5)

  direction = jnp.float32(draw.normal(size=k.shape))
  _, slope = jax.jvp(lambda k: jnp.sin(mixed(q, k, v)).sum(), (k,), (direction,))
  between = [jnp.sin(mixed(q, k + s * 1e-2 * direction, v)).sum() for s in (1, -1)]
  np.testing.assert_allclose(slope, (between[0] - between[1]) / 2e-2, rtol=1e-2)


def test_backends_that_hold_no_weights_are_refused_by_name():
  q = jnp.ones((4, 8, 2, 8))
  scoring = Scoring(dropout=Dropout(keys=keys(), rate=0.5))
  for backend in ('xla', 'pallas_tpu'):
    with pytest.raises(NotImplementedError, match=rf"{backend}.*\['dropout'\].*'blocked'"):
      attention(q, q, q, scoring, backend=backend)
  with jax.set_mesh(make_mesh(MeshConfig(context=2, data=1), jax.devices()[:2])):
    with pytest.raises(NotImplementedError, match='splits rows in 2 does not honour dropout'):
      attention(q, q, q, scoring)
