"""Does a step minimise what an objective says, whatever its models, terms and denominators, and is
a step's code free of kinds?
"""

import ast
import dataclasses
import functools
import math
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import CONSTANT, READ, SHARE, Toy

from model import params, transformer
from model.adaptation import AdapterConfig
from model.params import abstract, named_leaves
from objectives import kinds
from objectives.next_token import NextToken
from parallel import axes, hosts
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import (
  RATE,
  SGD,
  B,
  Trainer,
  assert_close,
  assert_same,
  host,
  make_batches,
  on,
  run_here,
  tiny,
)
from training import config as configs
from training.config import Config
from training.gradients import accumulate
from training.optimizer import make_optimizer
from training.program import (
  begin_state,
  check_models,
  lower_step,
  make_program,
  make_target,
)
from training.spent import flops_per_token
from workdir.checkpoint import Checkpoints
from workdir.frozen import begin

ROOT = pathlib.Path(__file__).parents[2]


def pairs():
  """Batches whose pairs differ in length, one of them padding, so that microbatches weigh
  differently in every term.
  """
  batches = make_batches(2)
  for batch in batches:
    batch.weights[2] = 0
  return batches


def toy(**parts) -> Config:
  return dataclasses.replace(tiny(**{'optimizer': SGD} | parts), objective=Toy())


