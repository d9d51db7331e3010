"""Are training's laws kept? Meshes, optimizers, skipped steps and stops change nothing they should
not; resumed is uninterrupted.
"""

import dataclasses
import itertools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import files
from data.config import SourceConfig, TokenizerConfig
from kernels import flash_gpu, mosaic_gpu_compat
from kernels.blocks import Blocks
from model.config import ModelConfig, MoEConfig
from model.execution import ExecutionConfig
from model.params import abstract, named_leaves
from tests.training.conftest import (
  Trainer,
  assert_close,
  assert_same,
  host,
  initial_model,
  make_batches,
  on,
  quickly,
  run_here,
  tiny,
)
from training import config as configs, overrides
from training.optimizer import OPTIMIZERS, make_schedule
from workdir.checkpoint import Checkpoints
from workdir.metrics import read_metrics
from workdir.seals import FACTS

BATCHES = make_batches(3)
MESHES = (
  {'data': 2, 'fsdp': 4},
  {'stage': 2, 'fsdp': 2, 'tensor': 2},
  *(
    pytest.param(mesh, marks=pytest.mark.slow)
    for mesh in (
      {'data': 8},
      {'fsdp': 8},
      {'data': 4, 'tensor': 2},
      {'data': 1, 'fsdp': 2, 'context': 4},
    )
  ),
)


def trained(devices=1, **parts):
  trainer = Trainer(tiny(**parts), devices)
  return trainer, trainer.run(BATCHES)


@pytest.fixture(scope='module')
def alone():
  return trained()


def assert_equivalent(a, b, learning_rate=0.01, steps=3):
  """Equal but for the order of f32 sums. Adam and its kin divide by a gradient's own size, so where
  a gradient is all rounding error, so is the update: such elements are few, and no step moves one
  further than a few learning rates.
  """
  a, b = host(a), host(b)
  assert a.keys() == b.keys()
  apart = np.concatenate([np.abs(a[name] - b[name]).ravel() for name in a])
  assert apart.max() <= 2 * learning_rate * steps
  assert (apart > 2e-6).mean() < 2e-3


