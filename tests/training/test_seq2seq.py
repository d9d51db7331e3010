"""Is what an encoder-decoder learns of packed pairs what it would learn of each pair alone, in any
microbatches, on any mesh, in float16; and does it then write, and stop?
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batch import SourceBatch
from data.config import CleanConfig, SourceConfig
from decode.generator import Generator
from model import flops, transformer
from model.adaptation import AdapterConfig
from model.config import ModelConfig
from model.execution import ExecutionConfig
from objectives.seq2seq import Seq2Seq
from objectives.sft import SFT
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import (
  RATE,
  SGD,
  B,
  Trainer,
  assert_close,
  assert_same,
  host,
  initial_model,
  quickly,
  run_here,
  tiny,
)
from tests.training.test_denoise import T5
from training import hints, program, spent
from workdir import samples
from workdir.metrics import read_metrics
from workdir.open import open_run

S, T = 16, 12
# Lengths that pack into rows with very unequal numbers of targets.
PAIRS = [(chr(97 + n) * (1 + n % 7), chr(110 - n) * n) for n in range(1, 12)]
PAIRS += [('xy' * n, 'z') for n in range(1, 8)]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return written(tmp_path_factory.mktemp('pairs') / 'pairs.jsonl', PAIRS)


def written(path, pairs):
  rows = [{'source': source, 'target': target} for source, target in pairs]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return SourceConfig(kind='jsonl', path=str(path), format='pair')


def config(source, objective=Seq2Seq(target_length=T), **parts):
  data = {
    'sources': (source,),
    'validation': (source,),
    'validation_fraction': 0.0,
    'clean': CleanConfig(anonymise=(), near_duplicates=0, exact_duplicates=False),
    'split': 'hash',
    'cache_dir': str(source.path) + '.cache',
  }
  parts = {'optimizer': SGD} | parts | {'data': data | parts.get('data', {})}
  made = tiny(**parts | {'model': T5 | parts.get('model', {})})
  return dataclasses.replace(made, objective=objective)


def rows_of(made) -> SourceBatch:
  """All training rows, as one batch filled up with padding to whole batches of B."""
  prepared = made.objective.read(made.data, lambda line: None)
  count = -(-prepared.rows // B) * B
  batch = prepared.empty(count)
  for row in range(prepared.rows):
    prepared.train[0].fill(row, batch, row)
  return batch


def ids_of(text):
  return [*(b + 3 for b in text.encode()), 2]


def alone():
  """The pairs, each in rows of its own: sources, their segments, decoder's inputs, targets; int32
  [pairs, ..]; targets are -1 where there are none.
  """
  sources = np.zeros((len(PAIRS), S), np.int32)
  targets = np.full((len(PAIRS), T), -1, np.int32)
  for row, (source, target) in enumerate(PAIRS):
    sources[row, : len(source) + 1] = ids_of(source)
    targets[row, : len(target) + 1] = ids_of(target)
  inputs = np.pad(np.maximum(targets, 0), ((0, 0), (1, 0)))[:, :-1]
  return sources, np.int32(sources > 0), inputs, targets


def by_hand(model, weighting):
  """The loss of all pairs, worked out from all logits of each alone, and these."""
  sources, segments, inputs, targets = map(jnp.asarray, alone())
  ones = jnp.ones_like(inputs)
  hidden = model(inputs, None, ones, source=sources, source_segments=segments).hidden
  logits = model.logits(hidden)
  picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], 2)[..., 0]
  nll = jax.nn.logsumexp(logits, -1) - picked
  count = (targets >= 0).sum(1, keepdims=True)
  weights = (targets >= 0) / (count if weighting == 'example' else 1)
  return (nll * weights).sum() / weights.sum(), logits


@functools.cache
def both(source):
  """A new model; of all pairs alone by hand (loss, logits) and gradient; of them packed loss and
  gradient of the objective; the packed rows.
  """
  made = config(source)
  batch, init = rows_of(made), functools.partial(transformer.init, made.model, 0)
  structure = jax.tree.structure(jax.eval_shape(init))
  model = jax.tree.unflatten(structure, [*map(jnp.asarray, initial_model(made.model, 0))])

  @jax.jit
  def run(model, batch):
    def mean(model):
      total, weight = made.objective.loss({'policy': model}, batch)[made.objective.term]
      return total / weight

    hand = functools.partial(by_hand, weighting='token')
    return jax.value_and_grad(hand, has_aux=True)(model), jax.value_and_grad(mean)(model)

  arguments = model, jax.tree.map(jnp.asarray, batch)
  return model, *quickly(run, *arguments)(*arguments), batch


@pytest.mark.slow
def test_packed_pairs_are_what_each_is_alone(source, one_device):
  """Loss and gradient, which all leaves have; and the loss is what numpy says that a mean is."""
  _, ((loss, logits), gradient), (packed, slopes), batch = both(source)
  assert len(batch.tokens) < len(PAIRS) and batch.segments.max() > 2
  np.testing.assert_allclose(packed, loss, rtol=1e-5)
  assert_close(slopes, gradient, 4e-6)
  assert all(np.abs(g).max() > 1e-4 for g in host(slopes).values())
  np.testing.assert_allclose(packed, np.mean(np.concatenate(by_numpy(logits))), rtol=1e-5)


def by_numpy(logits):
  """-log p of the targets of each pair, its end included."""
  logits, (*_, targets) = np.asarray(logits, np.float64), alone()
  return [
    [np.log(np.exp(logits[row, t]).sum()) - logits[row, t, i] for t, i in enumerate(ids) if i >= 0]
    for row, ids in enumerate(targets)
  ]


@pytest.mark.slow
@pytest.mark.parametrize('weighting', ['token', 'example'])
def test_a_step_is_the_absolute_step(source, one_device, weighting):
  """Parameters - rate * gradient of the mean over targets or examples, worked out by hand; all of
  them move.
  """
  made = config(source, Seq2Seq(target_length=T, weighting=weighting))
  batch = rows_of(made)
  size = dataclasses.replace(made.data, batch_size=len(batch.tokens))
  trainer = Trainer(dataclasses.replace(made, data=size))
  before = jax.tree.map(jnp.copy, trainer.state.models['policy'])
  gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True), static_argnums=1)
  (loss, logits), grads = gradient(before, weighting)
  metrics, _ = trainer.step(batch)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  after = trainer.state.models['policy']
  assert_close(after, jax.tree.map(lambda p, g: p - RATE * g, before, grads), 4e-6)
  moved = host(after)
  assert not [path for path, x in host(before).items() if (x == moved[path]).all()]

  nll = by_numpy(logits)
  each = [np.mean(x) for x in nll] if weighting == 'example' else np.concatenate(nll)
  np.testing.assert_allclose(metrics['loss'], np.mean(each), rtol=1e-5)
  counted = 'learned_examples' if weighting == 'example' else 'predicted_tokens'
  np.testing.assert_allclose(metrics[counted], len(each), rtol=1e-6)
  right = (np.asarray(logits).argmax(-1) == alone()[-1]).sum()
  if weighting == 'token':
    np.testing.assert_allclose(metrics['accuracy'], right / len(each), rtol=1e-5)


def shifted(batch):
  return dataclasses.replace(batch, targets=np.roll(batch.targets, 1, 1))


def without_end(batch):
  return dataclasses.replace(batch, weights=np.where(batch.targets == 2, 0, batch.weights))


def crossed(batch):
  """As if every target saw the next pair's source."""
  count = batch.source_segments.max(1, keepdims=True)
  others = np.where(batch.source_segments > 0, batch.source_segments % np.maximum(count, 1) + 1, 0)
  return dataclasses.replace(batch, source_segments=others.astype(np.int32))