class Run:
  """A state and a step of a run, as train.py makes them."""

  def __init__(self, config: Config, devices: int = 1):
    self.config, self.mesh = config, make_mesh(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(self.mesh):
      make_state, self.step = make_program(config)
      target = make_target(config, make_state, self.mesh, tempfile.gettempdir())
      self.state = begin_state(config, make_state, target)

  def go(self, batches):
    with jax.set_mesh(self.mesh):
      for batch in batches:
        batch = jax.device_put(batch, jax.NamedSharding(self.mesh, axes.spec('batch', 'length')))
        self.state, metrics, norms = self.step(self.state, batch)
    return jax.device_get(metrics), jax.device_get(norms)


@pytest.fixture(scope='module')
def whole():
  run = Run(toy())
  begun = host(run.state.models)
  return begun, run, run.go(pairs())


def by_hand(policy, reference, batch):
  """What the toy minimises, row by row, of numpy masks."""
  read = READ * np.cos(np.arange(32, dtype=np.float32))
  counted = batch.weights > 0

  def scores(model):
    rows = map(jnp.asarray, (batch.tokens, batch.positions, batch.segments))
    hidden = model(*rows).hidden
    return [(hidden[i][counted[i]] @ read).sum() for i in range(B)]

  ours, theirs = scores(policy), scores(reference)
  losses = []
  for i in range(0, B, 2):
    if counted[i].any() and counted[i + 1].any():
      losses.append(jnp.log1p(jnp.exp(-(ours[i] - theirs[i]) + (ours[i + 1] - theirs[i + 1]))))
  lengths = counted.sum(1)
  whitened = (lengths - lengths.mean()) / lengths.std()
  return (
    sum(losses) / len(losses)
    + SHARE * sum(score**2 for score in ours) / counted.sum()
    + sum(w * score for w, score in zip(whitened, ours, strict=True)) / CONSTANT
  )


@pytest.mark.slow
def test_a_step_is_the_absolute_step(one_device):
  """Parameters - rate * gradient of the sum over terms of sum / weight, worked out by hand."""
  run, batch = Run(toy()), pairs()[0]
  before = jax.device_get(run.state.models)

  @jax.jit
  def worked_out(policy, reference):
    loss, gradient = jax.value_and_grad(by_hand)(policy, reference, batch)
    moved = jax.tree.map(lambda p, g: p - RATE * g, policy, gradient)
    return loss, gradient, moved, jax.tree.map(jnp.linalg.norm, jax.tree.map(jnp.ravel, gradient))

  loss, gradient, expected, lengths = worked_out(before['policy'], before['reference'])
  metrics, norms = run.go([batch])
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['loss'], sum(metrics[name] for name in ('pairs', 'tokens', 'constant')), rtol=1e-6
  )
  assert_close(run.state.models['policy'], expected, 2e-6)
  assert max(np.abs(x).max() for x in host(gradient).values()) > 1e-3
  assert_close(norms, lengths, 1e-5)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'parts, devices, mesh',
  [
    pytest.param(2, 1, {}, marks=pytest.mark.slow),
    pytest.param(4, 1, {}, marks=pytest.mark.slow),
    pytest.param(1, 4, {'data': 2, 'fsdp': 2}, marks=pytest.mark.slow),
    (2, 2, {'data': 2}),
  ],
)
def test_microbatches_and_devices_are_one_big_batch(whole, parts, devices, mesh):
  run = Run(toy(mesh=mesh, train={'accumulation': parts}), devices)
  metrics, _ = run.go(pairs())
  assert_close(run.state.models, whole[1].state.models, 2e-6)
  for name, value in whole[2][0].items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_the_batches_can_tell_the_denominators_apart():
  """Of two microbatches of whole pairs, no two weigh alike in any term."""
  for batch in pairs():
    counted = batch.weights > 0
    halves = [np.arange(B) // 2 % 2 == i for i in range(2)]
    tokens = [counted[rows].sum() for rows in halves]
    real = [
      sum(counted[i].any() and counted[i + 1].any() for i in np.flatnonzero(rows)[::2])
      for rows in halves
    ]
    assert tokens[0] != tokens[1] and real[0] != real[1]


@pytest.mark.slow
def test_what_is_frozen_stays_and_has_no_optimizer_state(whole):
  begun, run, _ = whole
  after = host(run.state.models)
  for name in begun:
    still = begun[name].tobytes() == after[name].tobytes()
    unread = 'head' in name  # the toy reads hidden states
    assert still == ("'reference'" in name or unread), name
  adam = Run(dataclasses.replace(toy(), optimizer=tiny().optimizer))
  assert not [name for name in named_leaves(adam.state.optimizer) if 'reference' in name]
  assert [name for name in named_leaves(adam.state.optimizer) if 'policy' in name]


@pytest.mark.slow
@pytest.mark.parametrize('where', [pytest.param('host', marks=pytest.mark.long), 'disk'])
def test_only_what_is_trained_has_state_elsewhere(where):
  """With a frozen reference and a frozen embedding, steps are those of a run that keeps it all on
  the device.
  """

  def run(**train):
    config = toy(train={'frozen': ('policy.embedding.*',)} | train)
    adam = dataclasses.replace(tiny().optimizer, epsilon=1e-3)
    made = Run(dataclasses.replace(config, optimizer=adam))
    made.go(pairs())
    return made.state

  expected, state = run(), run(offload_optimizer=where)
  assert_close(state.models, expected.models, 2e-6)
  assert_same(state.models['reference'], expected.models['reference'])
  names = named_leaves(state.optimizer)
  assert names.keys() == named_leaves(expected.optimizer).keys()
  assert not [name for name in names if 'reference' in name or 'embedding' in name]


@pytest.mark.slow
def test_a_part_of_a_model_can_be_frozen_and_costs_no_gradient():
  """Frozen below the head, a step is a forward pass, about a third, and the head's gradient."""
  cheap = tiny(train={'frozen': ('policy.stack.*', '*.embedding.*')})
  flops = {}
  for name, config in (('all', tiny()), ('head', cheap)):
    with jax.default_matmul_precision('default'):
      lowered, _ = lower_step(config, make_mesh(config.mesh, jax.devices()[:1]))
    flops[name] = lowered.compile().cost_analysis()['flops']
  assert flops['head'] < 0.62 * flops['all'], flops
  run = Run(cheap)
  begun = host(run.state.models)
  run.go(make_batches(1))
  moved = {
    name for name, x in host(run.state.models).items() if x.tobytes() != begun[name].tobytes()
  }
  assert moved and all("'policy'" in name and '.head' in name for name in moved), moved
  kept = {
    name.split('policy.')[-1] for name in named_leaves(run.state.optimizer) if 'policy' in name
  }
  assert kept == {'head.tokens'}


def test_a_pattern_must_match_and_something_must_be_trained():
  with pytest.raises(
    ValueError,
    match=r"train.frozen: no parameter is named like 'policy.hed.\*'; near it: policy.head",
  ):
    Run(tiny(train={'frozen': ('policy.hed.*',)}))
  with pytest.raises(ValueError, match='leave no parameter to train'):
    Run(tiny(train={'frozen': ('*',)}))


def test_records_never_straddle_a_microbatch():
  rows = jnp.arange(16.0)[:, None]

  def spread(model, part, scale):
    pairs = part.reshape(-1, 2)
    return (model * part).sum(), {'split': jnp.abs(pairs[:, 0] + 1 - pairs[:, 1]).sum()}

  for parts in (1, 2, 4, 8):
    gradient, sums = accumulate(spread, jnp.float32(1), rows, 1.0, parts, 2)
    assert sums['split'] == 0 and gradient == rows.sum()
  with pytest.raises(
    ValueError, match=r'\(16, 1\).*train.accumulation=16 .* 2 row.*a multiple of 32'
  ):
    accumulate(spread, jnp.float32(1), rows, 1.0, 16, 2)
  with pytest.raises(
    ValueError, match=r'data.batch_size=8 with train.accumulation=8 .*2 rows.*a multiple of 16'
  ):
    toy(train={'accumulation': 8})


def test_the_loss_is_the_terms_and_their_weights(one_device):
  batch = jax.tree.map(jnp.asarray, pairs()[0])
  models = Run(toy()).state.models
  loss = jax.jit(lambda models: Toy().loss(models, Toy().prepare(models, batch)))(models)
  weights = {name: float(weight) for name, (_, weight) in loss.items()}
  assert weights == {'pairs': 3, 'tokens': (batch.weights > 0).sum(), 'constant': CONSTANT}
  value = jax.jit(lambda p, r: by_hand(p, r, pairs()[0]))(models['policy'], models['reference'])
  np.testing.assert_allclose(
    sum(total / weight for total, weight in loss.values()), value, rtol=1e-5
  )


def test_the_default_is_one_model_trained_whole():
  assert Config().objective == NextToken() and list(kinds.KINDS) == [
    'next_token',
    'sft',
    'seq2seq',
    'classify',
    'classify_seq2seq',
    'classify_head',
    'preference',
    'preference_seq2seq',
    'kto',
    'kto_seq2seq',
    'span_corruption',
    'masked_lm',
    'reward',
    'grpo',
    'grpo_seq2seq',
    'ppo',
    'distil',
    'distil_sft',
    'distil_seq2seq',
    'distil_span_corruption',
    'distil_masked_lm',
    'gkd',
    'gkd_seq2seq',
  ]
  trainer = Trainer(tiny())
  assert list(trainer.state.models) == ['policy']
  assert len(jax.tree.leaves(trainer.state.optimizer)) >= 2 * len(
    jax.tree.leaves(trainer.state.models)
  )


def test_no_page_of_the_step_names_an_objective():
  """They know what an objective is (objectives/objective.py); which there are, only the config's
  list knows.
  """
  files = [ROOT / 'train.py', ROOT / 'plan.py', ROOT / 'parallel' / 'pipeline.py']
  files += [
    path
    for path in (ROOT / 'training').glob('*.py')
    if path.stem not in ('config', 'overrides', 'reference')
  ]
  files += [*(ROOT / 'workdir').glob('*.py'), *(ROOT / 'objectives').glob('pipelined.py')]
  of_rollouts = ('actor', 'judges', 'rollout', 'rollout_rows')
  rollouts = {f'objectives.{name}' for name in of_rollouts}
  for path in files:
    allowed = {'objectives.objective'} | (rollouts if path.name == 'rollouts.py' else set())
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.ImportFrom):
        names = [
          f'{node.module}.{alias.name}' if node.module == 'objectives' else node.module
          for alias in node.names
        ]
      elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      met = {name for name in names if name.split('.')[0] == 'objectives'}
      assert met <= allowed, f'{path}: {met}'
    text = path.read_text()
    # What is drawn and shown has names of its own, one of which is a metric's.
    metrics = {'reward'} if path.name in ('curves.py', 'watch.py', 'bar.py') else set()
    assert not [kind for kind in kinds.KINDS.keys() - metrics if f"'{kind}'" in text], path


