"""Does a student learn the divergence that it is said to, of the positions that count, from a
teacher of another shape that stays as it is, on any batches and any mesh?
"""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.config import SourceConfig
from data.extra import extended
from data.tokenizers import ByteTokenizer, CharTokenizer
from model import logprobs, transformer
from model.adaptation import AdapterConfig
from model.params import named_leaves
from objectives import distil
from objectives.distil import Distil, DistilSeq2Seq, DistilSFT
from parallel import hosts
from parallel.mesh import MeshConfig, make_mesh
from parallel.pipeline import PipelineConfig
from tests.training import test_seq2seq, test_sft
from tests.training.conftest import (
  SGD,
  B,
  T,
  V,
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
from tests.training.test_objective import Run, leaves_of
from training import config as configs
from training.program import check_models, lower_step
from training.spent import flops_per_token
from workdir.checkpoint import Checkpoints
from workdir.metrics import read_metrics
from workdir.open import open_run

# Of another width, depth and family than the student.
TEACHER = {
  'width': 48,
  'layers': 4,
  'feed_forward': 80,
  'activation': 'gelu',
  'logit_softcap': 5.0,
  'init_scale': 2.0,
}
LONG = (pytest.mark.slow, pytest.mark.long)
CASES = {
  'forward': {},
  'forward at 2, and the text': {'temperature': 2.0, 'cross_entropy': 0.25, 'z_loss': 0.01},
  'reverse at 0.5': {'divergence': 'reverse_kl', 'temperature': 0.5},
  'jsd at 2': {'divergence': 'jsd', 'beta': 0.3, 'temperature': 2.0},
}


def written(directory, tokenizer=None, **model):
  """A directory with what is read of a teacher's before its parameters are."""
  configs.save(tiny(model=TEACHER | model), directory)
  (tokenizer or ByteTokenizer()).save(directory / 'tokenizer')
  return str(directory)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  return written(tmp_path_factory.mktemp('teacher'))


def distilling(teacher, objective=None, **parts):
  made = tiny(**{'optimizer': SGD} | parts)
  return dataclasses.replace(made, objective=Distil(teacher=teacher, **(objective or {})))


def new(config, seed):
  shape = jax.eval_shape(functools.partial(transformer.init, config, seed))
  leaves = [*map(jnp.asarray, initial_model(config, seed))]
  return jax.tree.unflatten(jax.tree.structure(shape), leaves)


def models():
  return {'policy': new(tiny().model, 0), 'teacher': new(tiny(model=TEACHER).model, 1)}


def ragged():
  """A batch whose weights are fractions, some rows without any."""
  batch = make_batches(1)[0]
  draw = np.random.default_rng(5)
  batch.weights[...] *= draw.uniform(0.5, 2, batch.weights.shape)
  batch.weights[3] = 0
  return jax.tree.map(jnp.asarray, batch)


def all_logits(model, batch, **source):
  return model.logits(model(batch.tokens, batch.positions, batch.segments, **source).hidden)


def by_hand(objective, logits, targets, weights):
  """What is minimised, in float64, from all logits of both models [.., V]."""
  w, ids = np.asarray(weights, np.float64), np.asarray(targets)

  def law(name, warmth):
    z = np.asarray(logits[name], np.float64) / warmth
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))

  def kl(a, b):
    return (np.exp(a) * (a - b)).sum(-1)

  p, q = (law(name, objective.temperature) for name in ('teacher', 'policy'))
  if objective.divergence == 'jsd':
    m = np.log(objective.beta * np.exp(p) + (1 - objective.beta) * np.exp(q))
    divergence = objective.beta * kl(p, m) + (1 - objective.beta) * kl(q, m)
  else:
    divergence = kl(p, q) if objective.divergence == 'forward_kl' else kl(q, p)
  plain = law('policy', 1)
  z = np.asarray(logits['policy'], np.float64)
  lse = (z - plain)[..., 0]
  nll = -np.take_along_axis(plain, ids[..., None], -1)[..., 0] + objective.z_loss * lse**2
  share, scale = objective.cross_entropy, objective.temperature**2
  each = (1 - share) * scale * divergence + share * nll
  counted = w > 0
  return (each[counted] * w[counted]).sum() / w.sum(), divergence[counted] @ w[counted] / w.sum()


