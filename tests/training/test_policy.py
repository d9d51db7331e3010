"""Is what a policy learns of its rollouts the formulas of the papers, over one mask, at one
temperature, whatever the parts and the devices?
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objective import Run

from model.adaptation import AdapterConfig
from model.config import MoEConfig
from objectives import policy, ppo
from objectives.policy import GRPO, VARIANTS
from objectives.ppo import PPO
from objectives.rollout_rows import RolloutBatch
from parallel import axes
from parallel.mesh import MeshConfig
from tests.training.conftest import RATE, SGD, B, T, V, assert_close, assert_slope, host, tiny
from training.program import check_models

UNSCORED = ['.head.tokens.value']
MADE = {'max_new_tokens': 8, 'temperature': 0.7, 'reward': ('none.py',), 'clip': 0.1}
PENALISED = GRPO(**MADE, group=4, beta=0.3, clip_high=0.25)
CRITICAL = PPO(**MADE, critic='shared', value_coefficient=0.6, value_clip=0.3)


def config(objective, **parts):
  return dataclasses.replace(tiny(**{'optimizer': SGD} | parts), objective=objective)


def batch_of(seed=0, rows=B) -> RolloutBatch:
  """Rows as rollouts leave them, of uneven lengths: one without a reward, one row of padding. What
  does not count holds what must not be read.
  """
  draw = np.random.default_rng(seed)
  batch = RolloutBatch.empty(rows, T)
  for row in range(rows - 1):
    prompt, answer = 1 + row % 4, 1 + (row * 3) % 8
    n = prompt + answer
    batch.tokens[row, :n] = draw.integers(3, V, n)
    batch.targets[row, :n] = draw.integers(3, V, n)
    batch.positions[row, :n] = np.arange(n)
    batch.segments[row, :n] = 1
    here = slice(prompt - 1, n - 1)
    batch.weights[row, here] = row != 2
    for name, scale in (('behaviour', 0.2), ('reference', 0.3), ('advantages', 0.5), ('values', 1)):
      getattr(batch, name)[row, here] = draw.normal(size=answer) * scale
    batch.behaviour[row, here] -= 5.5  # about what a new model says
    batch.reference[row, here] -= 5.5
    batch.returns[row, here] = draw.normal(size=answer)
    at = (row, n - 2)
    batch.last[at], batch.lengths[at] = 1, answer
    batch.scores[at], batch.failed[at] = (0 if row == 2 else draw.normal()), row == 2
    batch.ended[at] = row % 2
  batch.weights[:] *= batch.segments > 0
  return batch


def logs_by_hand(model, batch, temperature):
  """log p of every target, of all logits."""
  logits = model.logits(
    model(jnp.asarray(batch.tokens), segments=jnp.asarray(batch.segments)).hidden
  )
  law = jax.nn.log_softmax(logits[..., : model.config.vocabulary_limit or None] / temperature)
  return jnp.take_along_axis(law, jnp.asarray(batch.targets)[..., None], -1)[..., 0]


def by_hand(model, batch, objective):
  """The loss of the family, answer by answer."""
  logs = logs_by_hand(model, batch, objective.temperature)
  variant, low, high = objective.variant, 1 - objective.clip, 1 + objective.clip_high
  each, tokens = [], 0
  for row in range(len(batch.tokens)):
    places = np.flatnonzero(batch.weights[row])
    if not len(places):
      continue
    log, old, q = logs[row][places], batch.behaviour[row][places], batch.reference[row][places]
    A, n = batch.advantages[row][places], len(places)
    ratio = jnp.exp(log - old)
    if variant == 'gspo':
      ratio = jnp.full(n, jnp.exp((log - old).sum() / n))
    if variant == 'rloo':
      ratio = jnp.full(n, jnp.exp((log - old).sum()))
    gain = jnp.minimum(ratio * A, jnp.clip(ratio, low, high) * A)
    penalty = jnp.exp(q - log) - 1 - (q - log)
    of_tokens = -gain + objective.beta * penalty
    each.append(of_tokens.sum() if variant in ('dapo', 'dr_grpo') else of_tokens.mean())
    tokens += n
  over = {'dapo': tokens, 'dr_grpo': len(each) * objective.max_new_tokens}
  return sum(each) / over.get(variant, len(each))


def slow_but(*fast):
  """Variants, all but these slow."""
  return [
    pytest.param(name, marks=[] if name in fast else pytest.mark.slow, id=name) for name in VARIANTS
  ]


BOTH = [
  pytest.param(PENALISED, id='grpo'),
  pytest.param(CRITICAL, id='ppo', marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize('variant', slow_but('grpo'))
def test_a_step_is_the_absolute_step(one_device, variant):
  """Parameters - rate * gradient of the loss, worked out by hand."""
  objective = dataclasses.replace(PENALISED, variant=variant)
  run, batch = Run(config(objective)), batch_of()

  @jax.jit
  def worked_out(policy):
    loss, gradient = jax.value_and_grad(by_hand)(policy, batch, objective)
    return loss, jax.tree.map(lambda p, g: p - RATE * g, policy, gradient)

  loss, expected = worked_out(jax.device_get(run.state.models['policy']))
  metrics, _ = run.go([batch])
  np.testing.assert_allclose(metrics['loss'], loss, rtol=2e-5)
  # Rows of the embedding move by up to 10: their norm, at first, is small.
  assert_close(run.state.models['policy'], expected, 2e-5)


def test_the_head_meets_no_more_than_answers_can_have(one_device):
  """Of rows of T tokens so many places as an answer's: logits of a prompt are never made."""
  run, batch = Run(config(PENALISED)), batch_of()
  made = str(jax.make_jaxpr(PENALISED.sums)(run.state.models, batch))
  assert f'f32[{B},{PENALISED.max_new_tokens},{V}]' in made and f'f32[{B},{T},{V}]' not in made
  every = dataclasses.replace(PENALISED, max_new_tokens=T)
  assert f'f32[{B},{T},{V}]' in str(jax.make_jaxpr(every.sums)(run.state.models, batch))


