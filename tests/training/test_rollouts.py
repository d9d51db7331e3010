"""Does a policy learn from what it writes; is what is learned from what was written; and is a
rollout a function of state, seed and number, whatever the devices and however often the run was
stopped?
"""

import dataclasses
import gc
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.config import CleanConfig, SourceConfig
from data.prompts import prepare
from data.tokenizers import ByteTokenizer
from model import params
from model.adaptation import AdapterConfig
from objectives import rollout
from objectives.gkd import GKD
from objectives.policy import GRPO
from objectives.ppo import PPO
from objectives.rollout import Rollouts, laid_out
from objectives.rollout_rows import AnswerRows, RolloutBatch, packed, unpacked
from parallel.mesh import MeshConfig, make_mesh
from tests.decode.test_engine import compilations
from tests.training.conftest import assert_close, assert_same, run_here, tiny
from training import config as configs, state as states
from training.program import begin_state, make_program, make_target
from workdir.checkpoint import Checkpoints
from workdir.metrics import read_metrics
from workdir.rollouts import FILE, staged

NEW, LENGTH = 6, 12
# Fractions, and a reward that everything can be had of: the share of one letter's bytes.
REWARD = """
def reward(text, record):
  return sum(c in record['wanted'] for c in text) / 7 - 0.1
"""
SHARED = {'max_new_tokens': NEW, 'beta': 0.1, 'temperature': 0.8}
FAMILY = GRPO(**SHARED, group=4, minibatches=2, epochs=2)
TIMED = {'seconds': 0, 'tokens_per_second': 0}  # of a line, no function of the seed
CRITICAL = PPO(**SHARED, critic='shared', minibatches=2, epochs=2, stop_kl=10.0, missing_end=0.5)