@pytest.mark.slow
@pytest.mark.parametrize('adapter', [{}, {'kind': 'lora', 'rank': 2}], ids=['whole', 'lora'])
def test_a_reference_is_the_policy_as_it_began(adapter, one_device):
  """Their scores are the same at first, and ln 2 the loss of every pair; under an adapter the
  reference is the base itself, without a copy.
  """
  config = dataclasses.replace(
    toy(), objective=Toy(reference='begun'), adapter=AdapterConfig(**adapter)
  )
  run, batch = Run(config), pairs()[0]
  frozen = 'policy' if adapter else 'reference'
  begun = jax.tree.map(jnp.copy, run.state.models[frozen])
  assert ('reference' in run.state.models) == (not adapter)
  metrics, _ = run.go([batch])
  assert metrics['pairs'] == np.float32(math.log(2))
  metrics, _ = run.go([batch])
  assert abs(metrics['pairs'] - math.log(2)) > 1e-3
  assert_same(run.state.models[frozen], begun)
  check_models(config)
  alone = flops_per_token(dataclasses.replace(config, objective=NextToken()))
  forward = NextToken().forward_flops(config.model, config.data, None)
  assert flops_per_token(config) == alone + forward


# A run with a reference, from its beginning to its end.


@pytest.mark.slow
def test_a_record_that_devices_would_cut_apart_is_refused():
  with pytest.raises(ValueError, match='8 rows over 8 devices.*records of 2 rows apart.*of 16, or'):
    Run(toy(), 8).go(pairs()[:1])