def critic_by_hand(models, batch, objective):
  model, head = models['policy'], models['value_head']
  logs = logs_by_hand(model, batch, objective.temperature)
  x = model(jnp.asarray(batch.tokens), segments=jnp.asarray(batch.segments)).hidden
  values = (x @ head['weight'][...])[..., 0] + head['bias'][0]
  counted = batch.weights > 0
  ratio = jnp.exp(jnp.where(counted, logs - batch.behaviour, 0))
  A = batch.advantages
  gain = jnp.minimum(ratio * A, jnp.clip(ratio, 1 - objective.clip, 1 + objective.clip) * A)
  was, R, c = batch.values, batch.returns, objective.value_clip
  clipped = jnp.clip(values, was - c, was + c)
  miss = 0.5 * jnp.maximum((values - R) ** 2, (clipped - R) ** 2)
  each = -gain + objective.value_coefficient * miss
  return jnp.where(counted, each, 0).sum() / counted.sum()


@pytest.mark.slow
def test_a_step_with_a_critic_is_the_absolute_step(one_device):
  run, batch = Run(config(CRITICAL)), batch_of()
  trained = {name: run.state.models[name] for name in ('policy', 'value_head')}
  # From 0 the head's first step would say nothing of the gradient through it.
  draw = jax.random.normal(jax.random.key(0), trained['value_head']['weight'][...].shape)
  head = jax.tree.map(jnp.copy, trained['value_head'])
  head['weight'] = head['weight'].replace(draw)
  run.state = dataclasses.replace(run.state, models=run.state.models | {'value_head': head})
  before = jax.tree.map(jnp.copy, {'policy': trained['policy'], 'value_head': head})
  by_critic = jax.jit(jax.value_and_grad(lambda models: critic_by_hand(models, batch, CRITICAL)))
  loss, gradient = by_critic(before)
  metrics, _ = run.go([batch])
  np.testing.assert_allclose(metrics['loss'], loss, rtol=2e-5)
  expected = jax.tree.map(lambda p, g: p - RATE * g, before, gradient)
  for name in before:
    assert_close(run.state.models[name], expected[name], 2e-5)


def fresh(run, batch, objective):
  """The batch as the policy itself would have written it."""
  logs = logs_by_hand(run.state.models['policy'], batch, objective.temperature)
  behaviour = np.where(batch.weights > 0, np.asarray(logs), 0)
  return dataclasses.replace(batch, behaviour=behaviour, reference=behaviour)