@pytest.mark.costly
@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_eight_devices_are_one(alone, mesh):
  trainer, metrics = trained(8, mesh=mesh)
  assert_equivalent(trainer.state.models['policy'], alone[0].state.models['policy'])
  for a, b in zip(metrics, alone[1], strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
  split = [x for x in jax.tree.leaves(trainer.state) if not x.is_fully_replicated]
  assert split or mesh == {'data': 8}


@pytest.mark.slow
@pytest.mark.parametrize(
  'mesh, remat',
  [({'data': 1}, 'full'), ({'fsdp': 2, 'tensor': 2, 'context': 2, 'data': 1}, 'none')],
  ids=str,
)
def test_training_with_the_tpu_kernels_is_training(alone, mesh, remat):
  """Interpreted, forward and backward, in packed rows; split and recomputed as well."""
  trainer, metrics = trained(
    math.prod(mesh.values()),
    mesh=mesh,
    model={'execution': ExecutionConfig(attention='pallas_tpu', remat=remat)},
  )
  assert_equivalent(trainer.state.models['policy'], alone[0].state.models['policy'])
  np.testing.assert_allclose([m['loss'] for m in metrics], [m['loss'] for m in alone[1]], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
  mosaic_gpu_compat.INTERPRETER is None,
  reason=f'jax {jax.__version__} cannot interpret kernels of Mosaic GPU; 0.12 can',
)
@pytest.mark.parametrize('blocks', [{}, {'attention_blocks': Blocks(forward_keys=64)}], ids=str)
def test_training_with_the_gpu_kernels_is_training(blocks, monkeypatch):
  """Interpreted, in packed rows, of 16 bits, which is all that they multiply: as near to the oracle
  in f32 as the oracle in 16 bits is.
  """
  monkeypatch.setattr(flash_gpu, '_processors', lambda: 3)
  runs = {
    name: trained(model=fields)
    for name, fields in (
      ('exact', {'execution': ExecutionConfig(attention='reference')}),
      ('oracle', {'execution': ExecutionConfig(attention='reference', dtype='bfloat16')}),
      (
        'ours',
        {'execution': ExecutionConfig(attention='pallas_gpu', dtype='bfloat16', **blocks)},
      ),
    )
  }
  found = {
    name: np.concatenate([x.ravel() for x in host(trainer.state.models['policy']).values()])
    for name, (trainer, _) in runs.items()
  }
  began = np.concatenate([x.ravel() for x in initial_model(tiny().model, tiny().train.seed)])

  def error(x):
    return np.sqrt(np.square(found[x].astype(np.float64) - found['exact']).mean())

  assert (
    error('ours') <= 1.1 * error('oracle') < 0.2 * np.sqrt(np.square(found['exact'] - began).mean())
  )
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(
      *([m[name] for m in runs[run][1]] for run in ('ours', 'oracle')),
      rtol=1e-2 if name == 'grad_norm' else 1e-3,
    )


@pytest.mark.slow
def test_initial_parameters_do_not_depend_on_the_mesh(alone):
  trainer = Trainer(tiny(mesh={'fsdp': 4, 'data': 2}), 8)
  with jax.set_mesh(trainer.mesh):
    born = quickly(jax.jit(trainer.make_state))()
  assert_close(born, Trainer(tiny()).state, 1e-7)
  for x, like in zip(jax.tree.leaves(born), jax.tree.leaves(trainer.state), strict=True):
    assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


def test_the_states_buffers_are_reused(alone):
  trainer, _ = alone
  state = sum(x.nbytes for x in jax.tree.leaves(trainer.state))
  assert trainer.compiled.memory_analysis().alias_size_in_bytes >= state
  before = trainer.state
  trainer.step(BATCHES[0])
  assert all(x.is_deleted() for x in jax.tree.leaves(before))


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [pytest.param(name, marks=() if name == 'muon' else pytest.mark.slow) for name in OPTIMIZERS],
)
def test_every_optimizer_on_a_mesh_is_itself_alone_and_survives_a_checkpoint(name, tmp_path):
  """AdamW is above too; Muon, which moves whole layers between devices, is tried each time."""
  alone, _ = trained(optimizer={'name': name})
  trainer, metrics = trained(8, optimizer={'name': name}, mesh={'fsdp': 8})
  assert_equivalent(trainer.state.models['policy'], alone.state.models['policy'])
  assert all(math.isfinite(step['grad_norm']) for step in metrics)
  checkpoints = Checkpoints(tmp_path, log=pytest.fail)
  with jax.set_mesh(trainer.mesh):
    checkpoints.save(3, trainer.state, {}, {})
    checkpoints.wait()
    restored = checkpoints.restore(3, abstract(trainer.make_state, trainer.mesh))
  assert_same(restored, trainer.state)
  trainer.run(BATCHES[:1])
  again = trainer.state
  trainer.state = restored
  trainer.run(BATCHES[:1])
  assert_same(trainer.state, again)


@pytest.mark.slow
def test_f16_overflow_is_skipped_and_halves_the_scale():
  trainer = Trainer(
    tiny(
      model={'execution': ExecutionConfig(dtype='float16')},
      optimizer={'schedule': 'linear'},
      train={'steps': 40},
    )
  )
  largest = jax.device_put(
    jnp.float32(2.0**24), trainer.state.scale.scale.sharding
  )  # more than the gradients can take
  trainer.state = dataclasses.replace(
    trainer.state, scale=dataclasses.replace(trainer.state.scale, scale=largest)
  )
  kept = host(trainer.state)
  metrics, _ = trainer.step(BATCHES[0])
  after = host(trainer.state)
  changed = {name for name in kept if kept[name].tobytes() != after[name].tobytes()}
  assert changed == {'.step', '.scale.scale', '.scale.skipped_steps'}
  assert (after['.scale.scale'], after['.scale.skipped_steps'], after['.step']) == (2.0**23, 1, 1)
  assert metrics['loss_scale'] == 2.0**24 and not math.isfinite(metrics['grad_norm'])
  assert math.isfinite(metrics['loss'])
  seen = trainer.run(BATCHES[:1] * 14)
  skipped = int(trainer.state.scale.skipped_steps)
  assert skipped < 15
  assert seen[-1]['loss'] < metrics['loss']
  # The schedule advances with updates, not with attempts, and what is logged is what is applied.
  applied = jax.tree.leaves(trainer.state.optimizer)[-1]
  assert applied == 15 - skipped
  at = make_schedule(trainer.config.optimizer, trainer.config.train.steps)
  np.testing.assert_allclose(seen[-1]['learning_rate'], at(applied - 1), rtol=1e-6)


