"""Are microbatches exactly one big batch, tokens weighted, however unevenly the rows are filled?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.next_token import NextToken
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import B, Trainer, assert_close, make_batches, tiny
from training.gradients import accumulate

SGD = {
  'name': 'sgd',
  'learning_rate': 0.5,
}  # linear in the gradient, so that a difference stays as small as it is


@pytest.fixture(scope='module')
def whole():
  trainer = Trainer(tiny(optimizer=SGD))
  return trainer, trainer.run(make_batches(3))


@pytest.mark.slow
@pytest.mark.parametrize(
  'parts, devices, mesh', [(2, 1, {}), (4, 1, {}), (2, 4, {'data': 2, 'fsdp': 2})]
)
def test_microbatches_are_one_big_batch(whole, parts, devices, mesh):
  trainer = Trainer(tiny(optimizer=SGD, mesh=mesh, train={'accumulation': parts}), devices)
  metrics = trainer.run(make_batches(3))
  # Only the order of f32 sums differs: a few units in the last place of parameters near 0.1, after
  # three steps.
  assert_close(trainer.state.models['policy'], whole[0].state.models['policy'], 1e-6)
  for a, b in zip(metrics, whole[1], strict=True):
    assert a['predicted_tokens'] == b['predicted_tokens']
    np.testing.assert_allclose(
      [a[name] for name in ('loss', 'grad_norm')],
      [b[name] for name in ('loss', 'grad_norm')],
      rtol=2e-6,
    )


def test_the_batches_can_tell_tokens_from_rows():
  """Microbatches of these batches hold very different numbers of tokens, or the test above would
  not see a mean of means.
  """
  for batch in make_batches(3):
    for parts in (2, 4):
      counts = [int(batch.weights[i::parts].sum()) for i in range(parts)]
      assert max(counts) > 1.1 * min(counts)


def mean_over_targets(model, batch, z_loss):
  """-log p + z_loss * log(Z)^2 of every target that counts, row by row, over how many these are:
  nothing of loss or step.
  """
  x = model(*map(jnp.asarray, (batch.tokens, batch.positions, batch.segments))).hidden
  logits = jnp.einsum('BTD,VD->BTV', x, model.head.tokens[...])
  sums = jax.nn.logsumexp(logits, -1)
  places = list(zip(*np.nonzero(batch.weights)))
  return sum(
    sums[i, t] - logits[i, t, batch.targets[i, t]] + z_loss * sums[i, t] ** 2 for i, t in places
  ) / len(places)


@pytest.mark.parametrize(
  'parts, devices, mesh, z_loss, clip',
  [
    pytest.param(1, 1, {}, 0.0, 0.0, marks=pytest.mark.slow),
    pytest.param(4, 1, {}, 0.0, 0.0, marks=pytest.mark.slow),
    (2, 4, {'data': 2, 'fsdp': 2}, 0.1, 0.5),
  ],
)
def test_a_step_is_the_absolute_step(parts, devices, mesh, z_loss, clip):
  """Parameters - rate * gradient of the mean over targets, in rows with padding and two documents:
  of 128 slots 43 have a target. Where it is clipped, a part of it.
  """
  batch, rate = make_batches(1)[0], SGD['learning_rate']
  assert (batch.weights.size, batch.weights.sum()) == (128, 43)
  plain = SGD | {'weight_decay': 0.0, 'clip_norm': clip, 'momentum': 0.0}
  config = tiny(optimizer=plain, mesh=mesh, train={'accumulation': parts})
  trainer = Trainer(dataclasses.replace(config, objective=NextToken(z_loss=z_loss)), devices)
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    before = Trainer(tiny()).state.models['policy']
    gradient, mean = jax.jit(
      lambda model: (
        jax.grad(mean_over_targets)(model, batch, z_loss),
        mean_over_targets(model, batch, 0.0),
      )
    )(before)
    squares = sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(gradient))
    share = clip / squares**0.5 if clip else 1.0
    assert share <= 1
    moved = jax.jit(lambda *x: jax.tree.map(lambda p, g: p - rate * share * g, *x))
    expected = moved(before, gradient)

  metrics, _ = trainer.step(batch)
  assert_close(trainer.state.models['policy'], expected, 2e-6)
  assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) > 1e-2  # far above what is allowed
  np.testing.assert_allclose(metrics['loss'], mean, rtol=1e-5)  # what is shown has no z-loss
  np.testing.assert_allclose(metrics['grad_norm'], np.sqrt(squares), rtol=1e-5)


def linear(model, batch, scale):
  """A sum over rows whose gradient is exactly the rows' sum."""
  total = jnp.einsum('BD,D->', batch, model.astype(jnp.float32)) * scale
  return total, {'rows': jnp.float32(batch.shape[0])}


def test_narrow_parameters_are_summed_in_f32(one_device):
  """256 ones and then ones again: a bfloat16 sum stops at 256."""
  model, batch = jnp.zeros(3, jnp.bfloat16), jnp.ones((512, 3))
  grads, sums = jax.jit(accumulate, static_argnums=(0, 4))(linear, model, batch, 2.0, 512)
  assert grads.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.array(grads, np.float32), 1024.0)
  assert sums['rows'] == 512


@pytest.mark.parametrize('parts', [1, 2, 4, 8])
def test_every_row_is_used_once(one_device, parts):
  batch = jnp.arange(B * 3.0).reshape(B, 3)
  grads, sums = jax.jit(accumulate, static_argnums=(0, 4))(linear, jnp.zeros(3), batch, 1.0, parts)
  np.testing.assert_array_equal(grads, batch.sum(0))
  assert sums['rows'] == B