@pytest.mark.slow
def test_the_first_step_of_a_rollout_is_at_ratio_1(one_device):
  """Nothing is clipped, and the loss is the mean of the advantages with its sign turned."""
  run = Run(config(CRITICAL))
  batch = fresh(run, batch_of(), CRITICAL)
  metrics, _ = run.go([batch])
  counted = batch.weights > 0
  assert metrics['clip_fraction'] == 0 and metrics['log_ratio'] < 2e-6
  np.testing.assert_allclose(metrics['policy'], -batch.advantages[counted].mean(), atol=1e-5)
  np.testing.assert_allclose(metrics['entropy'], -batch.behaviour[counted].mean(), rtol=1e-5)


@pytest.mark.slow
def test_metrics_by_hand(one_device):
  run, batch = Run(config(PENALISED)), batch_of()
  logs = logs_by_hand(run.state.models['policy'], batch, PENALISED.temperature)
  metrics, _ = run.go([batch])
  counted = batch.weights > 0
  apart = (np.asarray(logs) - batch.behaviour)[counted]
  ratio, A = np.exp(apart), batch.advantages[counted]
  stopped = (ratio < 0.9) & (A < 0) | (ratio > 1.25) & (A > 0)
  expected = {
    'reward': batch.scores.sum() / (batch.last.sum() - 1),
    'answer_length': batch.lengths.sum() / batch.last.sum(),
    'ended': batch.ended.sum() / batch.last.sum(),
    'failed_rewards': 1 / batch.last.sum(),
    'policy_kl': (ratio - 1 - apart).mean(),
    'log_ratio': np.abs(apart).mean(),
    'clip_fraction': stopped.mean(),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
  assert 0 < metrics['clip_fraction'] < 1


@pytest.mark.slow
@pytest.mark.parametrize('objective', BOTH)
def test_parts_and_what_does_not_count_change_nothing(one_device, objective):
  """Four microbatches of uneven weight are one batch; NaN where nothing counts is not read."""
  whole, parts = Run(config(objective)), Run(config(objective, train={'accumulation': 4}))
  batch = batch_of()
  spoilt = dataclasses.replace(batch)
  for name in ('behaviour', 'reference', 'advantages', 'values', 'returns'):
    filled = np.where(batch.weights > 0, getattr(batch, name), 1e3)
    spoilt = dataclasses.replace(spoilt, **{name: np.float32(filled)})
  metrics, again = whole.go([batch])[0], parts.go([spoilt])[0]
  np.testing.assert_allclose(metrics['loss'], again['loss'], rtol=1e-5)
  # Entries are up to 7 after the step, where neighbours are 5e-7 apart.
  assert_close(whole.state.models, parts.state.models, 3e-5)


@pytest.mark.slow
def test_all_masked_gives_nothing(one_device):
  run, batch = Run(config(PENALISED)), batch_of()
  before = jax.tree.map(jnp.copy, run.state.models)
  metrics, _ = run.go([dataclasses.replace(batch, weights=np.zeros_like(batch.weights))])
  assert metrics['loss'] == 0 and all(np.isfinite(x).all() for x in metrics.values())
  assert_close(run.state.models, before, 0)


@pytest.mark.slow
@pytest.mark.parametrize('objective', BOTH)
def test_the_gradient_is_the_slope(one_device, objective):
  """Of the policy, in all variants, and of a critic's head."""
  run, batch = Run(config(objective)), batch_of()
  models, trained = run.state.models, ('policy', 'value_head')
  objectives = [objective]
  if isinstance(objective, GRPO):
    objectives = [dataclasses.replace(objective, variant=variant) for variant in VARIANTS]

  def losses(moved, batch):
    each = (made.loss(models | moved, batch).values() for made in objectives)
    return [sum(total / jnp.maximum(weight, 1) for total, weight in terms) for terms in each]

  moved = {name: models[name] for name in trained if name in models}
  # So short a step that hardly a token crosses the clip.
  assert_slope(losses, moved, batch, rtol=2e-2, step=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('objective', [PENALISED, CRITICAL], ids=['grpo', 'ppo'])
@pytest.mark.parametrize(
  'mesh', [{'data': 2, 'fsdp': 2}, {'tensor': 2, 'fsdp': 2}, {'context': 2}], ids=str
)
def test_devices_change_rounding_only(objective, mesh):
  batch = batch_of()
  whole = Run(config(objective))
  metrics, _ = whole.go([batch])
  devices = int(np.prod(list(mesh.values())))
  run = Run(config(objective, mesh=mesh), devices)
  again, _ = run.go([batch])
  for name in metrics:
    np.testing.assert_allclose(metrics[name], again[name], rtol=2e-4, atol=2e-5, err_msg=name)
  assert_close(jax.device_get(whole.state.models), jax.device_get(run.state.models), 3e-5)
  with jax.set_mesh(run.mesh):
    put = jax.device_put(batch, jax.NamedSharding(run.mesh, axes.spec('batch', 'length')))
    said = jax.jit(objective.said, static_argnums=2)(run.state.models, put, ('policy',))
  with jax.set_mesh(whole.mesh):
    expected = logs_by_hand(whole.state.models['policy'], batch, objective.temperature)
  expected = np.where(batch.weights > 0, np.asarray(expected), 0)
  np.testing.assert_allclose(said['policy'], expected, atol=1e-4)


def test_credit_of_groups_is_of_the_group_alone():
  objective = dataclasses.replace(PENALISED, variant='dr_grpo')
  batch = batch_of()
  made, _ = objective.credited(batch, {}, 0.0)
  scores, counted = batch.scores.sum(1), batch.weights.max(1) > 0
  for first in (0, 4):
    group = [row for row in range(first, first + 4) if counted[row]]
    for row in range(first, first + 4):
      credit = scores[row] - scores[group].mean() if row in group else 0.0
      np.testing.assert_allclose(
        made.advantages[row], credit * batch.weights[row], rtol=1e-5, err_msg=str(row)
      )


@pytest.mark.parametrize('reward_scale', ['', 'whitened'])
def test_credit_of_tokens_by_hand(reward_scale):
  """beta once, KL with its sign, the score at the last token that was written, rewards over their
  deviation where that is asked for, and whitening over what counts.
  """
  objective = dataclasses.replace(CRITICAL, beta=0.4, gamma=0.9, lam=0.5, reward_scale=reward_scale)
  batch = batch_of()
  said = {'reference': batch.reference, 'value': batch.values}
  made, noted = objective.credited(batch, said, 0.4)
  assert noted == {'beta': 0.4}
  counted, each, rewarded = batch.weights > 0, [], {}
  for row in np.flatnonzero(counted.any(1)):
    places = np.flatnonzero(counted[row])
    rewards = -0.4 * (batch.behaviour[row] - batch.reference[row]).astype(np.float64)[places]
    rewards[-1] += batch.scores[row].sum()
    rewarded[row] = rewards
  every = np.concatenate([*rewarded.values()])
  for row, rewards in rewarded.items():
    places = np.flatnonzero(counted[row])
    if reward_scale:
      rewards = (rewards - every.mean()) / every.std(ddof=1) + every.mean()
    values = [*batch.values[row][places].astype(np.float64), 0.0]
    later, advantages = 0.0, []
    for t in reversed(range(len(places))):
      later = rewards[t] + 0.9 * values[t + 1] - values[t] + 0.9 * 0.5 * later
      advantages.insert(0, later)
    each.append(advantages)
    np.testing.assert_allclose(made.returns[row][places], advantages + np.array(values[:-1]), 1e-5)
  whole = np.concatenate(each)
  expected = (whole - whole.mean()) / whole.std(ddof=1)
  np.testing.assert_allclose(made.advantages[counted], expected, rtol=1e-4, atol=1e-6)
  assert (made.advantages[~counted] == 0).all()


def test_the_penalty_adapts_by_the_divergence_of_answers():
  objective = dataclasses.replace(CRITICAL, beta=0.4, kl_target=2.0)
  batch = batch_of()
  said = {'reference': batch.reference, 'value': batch.values}
  _, noted = objective.credited(batch, said, 0.4)
  counted = batch.weights > 0
  answers = counted.any(1).sum()
  of_answer = (batch.behaviour - batch.reference)[counted].sum() / answers
  error = np.clip(of_answer / 2 - 1, -0.2, 0.2)
  np.testing.assert_allclose(
    noted['next_coefficient'], 0.4 * (1 + error * answers / 10_000), rtol=1e-6
  )


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'group': 1}, 'group=1 must be at least 2'),
    ({'variant': 'gppo'}, "variant.*'gppo'"),
    ({'temperature': 0.0}, 'temperature=0.0 must be above 0'),
    ({'reward_weights': (1.0, 2.0)}, 'reward_weights'),
    ({'reference': 'runs/x'}, 'would not be read'),
    ({'stop_kl': 0.1}, 'epochs=1 has none'),
    ({'unended': 'dropped'}, 'unended'),
  ],
)
def test_what_means_nothing_is_refused(fields, said):
  with pytest.raises(ValueError, match=said):
    GRPO(**fields)