def asked(directory):
  """The directory, with prompts and a reward."""
  rows = [{'prompt': 'pqr'[: 1 + i % 3] + str(i), 'wanted': 'abcdefghijklm'} for i in range(12)]
  (directory / 'prompts.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (directory / 'wanted.py').write_text(REWARD)
  return directory


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  return asked(tmp_path_factory.mktemp('prompts'))


def config(place, objective, adapter=None, **parts):
  source = SourceConfig(kind='jsonl', path=str(place / 'prompts.jsonl'), format='prompt')
  data = {
    'sources': (source,),
    'clean': CleanConfig(anonymise=(), near_duplicates=0),
    'split': 'hash',
    'validation_fraction': 0.3,
    'sequence_length': LENGTH,
    'batch_size': 8,
    'cache_dir': str(place / 'cache'),
  }
  objective = dataclasses.replace(objective, reward=(str(place / 'wanted.py'),))
  made = tiny(**parts | {'data': data | parts.get('data', {})})
  return dataclasses.replace(made, objective=objective, adapter=AdapterConfig(**adapter or {}))


class Started:
  """The state and the rollouts of a run that begins, on its mesh."""

  def __init__(self, made, directory, devices=1):
    self.lines = []
    mesh = make_mesh(made.mesh, jax.devices()[:devices])
    self.mesh = jax.set_mesh(mesh)
    prepared = made.objective.read(made.data, self.lines.append)
    self.config = made.resolve(prepared.tokenizer.vocabulary, prepared.rows)
    self.stage = staged(self.config, prepared, directory, self.lines.append)
    make_state, self.step = make_program(self.config)
    target = make_target(self.config, make_state, mesh, directory)
    self.state = begin_state(self.config, make_state, target)
    rows = range(self.config.data.batch_size)
    self.rollouts = Rollouts(self.stage, self.config.objective, self.config.data, rows)

  def __enter__(self):
    self.mesh.__enter__()
    return self

  def __exit__(self, *error):
    self.stage.judges.close()
    self.mesh.__exit__(*error)


@pytest.mark.parametrize(
  'line, said', [('x', 'line 2 is not JSON'), ('{}', 'line 2 names no roll')]
)
def test_a_journal_that_is_none_is_named_before_anything_is_written(place, tmp_path, line, said):
  (tmp_path / FILE).write_text('{"rollout": 0}\n' + line + '\n')
  with pytest.raises(ValueError, match=f'{FILE}, {said}'):
    staged(config(place, FAMILY), None, tmp_path, print)


@pytest.mark.slow
def test_rows_are_what_was_written(place, tmp_path):
  """Prompt and answer, the end of it too, at their places; log-probabilities are of the policy."""
  with Started(config(place, FAMILY), tmp_path) as run:
    run.rollouts.take(run.state)
    batch = run.rollouts._batch
    assert len(batch.tokens) == 16 and 'sampler and trainer agree' in run.lines[-1]
    said = run.stage.said(run.state.models, batch.cut(range(8)), ('policy',))['policy']
    prompts = {tuple(prompt.ids) for prompt in run.stage.prompts.train}
  counted = batch.weights > 0
  np.testing.assert_allclose(said[counted[:8]], batch.behaviour[:8][counted[:8]], atol=1e-5)
  ends, groups = 0, []
  for row in range(16):
    places = np.flatnonzero(counted[row])
    first, n = places[0], places[-1] + 1
    assert places.tolist() == list(range(first, n)) and n == (batch.segments[row] > 0).sum()
    prompt = tuple(batch.tokens[row, : first + 1].tolist())
    answer = batch.targets[row, first:n].tolist()
    assert prompt in prompts and len(answer) <= NEW
    assert batch.tokens[row, first + 1 : n].tolist() == answer[:-1]
    ended = answer[-1] == ByteTokenizer().eos
    ends += ended
    assert batch.ended[row].sum() == ended and (ended or len(answer) == NEW)
    text = bytes(i - 3 for i in answer if 3 <= i < 259).decode(errors='replace')
    expected = sum(c in 'abcdefghijklm' for c in text) / 7 - 0.1
    np.testing.assert_allclose(batch.scores[row].sum(), expected, rtol=1e-6)
    assert batch.scores[row, n - 1] == np.float32(expected) and batch.last[row, n - 1] == 1
    groups.append(prompt)
  assert all(len(set(groups[i : i + 4])) == 1 for i in range(0, 16, 4))


@pytest.mark.slow
def test_weights_that_write_go_with_their_rollout(place, tmp_path):
  """Before a step learns from it; the next one is of the step's weights, with the same programs."""
  with Started(config(place, FAMILY), tmp_path) as run:
    alive, make, engine = [], run.stage._writing, run.stage._actor._engine

    def recorded(models):
      weights = make(models)
      alive.extend(map(weakref.ref, jax.tree.leaves(weights)))
      return weights

    run.stage._writing = recorded
    run.rollouts.take(run.state)
    gc.collect()
    assert alive and not [x for x in alive if x() is not None]
    programs = dict(engine._programs)
    moved = jax.tree.map(lambda x: x * jnp.asarray(1.5, x.dtype), run.state.models['policy'])
    models = run.state.models | {'policy': moved}
    state = dataclasses.replace(run.state, models=models)
    run.rollouts._left = []
    run.rollouts.take(state)
    run.rollouts._left = []
    with compilations() as names:
      run.rollouts.take(state)
    assert engine._programs == programs and not names
    batch = run.rollouts._batch.cut(range(8))
    said = run.stage.said(models, batch, ('policy',))['policy']
  np.testing.assert_allclose(said, np.where(batch.weights > 0, batch.behaviour, 0), atol=1e-4)


@pytest.mark.slow
def test_rewards_are_scaled_by_group_and_weighed(place, tmp_path):
  """As the config says: each over its group, then by its weight."""
  for name, body in (
    ('length', 'float(len(text))'),
    ('letters', 'sum(c < "m" for c in text) ** 2'),
  ):
    (tmp_path / f'{name}.py').write_text(f'def reward(text, record):\n  return {body}\n')
  rewards = tuple(str(tmp_path / f'{name}.py') for name in ('length', 'letters'))
  made = config(place, dataclasses.replace(FAMILY, reward_scale='group'))
  objective = dataclasses.replace(made.objective, reward=rewards, reward_weights=(2.0, -0.5))
  with Started(dataclasses.replace(made, objective=objective), tmp_path) as run:
    run.rollouts.take(run.state)
    batch, text = run.rollouts._batch, run.stage.text
  texts = []
  for ids, counted in zip(batch.targets, batch.weights > 0):
    answer = ids[counted].tolist()
    texts.append(text(answer[:-1] if answer[-1] == ByteTokenizer().eos else answer))
  each = [[len(text), sum(c < 'm' for c in text) ** 2] for text in texts]
  groups = np.array(each, np.float64).reshape(4, 4, 2)
  spread = groups.std(1, ddof=1, keepdims=True) + 1e-6
  expected = ((groups - groups.mean(1, keepdims=True)) / spread) @ [2.0, -0.5]
  assert (groups.std(1) > 0).all(1).any()
  np.testing.assert_allclose(batch.scores.sum(1), expected.ravel(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'objective', [pytest.param(FAMILY, id='grpo'), pytest.param(CRITICAL, id='ppo')]
)
def test_a_run_that_was_stopped_is_one_that_was_not(place, tmp_path, objective):
  """Bit for bit, also from within a rollout, whose policy is gone."""
  made = config(place, objective, train={'steps': 7, 'eval_every': 3, 'save_every': 3})
  run_here(made, tmp_path / 'whole')
  three = dataclasses.replace(made, train=dataclasses.replace(made.train, steps=3))
  run_here(three, tmp_path / 'stopped')
  record = Checkpoints(tmp_path / 'stopped').record(3)
  assert record['data']['left'] and record['data']['rollouts'] == 1
  run_here(made, tmp_path / 'stopped')
  assert_same_runs(made, 7, tmp_path / 'whole', tmp_path / 'stopped')
  metrics = metrics_of(tmp_path / 'whole')
  assert {'reward', 'ended', 'entropy', 'kl', 'clip_fraction'} <= metrics[0].keys()
  assert any('validation_reward' in line for line in metrics)


def assert_same_runs(made, step, *directories):
  """The same policy, bit for bit, from the same rollouts."""
  assert_same(*(policy_of(made, directory, step) for directory in directories))
  lines = [(directory / FILE).read_text().split('\n') for directory in directories]
  for a, b in zip(*lines, strict=True):
    a, b = (json.loads(line or '{}') | TIMED for line in (a, b))
    assert a == b


def policy_of(made, directory, step, name='policy'):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    target = params.abstract(lambda: states.new_model(made, name), mesh)
    return Checkpoints(directory).restore(step, target, f'models.{name}')


def test_a_batch_is_kept_as_it_is():
  batch = RolloutBatch.empty(2, 3)
  batch.behaviour[:] = np.float32(0.1)
  again = unpacked(packed(batch))
  assert_same(vars(again), vars(batch))


@pytest.mark.slow
def test_the_rest_of_a_rollout_is_of_its_config(place, tmp_path):
  with Started(config(place, FAMILY), tmp_path) as run:
    run.rollouts.take(run.state)
    # A checkpoint writes it while the next ones are taken.
    position = run.rollouts.state()
    expected = run.rollouts.take(run.state)
    position = json.loads(json.dumps(position))
    other = Rollouts(run.stage, run.config.objective, run.config.data, range(8))
    other.restore(position)
    assert_same(vars(other.take(None)), vars(expected))  # of nothing but the position
    fewer = dataclasses.replace(run.config.objective, minibatches=1)
    with pytest.raises(ValueError, match='objective.minibatches: 2 then, 1 now'):
      Rollouts(run.stage, fewer, run.config.data, range(8)).restore(position)
    # What is left was drawn, and is of the lengths, that the old settings say.
    for name, value in (('temperature', 0.7), ('max_new_tokens', 3)):
      changed = dataclasses.replace(run.config.objective, **{name: value})
      with pytest.raises(ValueError, match=f'objective.{name}: .* then, {value} now'):
        Rollouts(run.stage, changed, run.config.data, range(8)).restore(position)
    # A weight that adapts goes on from where it was; one that stays is the config's.
    for target, coefficient in ((0.0, 0.1), (2.0, 0.7)):
      ppo = dataclasses.replace(CRITICAL, kl_target=target)
      again = Rollouts(run.stage, ppo, run.config.data, range(8))
      again.restore(position | {'coefficient': 0.7})
      assert again.state()['coefficient'] == coefficient
    ((name, of),) = run.stage.judges.of.items()
    assert position[f'{rollout.REWARD}{name}'] == of
    with pytest.raises(ValueError, match=f'objective.reward={name}: .*another.* then, .* now'):
      other.restore(position | {f'{rollout.REWARD}{name}': {'digest': 'another'}})
    later = *rollout.LATER, rollout.REWARD
    older = {name: value for name, value in position.items() if not name.startswith(later)}
    other.restore(older)
    with pytest.raises(ValueError, match='seed: None then'):
      other.restore({name: value for name, value in position.items() if name != 'seed'})
    with pytest.raises(ValueError, match='key: .* then'):
      other.restore(position | {'key': 'another'})


@pytest.mark.slow
def test_dynamic_sampling_replaces_what_teaches_nothing(place, tmp_path):
  """Groups of equal rewards give way to those of the next prompts, while there are tries."""
  objective = dataclasses.replace(FAMILY, resamplings=3, minibatches=1, epochs=1)
  made = config(place, objective)
  (tmp_path / 'own.py').write_text(
    'def reward(text, record):\n  return float(len(text) * ("1" in record["prompt"]))\n'
  )
  objective = dataclasses.replace(made.objective, reward=(str(tmp_path / 'own.py'),))
  with Started(dataclasses.replace(made, objective=objective), tmp_path) as run:
    batch = run.rollouts.take(run.state)
    assert run.rollouts.state()['prompt'] > 2  # more than the two that a batch has
    before = run.rollouts.state()['prompt']
  alike = dataclasses.replace(objective, resamplings=0)
  with Started(dataclasses.replace(made, objective=alike), tmp_path) as run:
    few = run.rollouts.take(run.state)
    assert run.rollouts.state()['prompt'] == 2 < before
  assert batch.equal.sum() <= few.equal.sum()
  assert (batch.advantages[batch.equal.sum(1) > 0] == 0).all()


@pytest.mark.slow
def test_a_reward_that_fails_is_counted_and_all_failing_ends_the_run(place, tmp_path):
  made = config(place, FAMILY)
  (tmp_path / 'own.py').write_text(
    'def reward(text, record):\n  return 1 / (len(text) % 2) + len(text)\n'
  )
  objective = dataclasses.replace(made.objective, reward=(str(tmp_path / 'own.py'),))
  with Started(dataclasses.replace(made, objective=objective), tmp_path) as run:
    run.rollouts.take(run.state)
    batch = run.rollouts._batch
    failed = batch.failed.sum(1) > 0
    assert 0 < failed.sum() < 16
    assert (batch.weights[failed] == 0).all() and (batch.advantages[failed] == 0).all()
    assert np.isfinite(batch.advantages).all()
    told = [line for line in run.lines if 'ZeroDivisionError' in line]
    assert len(told) == min(3, failed.sum()) and 'prompts.jsonl:' in told[0]
  (tmp_path / 'own.py').write_text('def reward(text, record):\n  return None\n')
  with Started(dataclasses.replace(made, objective=objective), tmp_path) as run:
    with pytest.raises(FloatingPointError, match='none of the 16 answers of rollout 0 has'):
      run.rollouts.take(run.state)


@pytest.mark.slow
def test_what_did_not_end_may_count_nowhere(place, tmp_path):
  with Started(config(place, FAMILY), tmp_path) as run:
    asked = [
      rollout.Question(prompt, 5 + i) for i, prompt in enumerate(run.stage.prompts.train[:4])
    ]
    answers = rollout.answered(run.stage, run.state.models, asked, missing_end=0.25)
  form = AnswerRows(LENGTH)
  whole, masked = laid_out(answers, form, 4), laid_out(answers, form, 4, masked=True)
  unended = whole.ended.sum(1) == 0
  assert unended.any()
  assert (masked.weights[unended] == 0).all() and (whole.weights[unended].max(1) == 1).all()
  ended = [not w.ended for w in answers.written]
  assert ended == unended.tolist()


@pytest.mark.slow
def test_sampler_and_trainer_that_differ_are_told(place, tmp_path, monkeypatch):
  """A forgotten temperature, or weights that are not the step's, end the run before it begins."""
  with Started(config(place, FAMILY), tmp_path) as run:
    run.stage._actor._temperature = 0.5
    with pytest.raises(FloatingPointError, match='the sampler and the trainer differ by'):
      run.rollouts.take(run.state)


@pytest.mark.slow
def test_too_far_from_what_wrote_it_another_epoch_does_not_begin(place, tmp_path):
  objective = dataclasses.replace(CRITICAL, stop_kl=1e-9)
  with Started(config(place, objective), tmp_path) as run:
    run.rollouts.take(run.state)
    run.rollouts.take(run.state)
    moved = jax.tree.map(lambda x: x * jnp.asarray(1.05, x.dtype), run.state.models['policy'])
    assert run.rollouts.state()['rollouts'] == 1
    state = dataclasses.replace(run.state, models=run.state.models | {'policy': moved})
    run.rollouts.take(state)
    assert run.rollouts.state()['rollouts'] == 2
  with Started(config(place, CRITICAL), tmp_path) as run:
    for _ in range(3):
      run.rollouts.take(run.state)
    assert run.rollouts.state()['rollouts'] == 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'mesh, weights',
  [
    ({'data': 4, 'fsdp': 2}, 'split'),
    ({'tensor': 2, 'fsdp': 2}, 'whole'),
    ({'context': 2}, 'split'),
  ],
  ids=str,
)
def test_devices_write_the_same(place, tmp_path, mesh, weights):
  with Started(config(place, FAMILY), tmp_path) as run:
    run.rollouts.take(run.state)
    alone = run.rollouts._batch
  objective = dataclasses.replace(FAMILY, rollout_weights=weights)
  devices = int(np.prod([*mesh.values()]))
  with Started(config(place, objective, mesh=mesh), tmp_path, devices) as run:
    run.rollouts.take(run.state)
    spread = run.rollouts._batch
  np.testing.assert_array_equal(alone.tokens, spread.tokens)
  np.testing.assert_array_equal(alone.targets, spread.targets)
  for name in ('behaviour', 'reference', 'advantages'):
    np.testing.assert_allclose(getattr(alone, name), getattr(spread, name), atol=2e-5)


@pytest.mark.slow
@pytest.mark.long
def test_ppo_on_devices_is_ppo_on_one(place, tmp_path):
  """Two rollouts with all that is made of them: answers, scores, values, credit, steps of the
  policy and of its critic, the coefficient that adapts.
  """
  objective = dataclasses.replace(CRITICAL, critic='separate', kl_target=0.01, missing_end=0.1)
  names = ('policy', 'critic', 'value_head')
  said, models = {}, {}
  for name, mesh in (('one', {}), ('eight', {'data': 4, 'tensor': 2})):
    # Adam's quotient makes of gradients that nearly cancel, and are rounded, a step: not with this
    # in it.
    parts = {'optimizer': {'epsilon': 1e-4}, 'train': {'steps': 8, 'eval_every': 4}}
    made = config(place, objective, mesh=mesh, **parts)
    run_here(made, tmp_path / name)
    said[name] = [json.loads(line) for line in (tmp_path / name / FILE).read_text().splitlines()]
    models[name] = {model: policy_of(made, tmp_path / name, 8, model) for model in names}
  for one, eight in zip(*said.values(), strict=True):
    assert one['answers'] == eight['answers'] and one['prompt'] == eight['prompt']
    np.testing.assert_allclose(one['rewards'], eight['rewards'], rtol=1e-6)
    np.testing.assert_allclose(one['beta'], eight['beta'], rtol=1e-5)
  assert said['one'][0]['beta'] != said['one'][1]['beta']
  told = ('loss', 'reward', 'kl', 'policy_kl', 'value_loss', 'explained', 'clip_fraction')
  for one, eight in zip(*(metrics_of(tmp_path / name) for name in said), strict=True):
    for key in told:
      np.testing.assert_allclose(one.get(key, 0), eight.get(key, 0), rtol=1e-3, atol=2e-5)
  assert_close(*models.values(), 1e-4)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'adapter, objective, mesh',
  [
    ({'kind': 'lora'}, FAMILY, {}),
    ({'kind': 'dora'}, FAMILY, {}),
    (
      {'kind': 'lora', 'base': 'int8'},
      dataclasses.replace(FAMILY, rollout_weights='whole'),
      {'data': 4, 'fsdp': 2},
    ),
  ],
  ids=['lora', 'dora', 'int8, whole'],
)
def test_an_adapter_writes_and_learns(place, tmp_path, adapter, objective, mesh):
  """The first rollouts are the base's, later ones the adapter's, of which the check is."""
  fields = {'rank': 4, 'alpha': 8.0} | adapter
  made = config(place, objective, adapter=fields, mesh=mesh, train={'steps': 6, 'eval_every': 6})
  run_here(made, tmp_path / 'run')
  before = len(metrics_of(tmp_path / 'run'))
  longer = dataclasses.replace(made, train=dataclasses.replace(made.train, steps=9))
  run_here(longer, tmp_path / 'run')  # the check again, with an adapter that has moved
  metrics = metrics_of(tmp_path / 'run')
  assert len(metrics) > before and all(np.isfinite(line.get('loss', 0)) for line in metrics)