@pytest.mark.slow
def test_faults_that_are_planted_change_the_loss(source, one_device):
  """Else the law above would not see them."""
  before, ((loss, _), _), _, batch = both(source)
  objective = Seq2Seq(target_length=T)

  @jax.jit
  def mean(model, batch):
    total, weight = objective.loss({'policy': model}, batch)[objective.term]
    return total / weight

  mean = quickly(mean, before, jax.tree.map(jnp.asarray, batch))
  of = {
    fault: float(mean(before, jax.tree.map(jnp.asarray, fault(batch))))
    for fault in (lambda x: x, shifted, without_end, crossed)
  }
  right, *wrong = of.values()
  np.testing.assert_allclose(right, loss, rtol=1e-5)
  assert min(abs(value - right) for value in wrong) > 1e-3, wrong


MESHES = [
  (4, 1, {}),
  (1, 8, {'data': 2, 'fsdp': 2, 'tensor': 2}),
  (2, 4, {'data': 1, 'fsdp': 2, 'tensor': 2, 'zero': 2}),
  (1, 4, {'data': 1, 'fsdp': 2, 'tensor': 2, 'zero': 1}),
  (1, 4, {'stage': 2, 'data': 2}),
  (1, 4, {'expert': 2, 'data': 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize('parts, devices, mesh', MESHES, ids=str)
def test_microbatches_and_devices_of_unequal_counts_are_one_batch(source, parts, devices, mesh):
  batch = jax.tree.map(lambda x: x[:B], rows_of(config(source)))
  assert len({*batch.weights.sum(1).tolist()}) > 2  # else nothing could go wrong
  expected, metrics = in_one_step(source)
  again = Trainer(config(source, mesh=mesh, train={'accumulation': parts}), devices)
  found, _ = again.step(batch)
  np.testing.assert_allclose(found['loss'], metrics['loss'], rtol=1e-5)
  assert_close(again.state.models, expected, 5e-6)


@functools.cache
def in_one_step(source):
  whole = Trainer(config(source))
  metrics, _ = whole.step(jax.tree.map(lambda x: x[:B], rows_of(config(source))))
  return whole.state.models, metrics


@pytest.mark.slow
def test_the_gradient_is_the_slope_in_a_direction(source, one_device):
  """By finite differences whose error is of the fourth order."""
  made = config(source)
  batch = jax.tree.map(lambda x: jnp.asarray(x[:B]), rows_of(made))
  models = Trainer(made).state.models

  @jax.jit
  def loss(models):
    total, weight = made.objective.loss(models, batch)[made.objective.term]
    return total / weight

  gradient = jax.jit(jax.grad(loss))(models)
  draw, size = np.random.default_rng(0), 4e-4
  direction = jax.tree.map(lambda p: jnp.float32(draw.normal(size=p.shape)), models)

  def between(step):
    ahead, behind = (
      loss(jax.tree.map(lambda p, d: p + s * d, models, direction)) for s in (step, -step)
    )
    return ahead - behind

  difference = (8 * between(size) - between(2 * size)) / (12 * size)
  slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
  np.testing.assert_allclose(difference, slope, rtol=1e-2)
  assert abs(slope) > 0.1 and all(np.abs(g).max() > 0 for g in host(gradient).values())


def test_costs_are_of_every_pair_apart(source):
  """Packed as they are: nothing is counted that a mask leaves out."""
  made = config(source)
  prepared = made.objective.read(made.data, lambda line: None)
  lengths = [(len(source) + 1, len(target) + 1) for source, target in PAIRS]
  total = sum(flops.pair_flops(made.model, *pair) for pair in lengths)
  tokens = sum(map(sum, lengths))
  found = spent.flops_per_token(made, prepared.document_length)
  assert found == pytest.approx(3 * total / tokens)
  # Of a plan that has read nothing, a pair fills its row.
  assert spent.flops_per_token(made) == pytest.approx(
    3 * flops.pair_flops(made.model, S, T) / (S + T)
  )
  batch = rows_of(made)
  assert int(made.objective.tokens(jax.tree.map(jnp.asarray, batch))) == tokens
  like = made.objective.batch_like(made.data)
  assert jax.tree.map(lambda x: x.shape[1:], like) == jax.tree.map(lambda x: x.shape[1:], batch)
  assert made.objective.row_tokens(made.data) == S + T


def test_what_it_cannot_train_is_refused_by_name(source):
  with pytest.raises(NotImplementedError, match='model.encoder_layers=0 has no encoder; set model'):
    Seq2Seq().accepts({'policy': ModelConfig()})
  with pytest.raises(NotImplementedError, match="use a decoder, or objective.kind='seq2seq'"):
    SFT().accepts({'policy': ModelConfig(**T5)})
  with pytest.raises(ValueError, match='objective.target_length=20 passes model.max_length=16'):
    config(source, Seq2Seq(target_length=20))
  open_ended = config(source, Seq2Seq(target_length=20), model={'max_length': 0})
  assert open_ended.resolve(259).model.max_length == 20
  with jax.set_mesh(make_mesh(MeshConfig(context=2, data=1), jax.devices()[:2])):
    with pytest.raises(NotImplementedError, match='mesh.context=2; use data, fsdp or tensor'):
      program.make_program(config(source, mesh={'context': 2}))


LOUD = 1000.0  # what feed-forwards are multiplied with
F16 = {'execution': ExecutionConfig(dtype='float16')}


def loud(model):
  """With feed-forwards that add numbers beyond what float16 holds, as T5's do."""
  for stack in (model.stack, model.encoder):
    for block in stack.blocks:
      for name in ('up', 'down'):
        weight = getattr(block.feed_forward, name)
        weight.set_value(weight.get_value() * LOUD)
  return model


def mean_of(config, leaves, batch):
  """The loss, of a network of this config whose parameters are these."""
  shape = jax.eval_shape(functools.partial(transformer.init, config.model, 0))
  model = jax.tree.unflatten(jax.tree.structure(shape), leaves)
  total, weight = config.objective.loss({'policy': model}, batch)[config.objective.term]
  return total / weight


@pytest.mark.slow
def test_float16_holds_what_float16_does_not(source, one_device, monkeypatch):
  """The loss is that of f32, where a residual stream of float16 has none."""
  wide, narrow = config(source), config(source, model=F16)
  assert narrow.model.stream_dtype == 'float32' and wide.model.stream_dtype == 'float32'
  assert ModelConfig(execution=F16['execution']).stream_dtype == 'float16'
  batch = jax.tree.map(lambda x: jnp.asarray(x[:2]), rows_of(wide))
  model = loud(jax.tree.map(jnp.copy, both(source)[0]))
  block = jax.tree.map(lambda p: p[0], model.encoder.blocks[0])
  x = model.embedding(batch.source, batch.source_positions, None)
  assert float(jnp.abs(block.feed_forward(block.feed_forward_norm(x))).max()) > 10 * 65_504

  def judged(config):
    function, leaves = jax.jit(functools.partial(mean_of, config)), jax.tree.leaves(model)
    return float(quickly(function, leaves, batch)(leaves, batch))

  np.testing.assert_allclose(judged(narrow), judged(wide), rtol=2e-3)
  monkeypatch.setattr(ModelConfig, 'stream_dtype', 'float16')
  assert not math.isfinite(judged(narrow))


@pytest.mark.slow
def test_float16_has_the_gradient_of_f32(source, one_device):
  """Of a loss that is scaled, as training scales it: else slopes would be too small for float16."""
  wide, narrow = config(source), config(source, model=F16)
  batch = jax.tree.map(jnp.asarray, rows_of(wide))
  leaves = jax.tree.leaves(loud(jax.tree.map(jnp.copy, both(source)[0])))

  def slopes(made):
    return jax.jit(jax.grad(lambda x: mean_of(made, x, batch) * 2.0**8))(leaves)

  expected, found = slopes(wide), slopes(narrow)
  for theirs, ours in zip(expected, found):
    np.testing.assert_allclose(ours, theirs, atol=3e-2 * float(jnp.abs(theirs).max()))


def test_float16_of_an_encoder_decoder_is_told_of_bfloat16(source):
  said = hints.hint(config(source, model=F16))
  assert 'execution.dtype=bfloat16' in said and 'encoder-decoder' in said
  assert not hints.hint(config(source)) and not hints.hint(tiny(model=F16))


@pytest.mark.slow
@pytest.mark.parametrize('mesh, devices', [({}, 1), ({'fsdp': 2, 'tensor': 2, 'zero': 2}, 4)])
def test_float16_trains_with_a_scale_that_moves(source, mesh, devices):
  """Though feed-forwards pass what it holds."""
  made = config(
    source,
    model=F16,
    mesh={'data': 1} | mesh,
    optimizer={'learning_rate': 0.02},
    train={'accumulation': 2},
  )
  trainer = Trainer(made, devices)
  with jax.set_mesh(trainer.mesh):
    trainer.state = dataclasses.replace(
      trainer.state, models={'policy': loud(trainer.state.models['policy'])}
    )
  batch = jax.tree.map(lambda x: x[:B], rows_of(made))
  metrics = trainer.run([batch] * 30)
  assert all(math.isfinite(line['loss']) for line in metrics)
  assert metrics[-1]['loss'] < metrics[0]['loss'] - 0.05
  assert int(trainer.state.scale.skipped_steps) < 20


def trained(source, steps=4, **parts):
  """A run on all devices."""
  given = {
    'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2},
    'train': {'steps': steps, 'save_every': 2, 'eval_every': 2} | parts.pop('train', {}),
  }
  return config(source, **given | parts)


@pytest.mark.slow
def test_resumed_is_uninterrupted_and_validation_is_by_hand(source, tmp_path, one_device):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  run_here(trained(source), whole)
  for steps in (2, 4):
    run_here(trained(source, steps), parts)
  assert_same(open_run(whole).model, open_run(parts).model)
  losses = [
    [line['loss'] for line in read_metrics(where / 'metrics.jsonl') if 'loss' in line]
    for where in (whole, parts)
  ]
  assert losses[0] == losses[1]
  last = read_metrics(whole / 'metrics.jsonl')[-1]
  loss, _ = jax.jit(by_hand, static_argnums=1)(open_run(whole).model, 'token')
  np.testing.assert_allclose(last['validation_loss'], loss, rtol=1e-5)
  tokens = sum(len(target) + 1 for _, target in PAIRS)
  np.testing.assert_allclose(
    last['completion_log_likelihood'], -loss * tokens / len(PAIRS), rtol=1e-5
  )
  facts = json.loads((whole / 'run.json').read_text())
  made = trained(source)
  prepared = made.objective.read(made.data, lambda line: None)
  assert facts['flops_per_token'] == pytest.approx(
    spent.flops_per_token(made, prepared.document_length)
  )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('kind', ['lora', 'dora'])
def test_an_adapter_is_trained_and_the_model_is_not(source, tmp_path, kind):
  """Attention, cross-attention and feed-forward, of encoder and decoder."""
  base = tmp_path / 'base'
  run_here(trained(source, 2), base)
  adapter = AdapterConfig(kind=kind, rank=2)
  made = dataclasses.replace(trained(source), adapter=adapter, init=str(base))
  run_here(made, tmp_path / 'tuned')
  before, after = open_run(base).model, open_run(tmp_path / 'tuned').model
  still = {
    path for path, x in host(before).items() if np.array_equal(x, np.asarray(host(after)[path]))
  }
  moved = {path for path in host(before) if path not in still}
  for part in ('encoder', 'stack'):
    for matrix in ('attention.q', 'attention.o', 'feed_forward.up', 'feed_forward.down'):
      assert any(f'.{part}.' in path and matrix in path for path in moved), (part, matrix)
  assert any('cross.k' in path for path in moved) and any('cross.o' in path for path in moved)
  assert all('norm' not in path and 'embedding' not in path for path in moved)


@pytest.mark.slow
@pytest.mark.long
def test_it_learns_to_write_and_to_stop(tmp_path):
  """Letters doubled: every answer to the letter, and none goes on; samples on the way are sources
  and what is written of them.
  """
  words = ['ab', 'ba', 'ca', 'ac', 'bc', 'cb', 'a', 'b', 'c', 'aa']
  pairs = [(word, ''.join(2 * letter for letter in word)) for word in words]
  source = written(tmp_path / 'doubled.jsonl', pairs)
  made = config(
    source,
    Seq2Seq(target_length=T, prefix='d:'),
    optimizer={'name': 'adamw', 'learning_rate': 3e-3},
    train={
      'steps': 240,
      'save_every': 240,
      'log_every': 60,
      'sample_every': 120,
      'sample_prompts': ('d:ab',),
    },
    mesh={'data': -1},
  )
  run_here(made, tmp_path / 'run')
  generator = Generator.load(tmp_path / 'run')
  answers = generator([f'd:{word}' for word in words], temperature=0.0, max_new_tokens=9)
  assert [answer.text for answer in answers] == [target for _, target in pairs]
  assert {answer.finish for answer in answers} == {'stop'}
  wrote = samples.read(tmp_path / 'run')
  assert [(each.step, each.prompt, each.read) for each in wrote] == [
    (120, 'd:ab', True),
    (240, 'd:ab', True),
  ]
  assert 'd:ab\n-> ' in (tmp_path / 'run' / 'report.md').read_text()