def mean(objective, models, batch):
  total, weight = objective.loss(models, batch)[objective.term]
  return total / weight


@functools.cache
def values():
  """{case: (loss, sums)} and all logits of both, of the ragged batch, by one program."""
  objectives = {name: Distil(teacher='x', **fields) for name, fields in CASES.items()}

  def run(models, batch):
    said = {}
    for name, objective in objectives.items():
      _, sums = objective.sums(models, batch)
      said[name] = mean(objective, models, batch), sums['divergence'] / sums['tokens']
    return said, {name: all_logits(model, batch) for name, model in models.items()}

  given = models(), ragged()
  return quickly(jax.jit(run), *given)(*given)


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_the_loss_is_the_formula_of_what_counts(name, one_device):
  said, logits = values()
  batch = ragged()
  objective = Distil(teacher='x', **CASES[name])
  expected = by_hand(objective, logits, batch.targets, batch.weights)
  np.testing.assert_allclose(said[name], expected, rtol=2e-5)


@pytest.mark.slow
def test_a_teacher_that_is_the_student_teaches_nothing(one_device):
  """Exactly 0, its gradient too."""
  student = models()['policy']
  batch = ragged()

  def run(student, batch):
    def each(student, objective):
      return mean(objective, {'policy': student, 'teacher': models_of(student)}, batch)

    def models_of(student):
      return jax.lax.stop_gradient(student)

    warm = Distil(teacher='x', temperature=2.0)
    other = Distil(teacher='x', divergence='reverse_kl')
    return [jax.value_and_grad(each)(student, objective) for objective in (warm, other)]

  (loss, slopes), (reverse, other_slopes) = quickly(jax.jit(run), student, batch)(student, batch)
  assert loss == 0 and reverse == 0
  assert all((g == 0).all() for g in jax.tree.leaves(slopes))
  assert all(np.abs(g).max() < 1e-6 for g in jax.tree.leaves(other_slopes))


@pytest.mark.slow
def test_the_gradient_is_the_slope(one_device):
  """Along a random direction, of all divergences together; a teacher has none."""
  given, batch, step = models(), ragged(), 2e-4
  draw = np.random.default_rng(3)
  direction = jax.tree.map(
    lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), given['policy']
  )
  objectives = [Distil(teacher='x', **fields) for fields in CASES.values()]

  def run(models):
    return sum(mean(objective, models, batch) for objective in objectives)

  def moved(step):
    along = jax.tree.map(lambda p, d: p + step * d, given['policy'], direction)
    return run(given | {'policy': along})[0]

  run = quickly(jax.jit(jax.value_and_grad(run)), given)
  _, slopes = run(given)
  exact = sum(
    (g * d).sum()
    for g, d in zip(jax.tree.leaves(slopes['policy']), jax.tree.leaves(direction), strict=True)
  )
  np.testing.assert_allclose((moved(step) - moved(-step)) / (2 * step), exact, rtol=1e-2)
  assert all((g == 0).all() for g in jax.tree.leaves(slopes['teacher']))


def stepped(config, devices=1, batches=2):
  run = Run(config, devices)
  metrics, _ = run.go(make_batches(batches))
  return run, metrics


@pytest.fixture(scope='module')
def alone(teacher):
  return stepped(distilling(teacher, CASES['jsd at 2']))


