"""Is the chunked, sharded loss the plain cross-entropy, gradients too, and is its memory small?"""

import contextlib

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from model import loss
from model.loss import cross_entropy
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh


def plain(x, head, targets, weights, z_loss, softcap):
  """(loss, {nll, tokens, correct}) by jax.nn.log_softmax over all the logits."""
  logits = jnp.einsum('BTD,VD->BTV', x.astype(jnp.float32), head.astype(jnp.float32))
  logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), targets[..., None], -1)[..., 0]
  nll = -(weights * picked).sum()
  penalty = (weights * jnp.square(jax.nn.logsumexp(logits, -1))).sum()
  correct = (weights * (logits.argmax(-1) == targets)).sum()
  return nll + z_loss * penalty, {'nll': nll, 'tokens': weights.sum(), 'correct': correct}


def inputs(B=2, T=7, D=8, V=12, ignore=0.3, dtype='float32', seed=0):
  draw = np.random.default_rng(seed)
  weights, targets = draw.random((B, T)) >= ignore, draw.integers(0, V, (B, T))
  x, head = (jnp.asarray(draw.normal(size=shape), dtype) for shape in ((B, T, D), (V, D)))
  return x, head, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)


def with_gradients(function, options):
  """Jitted: of 3 * loss, so that the cotangent counts."""

  def run(x, head, targets, weights):
    value, sums = function(x, head, targets, weights, *options)
    return 3 * value, sums

  return jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))


def check(arguments, z_loss=0.0, softcap=0.0, chunk=loss.CHUNK, mesh=None, tolerance=1e-5):
  """Loss, sums and gradients are those of `plain`, with and without gradients being asked for."""
  (expected, expected_sums), expected_gradients = with_gradients(plain, (z_loss, softcap))(
    *arguments
  )
  options = (z_loss, softcap, chunk)
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    x, head, *tokens = arguments
    if mesh is not None:
      x, head, *tokens = (
        jax.device_put(a, ax.spec(*axis))
        for a, axis in zip(arguments, (('batch',), ('vocab', 'embed'), ('batch',), ('batch',)))
      )
    (value, sums), gradients = with_gradients(cross_entropy, options)(x, head, *tokens)
    forward_value, forward_sums = jax.jit(cross_entropy, static_argnums=(4, 5, 6))(
      x, head, *tokens, *options
    )
  np.testing.assert_allclose(value, expected, rtol=tolerance)
  np.testing.assert_allclose(3 * forward_value, expected, rtol=tolerance)
  for name in expected_sums:
    np.testing.assert_allclose(sums[name], expected_sums[name], rtol=tolerance)
    np.testing.assert_allclose(forward_sums[name], expected_sums[name], rtol=tolerance)
  for actual, wanted, of in zip(gradients, expected_gradients, (x, head)):
    assert actual.dtype == of.dtype and actual.sharding.is_equivalent_to(of.sharding, of.ndim)
    actual, wanted = np.asarray(actual, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(actual, wanted, atol=tolerance * np.abs(wanted).max())


CASES = [
  (0.0, 0.0, 1024),
  (0.1, 0.0, 1),
  (0.0, 2.0, 14 * 6),
  (0.1, 2.0, 14 * 5),
]  # 1, 12, 2 and 3 chunks; 14 tokens, 12 ids


@pytest.mark.parametrize('z_loss, softcap, chunk', CASES)
def test_loss_is_the_cross_entropy(z_loss, softcap, chunk):
  check(inputs(), z_loss, softcap, chunk)


def test_in_bfloat16():
  check(inputs(dtype='bfloat16'), 0.1, 2.0, 14 * 6, tolerance=1e-2)


def test_a_vocabulary_of_prime_size():
  check(inputs(V=13), 0.1, 2.0, 14 * 5)


@pytest.mark.costly
@pytest.mark.parametrize(
  'sizes', [{'data': 8}, {'data': 2, 'tensor': 4}, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=str
)
def test_split_over_devices(sizes):
  check(inputs(B=8), 0.1, 2.0, 14 * 2, make_mesh(MeshConfig(**sizes)))


def test_split_over_auto_axes():
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), axis_type=jax.sharding.AxisType.Auto)
  check(inputs(B=8), 0.1, 2.0, 14 * 2, mesh)


def test_gradients_are_slopes():
  x, head, *tokens = inputs(T=5)
  run = jax.jit(lambda x, head: cross_entropy(x, head, *tokens, 0.1, 2.0, 50)[0])
  jax.test_util.check_grads(run, (x, head), order=1, modes=['rev'], atol=1e-2, rtol=1e-2, eps=1e-2)


def test_nothing_to_predict_is_zero():
  (value, sums), gradients = with_gradients(cross_entropy, (0.1, 2.0))(*inputs(ignore=1.1))
  assert value == sums['nll'] == sums['tokens'] == sums['correct'] == 0
  assert all((g == 0).all() for g in gradients)


def test_large_logits_stay_finite():
  x, *others = inputs()
  (value, _), gradients = with_gradients(cross_entropy, (0.0, 0.0))(x * 1e4, *others)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


def test_a_row_of_targets_that_is_ignored_costs_nothing():
  x, head, targets, weights = inputs(ignore=0)
  _, (d_x, _) = with_gradients(cross_entropy, (0.1, 0.0))(x, head, targets, weights.at[0].set(0))
  assert (d_x[0] == 0).all() and (d_x[1] != 0).all()


def test_weights_are_factors():
  x, head, targets, weights = inputs()
  check((x, head, targets, weights * jnp.linspace(0.1, 2, 7)[None]), 0.1, 2.0, 14 * 6)


@pytest.mark.parametrize('behind', [np.nan, np.inf])
def test_what_weighs_nothing_does_not_leak(behind):
  x, head, targets, weights = inputs()
  expected = with_gradients(cross_entropy, (0.1, 2.0))(x, head, targets, weights)
  spoilt = jnp.where(weights[..., None] != 0, x, behind)
  for a, b in zip(
    jax.tree.leaves(with_gradients(cross_entropy, (0.1, 2.0))(spoilt, head, targets, weights)),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('gradients', [False, True])
def test_memory_stays_far_below_the_logits(gradients):
  B, T, D, V = 4, 1024, 32, 8192
  shapes = [
    jax.ShapeDtypeStruct(*a)
    for a in (
      ((B, T, D), jnp.float32),
      ((V, D), jnp.float32),
      ((B, T), jnp.int32),
      ((B, T), jnp.float32),
    )
  ]

  def run(x, head, targets, weights):
    return cross_entropy(x, head, targets, weights, 1e-4, 0.0, 2**21)

  run = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True) if gradients else run)
  naive = jax.jit(jax.grad(lambda *arguments: plain(*arguments, 1e-4, 0.0)[0]))
  ours, others = (
    f.lower(*shapes).compile().memory_analysis().temp_size_in_bytes for f in (run, naive)
  )
  logits = 4 * B * T * V
  assert ours < logits / 4 and others > logits