def test_answers_without_any_reward_have_none():
  """And an evaluation of such is the best of nothing."""
  sums = dict.fromkeys(('lengths', 'ended', 'scores'), 0.0) | {'last': 8.0, 'failed': 8.0}
  objective = dataclasses.replace(PENALISED, reward=('r.py',))
  said = objective.verdict(sums, None)
  assert math.isnan(said['validation_reward']) and math.isnan(said['validation_loss'])
  assert said['validation_failed_rewards'] == 1
  said = objective.verdict(sums | {'failed': 6.0, 'scores': 3.0}, None)
  assert said['validation_reward'] == 1.5 and said['validation_failed_rewards'] == 0.75


def test_models_that_write_no_text_are_refused():
  encoder = dict(causal=False)
  seq2seq = dict(encoder_layers=2)
  for fields in (encoder, seq2seq):
    with pytest.raises(NotImplementedError, match='learns from what a decoder writes'):
      check_models(config(PENALISED, model=fields))
  experts = dataclasses.replace(tiny().model.moe, experts=4, dispatch='capacity')
  with pytest.raises(ValueError, match="use 'dropless'"):
    check_models(config(PENALISED, model={'moe': experts}))
  critical = dataclasses.replace(CRITICAL, critic='runs/reward')
  coded = dataclasses.replace(tiny().model.execution, stored=('*=int8',))
  for fields, error, said in (
    ({'execution': coded}, ValueError, r'lies in codes \(\*=int8\), and a critic is trained'),
    (
      {'moe': MoEConfig(experts=4, selection_bias=True, bias_rate=0.1)},
      NotImplementedError,
      "critic='shared'",
    ),
  ):
    critic = dataclasses.replace(tiny().model, **fields)
    with pytest.raises(error, match=said):
      critical.accepts({'policy': tiny().model, 'critic': critic})
  with pytest.raises(ValueError, match='leaves no room for a prompt'):
    PENALISED.read(tiny(data={'sequence_length': 8}).data, print)


