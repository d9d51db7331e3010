"""Is what a reward model minimises the formula, read at the end of an answer, whatever the packing,
the parts and the devices; and is it judged, and used, as it was trained?
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
from data.rewarded import held_out
from evaluation.rewards import compared, lines
from model.adaptation import AdapterConfig
from objectives.reward import Reward, losses
from parallel.mesh import MeshConfig, make_mesh
from parallel.pipeline import PipelineConfig
from tests.test_commands import Process
from tests.training.conftest import (
  RATE,
  SGD,
  T,
  assert_close,
  assert_slope,
  host,
  quickly,
  run_here,
  tiny,
)
from tests.training.test_tuned_classifier import BERT
from training import config as configs
from training.program import check_models
from workdir import judging_run
from workdir.reward import FILE, open_reward

# Which answer is the better one its first letter tells; lengths pack into rows of T unevenly.
GIVEN = [
  {
    'prompt': 'q' * (n % 3),
    'chosen': 'y' + 'ab'[n % 2] * (n % 3),
    'rejected': 'n' + 'ab'[n % 2] * (n % 2),
    'margin': n % 4 / 2,
  }
  for n in range(1, 25)
]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp('pairs') / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in GIVEN))
  return SourceConfig(kind='jsonl', path=str(path), format='preference')


def config(source, objective=Reward(), adapter=None, **parts):
  data = {
    'sources': (source,),
    'validation': (source,),
    'validation_fraction': 0.0,
    'clean': CleanConfig(anonymise=(), near_duplicates=0, exact_duplicates=False),
    'split': 'hash',
    'cache_dir': str(source.path) + '.cache',
    'batch_size': 24,
  }
  made = tiny(**{'optimizer': SGD} | parts | {'data': data | parts.get('data', {})})
  return dataclasses.replace(made, objective=objective, adapter=AdapterConfig(**adapter or {}))


def batch_of(made):
  """All training rows, behind them rows of padding."""
  prepared = made.objective.read(made.data, lambda line: None)
  batch = ChoiceBatch.empty(made.data.batch_size, T)
  assert prepared.rows <= made.data.batch_size
  for row in range(prepared.rows):
    prepared.train[0].fill(row, batch, row)
  return batch


def answers():
  """ids of every answer behind its prompt, with its end, chosen and rejected by turns."""
  each = [row['prompt'] + row[side] for row in GIVEN for side in ('chosen', 'rejected')]
  return [[1, *(b + 3 for b in text.encode()), 2] for text in each]


def rewards_by_hand(models):
  """[pairs, 2], each answer in a row of its own."""
  model, head = models['policy'], models['head']
  ids = np.zeros((2 * len(GIVEN), T), np.int32)
  for row, answer in zip(ids, answers()):
    row[: len(answer)] = answer
  segments = jnp.asarray(ids != 0, jnp.int32)
  x = model(jnp.asarray(ids), segments=segments).hidden
  lengths = np.array([len(answer) for answer in answers()])
  at = lengths - 1 if model.config.causal else 0 * lengths
  return (x[np.arange(len(ids)), at] @ head['weight'][...] + head['bias'][...][None]).reshape(-1, 2)


def by_hand(models, margins, centring):
  rewards = rewards_by_hand(models)
  d = rewards[:, 0] - rewards[:, 1] - jnp.array([row['margin'] if margins else 0 for row in GIVEN])
  each = jnp.log1p(jnp.exp(-d)) + centring * rewards.sum(1) ** 2
  return each.mean()


def with_bias(models):
  head = models['head']
  bias = head['bias'].replace(jnp.array([0.3]))
  # Larger than it begins, so that rewards differ.
  weight = head['weight'].replace(3 * head['weight'][...])
  return models | {'head': {'weight': weight, 'bias': bias}}


def test_the_loss_is_that_of_bradley_and_terry():
  """Against float64; swapped pairs change signs, and equal ones are ln 2."""
  draw = np.random.default_rng(0)
  rewards, margins = 3 * draw.normal(size=(5, 7, 2)), draw.uniform(size=(5, 7))
  d = rewards[..., 0] - rewards[..., 1] - margins
  expected = np.log1p(np.exp(-d)) + 0.01 * rewards.sum(-1) ** 2
  ours = losses(jnp.asarray(rewards, jnp.float32), jnp.asarray(margins, jnp.float32), 0.01)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)
  pull = jax.grad(lambda r: losses(r, jnp.asarray(margins, jnp.float32), 0.01).sum())
  slopes = np.stack([-1 / (1 + np.exp(d)), 1 / (1 + np.exp(d))], -1)
  slopes += 0.02 * rewards.sum(-1, keepdims=True)
  np.testing.assert_allclose(pull(jnp.asarray(rewards, jnp.float32)), slopes, rtol=1e-4, atol=1e-6)
  golden = losses(jnp.array([[1.0, 0.0], [0.5, 2.0]]), jnp.zeros(2))
  np.testing.assert_allclose(golden, [0.3132616875, 1.7014132779], rtol=1e-6)
  same = losses(jnp.full((3, 2), 0.7), jnp.zeros(3))
  assert (same == np.float32(math.log(2))).all()
  forward, swapped = (losses(jnp.array([[r, -r]]), jnp.zeros(1)) for r in (0.4, -0.4))
  np.testing.assert_allclose(swapped - forward, 0.8, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'objective, model',
  [
    (Reward(centring=0.1), {}),
    pytest.param(
      Reward(margins=False, pooled='first', packing='alone'), BERT, marks=pytest.mark.slow
    ),
  ],
  ids=['decoder', 'encoder'],
)
def test_a_step_is_the_absolute_step(source, one_device, objective, model):
  made = config(source, objective, model=model)
  check_models(made)
  run = Run(made)
  run.state = dataclasses.replace(run.state, models=with_bias(run.state.models))
  before = jax.tree.map(jnp.copy, run.state.models)
  hand = functools.partial(by_hand, margins=objective.margins, centring=objective.centring)
  loss, gradient = jax.jit(jax.value_and_grad(hand))(before)
  rewards = jax.jit(rewards_by_hand)(before)
  batch = batch_of(made)
  assert objective.packing == 'alone' or batch.segments.max() > 2
  metrics, _ = run.go([batch])
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  assert 'reward' not in metrics  # which pictures and views take for one
  assert metrics['accuracy'] == (rewards[:, 0] > rewards[:, 1]).mean()
  np.testing.assert_allclose(metrics['reward_rejected'], rewards[:, 1].mean(), rtol=1e-4, atol=1e-6)
  expected = jax.tree.map(lambda p, g: p - RATE * g, before, gradient)
  assert_close(run.state.models, expected, 3e-5)
  moved = {name for name, g in host(gradient).items() if np.abs(g).max() > 1e-7}
  assert any('head' in name and 'weight' in name for name in moved)


@pytest.mark.slow
def test_the_gradient_is_the_slope(source, one_device):
  """Of the model and of its head."""
  made = config(source, Reward(centring=0.1))
  models = with_bias(Run(made).state.models)

  def losses(models, batch):
    total, weight = made.objective.loss(models, batch)['reward']
    return [total / weight]

  assert_slope(losses, models, batch_of(made))


@pytest.mark.slow
@pytest.mark.parametrize(
  'devices, parts',
  [
    (8, {'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2}, 'train': {'accumulation': 3}}),
    pytest.param(2, {'mesh': {'data': 2, 'zero': 1}}, marks=pytest.mark.long),
    pytest.param(2, {'mesh': {'context': 2, 'data': 1}}, marks=pytest.mark.long),
    pytest.param(2, {'mesh': {'stage': 2, 'data': 1}}, marks=pytest.mark.long),
  ],
  ids=str,
)
def test_steps_are_the_same_whatever_the_parts_and_devices(source, devices, parts):
  objective = Reward(centring=0.1)
  after = []
  for made, count in (
    (config(source, objective), 1),
    (config(source, objective, **parts), devices),
  ):
    run = Run(made, count)
    metrics, _ = run.go([batch_of(made)] * 2)
    after.append((jax.device_get(run.state.models), metrics['loss']))
  np.testing.assert_allclose(after[0][1], after[1][1], rtol=1e-5)
  assert_close(after[0][0], after[1][0], 2e-5)


@pytest.mark.slow
def test_an_adapter_gives_rewards(source):
  made = config(source, adapter={'kind': 'lora', 'rank': 2})
  run = Run(made)
  before = host(run.state.models)
  run.go([batch_of(made)] * 2)
  moved = {
    name for name, x in host(run.state.models).items() if x.tobytes() != before[name].tobytes()
  }
  assert moved and all("'adapter'" in name or "'head'" in name for name in moved)


def test_what_is_held_out_is_whole_answers(source):
  made = config(source)
  prepared = made.objective.read(made.data, lambda line: None)
  pairs = held_out(prepared, T)
  assert [ids for pair in pairs for ids in pair] == answers()


def test_numbers_of_judging_are_those_by_hand():
  d = np.array([2.0, -1.0, 0.5, 0.0] * 50)
  said = compared(d)
  assert said['accuracy'].value == 0.5 and said['accuracy'].low < 0.5 < said['accuracy'].high
  np.testing.assert_allclose(said['log_loss'].value, np.log1p(np.exp(-d)).mean())
  np.testing.assert_allclose(said['difference'].value, 0.375)
  p = 1 / (1 + np.exp(-np.abs(d[:4])))
  right = np.array([1, 0, 1, 0])
  # Of 15 bins each has one of the four confidences: .881, .731, .622, .5.
  np.testing.assert_allclose(said['calibration_error'].value, np.abs(right - p).mean())


def test_each_pair_has_a_line():
  """From which the numbers are worked out again."""
  pairs = [([1, 100, 101, 2], [1, 100, 102, 103, 2]), ([1, 104, 2], [1, 105, 2])]
  given = np.array([[0.5, 1.5], [2.0, -1.0]])
  made = lines(pairs, given, lambda ids: ''.join(map(chr, ids[1:-1])))
  assert [(each['chosen'], each['rejected']) for each in made] == [('de', 'dfg'), ('h', 'i')]
  assert [each['tokens'] for each in made] == [[4, 5], [3, 3]] and [0, 1] == [x['i'] for x in made]
  assert [each['right'] for each in made] == [False, True]
  assert [each['rewards'] for each in json.loads(json.dumps(made))] == given.tolist()
  assert len({each['digest'] for each in made}) == 2
  assert lines(pairs[:1], given[1:], str)[0]['digest'] == made[0]['digest'], 'of what was asked'


def test_what_gives_no_rewards_is_refused(source, tmp_path):
  with pytest.raises(ValueError, match='objective.centring=-1.0 must be at least 0'):
    Reward(centring=-1.0)
  with pytest.raises(ValueError, match="objective.pooled='middle' is unknown"):
    Reward(pooled='middle')
  with pytest.raises(ValueError, match="set objective.pooled='first'"):
    check_models(config(source, model={'causal': False}))
  with pytest.raises(NotImplementedError, match='of an encoder-decoder.*use a decoder, or an enc'):
    check_models(config(source, model={'encoder_layers': 1}))
  made = config(source)
  one = made.model.with_execution(pipeline=PipelineConfig(schedule='1f1b'))
  with pytest.raises(NotImplementedError, match="use 'gpipe' or 'circular'"):
    check_models(dataclasses.replace(made, model=one))
  configs.save(tiny(), tmp_path)
  with pytest.raises(ValueError, match="objective.kind='next_token' and gives no rewards; train"):
    open_reward(tmp_path)


@pytest.mark.parametrize('normalised', [True, False])
def test_a_run_that_has_only_begun_gives_no_rewards_yet(tmp_path, normalised):
  configs.save(dataclasses.replace(tiny(), objective=Reward()), tmp_path)
  with pytest.raises(FileNotFoundError, match='holds no checkpoint; train with train.py'):
    open_reward(tmp_path, normalised=normalised)


@pytest.mark.slow
def test_a_run_learns_and_is_judged_and_normalised(source, tmp_path):
  """Rewards of held-out answers are of mean 0 and deviation 1 then, and what training says."""
  adam = {'learning_rate': 0.01, 'schedule': 'constant'}
  made = config(source, optimizer=adam, train={'steps': 20, 'save_every': 20})
  made = dataclasses.replace(made, mesh=MeshConfig(data=4, tensor=2))
  run_here(dataclasses.replace(made, objective=Reward(margins=False)), tmp_path / 'run')
  with pytest.raises(ValueError, match=f'{FILE} is not there.*run python evaluate.py --workdir='):
    open_reward(tmp_path / 'run')

  done = Process(tmp_path, 'evaluate.py', f'--workdir={tmp_path / "run"}').end()
  assert done.code == 0 and 'reward = ' in done.out, (done.out, done.error)
  said = json.loads((tmp_path / 'run' / 'evaluation' / 'reward.json').read_text())
  assert said['n'] == len(GIVEN) and said['metrics']['accuracy']['value'] > 0.9
  assert (tmp_path / 'run' / 'evaluation' / 'reward-calibration.png').stat().st_size > 1000
  told = [json.loads(line) for line in open(tmp_path / 'run' / 'evaluation' / 'reward.jsonl')]
  assert [(each['chosen'], each['rejected']) for each in told] == [
    (row['prompt'] + row['chosen'], row['prompt'] + row['rejected']) for row in GIVEN
  ]
  assert said['metrics']['accuracy']['value'] == np.mean([each['right'] for each in told])
  gaps = np.array([each['rewards'] for each in told]) @ [1, -1]
  np.testing.assert_allclose(gaps.mean(), said['metrics']['difference']['value'])

  scale = (tmp_path / 'run' / FILE).read_bytes()
  looked = f'--workdir={tmp_path / "run"}', '--limit=5', f'--output={tmp_path / "look"}'
  done = Process(tmp_path, 'evaluate.py', *looked).end()
  assert done.code == 0 and f'{FILE} is left as it is' in done.out, (done.out, done.error)
  assert (tmp_path / 'run' / FILE).read_bytes() == scale

  for flag in ('--shots=4', '--weights=int8', '--calibration=pmi'):
    refused = Process(tmp_path, 'evaluate.py', f'--workdir={tmp_path / "run"}', flag).end()
    assert refused.code == 1 and 'reads answers as they are' in refused.error, refused.error

  model = open_reward(tmp_path / 'run')
  scores = model.scores(answers())
  np.testing.assert_allclose([scores.mean(), scores.std()], [0, 1], atol=1e-5)
  mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
  np.testing.assert_allclose(
    open_reward(tmp_path / 'run', mesh).scores(answers()), scores, atol=1e-4
  )
  np.testing.assert_allclose(model.scores(answers()[5:6]), scores[5:6], atol=1e-5)
  with pytest.raises(ValueError, match=f'a text of {T + 1} tokens is longer than the {T} that'):
    model.scores([[1] * (T + 1)])

  # As a judge it says of answers whether they are as good as a refusal.
  prompts, told = zip(*((row['prompt'], row[s]) for row in GIVEN for s in ('chosen', 'rejected')))
  for threshold in (None, 0.5):
    judge = judging_run.judge_of(judging_run.JudgeRequest(tmp_path / 'run', threshold=threshold))
    assert judge(prompts, told) == (scores >= (threshold or 0)).tolist()
  assert judge(['q'], [' ']) == [False] and judge.labels == ('unsafe',)
  spread = judging_run.JudgeRequest(tmp_path / 'run', mesh=MeshConfig(data=4, tensor=2))
  # Rows that no mesh divides; rewards are of mean 0 over answers, none of which is near it.
  assert np.abs(scores).min() > 1e-3
  assert judging_run.judge_of(spread)(prompts[:21], told[:21]) == (scores[:21] >= 0).tolist()
  with pytest.raises(ValueError, match='--judge_reads=answer is not of a run of objective.kind'):
    judging_run.judge_of(judging_run.JudgeRequest(tmp_path / 'run', reads='answer'))
  notes = []
  long = judging_run.judge_of(judging_run.JudgeRequest(tmp_path / 'run'), notes.append)
  assert long(['q' * T], ['y']) == [
    bool(model.scores([[*[ord('q') + 3] * (T - 2), ord('y') + 3, 2]]) >= 0)
  ]
  assert notes == ['NOTE: 1 texts were cut, to fit the context of the judge']

  again = dataclasses.replace(made, train=dataclasses.replace(made.train, steps=22))
  run_here(dataclasses.replace(again, objective=Reward(margins=False)), tmp_path / 'run')
  with pytest.raises(ValueError, match='is of checkpoint 20, and this is 22: their rewards'):
    open_reward(tmp_path / 'run')


# Planted faults: the formula must see them.


@pytest.mark.slow
@pytest.mark.parametrize('name', ['one token early', 'sides', 'margin added'])
def test_planted_faults_are_seen(source, one_device, monkeypatch, name):
  made = config(source, Reward())
  run, batch = Run(made), batch_of(made)
  models = with_bias(run.state.models)
  if name == 'one token early':
    batch.weights[...] = np.roll(batch.weights, -1, 1)
  if name == 'margin added':
    batch.margins[...] *= -1
  if name == 'sides':
    monkeypatch.setattr('objectives.reward.losses', lambda r, m, c: losses(r[..., ::-1], m, c))

  def run(models, batch):
    total, weight = made.objective.loss(models, batch)['reward']
    return total / weight, by_hand(models, True, 0.0)

  given = models, jax.tree.map(jnp.asarray, batch)
  wrong, right = quickly(jax.jit(run), *given)(*given)
  assert abs(wrong - right) > 1e-3
