"""Is a row that branches what rows of one text each are, whatever the mask, the backend and the
mesh?
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference
from kernels.attention import attention, check
from kernels.draws import Dropout
from kernels.mask import Mask, Relative
from kernels.scoring import Scoring
from parallel.mesh import MeshConfig, make_mesh

R, N, K, H, P, G, A = 2, 4, 2, 8, 5, 3, 4
T = P + G * A


def operands(rows=R):
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(key, (rows, T, heads, H)) for key, heads in zip(keys, (N, K, K))]


def scoring(name):
  extra = {
    'window': {'mask': Mask(window=6)},
    'softcap': {'softcap': 2.0},
    'sinks': {'sinks': jnp.linspace(-1, 1, N)},
    'relative': {
      'relative': Relative(table=jnp.ones((8, N)).cumsum(0), bidirectional=False, max_distance=6)
    },
  }.get(name, {})
  made = Scoring(scale=H**-0.5, **extra)
  mask = dataclasses.replace(made.mask, branches=G, trunk=P)
  if name == 'padded':
    # A trunk is filled up before its tokens, a branch behind them.
    real = np.ones((R, T), np.int32)
    real[0, :2], real[1, -2:] = 0, 0
    mask = mask.of_segments(jnp.asarray(real))
  return dataclasses.replace(made, mask=mask)


def masked(asked, segments):
  return dataclasses.replace(asked, mask=asked.mask.of_segments(segments))


def rows_of_one_text(x):
  """[R, T, ..] as [R, G, P + A, ..]."""
  own = x[:, P:].reshape(R, G, A, *x.shape[2:])
  return jnp.concatenate([jnp.broadcast_to(x[:, None, :P], (R, G, *x[0, :P].shape)), own], 2)


@pytest.mark.parametrize('name', ['plain', 'window', 'softcap', 'sinks', 'relative', 'padded'])
def test_rows_that_branch_are_rows_of_one_text(name):
  q, k, v = operands()
  asked = scoring(name)
  out, lse = attention(q, k, v, asked)
  flat = (rows_of_one_text(x).reshape(R * G, P + A, *x.shape[2:]) for x in (q, k, v))
  mask = dataclasses.replace(asked.mask, branches=1, trunk=0)
  if mask.query_segments is not None:
    segments = rows_of_one_text(mask.query_segments).reshape(R * G, P + A)
    mask = mask.of_segments(segments)
  expected = reference.attention(*flat, dataclasses.replace(asked, mask=mask))
  for ours, theirs in zip((out, lse), expected):
    theirs = theirs.reshape(R, G, P + A, *theirs.shape[2:])
    np.testing.assert_allclose(ours[:, :P], theirs[:, 0, :P], atol=1e-5)
    own = theirs[:, :, P:].reshape(R, G * A, *theirs.shape[3:])
    np.testing.assert_allclose(ours[:, P:], own, atol=1e-5)


@pytest.mark.parametrize('name', ['plain', 'window', 'relative', 'padded'])
def test_the_dense_mask_says_the_same(name):
  """And gradients, of the trunk's keys from all that looks at them."""
  q, k, v = operands()
  asked = scoring(name)
  weights = jax.random.normal(jax.random.key(1), (R, T, N, H))

  def total(attend):
    return lambda *x: (attend(*x, asked)[0] * weights).sum()

  ours = jax.value_and_grad(total(attention), (0, 1, 2))(q, k, v)
  expected = jax.value_and_grad(total(reference.attention), (0, 1, 2))(q, k, v)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
    np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.costly
@pytest.mark.parametrize('name', ['plain', 'window', 'padded'])
@pytest.mark.parametrize('backend', ['blocked', 'xla', 'pallas_tpu'])
def test_on_meshes(name, backend):
  """Values and gradients of devices that have rows and heads of their own."""
  q, k, v = operands(4)
  asked = scoring(name)
  segments = asked.mask.query_segments
  if segments is not None:
    asked = masked(asked, jnp.concatenate([segments, segments]))
  weights = jax.random.normal(jax.random.key(1), q.shape)

  def total(q, k, v, weights, segments, backend):
    out, lse = attention(q, k, v, masked(asked, segments), backend=backend)
    return (out * weights).sum(), lse

  found = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
  segments = asked.mask.query_segments
  expected = found(q, k, v, weights, segments, 'reference')
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=1), jax.devices()[:4])
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, jax.P('fsdp', None))
    layout = jax.NamedSharding(mesh, jax.P('fsdp', None, 'tensor'))
    split = [jax.device_put(x, layout) for x in (q, k, v, weights)]
    segments = None if segments is None else jax.device_put(segments, rows)
    ours = jax.jit(found, static_argnums=5)(*split, segments, backend)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-4)


def test_what_does_not_branch_is_refused():
  q, k, v = operands()
  with pytest.raises(ValueError, match='17 tokens, 4 of them the trunk, do not split into 3'):
    attention(q, k, v, Scoring(Mask(branches=3, trunk=4)))
  with pytest.raises(ValueError, match=r"in order, and causal; this mask is of \['branches'\]"):
    Mask(branches=2, causal=False)
  at = jnp.arange(T)[None]
  with pytest.raises(ValueError, match="this mask is of .*'positions'"):
    Mask(branches=2, query_positions=at, key_positions=at)
  drops = Dropout(keys=jnp.zeros((R, 2), jnp.uint32), rate=0.5)
  with pytest.raises(NotImplementedError, match='does not honour dropout'):
    attention(q, k, v, Scoring(Mask(branches=G, trunk=P), dropout=drops))
  with pytest.raises(NotImplementedError, match=r"'blocked' does not honour \['branches'\]"):
    check('blocked', Mask(branches=G, trunk=P).fields())
  with pytest.raises(ValueError, match='trunk=3 is what branches go on from'):
    Mask(trunk=3)
