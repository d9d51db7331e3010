"""Is what is tuned on records what the records say: answers and their ends, whatever the packing,
the microbatches and the devices?
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from data.batch import Batch
from data.config import CleanConfig, SourceConfig
from data.tokenizers import ByteTokenizer, CharTokenizer
from objectives.sft import SFT
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import RATE, SGD, B, T, Trainer, assert_close, host, run_here, tiny
from workdir.metrics import read_metrics

# Lengths that pack into rows of T with very unequal numbers of learned tokens.
PAIRS = [('a', 'b' * n) for n in range(1, 13)] + [('ask' * 3, 'c' * n) for n in range(1, 5)]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp('records') / 'pairs.jsonl'
  rows = [{'prompt': prompt, 'completion': answer} for prompt, answer in PAIRS]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return SourceConfig(kind='jsonl', path=str(path), format='completion')


def config(source, objective=SFT(), **parts):
  data = {
    'sources': (source,),
    'validation': (source,),
    'validation_fraction': 0.0,
    'clean': CleanConfig(anonymise=(), near_duplicates=0, exact_duplicates=False),
    'split': 'hash',
    'cache_dir': str(source.path) + '.cache',
  }
  made = tiny(**{'optimizer': SGD} | parts | {'data': data | parts.get('data', {})})
  return dataclasses.replace(made, objective=objective)


def rows_of(made) -> Batch:
  """All training rows, as one batch filled up with padding to whole batches of B."""
  prepared = made.objective.read(made.data, lambda line: None)
  count = -(-prepared.rows // B) * B
  batch = Batch.empty(count, T)
  for row in range(prepared.rows):
    prepared.train[0].fill(row, batch, row)
  return batch


def by_hand(model, weighting):
  """The loss worked out pair by pair, each in a row of its own, from all logits."""
  ids = np.zeros((len(PAIRS), T + 1), np.int32)
  for row, (prompt, answer) in enumerate(PAIRS):
    text = [1, *(b + 3 for b in (prompt + answer).encode()), 2]
    ids[row, : len(text)] = text
  nll = -jax.nn.log_softmax(model.logits(model(jnp.asarray(ids[:, :-1])).hidden))
  total = weight = 0.0
  for row, (prompt, answer) in enumerate(PAIRS):
    answers = range(len(prompt), len(prompt) + len(answer) + 1)
    learned = sum(nll[row, t, ids[row, t + 1]] for t in answers)
    total += learned / len(answers) if weighting == 'example' else learned
    weight += 1 if weighting == 'example' else len(answers)
  return total / weight


@pytest.mark.slow
@pytest.mark.parametrize('packing, weighting', [('fit', 'token'), ('alone', 'example')])
def test_a_step_is_the_absolute_step(source, one_device, packing, weighting):
  """Parameters - rate * gradient of the mean over answers, worked out by hand."""
  made = config(source, SFT(weighting=weighting, packing=packing))
  batch = rows_of(made)
  made = dataclasses.replace(
    made, data=dataclasses.replace(made.data, batch_size=len(batch.tokens))
  )
  trainer = Trainer(made)
  before = jax.tree.map(jnp.copy, trainer.state.models['policy'])
  loss, gradient = jax.jit(jax.value_and_grad(by_hand), static_argnums=1)(before, weighting)
  metrics, _ = trainer.step(batch)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  expected = jax.tree.map(lambda p, g: p - RATE * g, before, gradient)
  assert_close(trainer.state.models['policy'], expected, 3e-6)
  assert max(np.abs(x).max() for x in host(gradient).values()) > 1e-2
  count = 'learned_examples' if weighting == 'example' else 'predicted_tokens'
  learned = len(PAIRS) if weighting == 'example' else sum(len(answer) + 1 for _, answer in PAIRS)
  np.testing.assert_allclose(metrics[count], learned, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('weighting', ['token', 'example'])
def test_microbatches_and_devices_of_unequal_counts_are_one_batch(source, weighting):
  objective = SFT(weighting=weighting)
  batch = jax.tree.map(lambda x: x[:B], rows_of(config(source, objective)))
  counts = batch.weights.sum(1)
  assert len(set(np.round(counts, 3))) > 1  # else nothing could go wrong
  whole = Trainer(config(source, objective))
  expected, _ = whole.step(batch)
  for parts, devices, mesh in ((4, 1, {}), (2, 4, {'data': 2, 'fsdp': 2})):
    again = Trainer(config(source, objective, mesh=mesh, train={'accumulation': parts}), devices)
    metrics, _ = again.step(batch)
    np.testing.assert_allclose(metrics['loss'], expected['loss'], rtol=1e-6)
    # Entries are of 3 at most, and summed in another order.
    assert_close(again.state.models, whole.state.models, 4e-6)


@pytest.mark.slow
def test_the_gradient_is_the_slope_in_a_direction(source, one_device):
  """By finite differences; every parameter moves."""
  made = config(source)
  trainer, batch = Trainer(made), jax.tree.map(lambda x: jnp.asarray(x[:B]), rows_of(made))
  models = trainer.state.models

  @jax.jit
  def loss(models):
    terms = made.objective.loss(models, batch)
    return sum(total / weight for total, weight in terms.values())

  value, gradient = jax.value_and_grad(loss)(models)
  draw = np.random.default_rng(0)
  direction = jax.tree.map(lambda p: jnp.float32(draw.normal(size=p.shape)), models)
  step = 1e-3
  ahead, behind = (
    loss(jax.tree.map(lambda p, d: p + sign * step * d, models, direction)) for sign in (1, -1)
  )
  slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
  # The error of the difference: rounding of the loss, eps * loss / step, is 1e-4 of it.
  np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=1e-2)
  assert np.isfinite(value) and all(np.abs(g).max() > 0 for g in host(gradient).values())


@pytest.mark.slow
def test_epochs_say_how_many_steps_and_what_is_held_out_is_judged(source, tmp_path):
  made = config(
    source,
    SFT(packing='alone'),
    data={'batch_size': 8},
    train={'steps': 0, 'epochs': 2.5, 'save_every': 5},
    optimizer={'warmup_fraction': 0.2},
    mesh={'data': -1},
  )
  run_here(made, tmp_path)
  records = read_metrics(tmp_path / 'metrics.jsonl')
  assert max(record['step'] for record in records) == 5  # 2.5 * 16 rows in batches of 8
  last = [record for record in records if 'validation_loss' in record][-1]
  tokens = sum(len(answer) + 1 for _, answer in PAIRS)
  np.testing.assert_allclose(
    last['completion_log_likelihood'], -last['validation_loss'] * tokens / len(PAIRS), rtol=1e-5
  )
  assert 0 <= last['validation_accuracy'] <= 1
  rates = [record['learning_rate'] for record in records if 'learning_rate' in record]
  assert rates[:2] == pytest.approx([0.005, 0.01])  # one step of warm-up


def test_how_long_is_said_once():
  with pytest.raises(ValueError, match='train.steps=6 and train.epochs=1.*set the other to 0'):
    tiny(train={'epochs': 1.0})
  with pytest.raises(ValueError, match='train.steps=0 and train.epochs=0'):
    tiny(train={'steps': 0})
  with pytest.raises(ValueError, match='warmup_steps=2 and .*warmup_fraction=0.1 both'):
    tiny(optimizer={'warmup_steps': 2, 'warmup_fraction': 0.1})


def test_a_model_is_tuned_on_the_ids_that_it_knows(source, tmp_path):
  base, other = tmp_path / 'base', tmp_path / 'other'
  ByteTokenizer().save(base / 'tokenizer')
  CharTokenizer('abc').save(other / 'tokenizer')
  made = dataclasses.replace(config(source), init=str(base))
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    mesh = jax.sharding.get_mesh()
    assert train.read(made, tmp_path / 'run', mesh, False, lambda line: None)
    made = dataclasses.replace(made, init=str(other))
    with pytest.raises(ValueError, match='not that of config.init=.*other .* leave data.tokenizer'):
      train.read(made, tmp_path / 'run', mesh, False, lambda line: None)
