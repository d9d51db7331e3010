"""Is a reference that was asked once what one is that is held in every step, for every row, and is
nothing read in its place?
"""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objective import Run, leaves_of

import files
import names
from data import cache
from data.config import SourceConfig
from data.said import Said
from data.tokenizers import ByteTokenizer
from model import transformer
from objectives import answers
from objectives.kto import KTO
from objectives.preference import Preference
from objectives.preference_seq2seq import KTOSeq2Seq, PreferenceSeq2Seq
from parallel import hosts
from tests.training import test_preference, test_preference_seq2seq
from tests.training.conftest import assert_close, assert_same, initial_model, quickly, run_here
from training import config as configs
from training.program import abstract_state, check_models
from training.spent import flops_per_token
from workdir.checkpoint import Checkpoints
from workdir.metrics import read_metrics
from workdir.said import opened
from workdir.untrained import write_run

GIVEN = [('a' * (n % 3), 'b' * (n % 4) + 'e', 'cd' * (n % 5 // 2)) for n in range(30)]
# Another source, of more and shorter answers.
OTHERS = [('f' * (n % 2), 'gh'[n % 2 :], 'i' * (n % 3)) for n in range(1, 19)]
KINDS = {
  'preference': Preference(beta=0.7, sft=0.3),
  'kto': KTO(beta=0.7),
  'kto_seq2seq': KTOSeq2Seq(target_length=24, beta=0.7),
  'preference_seq2seq': PreferenceSeq2Seq(target_length=24, beta=0.7),
}
SLOW = pytest.mark.slow


def silent(line):
  pass


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """Two files of each form of records."""
  directory = tmp_path_factory.mktemp('stored')
  found = {}
  for form in ('preference', 'judged'):
    found[form] = []
    for i, given in enumerate((GIVEN, OTHERS)):
      if form == 'preference':
        rows = [{'prompt': p + 'q', 'chosen': c, 'rejected': r + 'x'} for p, c, r in given]
      else:
        rows = [{'prompt': p + 'q', 'completion': c, 'label': len(r) < 2} for p, c, r in given]
      path = directory / f'{form}{i}.jsonl'
      path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
      found[form].append(SourceConfig(kind='jsonl', path=str(path), format=form, weight=1.0 + i))
  return found


def config(sources, kind='preference', init='', adapter=None, data=None, **fields):
  """A run of two sources, in two microbatches."""
  form = 'judged' if 'kto' in kind else 'preference'
  first, second = sources[form]
  given = {'sources': (first, second), 'validation': (second, first)} | (data or {})
  if 'seq2seq' in kind:
    whole = test_preference_seq2seq.config(first, train={'accumulation': 2})
    whole = dataclasses.replace(whole, data=dataclasses.replace(whole.data, **given))
  else:
    whole = test_preference.config(
      first, adapter=adapter, data=given, train={'accumulation': 2, 'save_every': 1}
    )
  objective = dataclasses.replace(KINDS[kind], **fields)
  return dataclasses.replace(whole, objective=objective, init=str(init))


def written(directory, made, seed):
  """A run of this config's model, drawn by a seed, that nobody has trained."""
  made = dataclasses.replace(made, init='')
  ByteTokenizer().save(directory / 'tokenizer')
  shape = jax.eval_shape(lambda: transformer.init(made.model, seed))
  leaves = [*map(jnp.asarray, initial_model(made.model, seed))]
  model = jax.tree.unflatten(jax.tree.structure(shape), leaves)
  write_run(directory, made, {'model': model}, silent)
  return str(directory)


@pytest.fixture(scope='module')
def reference(sources, tmp_path_factory):
  """(kind) -> the directory of a reference, which is not what a policy begins as."""
  made = {}

  def of(kind):
    shape = 'seq2seq' if 'seq2seq' in kind else 'decoder'
    if shape not in made:
      made[shape] = written(tmp_path_factory.mktemp(shape), config(sources, kind), 11)
    return made[shape]

  return of


def completed(run, workdir, lines=None):
  """The data of a run, with what its objective asks for; and what makes arrays of its batches."""
  made = run.config
  with jax.set_mesh(run.mesh):
    prepared = made.objective.read(made.data, silent)
    if name := made.objective.completed_by:
      log = silent if lines is None else lines.append
      prepared = names.imported(name)(made, prepared, workdir, log)
  rows = jax.NamedSharding(run.mesh, jax.sharding.PartitionSpec())
  return prepared, hosts.RowShards(rows, (made.data.batch_size, made.data.sequence_length))


def every_batch(made, prepared):
  """Those of an epoch and more, and all that is held out."""
  rows = range(made.data.batch_size)
  loader = made.objective.batches(prepared, made.data, rows)
  trained = [loader.take(None) for _ in range(-(-2 * prepared.rows // len(rows)))]
  loader.close()
  return trained + list(made.objective.validation_batches(prepared, made.data, rows))


@pytest.fixture(scope='module')
def held(sources, reference):
  """(kind) -> a run that holds the reference, and one that asked it, whose policies are one."""
  made = {}

  def of(kind):
    if kind not in made:
      fields = {'reference': reference(kind)}
      live = Run(config(sources, kind, **fields))
      with jax.set_mesh(live.mesh):
        frozen, _ = opened(live.config, 'reference', silent)
      live.state = dataclasses.replace(live.state, models=live.state.models | {'reference': frozen})
      made[kind] = live, Run(config(sources, kind, **fields, stored_reference=True))
    return made[kind]

  return of


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('kind', [*KINDS][:1] + [pytest.param(k, marks=SLOW) for k in [*KINDS][1:]])
def test_what_is_stored_is_what_it_says_of_every_row(held, kind, tmp_path, monkeypatch):
  """In training and in what is held out; another row's, or another model's, is not."""
  live, run = held(kind)
  prepared, put = completed(run, tmp_path)
  assert len(prepared.train) == 2 and run.config.train.accumulation == 2
  model = live.state.models['reference']

  def says(model, batch):
    return answers.token_logprobs(model, batch, 1)[0]

  with jax.set_mesh(run.mesh):
    batches = every_batch(run.config, prepared)
    said = quickly(jax.jit(says), model, put(batches[0]))
    expected = [np.asarray(said(model, put(batch))) for batch in batches]
    other = [np.asarray(said(live.state.models['policy'], put(batch))) for batch in batches]
  assert any(batch.segments.max() > 2 for batch in batches), 'no row has several pairs'
  assert (batches[-1].segments[-1] == 0).all(), 'no batch ends in padding'

  def away(stored, laws):
    pairs = zip(stored, laws, strict=True)
    return max(np.abs(batch.reference - law).max() for batch, law in pairs)

  assert away(batches, expected) < 2e-6
  assert all((batch.reference != 0).sum() == (batch.weights != 0).sum() for batch in batches)
  # The faults that this is about.
  assert away(batches, other) > 0.01
  fill = Said.fill

  def next_row(self, index, batch, into):
    within = batch['rows'].weights[into] != 0
    # As many numbers as the row has, from where the next one's begin.
    first = self.ends[(index + 1) % (len(self.ends) - 1)]
    for field in self.fields:
      batch[field][into, within] = np.resize(self.arrays[field][first:], (within.sum(), 1))

  monkeypatch.setattr(Said, 'fill', next_row)
  assert away(every_batch(run.config, prepared), expected) > 0.01
  monkeypatch.setattr(Said, 'fill', fill)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('kind', [*KINDS][:1] + [pytest.param(k, marks=SLOW) for k in [*KINDS][1:]])
def test_a_step_is_that_of_a_reference_that_is_held(held, kind, tmp_path):
  """Its loss, its update and what is said of held-out answers; but for the divergence of laws."""
  found = []
  for run in held(kind):
    made = run.config
    prepared, put = completed(run, tmp_path)
    loader = made.objective.batches(prepared, made.data, range(made.data.batch_size))
    with jax.set_mesh(run.mesh):
      batch = put(loader.take(None))
      loader.close()
      state, metrics, _ = run.step(jax.tree.map(jnp.copy, run.state), batch)
      held_out = made.objective.validation_batches(prepared, made.data, put.rows)
      batch = put(next(iter(held_out)))
      judged = quickly(jax.jit(made.objective.judged), state.models, batch)
      verdict = made.objective.verdict(jax.device_get(judged(state.models, batch)), prepared)
    found.append((state.models, jax.device_get(metrics), verdict))
  (models, metrics, verdict), (stored_models, stored, stored_verdict) = found
  assert stored.keys() == metrics.keys() and list(stored_models) == ['policy']
  for name, value in metrics.items():
    tolerance = 1e-6 if name == 'loss' else 1e-5
    np.testing.assert_allclose(stored[name], value, tolerance, tolerance, err_msg=name)
  assert_close(stored_models['policy'], models['policy'], 5e-6)
  assert verdict.keys() - stored_verdict.keys() == (set() if 'kto' in kind else {'validation_kl'})
  for name, value in stored_verdict.items():
    np.testing.assert_allclose(value, verdict[name], 1e-5, 1e-6, err_msg=name)
  # Such batches tell a reference from none.
  assert abs(metrics['rewards_wanted' if 'kto' in kind else 'log_ratio']) > 1e-3


@pytest.mark.slow
def test_nothing_counts_what_is_not_run(held):
  live, run = held('preference')
  forward = run.config.objective.forward_flops(run.config.model, run.config.data, None)
  assert flops_per_token(live.config) == flops_per_token(run.config) + forward
  planned = [abstract_state(each.config, each.mesh).models for each in (live, run)]
  assert [list(models) for models in planned] == [['policy', 'reference'], ['policy']]


@pytest.mark.slow
def test_it_is_asked_once_and_known_by_rows_checkpoint_and_question(sources, tmp_path):
  """What is damaged, or of something else, is refused; a loader goes on to the bit."""
  directory = tmp_path / 'begun'
  made = config(sources, data={'cache_dir': str(tmp_path / 'cache')}, stored_reference=True)
  made = dataclasses.replace(made, init=written(directory, made, 3))
  run, workdir, lines = Run(made), tmp_path / 'run', []
  prepared, _ = completed(run, workdir, lines)
  assert [line for line in lines if 'reference said' in line]

  def kept():
    return sorted(path for path in (tmp_path / 'cache').glob('said-*') if path.is_dir())

  (first,) = kept()
  lines.clear()
  sharper = dataclasses.replace(made.objective, beta=0.2, variant='ipo')
  run.config = dataclasses.replace(made, objective=sharper)
  again, _ = completed(run, workdir, lines)
  assert again.key == prepared.key and kept() == [first]
  assert not [line for line in lines if 'reference said' in line]

  def loader(prepared):
    return made.objective.batches(prepared, made.data, range(made.data.batch_size))

  one, other = loader(prepared), loader(again)
  one.take(None)
  position = one.state()
  other.restore(json.loads(json.dumps(position)))
  for _ in range(9):
    assert_same(one.take(None), other.take(None))
  one.close()
  other.close()

  # A bit of an answer; then the answers of another checkpoint, under the name of these.
  run.config = made
  file = first / 'train-1.reference'
  content = file.read_bytes()
  files.replace(file, bytes([content[0] ^ 1]) + content[1:])  # who has it mapped keeps the old one
  with pytest.raises(cache.CorruptShardError, match=f'delete {first} and run again'):
    completed(run, workdir)
  files.replace(file, content)
  written(directory, made, 4)
  moved, _ = completed(run, workdir)
  second = next(path for path in kept() if path != first)
  with pytest.raises(ValueError, match='(?s)said-.*said-.*bring back the checkpoint'):
    loader(moved).restore(position)
  shutil.rmtree(second)
  shutil.copytree(first, second)
  with pytest.raises(cache.CorruptShardError, match=f'{second} holds what .*delete it and run'):
    completed(run, workdir)

  # In another precision it would say something else.
  half = made.model.with_execution(dtype='bfloat16')
  run.config = dataclasses.replace(made, model=half)
  assert completed(run, workdir)[0].key not in (prepared.key, moved.key)


@pytest.mark.slow
def test_what_cannot_be_stored_is_refused(sources, tmp_path):
  with pytest.raises(ValueError, match="reference='none': there is nothing to store; leave it out"):
    Preference(reference='none', stored_reference=True)
  stored = config(sources, stored_reference=True, init='somewhere')
  check_models(stored)
  with pytest.raises(ValueError, match="config.init='': .* give config.init, or the directory"):
    check_models(dataclasses.replace(stored, init=''))
  lora = config(sources, stored_reference=True, init='somewhere', adapter={'kind': 'lora'})
  with pytest.raises(ValueError, match="adapter.kind='lora'.* takes no memory of its own; leave"):
    check_models(lora)
  check_models(
    dataclasses.replace(lora, objective=dataclasses.replace(lora.objective, reference='x'))
  )
  (line,) = configs.differences(config(sources, init='somewhere'), stored)
  assert line == 'objective.stored_reference: False -> True'

  # What the directory itself begins with is what would have to be asked.
  run = Run(dataclasses.replace(stored, init=written(tmp_path / 'run', stored, 3)))
  with pytest.raises(ValueError, match='model that was imported into it.* use another --workdir'):
    completed(run, tmp_path / 'run')
  run.config = dataclasses.replace(run.config, init=str(tmp_path / 'nothing'))
  with pytest.raises(FileNotFoundError, match='nothing holds no checkpoint; train with train.py'):
    completed(run, tmp_path / 'other')


@SLOW
def test_a_run_begins_at_ln_2_and_resumes_bit_for_bit(sources, tmp_path):
  cache_dir = {'cache_dir': str(tmp_path / 'cache')}
  made = config(sources, data=cache_dir, stored_reference=True, sft=0.0)
  made = dataclasses.replace(made, init=written(tmp_path / 'begun', made, 3))

  def go(name, steps, **fields):
    objective = dataclasses.replace(made.objective, **fields)
    train = dataclasses.replace(made.train, steps=steps, accumulation=1)
    mesh = dataclasses.replace(made.mesh, data=4, tensor=2)
    run = dataclasses.replace(made, train=train, objective=objective, mesh=mesh)
    run_here(run, tmp_path / name)
    return read_metrics(tmp_path / name / 'metrics.jsonl')

  whole = go('whole', 4)
  go('again', 2)
  go('again', 4)
  record, leaves = leaves_of(tmp_path / 'whole', 4)
  assert_same(leaves, leaves_of(tmp_path / 'again', 4)[1])
  assert record['references'] == {} and not [name for name in leaves if 'reference' in name]
  losses = [line['loss'] for line in whole if 'loss' in line]
  np.testing.assert_allclose(losses[0], math.log(2), rtol=1e-6)
  assert losses[-1] < losses[0] - 1e-3
  live = go('live', 4, stored_reference=False)
  np.testing.assert_allclose([line['loss'] for line in live if 'loss' in line], losses, rtol=2e-5)
  assert 'validation_kl' in live[-1] and 'validation_kl' not in whole[-1]
  assert 'reference' in Checkpoints(tmp_path / 'live').record(4)['references']
  with pytest.raises(SystemExit, match='objective.stored_reference: False -> True'):
    go('live', 5)