EXPERTS = dataclasses.replace(
  tiny().model.moe,
  experts=4,
  feed_forward=16,
  first=1,
  router='sigmoid',
  selection_bias=True,
  bias_rate=0.01,
  balance_loss=0.1,
  z_loss=0.01,
)


@pytest.mark.slow
def test_experts_are_balanced_and_reported():
  """On a mesh with microbatches as alone; the bias moves by the loads of the whole batch, and the
  optimizer leaves it alone.
  """
  model, sgd = {'moe': EXPERTS, 'layers': 3}, {'name': 'sgd', 'learning_rate': 0.5}
  alone, mesh = Trainer(tiny(model=model, optimizer=sgd)), {'data': 2, 'fsdp': 2, 'tensor': 2}
  many = Trainer(tiny(model=model, optimizer=sgd, mesh=mesh, train={'accumulation': 2}), 8)
  for batch in BATCHES:
    (one, _), (other, _) = alone.step(batch), many.step(batch)
    for name in one:
      np.testing.assert_allclose(one[name], other[name], rtol=1e-5, err_msg=name)
    assert (
      one['dropped'] == 0
      and one['expert_load'].shape == (4,)
      and one['expert_load'].sum() == pytest.approx(4)
    )
    assert (
      one['expert_load_max'] >= one['expert_load'].max()
      and one['balance_loss'] > 0
      and one['router_z_loss'] > 0
    )
  assert_close(alone.state.models['policy'], many.state.models['policy'], 1e-6)
  bias = np.array(alone.state.models['policy'].stack.blocks[1].feed_forward.selection_bias[...])
  assert bias.shape == (2, 4) and (bias != 0).any() and (np.abs(bias) < 0.031).all()
  np.testing.assert_allclose(
    bias / 0.01, np.round(bias / 0.01), atol=1e-5
  )  # whole steps of the rate, up or down


SPLIT = MoEConfig(
  experts=8,
  feed_forward=32,
  shared_feed_forward=16,
  router='sigmoid',
  groups=4,
  groups_per_token=2,
  selection_bias=True,
  bias_rate=0.01,
  balance_loss=0.1,
  z_loss=0.01,
  capacity_factor=0.5,
)


@pytest.fixture(scope='module')
def split_alone():
  return trained(model={'moe': SPLIT})


@pytest.mark.parametrize(
  'mesh',
  [{'fsdp': 2, 'expert': 2, 'tensor': 2}]
  + [
    pytest.param(mesh, marks=pytest.mark.slow)
    for mesh in (
      {'data': 2, 'expert': 4},
      {'expert': 8},
      {'fsdp': 2, 'expert': 4},
      {'expert': 4, 'tensor': 2},
    )
  ],
  ids=str,
)
@pytest.mark.slow
@pytest.mark.long
def test_experts_on_eight_devices_are_those_of_one(split_alone, mesh):
  """Three steps with everything recomputed; the bias that balances the load moves alike, too."""
  trainer, metrics = trained(
    8, mesh=mesh, model={'moe': SPLIT, 'execution': ExecutionConfig(remat='full')}
  )
  assert_equivalent(trainer.state.models['policy'], split_alone[0].state.models['policy'])
  for a, b in zip(metrics, split_alone[1], strict=True):
    for name in b:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)
  bias = trainer.state.models['policy'].stack.blocks[0].feed_forward.selection_bias[...]
  assert np.abs(np.asarray(bias)).max() > 0.005


# Whole runs, on all eight devices.


def state_of(workdir, step):
  """The arrays of a checkpoint, on the host."""
  import orbax.checkpoint as ocp

  checkpoints = Checkpoints(workdir, log=pytest.fail)
  assert not checkpoints.problems(step)
  request = dict.fromkeys(checkpoints.record(step)['leaves'], 0)
  with ocp.PyTreeCheckpointer() as reader:
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), request)
    return reader.restore(
      checkpoints._path(step), args=ocp.args.PyTreeRestore(item=request, restore_args=arguments)
    )