@pytest.mark.slow
def test_a_critic_is_a_model_of_its_own_and_the_reference_none_under_an_adapter(one_device):
  """Both begin as the policy; the critic's is trained, and the reference stays, bitwise."""
  objective = dataclasses.replace(CRITICAL, critic='separate', beta=0.1)
  run = Run(config(objective))
  before = jax.tree.map(jnp.copy, run.state.models)
  assert set(before) == {'policy', 'reference', 'critic', 'value_head'}
  for name in ('reference', 'critic'):
    assert_close(before[name], before['policy'], 0)
  run.go([batch_of()] * 2)
  assert_close(run.state.models['reference'], before['reference'], 0)
  for name in ('policy', 'critic'):
    after = host(run.state.models[name])
    still = [path for path, x in host(before[name]).items() if (x == after[path]).all()]
    # A critic scores no words.
    assert still == ([] if name == 'policy' else UNSCORED), name

  adapted = dataclasses.replace(
    config(objective, mesh=dataclasses.asdict(MeshConfig())), adapter=AdapterConfig(kind='lora')
  )
  run = Run(adapted)
  assert set(run.state.models) == {'policy', 'critic', 'value_head', 'adapter'}
  base = jax.tree.map(jnp.copy, run.state.models['policy'])
  run.go([batch_of()] * 2)
  assert_close(run.state.models['policy'], base, 0)


def test_clipped_values_stop_the_gradient():
  batch = dataclasses.replace(batch_of(), values=np.float32([[0.0]]), returns=np.float32([[1.0]]))
  value = jnp.float32([[0.5]])
  np.testing.assert_allclose(ppo.value_losses(value, batch, 0.2), 0.5 * 0.8**2, rtol=1e-6)
  slope = jax.grad(lambda v: ppo.value_losses(v, batch, 0.2).sum())(value)
  assert slope[0, 0] == 0
  assert policy.VARIANTS['dapo'].counts == 'token'