@pytest.fixture(scope='module')
def base(two_steps, tmp_path_factory):
  """A run whose model a policy begins with, and a reference is."""
  return shutil.copytree(two_steps, tmp_path_factory.mktemp('begun') / 'base')


@pytest.fixture
def registered(monkeypatch):
  monkeypatch.setitem(kinds.KINDS, 'toy', 'toy.Toy')


def with_reference(corpus, base, steps=4, **parts):
  # A pair of rows on each device.
  mesh = {'data': 4, 'tensor': 2}
  config = on(corpus, **{'train': {'steps': steps, 'save_every': 2}, 'mesh': mesh} | parts)
  return dataclasses.replace(config, objective=Toy(reference=str(base)), init=str(base))


def leaves_of(directory, step):
  record = Checkpoints(directory).record(step)
  target = {
    name: jax.ShapeDtypeStruct(
      tuple(shape), dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    for name, (shape, dtype) in record['leaves'].items()
  }
  restored = Checkpoints(directory).restore(step, target)
  return record, {name: np.asarray(x) for name, x in restored.items()}


@pytest.mark.slow
def test_resumed_is_uninterrupted_with_a_frozen_reference(corpus, base, registered, tmp_path):
  run_here(with_reference(corpus, base), tmp_path / 'whole')
  run_here(with_reference(corpus, base, 2), tmp_path / 'again')
  run_here(with_reference(corpus, base), tmp_path / 'again')
  record, whole = leaves_of(tmp_path / 'whole', 4)
  _, again = leaves_of(tmp_path / 'again', 4)
  assert_same(whole, again)
  # The reference is not in the checkpoint but by name.
  assert not [name for name in whole if 'reference' in name]
  assert record['references'] == {'reference': Checkpoints(base).reference(2)} and record[
    'references'
  ]['reference']['directory'] == str(base)
  assert configs.load(tmp_path / 'whole').objective == Toy(reference=str(base))


@pytest.mark.slow
def test_another_reference_is_refused(corpus, base, registered, tmp_path):
  shutil.copytree(base, tmp_path / 'base')
  run_here(with_reference(corpus, tmp_path / 'base', 2), tmp_path / 'run')
  for path in (tmp_path / 'base' / 'checkpoints').iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  run_here(
    on(corpus, train={'steps': 2, 'save_every': 2, 'seed': 5}), tmp_path / 'base', allow_change=True
  )
  with pytest.raises(
    SystemExit, match=r'(?s)checkpoint 2 in .*base, which is not what it was: its digest was'
  ):
    run_here(with_reference(corpus, tmp_path / 'base'), tmp_path / 'run')
  shutil.rmtree(tmp_path / 'base' / 'checkpoints')
  with pytest.raises(SystemExit, match='Bring it back; where it was moved, say where it is'):
    run_here(with_reference(corpus, tmp_path / 'base'), tmp_path / 'run')


@pytest.mark.slow
def test_a_checkpoint_of_before_models_had_names_is_read_bit_for_bit(tmp_path):
  """Its leaves were `model.NAME`, and `optimizer.*.NAME` without a model's."""
  trainer = Trainer(tiny())
  trainer.run(make_batches(1))
  state = trainer.state
  with jax.set_mesh(trainer.mesh):
    optimizer = make_optimizer(trainer.config.optimizer, 6, params.specs(state.models['policy']))
    bare = jax.eval_shape(optimizer.init, state.models['policy'])
    former = {
      'step': state.step,
      'model': state.models['policy'],
      'optimizer': jax.tree.unflatten(jax.tree.structure(bare), jax.tree.leaves(state.optimizer)),
      'scale': state.scale,
      'key': state.key,
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, former, {}, {}, donated=False)
    checkpoints.wait()
    names = set(checkpoints.record(1)['leaves'])
    assert 'optimizer.0.mu.head.tokens' in names and 'model.head.tokens' in names
    target = abstract(trainer.make_state, trainer.mesh)
    assert_same(checkpoints.restore(1, target), state)
    assert_same(checkpoints.model(target.models['policy']), state.models['policy'])


@pytest.mark.slow
def test_a_frozen_part_is_kept_where_it_came_from(corpus, base, registered, tmp_path):
  """A policy that trains its head only, on a base: the checkpoint holds the head, and opens as a
  whole.
  """
  config = with_reference(corpus, base, 2)
  config = dataclasses.replace(
    config, train=dataclasses.replace(config.train, trained=('policy.head.*',))
  )
  run_here(config, tmp_path / 'run')
  record, kept = leaves_of(tmp_path / 'run', 2)
  assert [name for name in kept if name.startswith('models.')] == ['models.policy.head.tokens']
  assert set(record['references']) == {'policy', 'reference'}
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    target = abstract(functools.partial(transformer.init, configs.load(base).model, 0), mesh)
    opened = host(Checkpoints(tmp_path / 'run').model(target))
    begun = host(Checkpoints(base).model(target))
  moved = {name for name in begun if begun[name].tobytes() != opened[name].tobytes()}
  assert len(moved) == 1 and '.head' in moved.pop()
  run_here(
    dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3)), tmp_path / 'run'
  )