@pytest.fixture(scope='module')
def straight(corpus, tmp_path_factory):
  """A run of six steps without interruption: its directory."""
  workdir = tmp_path_factory.mktemp('straight')
  run_here(on(corpus), workdir)
  return workdir


def steps_logged(workdir):
  return [
    line['step'] for line in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  ]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(straight, corpus, tmp_path, capsys):
  """Three starts, with more steps each; the second one is before its checkpoint's last lines of
  metrics.
  """
  for steps, checkpoint in ((2, None), (4, 2), (6, 4)):
    run_here(on(corpus, train={'steps': steps}), tmp_path)
    said = capsys.readouterr().out
    assert (f'going on from checkpoint {checkpoint}' in said) == bool(checkpoint)
    assert 'learning rate' not in said, 'a constant schedule has no length'
    with open(tmp_path / 'metrics.jsonl', 'a') as file:  # as if it had been killed further on
      file.write(json.dumps({'step': steps + 1, 'loss': 0.0}) + '\n')
  (tmp_path / 'metrics.jsonl').write_text(
    '\n'.join((tmp_path / 'metrics.jsonl').read_text().splitlines()[:-1]) + '\n'
  )
  assert_same(state_of(tmp_path, 6), state_of(straight, 6))
  assert Checkpoints(tmp_path).record(6)['data'] == Checkpoints(straight).record(6)['data']
  assert steps_logged(tmp_path) == steps_logged(straight) == [1, 2, 3, 4, 5, 6]

  def losses(workdir):
    return [line['loss'] for line in read_metrics(workdir / 'metrics.jsonl')]

  assert losses(tmp_path) == losses(straight)


@pytest.mark.slow
def test_what_changed_at_a_resume_is_said_and_a_jump_of_the_rate_warned_of(
  corpus, tmp_path, capsys
):
  cosine = {'optimizer': {'schedule': 'cosine'}}
  run_here(on(corpus, **cosine, train={'steps': 2}), tmp_path)
  # The last config is that of the checkpoint, not that of a run which never came to one.
  configs.save(on(corpus, **cosine, train={'steps': 4}), tmp_path)
  capsys.readouterr()
  run_here(on(corpus, **cosine, train={'steps': 4, 'log_every': 2}), tmp_path)
  said = capsys.readouterr().out
  assert (
    'changed since checkpoint 2: train.log_every: 1 -> 2; train.steps: 2 -> 4\n'
    'learning rate of step 3: 0.0055, before the change 0.001\n'
    'WARNING: the learning rate jumps here, to 5.5 times what it was to be'
  ) in said
  lines = read_metrics(tmp_path / 'metrics.jsonl')
  run_here(on(corpus, train={'steps': 5}, optimizer={'learning_rate': 0.001}), tmp_path)
  said = capsys.readouterr().out
  assert "optimizer.schedule: 'cosine' -> 'constant'" in said and 'before the change' not in said
  assert 'jumps' not in said and len(lines) == 3


@pytest.mark.slow
def test_tokens_of_a_run_are_those_that_are_no_padding(corpus, tmp_path):
  """Counted on the host, in the batches that the run read: what rates, MFU and the report say."""
  texts = ['a' * (3 + i % 9) + f' {i}' for i in range(200)]
  source = tmp_path / 'short.jsonl'
  source.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  sources = (SourceConfig(kind='jsonl', path=str(source), text_field='text'),)
  config = on(corpus, data={'sources': sources}, train={'steps': 3}, mesh={'fsdp': 4, 'context': 2})
  run_here(config, tmp_path / 'run')
  config = configs.load(tmp_path / 'run')
  prepared = config.objective.read(config.data, lambda _: None)
  batches = config.objective.batches(prepared, config.data, range(config.data.batch_size))
  real = [int((batches.take(None).segments > 0).sum()) for _ in range(3)]
  assert sum(real) < 0.9 * 3 * 8 * 16, 'or this test says nothing'
  lines = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  assert [line['tokens'] for line in lines] == list(itertools.accumulate(real))
  assert lines[1]['tokens_per_second'] * lines[1]['step_seconds'] == pytest.approx(real[1])


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(straight, corpus, tmp_path):
  run_here(on(corpus, train={'steps': 4}), tmp_path)
  run_here(on(corpus, mesh={'data': 2, 'fsdp': 4}), tmp_path)
  a, b = state_of(tmp_path, 6), state_of(straight, 6)
  assert_equivalent(
    {name: x for name, x in a.items() if name.startswith('models.policy.')},
    {name: x for name, x in b.items() if name.startswith('models.policy.')},
    steps=2,
  )
  assert Checkpoints(tmp_path).record(6)['data'] == Checkpoints(straight).record(6)['data']