def test_prompts_are_read_in_order_of_the_seed_and_refused_by_name(place):
  made = config(place, FAMILY)
  read = prepare(made.data, '', LENGTH - NEW, 4, lambda line: None)
  assert len(read.train) + len(read.validation) == 12 and read.rows == 4 * len(read.train)
  n = len(read.train)
  for epoch in range(2):
    drawn = [read.order(7, epoch * n + i).place for i in range(n)]
    assert sorted(drawn) == sorted(prompt.place for prompt in read.train)
  assert [read.order(7, i).place for i in range(n)] != drawn
  with pytest.raises(ValueError, match='prompts are to train on'):
    prepare(made.data, '', 1, 4, lambda line: None)
  wrong = dataclasses.replace(made.data.sources[0], format='chat')
  with pytest.raises(ValueError, match='format=prompt'):
    prepare(dataclasses.replace(made.data, sources=(wrong,)), '', 6, 4, lambda line: None)
  with pytest.raises(ValueError, match='data.seed=3: .*an order of train.seed'):
    prepare(dataclasses.replace(made.data, seed=3), '', LENGTH - NEW, 4, lambda line: None)


@pytest.mark.slow
@pytest.mark.long
def test_a_student_learns_from_a_teacher_what_to_write(place, tmp_path):
  """Of its own teacher nothing; of another one to say of its own text what that does."""
  teacher = config(place, FAMILY, train={'steps': 1, 'seed': 5})
  run_here(teacher, tmp_path / 'teacher')
  objective = GKD(max_new_tokens=NEW, teacher=str(tmp_path / 'teacher'), temperature=1.5)
  made = dataclasses.replace(
    config(place, FAMILY, train={'steps': 12, 'eval_every': 6}), objective=objective
  )
  same = dataclasses.replace(
    made, init=objective.teacher, train=dataclasses.replace(made.train, steps=1, eval_every=1)
  )
  run_here(same, tmp_path / 'same')
  (said,) = [line for line in metrics_of(tmp_path / 'same') if line['step'] == 0]
  assert 0 <= said['validation_divergence'] < 1e-6

  run_here(made, tmp_path / 'student')
  lines = metrics_of(tmp_path / 'student')
  apart = [line['validation_divergence'] for line in lines if 'validation_divergence' in line]
  assert apart[-1] < 0.7 * apart[0] and {'answer_length', 'ended'} <= lines[0].keys()
  with pytest.raises(ValueError, match='teach the student what it wrote itself'):
    GKD(cross_entropy=0.5)
  with pytest.raises(NotImplementedError, match='stored_top_k'):
    GKD(stored_top_k=4)


def metrics_of(directory):
  return read_metrics(directory / 'metrics.jsonl')


def test_a_config_of_rollouts_survives_its_file(place, tmp_path):
  made = config(place, CRITICAL)
  configs.save(made, tmp_path)
  assert configs.load(tmp_path) == made