@pytest.mark.slow
@pytest.mark.parametrize('stored', ['', 'bfloat16', 'int8'])
def test_what_is_frozen_and_equal_is_in_memory_once(corpus, base, stored, one_device):
  config = with_reference(corpus, base)
  config = dataclasses.replace(
    config,
    model=configs.load(base).model,
    objective=Toy(reference=str(base), stored=stored),
    train=dataclasses.replace(config.train, frozen=('policy.stack.*',)),
  )
  models, frozen = begin(config, lambda _: None)
  make_state, step = make_program(config)
  state = begin_state(config, make_state, jax.eval_shape(make_state), models)
  policy, reference = (
    state.models[name].stack.blocks[0].attention.q for name in ('policy', 'reference')
  )
  if stored:
    assert {'bfloat16': 'bfloat16', 'int8': 'int8'}[stored] in {
      str(x.dtype) for x in jax.tree.leaves(reference)
    }
  else:
    assert policy[...].unsafe_buffer_pointer() == reference[...].unsafe_buffer_pointer()
  if stored != 'int8':
    head, other = (state.models[name].head.tokens[...] for name in ('policy', 'reference'))
    assert head.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
  batch = jax.device_put(pairs()[0], jax.NamedSharding(one_device, axes.spec('batch', 'length')))
  before = host(state.models['reference'])
  state, metrics, _ = step(state, batch)
  assert math.isfinite(metrics['loss'])
  after = host(state.models['reference'])
  assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_arrays_of_a_batch_without_a_length_are_split_by_rows():
  mesh = make_mesh(MeshConfig(data=2, context=2), jax.devices()[:4])
  with jax.set_mesh(mesh):
    put = hosts.RowShards(jax.NamedSharding(mesh, axes.spec('batch', 'length')), (4, 6))
  given = {'tokens': np.arange(24).reshape(4, 6), 'score': np.arange(4.0), 'k': np.ones((4, 3))}
  placed = put(given)
  assert_same(placed, jax.tree.map(jnp.asarray, given))
  shards = {name: x.sharding.shard_shape(x.shape) for name, x in placed.items()}
  assert shards == {'tokens': (2, 3), 'score': (2,), 'k': (2, 3)}