def begun(config):
  """The config with what it takes from the run at config.init, as the flag --config makes it."""
  return dataclasses.replace(config, **overrides._begun(config, config.init))


@pytest.mark.slow
def test_a_run_begins_with_another_runs_parameters_and_tokenizer(
  straight, corpus, tmp_path, capsys
):
  """Taken as they are, and as an import leaves them: the model alone, at step 0 of the run's own
  directory.
  """
  still = {'optimizer': {'learning_rate': 1e-30}, 'train': {'steps': 1, 'save_every': 1}}
  begin = dataclasses.replace(
    on(corpus, **still),
    init=str(straight),
    model=ModelConfig(execution=ExecutionConfig(remat='full')),
  )
  begin = dataclasses.replace(
    begin, data=dataclasses.replace(begin.data, tokenizer=TokenizerConfig())
  )
  run_here(begun(begin), tmp_path / 'new')
  assert f'beginning with the parameters of {straight}' in capsys.readouterr().out
  saved = configs.load(tmp_path / 'new')
  assert (
    saved.model == configs.load(straight).model.with_execution(remat='full')
    and saved.data.tokenizer.kind == 'byte'
  )

  def ours(workdir, step):
    return {
      name: x for name, x in state_of(workdir, step).items() if name.startswith('models.policy.')
    }

  assert_same(ours(tmp_path / 'new', 1), ours(straight, 6))

  trainer = Trainer(on(corpus, **still))
  imported = Checkpoints(tmp_path / 'imported')
  imported.save(0, {'model': trainer.state.models['policy']}, {}, {})
  imported.wait()
  run_here(on(corpus, **still), tmp_path / 'imported')
  assert f'beginning with the parameters of {tmp_path / "imported"}' in capsys.readouterr().out
  assert_same(
    ours(tmp_path / 'imported', 1),
    {
      f'models.policy.{name}': np.asarray(x)
      for name, x in named_leaves(trainer.state.models['policy']).items()
    },
  )
  with pytest.raises(FileNotFoundError, match='nowhere is not the directory of a run'):
    begun(dataclasses.replace(begin, init=str(tmp_path / 'nowhere')))
  wrong = dataclasses.replace(begin, model=ModelConfig(width=64))
  with pytest.raises(SystemExit, match=r'(?s)does not fit the config.*in the checkpoint'):
    run_here(begun(wrong), tmp_path / 'other')


@pytest.mark.slow
def test_what_was_kept_in_bf16_is_trained_in_f32(corpus, tmp_path, capsys):
  """At a small rate bf16 loses nine of ten updates, and all of norms, whose scales are near 1."""
  half = ModelConfig(execution=ExecutionConfig(parameter_dtype='bfloat16'))
  base = on(corpus, train={'steps': 1})
  base = dataclasses.replace(
    base, model=base.model.with_execution(parameter_dtype='bfloat16', dtype='bfloat16')
  )
  run_here(base, tmp_path / 'base')
  capsys.readouterr()
  small = {'optimizer': {'learning_rate': 2e-5}, 'train': {'steps': 2, 'save_every': 1}}
  begin = dataclasses.replace(on(corpus, **small), init=str(tmp_path / 'base'), model=ModelConfig())
  data = dataclasses.replace(begin.data, tokenizer=TokenizerConfig())
  begin = dataclasses.replace(begin, data=data)
  before = state_of(tmp_path / 'base', 1)

  def moved(model, workdir):
    run_here(begun(dataclasses.replace(begin, model=model)), workdir)
    after = {
      name: x for name, x in state_of(workdir, 2).items() if name.startswith('models.policy.')
    }
    shares = {
      name: float((x.astype(np.float32) != before[name].astype(np.float32)).mean())
      for name, x in after.items()
    }
    return {str(x.dtype) for x in after.values()}, shares

  types, shares = moved(ModelConfig(), tmp_path / 'tuned')
  norms = [name for name in shares if 'norm' in name]
  assert (
    types == {'float32'} and configs.load(tmp_path / 'tuned').model.execution.dtype == 'bfloat16'
  )
  assert norms and all(shares[name] > 0.9 for name in norms)
  # What is asked for holds.
  assert 'of the entries trained' not in capsys.readouterr().out
  types, lost = moved(half, tmp_path / 'lost')
  out = capsys.readouterr().out
  (said,) = re.findall(r'step 1 moved ([\d.]+)% of the entries trained in bfloat16', out)
  pairs = [
    (x, before[name])
    for name, x in state_of(tmp_path / 'lost', 1).items()
    if name.startswith('models.policy.')
  ]
  share = sum((x != old).sum() for x, old in pairs) / sum(x.size for x, _ in pairs)
  # A sample: one device's part.
  assert 0 < share < 0.5 and abs(float(said) / 100 - share) < 0.03
  assert types == {'bfloat16'} and all(lost[name] == 0 for name in norms)


