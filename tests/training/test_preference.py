"""Does a step of preference optimisation minimise what its paper says, whatever the packing, the
microbatches, the devices, and where the reference comes from?
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objective import Run

from data.config import CleanConfig, SourceConfig
from data.preferences import ChoiceBatch
from model.adaptation import AdapterConfig
from objectives.answers import NONE
from objectives.compared import VARIANTS
from objectives.preference import Preference
from tests.training.conftest import (
  RATE,
  SGD,
  T,
  assert_close,
  assert_same,
  assert_slope,
  host,
  tiny,
)
from tests.training.test_compared import settings
from training.program import check_models

# Answers of unequal lengths, which pack into rows of T with one to three pairs.
GIVEN = [('a' * (n % 3), 'b' * (n % 4), 'cd' * (n % 5 // 2) + 'e') for n in range(1, 17)]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp('choices') / 'pairs.jsonl'
  rows = [
    {'prompt': prompt, 'chosen': chosen, 'rejected': other} for prompt, chosen, other in GIVEN
  ]
  rows = [row for row in rows if row['chosen']]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return SourceConfig(kind='jsonl', path=str(path), format='preference')


def config(source, objective=Preference(), adapter=None, **parts):
  data = {
    'sources': (source,),
    'validation': (source,),
    'validation_fraction': 0.0,
    'clean': CleanConfig(anonymise=(), near_duplicates=0, exact_duplicates=False),
    'split': 'hash',
    'cache_dir': str(source.path) + '.cache',
  }
  made = tiny(**{'optimizer': SGD} | parts | {'data': data | parts.get('data', {})})
  return dataclasses.replace(made, objective=objective, adapter=AdapterConfig(**adapter or {}))


def batches(made, count=1):
  """All training rows, dealt in turn, with rows of padding at each batch's end."""
  prepared = made.objective.read(made.data, lambda line: None)
  dealt = [ChoiceBatch.empty(made.data.batch_size, T) for _ in range(count)]
  for row in range(prepared.rows):
    prepared.train[0].fill(row, dealt[row % count], row // count)
  return dealt


def with_reference(run, seed=3):
  """The state with a reference that differs from the policy."""
  draw = np.random.default_rng(seed)

  def moved(x):
    noise = 0.2 * draw.normal(size=x.shape).astype(x.dtype)
    return jax.device_put(np.asarray(x) + noise, x.sharding)

  models = run.state.models
  models = models | {'reference': jax.tree.map(moved, models['reference'])}
  run.state = dataclasses.replace(run.state, models=models)
  return run


def by_hand(policy, reference, rows, objective):
  """The loss, each answer in a row of its own, of all logits."""
  ids, answered = np.zeros((2 * len(rows), T + 1), np.int32), np.zeros((2 * len(rows), T), bool)
  for i, row in enumerate(rows):
    for j, side in enumerate(('chosen', 'rejected')):
      prompt = [1, *(b + 3 for b in row['prompt'].encode())]
      whole = [*prompt, *(b + 3 for b in row[side].encode()), 2]
      ids[2 * i + j, : len(whole)] = whole
      answered[2 * i + j, len(prompt) - 1 : len(whole) - 1] = True
  sums = []
  for model in (policy, reference):
    law = jax.nn.log_softmax(model.logits(model(jnp.asarray(ids[:, :-1])).hidden))
    picked = jnp.take_along_axis(law, jnp.asarray(ids[:, 1:, None]), -1)[..., 0]
    sums.append(jnp.where(jnp.asarray(answered), picked, 0).sum(1))
  lengths = answered.sum(1)
  ratios = sums[0] - sums[1]
  if objective.variant == 'sigmoid':
    losses = jnp.log1p(jnp.exp(-objective.beta * (ratios[::2] - ratios[1::2])))
  else:
    ratios = ratios / lengths
    losses = (ratios[::2] - ratios[1::2] - 1 / (2 * objective.beta)) ** 2
  return losses.mean() - objective.sft * sums[0][::2].sum() / lengths[::2].sum()


@pytest.mark.costly
@pytest.mark.parametrize(
  'objective',
  [Preference(beta=0.7, sft=0.3), Preference(variant='ipo', beta=0.7, packing='alone')],
  ids=['sigmoid', 'ipo'],
)
def test_a_step_is_the_absolute_step(source, one_device, objective):
  made = config(source, objective, data={'batch_size': 16})
  run = with_reference(Run(made))
  before = jax.tree.map(jnp.copy, run.state.models)
  with open(source.path) as lines:
    rows = [json.loads(line) for line in lines]
  value = functools.partial(by_hand, rows=rows, objective=objective)
  loss, gradient = jax.jit(jax.value_and_grad(value))(before['policy'], before['reference'])
  metrics, _ = run.go(batches(made))
  np.testing.assert_allclose(metrics['loss'], loss, rtol=2e-6)
  expected = jax.tree.map(lambda p, g: p - RATE * g, before['policy'], gradient)
  assert_close(
    run.state.models['policy'], expected, 1e-5
  )  # of parameters of 1, after a rate of 0.5
  assert max(np.abs(x).max() for x in host(gradient).values()) > 1e-3
  assert_same(run.state.models['reference'], before['reference'])


@pytest.mark.slow
@pytest.mark.long
def test_the_gradient_is_the_slope(source, one_device):
  """Of every variant, of pairs in packed rows."""
  run = with_reference(Run(config(source)))
  (batch,) = batches(run.config)
  policy, reference = (run.state.models[name] for name in ('policy', 'reference'))
  objectives = [settings(variant, beta=0.7) for variant in VARIANTS]

  def losses(policy, batch):
    said = []
    for objective in objectives:
      others = {'reference': reference} if objective.reference != NONE else {}
      terms = objective.loss({'policy': policy} | others, batch)
      said.append(sum(total / jnp.maximum(weight, 1) for total, weight in terms.values()))
    return said

  assert_slope(losses, policy, batch)


@pytest.fixture(scope='module')
def whole(source):
  made = config(source)
  run = with_reference(Run(made))
  return run, run.go(batches(made, 2))


@pytest.mark.parametrize(
  'parts, devices, mesh, train',
  [
    pytest.param(2, 2, {'data': 2}, {}, marks=pytest.mark.slow),
    pytest.param(4, 1, {}, {}, marks=pytest.mark.slow),
    pytest.param(1, 4, {'data': 2, 'context': 2}, {}, marks=pytest.mark.slow),
    pytest.param(2, 4, {'fsdp': 2, 'tensor': 2, 'zero': 3}, {}, marks=pytest.mark.slow),
    pytest.param(2, 2, {'fsdp': 2, 'zero': 2}, {}, marks=pytest.mark.slow),
    pytest.param(2, 2, {'fsdp': 2, 'zero': 1}, {}, marks=pytest.mark.slow),
  ],
)
def test_microbatches_and_devices_are_one_big_batch(source, whole, parts, devices, mesh, train):
  made = config(source, mesh=mesh, train={'accumulation': parts} | train)
  run = with_reference(Run(made, devices))
  metrics, _ = run.go(batches(made, 2))
  assert_close(run.state.models, whole[0].state.models, 3e-6)
  for name, value in whole[1][0].items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_packed_is_alone(source, whole):
  made = config(source, Preference(packing='alone'), data={'batch_size': 16})
  run = with_reference(Run(made))
  one = config(source, data={'batch_size': 16})
  (alone,), (packed,) = batches(made), batches(one)
  assert (packed.segments.max(1) > 2).any() and (alone.segments.max(1) <= 2).all()
  with jax.set_mesh(run.mesh):
    values = [
      jax.jit(made.objective.loss)(run.state.models, batch)['preference']
      for batch in (alone, packed)
    ]
  assert values[0][1] == values[1][1]
  np.testing.assert_allclose(values[0][0], values[1][0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('adapter', [{}, {'kind': 'lora', 'rank': 2}], ids=['whole', 'lora'])
def test_it_begins_at_ln_2_and_the_reference_stays(source, adapter):
  made = config(source, adapter=adapter, optimizer=SGD | {'learning_rate': 0.05})
  run, dealt = Run(made), batches(made)
  frozen = 'policy' if adapter else 'reference'
  assert ('reference' in run.state.models) == (not adapter)
  begun = jax.tree.map(jnp.copy, run.state.models[frozen])
  metrics, _ = run.go(dealt)
  assert metrics['loss'] == np.float32(math.log(2))
  assert metrics['reward_margin'] == metrics['log_ratio'] == metrics['reward_accuracy'] == 0
  metrics, _ = run.go(dealt)
  assert metrics['loss'] < math.log(2) - 1e-3 and metrics['reward_margin'] > 1e-3
  assert metrics['reward_accuracy'] > 0.5
  assert_same(run.state.models[frozen], begun)
  assert set(metrics) >= {'logprob_chosen', 'logprob_rejected', 'rewards_chosen'}


@pytest.mark.slow
def test_validation_is_of_held_out_pairs(source, whole):
  run, _ = whole
  made = run.config
  prepared = made.objective.read(made.data, lambda line: None)
  with jax.set_mesh(run.mesh):
    total = {}
    for batch in made.objective.validation_batches(prepared, made.data, range(8)):
      judged = jax.jit(made.objective.judged)(run.state.models, batch)
      for name, value in judged.items():
        total[name] = total.get(name, 0) + float(value)
  said = made.objective.verdict(total, prepared)
  assert total['pairs'] == prepared.report['validation']['documents']
  assert 0 < said['validation_accuracy'] <= 1 and said['validation_kl'] > 0
  assert math.isfinite(said['validation_loss'])


def test_models_that_cannot_be_compared_are_refused(source):
  made = config(source)
  other = {'reference': dataclasses.replace(made.model, vocabulary=300), 'policy': made.model}
  with pytest.raises(ValueError, match='use a reference of the same tokenizer'):
    made.objective.accepts(other)
  encoder = dataclasses.replace(made.model, causal=False)
  with pytest.raises(NotImplementedError, match='is an encoder; use a decoder'):
    made.objective.accepts({'policy': encoder})
  pipeline = dataclasses.replace(made.model.execution.pipeline, schedule='1f1b')
  run = dataclasses.replace(made.model.execution, pipeline=pipeline)
  with pytest.raises(NotImplementedError, match="use 'gpipe' or 'circular'"):
    made.objective.accepts({'policy': dataclasses.replace(made.model, execution=run)})
  check_models(config(source, Preference(variant='simpo', reference=NONE)))
