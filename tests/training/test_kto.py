"""Is what judged answers teach what the paper says, with one divergence for a whole batch?"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objective import Run
from test_preference import batches, config, with_reference

from data.config import SourceConfig
from objectives.answers import NONE
from objectives.kto import KTO
from tests.training.conftest import RATE, T, assert_close, assert_slope
from training.spent import flops_per_token

GIVEN = [('a' * (n % 3), 'b' * (n % 4) + 'c' * (n % 2), n % 3 > 0) for n in range(1, 16)]
MADE = KTO(beta=0.7, wanted_weight=1.5, unwanted_weight=0.8)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp('judged') / 'judged.jsonl'
  rows = [
    {'prompt': prompt, 'completion': answer, 'label': label}
    for prompt, answer, label in GIVEN
    if answer
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return SourceConfig(kind='jsonl', path=str(path), format='judged')


def by_hand(policy, reference, rows, objective):
  """The loss, each answer in a row of its own, of all logits; and the divergence."""
  others = [rows[1], *rows[:-1]]
  texts = [(row['prompt'], row['completion']) for row in rows]
  texts += [(row['prompt'], other['completion']) for row, other in zip(rows, others)]
  ids, answered = np.zeros((len(texts), T + 1), np.int32), np.zeros((len(texts), T), bool)
  for i, (prompt, answer) in enumerate(texts):
    whole = [1, *(b + 3 for b in (prompt + answer).encode()), 2]
    ids[i, : len(whole)] = whole
    answered[i, len(prompt) : len(whole) - 1] = True
  sums = []
  for model in (policy, reference):
    law = jax.nn.log_softmax(model.logits(model(jnp.asarray(ids[:, :-1])).hidden))
    picked = jnp.take_along_axis(law, jnp.asarray(ids[:, 1:, None]), -1)[..., 0]
    sums.append(jnp.where(jnp.asarray(answered), picked, 0).sum(1))
  ratios = sums[0] - sums[1]
  own, mismatched = ratios[: len(rows)], ratios[len(rows) :]
  away = jax.lax.stop_gradient(jnp.maximum(mismatched.mean(), 0))
  wanted = jnp.array([row['label'] for row in rows])
  losses = jnp.where(
    wanted,
    objective.wanted_weight * (1 - 1 / (1 + jnp.exp(-objective.beta * (own - away)))),
    objective.unwanted_weight * (1 - 1 / (1 + jnp.exp(-objective.beta * (away - own)))),
  )
  return losses.mean(), away


@pytest.fixture(scope='module')
def whole(source):
  made = config(source, MADE, data={'batch_size': 16})
  run = with_reference(Run(made), 11)
  before = jax.tree.map(jnp.copy, run.state.models)
  return before, run, run.go(batches(made))


@pytest.mark.slow
def test_a_step_is_the_absolute_step(source, whole):
  before, run, (metrics, _) = whole
  with open(source.path) as lines:
    rows = [json.loads(line) for line in lines]

  def value(policy, reference):
    return by_hand(policy, reference, rows, MADE)

  with jax.set_mesh(run.mesh):
    (loss, away), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(
      before['policy'], before['reference']
    )
    expected = jax.tree.map(lambda p, g: p - RATE * g, before['policy'], gradient)
  # It counts: with 0 in its place the loss is another.
  assert away > 0.1
  np.testing.assert_allclose(metrics['loss'], loss, rtol=3e-6)
  np.testing.assert_allclose(metrics['kl'], away, rtol=1e-5)
  assert_close(run.state.models['policy'], expected, 5e-6)


@pytest.mark.slow
def test_the_gradient_is_the_slope(source, whole, one_device):
  """With the divergence as it was before: it is a number of the batch, and not differentiated."""
  models, (batch,) = whole[0], batches(config(source, MADE, data={'batch_size': 16}))
  prepared = jax.jit(MADE.prepare)(models, jax.tree.map(jnp.asarray, batch))

  def losses(policy, batch):
    total, weight = MADE.loss(models | {'policy': policy}, batch)['kto']
    return [total / weight]

  assert_slope(losses, models['policy'], prepared)


@pytest.mark.parametrize(
  'parts, devices, mesh',
  [
    pytest.param(4, 1, {}, marks=pytest.mark.slow),
    pytest.param(2, 4, {'data': 2, 'context': 2}, marks=pytest.mark.slow),
    pytest.param(1, 4, {'fsdp': 2, 'tensor': 2, 'zero': 2}, marks=pytest.mark.slow),
  ],
)
def test_microbatches_and_devices_are_one_big_batch(source, whole, parts, devices, mesh):
  """Their divergence is the whole batch's, and not of each."""
  made = config(source, MADE, mesh=mesh, train={'accumulation': parts}, data={'batch_size': 16})
  run = with_reference(Run(made, devices), 11)
  metrics, _ = run.go(batches(made))
  assert_close(run.state.models, whole[1].state.models, 3e-6)
  for name, value in whole[2][0].items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_it_begins_where_half_of_all_is_lost(source):
  made = config(source, KTO(), {'kind': 'lora', 'rank': 2}, data={'batch_size': 16})
  run = Run(made)
  metrics, _ = run.go(batches(made))
  assert metrics['loss'] == 0.5 and metrics['kl'] == 0 == metrics['reward_margin']
  prepared = made.objective.read(made.data, lambda line: None)
  models = run.state.models | {'reference': run.state.models['policy']}
  with jax.set_mesh(run.mesh):
    batch = next(iter(made.objective.validation_batches(prepared, made.data, range(16))))
    sums = jax.jit(made.objective.judged)(models, jax.tree.map(jnp.asarray, batch))
    said = made.objective.verdict(jax.device_get(sums), prepared)
  assert said['validation_loss'] == 0.5 and said['validation_kl'] == 0


def test_what_needs_a_reference_has_one():
  with pytest.raises(ValueError, match="reference='none' is none; use 'begun'"):
    KTO(reference=NONE)
  assert dataclasses.replace(MADE, beta=0.1).beta == 0.1


def test_its_cost_has_the_pass_that_the_divergence_takes(source, one_device):
  """Forward and twice backward, the reference's pass, and one of the policy before."""
  made = config(source, KTO(), data={'batch_size': 16})
  forward = made.objective.forward_flops(made.model, made.data, None)
  assert flops_per_token(made) == pytest.approx((3 + 1 + 1) * forward)