@pytest.mark.slow
def test_a_run_goes_on_though_what_it_began_with_has_moved(corpus, tmp_path, monkeypatch, capsys):
  """It has model and tokenizer of its own, and on the command line stands still where it began."""
  base, workdir = tmp_path / 'base', tmp_path / 'run'
  run_here(on(corpus, train={'steps': 1}), base)
  begin = dataclasses.replace(
    on(corpus), init=str(base), model=ModelConfig(execution=ExecutionConfig(remat='full'))
  )
  data = dataclasses.replace(begin.data, tokenizer=TokenizerConfig())
  begin = dataclasses.replace(begin, data=data)
  monkeypatch.setattr(sys, 'argv', ['train.py', f'--workdir={workdir}'])

  def resume(steps):
    config = dataclasses.replace(begin, train=dataclasses.replace(begin.train, steps=steps))
    parts = overrides._begun(config, config.init, overrides._taken_over(config.init))
    run_here(dataclasses.replace(config, **parts), workdir)

  resume(2)
  base.rename(tmp_path / 'moved')
  capsys.readouterr()
  resume(4)
  assert 'going on from checkpoint 2' in capsys.readouterr().out
  assert steps_logged(workdir) == [1, 2, 3, 4]
  monkeypatch.setattr(sys, 'argv', ['train.py', f'--workdir={tmp_path / "other"}'])
  with pytest.raises(FileNotFoundError, match='base is not the directory of a run'):
    resume(4)


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_do_but_its_report(straight, corpus, capsys):
  # As 64 others left it, which are not here.
  facts = json.loads((straight / FACTS).read_text())
  facts.pop(files.SEAL)
  theirs = files.sealed(facts | {'chips': 64, 'hardware': 'TPU v9'})
  (straight / FACTS).write_text(json.dumps(theirs))
  (straight / 'report.md').unlink()
  before = sorted(path.name for path in (straight / 'checkpoints').iterdir())
  run_here(on(corpus), straight)
  assert (
    'nothing to do: checkpoint 6 has reached train.steps=6; raise it' in capsys.readouterr().out
  )
  assert '64 x TPU v9' in (straight / 'report.md').read_text()
  assert sorted(path.name for path in (straight / 'checkpoints').iterdir()) == before


def test_another_model_or_data_order_is_refused_and_the_run_stays_as_it_is(straight, corpus):
  kept = {path: path.read_bytes() for path in straight.rglob('*') if path.is_file()}
  # Without the corpus, which is not looked at for this.
  gone = (SourceConfig(kind='text', path='gone'),)
  with pytest.raises(SystemExit, match='model.width: 32 -> 64'):
    run_here(on(corpus, model={'width': 64, 'vocabulary': 0}, data={'sources': gone}), straight)
  other = on(corpus, model={'width': 64}, data={'seed': 1}, train={'steps': 9})
  with pytest.raises(
    SystemExit, match=r'(?s)data\.seed: 0 -> 1.*model\.width: 32 -> 64.*--allow_config_change'
  ):
    run_here(other, straight)
  # Allowed, but impossible: parameters of this shape are not there.
  with pytest.raises(
    SystemExit, match=r'(?s)checkpoint 6 .* does not fit the config.*models\.policy\.embedding'
  ):
    run_here(other, straight, allow_change=True)
  assert {path: path.read_bytes() for path in straight.rglob('*') if path.is_file()} == kept