@pytest.mark.slow
def test_a_step_moves_the_student_and_not_the_teacher(teacher, alone):
  config = distilling(teacher, CASES['jsd at 2'])
  begun, (run, metrics) = Run(config), alone
  assert_same(begun.state.models['teacher'], run.state.models['teacher'])
  after, before = host(run.state.models['policy']), host(begun.state.models['policy'])
  assert all(after[name].tobytes() != before[name].tobytes() for name in after)
  assert not [name for name in named_leaves(run.state.optimizer) if 'teacher' in name]
  np.testing.assert_allclose(metrics['loss'], 4 * metrics['divergence'], rtol=1e-6)
  assert metrics['cross_entropy'] > 0 and metrics['predicted_tokens'] > 0
  plain = dataclasses.replace(tiny(), objective=distil.NextToken())
  forward = config.objective.forward_flops(run.state.models['teacher'].config, config.data, None)
  assert flops_per_token(config) == flops_per_token(plain) + forward


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'devices, parts',
  [
    (1, {'train': {'accumulation': 4}}),
    (8, {'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2}, 'train': {'accumulation': 2}}),
    (8, {'mesh': {'data': 4, 'fsdp': 2, 'zero': 1}}),
    (8, {'mesh': {'data': 2, 'fsdp': 4, 'zero': 2}}),
    (4, {'mesh': {'context': 2, 'tensor': 2}, 'context': 'ring'}),
    (4, {'mesh': {'context': 4}, 'context': 'ulysses_ring'}),
    (4, {'mesh': {'stage': 2, 'data': 2}}),
    (
      2,
      {
        'mesh': {'stage': 2},
        'pipeline': {'schedule': 'circular', 'repeats': 2},
        'model': {'layers': 4},
      },
    ),
  ],
  ids=str,
)
def test_steps_are_the_same_whatever_the_parts_and_devices(teacher, alone, devices, parts):
  config = distilling(
    teacher,
    CASES['jsd at 2'],
    mesh={'data': 1} | parts.get('mesh', {}),
    train=parts.get('train', {}),
    model=parts.get('model', {}),
  )
  if 'model' in parts:
    alone = stepped(dataclasses.replace(config, mesh=MeshConfig()))
  run = {name: parts[name] for name in ('context',) if name in parts}
  if 'pipeline' in parts:
    run['pipeline'] = PipelineConfig(**parts['pipeline'])
  config = dataclasses.replace(config, model=config.model.with_execution(**run))
  config.check_mesh(make_mesh(config.mesh, jax.devices()[:devices]).shape)
  run, metrics = stepped(config, devices)
  np.testing.assert_allclose(metrics['loss'], alone[1]['loss'], rtol=2e-5)
  assert_close(run.state.models, alone[0].state.models, 2e-5)


@pytest.mark.parametrize('stored', ['int8', pytest.param('bfloat16', marks=LONG)])
@pytest.mark.slow
def test_a_teacher_is_kept_in_less(teacher, alone, stored):
  """Its laws are nearly the same."""
  config = distilling(teacher, CASES['jsd at 2'] | {'teacher_stored': stored})
  run, metrics = stepped(config)
  bits = {x.dtype for x in jax.tree.leaves(run.state.models['teacher'])}
  assert jnp.dtype(stored) in bits
  np.testing.assert_allclose(metrics['loss'], alone[1]['loss'], rtol=5e-2)
  assert metrics['loss'] != alone[1]['loss']


@pytest.mark.slow
def test_an_adapter_learns_of_a_teacher(teacher):
  config = distilling(teacher, {})
  config = dataclasses.replace(config, adapter=AdapterConfig(kind='lora', rank=2))
  begun, (run, _) = Run(config), stepped(config)
  for name in ('teacher', 'policy'):
    assert_same(begun.state.models[name], run.state.models[name])
  after, before = host(run.state.models['adapter']), host(begun.state.models['adapter'])
  assert any(after[name].tobytes() != before[name].tobytes() for name in after)


# On records.


@pytest.mark.parametrize('weighting', ['token', pytest.param('example', marks=pytest.mark.slow)])
def test_what_the_assistant_says_is_distilled(tmp_path, one_device, weighting):
  """Packed examples are what each is alone, and nothing of a question counts."""
  rows = [{'prompt': prompt, 'completion': answer} for prompt, answer in test_sft.PAIRS]
  source = written_lines(tmp_path, rows, 'completion')
  teacher = written(tmp_path / 'teacher', None)
  objective = DistilSFT(
    teacher=teacher, weighting=weighting, temperature=2.0, cross_entropy=0.5, packing='fit'
  )
  made = test_sft.config(source, objective)
  batch = test_sft.rows_of(made)
  assert batch.segments.max() > 1
  ids = np.zeros((len(rows), T + 1), np.int32)
  weights = np.zeros((len(rows), T))
  for row, (prompt, answer) in enumerate(test_sft.PAIRS):
    text = [1, *(b + 3 for b in (prompt + answer).encode()), 2]
    ids[row, : len(text)] = text
    answers = slice(len(prompt), len(prompt) + len(answer) + 1)
    weights[row, answers] = 1 / (len(answer) + 1) if weighting == 'example' else 1
  loss, logits = of_both(objective, models(), batch, lambda model: logits_of(model, ids[:, :-1]))
  expected, _ = by_hand(objective, logits, ids[:, 1:], weights)
  np.testing.assert_allclose(loss, expected, rtol=2e-5)


def written_lines(directory, rows, form):
  path = directory / 'rows.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return SourceConfig(kind='jsonl', path=str(path), format=form)


def logits_of(model, ids):
  return model.logits(model(jnp.asarray(ids)).hidden)


def of_both(objective, models, batch, logits):
  def run(models, batch):
    return mean(objective, models, batch), {name: logits(model) for name, model in models.items()}

  batch = jax.tree.map(jnp.asarray, batch)
  return quickly(jax.jit(run), models, batch)(models, batch)


@pytest.mark.slow
@pytest.mark.long
def test_an_encoder_decoder_is_distilled(tmp_path, one_device):
  rows = [{'source': source, 'target': target} for source, target in test_seq2seq.PAIRS]
  source = written_lines(tmp_path, rows, 'pair')
  shape = test_seq2seq.T5 | {'width': 48, 'layers': 3, 'encoder_layers': 1}
  teacher = written(tmp_path / 'teacher', None, **shape)
  objective = DistilSeq2Seq(
    teacher=teacher, target_length=test_seq2seq.T, divergence='reverse_kl', temperature=2.0
  )
  made = test_seq2seq.config(source, objective)
  check_models(made)
  batch = test_seq2seq.rows_of(made)
  sources, segments, inputs, targets = test_seq2seq.alone()
  both = {'policy': new(made.model, 0), 'teacher': new(configs.load(teacher).model, 1)}

  def logits(model):
    ones = jnp.ones_like(inputs)
    args = {'source': jnp.asarray(sources), 'source_segments': jnp.asarray(segments)}
    return model.logits(model(jnp.asarray(inputs), None, ones, **args).hidden)

  loss, scores = of_both(objective, both, batch, logits)
  expected, _ = by_hand(objective, scores, np.maximum(targets, 0), targets >= 0)
  np.testing.assert_allclose(loss, expected, rtol=2e-5)
  one, eight = (
    Run(dataclasses.replace(made, mesh=MeshConfig(**mesh)), devices)
    for devices, mesh in ((1, {}), (8, {'data': 2, 'fsdp': 2, 'tensor': 2}))
  )
  for run in (one, eight):
    run.go([jax.tree.map(lambda x: np.asarray(x)[:B], batch)])
  assert_close(one.state.models, eight.state.models, 2e-5)


def test_logits_of_all_tokens_never_are(teacher):
  """Of a step, forward and back, with both laws."""
  rows, length, ids = 64, 256, 65536
  model = {'vocabulary': ids, 'width': 16, 'layers': 1, 'feed_forward': 16, 'max_length': length}
  data = {'batch_size': rows, 'sequence_length': length}
  config = distilling(teacher, CASES['jsd at 2'] | {'cross_entropy': 0.5}, model=model, data=data)
  large = written_over(teacher, **model)
  config = dataclasses.replace(
    config, objective=dataclasses.replace(config.objective, teacher=large)
  )
  lowered, _ = lower_step(config, make_mesh(config.mesh, jax.devices()[:1]))
  temporary = lowered.compile().memory_analysis().temp_size_in_bytes
  assert temporary < 4 * rows * length * ids / 6


def written_over(teacher, **model):
  directory = pathlib.Path(teacher).parent / 'large'
  directory.mkdir(exist_ok=True)
  return written(directory, None, **{'width': 32, 'layers': 1, 'feed_forward': 16} | model)


# With what a teacher said once.


def asked_batch(objective, both, batch):
  """The batch with what the teacher says of its likeliest ids."""
  return {'rows': batch} | objective.asked().answer(both['teacher'], batch)


@pytest.mark.parametrize(
  'divergence',
  ['jsd', *(pytest.param(name, marks=LONG) for name in ('forward_kl', 'reverse_kl'))],
)
def test_what_is_not_among_the_likeliest_is_one_rest(divergence, one_device):
  """The formula of laws of K ids and of the rest; of all ids it is that of whole laws."""
  fields = {'divergence': divergence, 'temperature': 2.0, 'cross_entropy': 0.25}
  stored = {K: Distil(teacher='x', stored_top_k=K, **fields) for K in (5, V)}
  live = Distil(teacher='x', **fields)

  def run(both, batch):
    logits = {name: all_logits(model, batch) for name, model in both.items()}
    batches = {K: asked_batch(objective, both, batch) for K, objective in stored.items()}
    said = {K: mean(objective, both, batches[K]) for K, objective in stored.items()}
    return said, mean(live, both, batch), batches[5]['top_ids'], logits

  both, batch = models(), ragged()
  said, whole, ids, logits = quickly(jax.jit(run), both, batch)(both, batch)
  np.testing.assert_allclose(said[V], whole, rtol=1e-4)

  def coarse(z):
    """Logits of K ids and one of the rest, of the same law at the temperature."""
    z = np.asarray(z, np.float64) / 2
    z = z - np.log(np.exp(z).sum(-1, keepdims=True))
    few = np.take_along_axis(z, np.asarray(ids), -1)
    rest = np.log1p(-np.exp(few).sum(-1, keepdims=True))
    return 2 * np.concatenate([few, rest], -1)

  plain = dataclasses.replace(live, cross_entropy=0.0)
  few = {name: coarse(z) for name, z in logits.items()}
  none = np.zeros(batch.targets.shape, int)
  divergence, _ = by_hand(plain, few, none, batch.weights)
  text = dataclasses.replace(live, cross_entropy=1.0)
  nll, _ = by_hand(text, logits, batch.targets, batch.weights)
  np.testing.assert_allclose(said[5], 0.75 * divergence + 0.25 * nll, rtol=1e-4)
  assert said[5] < whole, 'a coarser law is nearer'


@pytest.mark.slow
@pytest.mark.long
def test_stored_steps_are_the_same_over_devices(teacher):
  both, batches = models(), make_batches(2)
  after = []
  for devices, mesh in ((1, {}), (8, {'data': 2, 'fsdp': 2, 'tensor': 2}), (2, {'context': 2})):
    config = distilling(teacher, {'stored_top_k': 5, 'divergence': 'jsd'}, mesh={'data': 1} | mesh)
    run = Run(config, devices)
    assert list(run.state.models) == ['policy']
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
      said = [
        jax.tree.map(np.asarray, asked_batch(config.objective, both, jax.tree.map(jnp.asarray, b)))
        for b in batches
      ]
    with jax.set_mesh(run.mesh):
      rows = jax.NamedSharding(run.mesh, distil.ax.spec('batch', 'length'))
      put = hosts.RowShards(rows, (B, T))
      for batch in said:
        run.state, metrics, _ = run.step(run.state, put(batch))
    after.append(jax.device_get(run.state.models))
  for other in after[1:]:
    assert_close(other, after[0], 2e-5)


# What is refused.


@pytest.mark.parametrize(
  'fields, match',
  [
    ({'divergence': 'kl'}, "objective.divergence='kl' is unknown"),
    ({'beta': 0.1}, "objective.beta=0.1 is of objective.divergence='jsd'.*leave it out"),
    ({'beta': 1.0, 'divergence': 'jsd'}, 'objective.beta=1.0 must be between 0 and 1'),
    ({'temperature': 0.0}, 'objective.temperature=0.0 must be above 0'),
    ({'cross_entropy': 1.5}, 'objective.cross_entropy=1.5 is a share'),
    ({'z_loss': 0.1}, 'objective.z_loss=0.1 is added to the cross-entropy.*leave it out, or raise'),
    ({'stored_top_k': -1}, 'objective.stored_top_k=-1 must be at least 0'),
    ({'teacher_stored': 'int4'}, "objective.teacher_stored='int4' is unknown"),
  ],
)
def test_settings_that_cannot_be(fields, match):
  with pytest.raises(ValueError, match=match):
    Distil(teacher='x', **fields)


def test_noise_cannot_be_asked_about_beforehand():
  for kind in (distil.DistilSpanCorruption, distil.DistilMaskedLM):
    with pytest.raises(NotImplementedError, match='objective.stored_top_k=8 of.*drawn anew.*use 0'):
      kind(teacher='x', stored_top_k=8)


def test_a_teacher_that_cannot_teach(tmp_path, teacher):
  with pytest.raises(ValueError, match="objective.teacher='' names no run.*=runs/large"):
    check_models(distilling(''))
  with pytest.raises(FileNotFoundError, match='is not the directory of a run'):
    check_models(distilling(str(tmp_path / 'nothing')))
  check_models(distilling(teacher))
  one = PipelineConfig(schedule='1f1b')
  config = distilling(teacher)
  config = dataclasses.replace(config, model=config.model.with_execution(pipeline=one))
  with pytest.raises(NotImplementedError, match="the teacher.*schedule='1f1b' is of one; use"):
    check_models(config)
  other = written(tmp_path / 'other', None, vocabulary=300)
  with pytest.raises(ValueError, match='model.vocabulary=264.*300.*model.vocabulary=300 and'):
    check_models(distilling(other))
  encoder = written(tmp_path / 'encoder', None, causal=False)
  with pytest.raises(NotImplementedError, match='the teacher, objective.teacher=.*is an encoder'):
    check_models(distilling(encoder))
  coded = tiny().model.with_execution(stored=('*=int8',))
  with pytest.raises(ValueError, match=r"teacher_stored='int8'.*in codes already \(\*=int8\)"):
    models = {'policy': tiny().model, 'teacher': coded}
    Distil(teacher='t', teacher_stored='int8').accepts(models)
  longer = distilling(teacher, model={'max_length': 32}, data={'sequence_length': 32})
  with pytest.raises(ValueError, match='rows of 32 tokens.*max_length=16 of teacher'):
    longer.check_mesh(make_mesh(MeshConfig(), jax.devices()[:1]).shape)


def test_a_teacher_of_other_ids_is_refused(tmp_path):
  rows = [{'prompt': 'a', 'completion': 'b' * n} for n in range(1, 6)]
  source = written_lines(tmp_path, rows, 'completion')
  known = {
    'bytes': ByteTokenizer(),
    'letters': CharTokenizer({'a', 'b'}),
    'more': extended(ByteTokenizer(), ['<mask>']),
  }
  for name, tokenizer in known.items():
    directory = written(tmp_path / name, tokenizer)
    made = test_sft.config(source, DistilSFT(teacher=directory))
    if name != 'letters':
      made.objective.read(made.data, lambda line: None)
      continue
    with pytest.raises(ValueError, match=r"of the data \(byte, 259 ids\).*teacher=.*\(char, 5 ids"):
      made.objective.read(made.data, lambda line: None)


# Planted faults: the formula must see them.


def forgotten(monkeypatch, name):
  if name == 'mask':
    monkeypatch.setattr(
      Distil, '_diverged', lambda self, p, q, w: logprobs.kl(p, q, jnp.ones_like(w))
    )
    # A weight of 0 hides what is counted; padding that counts like a token does not.
    return lambda batch: dataclasses.replace(batch, weights=jnp.maximum(batch.weights, 0.5))
  if name == 'direction':
    monkeypatch.setattr(Distil, '_diverged', lambda self, p, q, w: logprobs.kl(q, p, w))
  if name == 'temperature of the student':
    plain = distil.law
    monkeypatch.setattr(
      distil,
      'law',
      lambda model, x, warmth: plain(model, x, 1.0 if model.config.L == 2 else warmth),
    )
  return lambda batch: batch


@pytest.mark.parametrize('name', ['mask', 'direction', 'temperature of the student'])
@pytest.mark.slow
@pytest.mark.long
def test_planted_faults_are_seen(monkeypatch, one_device, name):
  _, logits = values()
  batch, both = ragged(), models()
  objective = Distil(teacher='x', temperature=2.0)
  expected, _ = by_hand(objective, logits, batch.targets, batch.weights)
  np.testing.assert_allclose(mean(objective, both, batch), expected, rtol=2e-5)
  change = forgotten(monkeypatch, name)
  jax.clear_caches()
  assert abs(mean(objective, both, change(batch)) / expected - 1) > 1e-3


# From a teacher's run to a student's.


@pytest.mark.slow
@pytest.mark.long
def test_a_run_learns_of_a_run_and_resumes(corpus, tmp_path):
  """Uninterrupted or not, bit for bit; the teacher is named in checkpoints, and not in them."""
  run_here(on(corpus, model=TEACHER, train={'steps': 1, 'save_every': 1}), tmp_path / 'teacher')
  mesh = {'data': 4, 'tensor': 2}

  def student(steps):
    train = {'steps': steps, 'save_every': 2, 'eval_every': 2}
    config = on(corpus, train=train, mesh=mesh)
    objective = Distil(teacher=str(tmp_path / 'teacher'), temperature=2.0, cross_entropy=0.5)
    return dataclasses.replace(config, objective=objective)

  run_here(student(4), tmp_path / 'whole')
  run_here(student(2), tmp_path / 'again')
  run_here(student(4), tmp_path / 'again')
  record, whole = leaves_of(tmp_path / 'whole', 4)
  assert_same(whole, leaves_of(tmp_path / 'again', 4)[1])
  assert not [name for name in whole if 'teacher' in name]
  assert record['references'] == {'teacher': Checkpoints(tmp_path / 'teacher').reference(1)}
  assert configs.load(tmp_path / 'whole').objective == student(4).objective
  last = list(read_metrics(tmp_path / 'whole' / 'metrics.jsonl'))[-1]
  parts = 2 * last['validation_divergence'] + 0.5 * last['validation_cross_entropy']
  np.testing.assert_allclose(last['validation_loss'], parts, rtol=1e-6)
  assert last['bits_per_byte'] > 0
  opened = open_run(tmp_path / 'whole')
  assert opened.model.config.D == 32

  # Another teacher is another run; the same one may be elsewhere.
  shutil.copytree(tmp_path / 'teacher', tmp_path / 'moved')
  run_here(
    on(corpus, model=TEACHER, train={'steps': 1, 'save_every': 1, 'seed': 3}), tmp_path / 'other'
  )
  for name in ('other', 'moved'):
    objective = dataclasses.replace(student(5).objective, teacher=str(tmp_path / name))
    longer = dataclasses.replace(student(5), objective=objective)
    if name == 'moved':
      run_here(longer, tmp_path / 'again')
      continue
    with pytest.raises(SystemExit, match="'teacher' of this run is checkpoint 1 .* another model"):
      run_here(longer, tmp_path / 'again')


@pytest.mark.slow
@pytest.mark.long
def test_a_teacher_is_asked_once(corpus, tmp_path):
  """Whole or not at all, for this teacher and these rows alone; and no step holds it."""
  teacher = tmp_path / 'teacher'
  run_here(on(corpus, model=TEACHER, train={'steps': 1, 'save_every': 1}), teacher)
  cache = tmp_path / 'cache'

  def student(steps=2, **fields):
    config = on(corpus, train={'steps': steps, 'save_every': 1}, data={'cache_dir': str(cache)})
    objective = Distil(teacher=str(teacher), stored_top_k=8, temperature=2.0, **fields)
    return dataclasses.replace(config, objective=objective)

  def kept():
    return sorted(path for path in cache.glob('said-*') if path.is_dir())

  run_here(student(1), tmp_path / 'run')
  (first,) = kept()
  record = Checkpoints(tmp_path / 'run').record(1)
  assert record['references'] == {} and not [name for name in record['leaves'] if 'teach' in name]
  written = {path: path.stat().st_mtime_ns for path in first.iterdir()}
  run_here(student(2), tmp_path / 'run')
  run_here(student(2), tmp_path / 'again')
  assert_same(*(leaves_of(tmp_path / name, 2)[1] for name in ('run', 'again')))
  assert kept() == [first] and written == {p: p.stat().st_mtime_ns for p in first.iterdir()}
  last = read_metrics(tmp_path / 'run' / 'metrics.jsonl')[-1]
  assert last['validation_divergence'] > 0

  # Of what is damaged nothing is used, and the remedy is said.
  (file,) = first.glob('train-0.top_logs')
  content = file.read_bytes()
  file.write_bytes(content[:-4] + b'1234')
  with pytest.raises(SystemExit, match=f'delete {first} and run again'):
    run_here(student(3), tmp_path / 'run')
  file.write_bytes(content)

  # A teacher that learned more is another one: a run goes on with the one that it began with.
  run_here(on(corpus, model=TEACHER, train={'steps': 2, 'save_every': 1}), teacher)
  with pytest.raises(SystemExit, match='(?s)the data order has changed.*said-'):
    run_here(student(3), tmp_path / 'run')
  assert len(kept()) == 2


@pytest.mark.oracle
def test_trl_has_the_same_loss():
  """GKD's generalised divergence, at its own ends too, of ragged masks."""
  torch = pytest.importorskip('torch')
  trainer = pytest.importorskip('trl.experimental.gkd').GKDTrainer
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    _, logits = values()
  batch = ragged()
  counted = np.asarray(batch.weights) > 0
  student, teacher = (torch.tensor(np.array(logits[name])) for name in ('policy', 'teacher'))
  labels = torch.tensor(np.where(counted, np.asarray(batch.targets), -100))
  for fields, beta in (
    ({}, 0.0),
    ({'divergence': 'reverse_kl'}, 1.0),
    ({'divergence': 'jsd'}, 0.5),
  ):
    objective = Distil(teacher='x', temperature=2.0, **fields)
    expected = trainer.generalized_jsd_loss(
      student, teacher, labels, beta, temperature=2.0, reduction='batchmean'
    )
    _, divergence = by_hand(objective, logits, batch.targets, counted)
    np.testing.assert_allclose(divergence, float(expected), rtol=1e-5)