@pytest.mark.slow
def test_an_allowed_change_of_the_data_starts_the_new_order_loudly(corpus, tmp_path, capsys):
  run_here(on(corpus, train={'steps': 2}), tmp_path)
  other = on(corpus, data={'seed': 1}, train={'steps': 4})
  with pytest.raises(SystemExit, match='data.seed: 0 -> 1'):
    run_here(other, tmp_path)
  capsys.readouterr()
  run_here(other, tmp_path, allow_change=True)
  said = capsys.readouterr().out
  assert (
    'WARNING: the data order has changed' in said
    and 'the new order starts at its beginning' in said
  )
  record = Checkpoints(tmp_path).record(4)['data']
  assert (record['seed'], record['examples']) == (1, 2 * 8)


EXPLODING = {'optimizer': {'name': 'sgd', 'learning_rate': 1e37, 'clip_norm': 0.0}}


@pytest.mark.slow
def test_a_step_that_is_not_finite_stops_the_run_or_is_skipped(corpus, tmp_path):
  with pytest.raises(FloatingPointError) as error:
    run_here(on(corpus, **EXPLODING, train={'save_every': 1}), tmp_path / 'stop')
  said = str(error.value)
  for part in (
    'step 2: loss',
    'Gradient norm by module: ',
    ' embedding nan',
    'stack.blocks.0.attention.q nan',
    'Not finite: [',
    'Last good checkpoint: checkpoint 1 in',
    'train.nonfinite=skip',
  ):
    assert part in said
  assert Checkpoints(tmp_path / 'stop').latest() == 1
  with pytest.raises(
    FloatingPointError, match='step 2: .*there is none yet'
  ):  # seen at once, not only where a save waits
    run_here(on(corpus, **EXPLODING, train={'save_every': 6}), tmp_path / 'at once')
  run_here(
    on(corpus, **EXPLODING, train={'save_every': 1, 'keep_last': 9, 'nonfinite': 'skip'}),
    tmp_path / 'skip',
  )
  assert steps_logged(tmp_path / 'skip') == [1, 2, 3, 4, 5, 6]
  last, first = state_of(tmp_path / 'skip', 6), state_of(tmp_path / 'skip', 1)
  assert last['scale.skipped_steps'] == 5
  assert {name for name in last if last[name].tobytes() != first[name].tobytes()} == {
    'step',
    'scale.good_steps',
    'scale.skipped_steps',
  }


@pytest.mark.slow
def test_training_stops_when_patience_ends_and_stays_stopped(corpus, tmp_path, capsys):
  stuck = {
    'optimizer': {'learning_rate': 1e-30},
    'train': {'eval_every': 1, 'eval_batches': 1, 'patience': 2, 'keep_last': 1},
  }
  run_here(on(corpus, **stuck), tmp_path)
  said = capsys.readouterr().out
  assert (
    'stopped after step 3: train.patience=2: no better validation loss in 2 evaluations' in said
    and 'same command' not in said
  )
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.steps() == [1, 3] and checkpoints.best() == 1
  assert checkpoints.record(3)['progress']['waited'] == 2
  lines = read_metrics(tmp_path / 'metrics.jsonl')
  assert (
    lines[-1]['step'] == 3
    and 'gzip_bits_per_byte' in lines[-1]
    and 'gzip_bits_per_byte' not in lines[-2]
  )
  assert (tmp_path / 'report.md').exists()
  run_here(on(corpus, **stuck), tmp_path)
  assert 'nothing to do: checkpoint 3 has reached train.patience=2' in capsys.readouterr().out
  assert checkpoints.steps() == [1, 3]


def test_the_checkpoint_holds_the_names_that_the_state_has(straight):
  record = Checkpoints(straight).record(6)
  assert set(record['leaves']) == set(named_leaves(Trainer(on(straight)).state))
