"""Do the objectives that put noise right minimise what they say: by hand, on any mesh, in any
microbatches, from a corpus to a model that generates?
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import huggingface, tokenizers
from data.chunks import ChunkTokens, uniform
from data.config import TokenizerConfig
from data.masking import Masking
from data.spans import Spans
from decode.generator import Generator
from model import flops
from model.config import ModelConfig
from model.execution import ExecutionConfig
from objectives.denoise import MaskedLM, SpanCorruption
from objectives.next_token import NextToken
from parallel.mesh import MeshConfig, make_mesh
from parallel.pipeline import PipelineConfig
from tests.data import tokenizer_families as families
from tests.training.conftest import (
  B,
  T,
  Trainer,
  V,
  assert_close,
  assert_same,
  host,
  on,
  run_here,
  tiny,
)
from training import program, spent
from training.config import Config
from workdir.metrics import read_metrics
from workdir.open import open_run

RATE = 0.2
SGD = {'name': 'sgd', 'learning_rate': RATE, 'weight_decay': 0.0, 'clip_norm': 0.0, 'momentum': 0.0}
SPANS = SpanCorruption(noise_density=0.3, mean_span=2.0, sentinels=5)
MASKS = MaskedLM(masked=0.4)
T5 = {
  'encoder_layers': 2,
  'position': 'relative',
  'relative_buckets': 8,
  'relative_distance': 12,
  'activation': 'gelu',
  'kv_heads': 4,
}
BERT = {
  'causal': False,
  'norm': 'layer',
  'norm_placement': 'post',
  'position': 'learned',
  'biases': 'all',
  'gated': False,
  'activation': 'gelu_exact',
  'tie_embeddings': True,
  'head': 'mlm',
  'token_types': 2,
  'kv_heads': 4,
}
OBJECTIVES = {'spans': (SPANS, T5), 'masks': (MASKS, BERT)}
each = pytest.mark.parametrize('name', OBJECTIVES)


def config_of(name, **parts) -> Config:
  objective, model = OBJECTIVES[name]
  parts = {'optimizer': SGD} | parts
  parts['model'] = model | parts.get('model', {})
  return dataclasses.replace(tiny(**parts), objective=objective)


def noise_of(name):
  if name == 'masks':
    text = np.arange(3, 259)
    return Masking(T, '', MASKS.masked, MASKS.replaced, MASKS.random, text, 259)
  return Spans(SPANS.lengths(tiny().data), '', tuple(range(263, 258, -1)), eos=2, start=0)


@functools.cache
def batches(name):
  """Two batches, some of whose rows weigh nothing, so that microbatches and devices differ."""
  noise, draw, made = noise_of(name), np.random.default_rng(7), []
  for step in range(2):
    batch = noise.empty(B)
    for row in range(B):
      tokens = draw.integers(3, 259, noise.length).astype(np.int32)
      index = np.arange(noise.length)
      first = noise.length // 3
      chunk = ChunkTokens(
        tokens, np.where(index < first, index, index - first), 1 + (index >= first)
      )
      noise.fill(chunk, functools.partial(uniform, 0, 0, step * B + row), batch, row)
    batch.weights[[2, 5 + step]] = 0
    made.append(batch)
  return made


def mean_loss(name, model, batch):
  """Nats a scored token, by the logits of everything."""
  others = {}
  if name == 'spans':
    others = {
      'source': batch.source,
      'source_positions': batch.source_positions,
      'source_segments': batch.source_segments,
    }
  hidden = model(batch.tokens, batch.positions, batch.segments, **others).hidden
  logs = jax.nn.log_softmax(model.logits(hidden))
  picked = jnp.take_along_axis(logs, batch.targets[..., None], 2)[..., 0]
  return -(picked * batch.weights).sum() / batch.weights.sum()


def on_device(batch):
  return jax.tree.map(jnp.asarray, batch)


@functools.cache
def alone(name):
  """Models before a step on one device, after it, and after another; metrics of both steps."""
  trainer = Trainer(config_of(name))
  models, metrics = [jax.tree.map(jnp.copy, trainer.state.models)], []
  for batch in batches(name):
    metrics.append(trainer.step(batch)[0])
    models.append(jax.tree.map(jnp.copy, trainer.state.models))
  return models, metrics


@pytest.mark.slow
@each
def test_a_step_is_the_absolute_step(name, one_device):
  """Parameters - rate * gradient of the mean over what is scored, worked out by hand; all of them
  move.
  """
  (before, after, _), (metrics, _) = alone(name)
  before, after, batch = before['policy'], after['policy'], on_device(batches(name)[0])
  value, gradient = jax.jit(jax.value_and_grad(functools.partial(mean_loss, name)))(before, batch)
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-5)
  assert metrics['predicted_tokens'] == batches(name)[0].weights.sum()
  expected = jax.tree.map(lambda p, g: p - RATE * g, before, gradient)
  assert_close(after, expected, 2e-6)
  after = host(after)
  still = [path for path, x in host(before).items() if (x == after[path]).all()]
  assert not still


@pytest.mark.slow
@each
def test_the_gradient_is_a_difference(name, one_device):
  """In a random direction, by differences of the objective's own loss whose error is of the fourth
  order.
  """
  objective = OBJECTIVES[name][0]
  model, batch = alone(name)[0][0]['policy'], on_device(batches(name)[0])

  @jax.jit
  def value(model):
    total, weight = objective.loss({'policy': model}, batch)[objective.term]
    return total / weight

  keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(model))))
  direction = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), model)
  size = 1e-3

  def between(step):
    ahead, behind = (
      value(jax.tree.map(lambda p, d: p + s * d, model, direction)) for s in (step, -step)
    )
    return ahead - behind

  slope = sum(
    jnp.vdot(g, d)
    for g, d in zip(jax.tree.leaves(jax.jit(jax.grad(value))(model)), jax.tree.leaves(direction))
  )
  difference = (8 * between(size) - between(2 * size)) / (12 * size)
  np.testing.assert_allclose(slope, difference, rtol=1e-2)
  assert abs(slope) > 0.1


MESHES = [
  ('spans', 2, 1, {}),
  ('masks', 4, 1, {}),
  ('spans', 1, 8, {'data': 2, 'fsdp': 2, 'tensor': 2}),
  ('masks', 1, 8, {'data': 2, 'fsdp': 2, 'tensor': 2}),
  ('spans', 2, 4, {'data': 1, 'fsdp': 2, 'tensor': 2}),
  ('spans', 2, 4, {'data': 1, 'fsdp': 2, 'tensor': 2, 'zero': 2}),
  ('masks', 2, 4, {'data': 1, 'fsdp': 2, 'tensor': 2, 'zero': 1}),
  ('spans', 1, 4, {'stage': 2, 'data': 2}),
  ('masks', 1, 4, {'stage': 2, 'data': 2}),
  ('masks', 2, 4, {'data': 1, 'context': 2, 'fsdp': 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize('name, parts, devices, mesh', MESHES, ids=str)
def test_microbatches_and_devices_are_one_big_batch(name, parts, devices, mesh):
  models, wanted = alone(name)
  trainer = Trainer(config_of(name, mesh=mesh, train={'accumulation': parts}), devices)
  metrics = trainer.run(batches(name))[-1]
  assert_close(trainer.state.models, models[-1], 5e-6)
  for said, value in wanted[-1].items():
    np.testing.assert_allclose(metrics[said], value, rtol=1e-4, err_msg=said)


@pytest.mark.slow
def test_an_encoder_goes_through_1f1b():
  execution = ExecutionConfig(pipeline=PipelineConfig(schedule='1f1b'))
  config = config_of('masks', mesh={'stage': 2, 'data': 2}, model={'execution': execution})
  trainer = Trainer(config, 4)
  trainer.run(batches('masks'))
  assert_close(trainer.state.models, alone('masks')[0][-1], 5e-6)


@pytest.mark.costly
@each
def test_what_is_not_scored_does_not_count(name, one_device):
  """Whatever its target is said to be; and the denominator is of what is scored."""
  objective, model = OBJECTIVES[name][0], alone(name)[0][0]
  batch = batches(name)[0]
  others = np.where(batch.weights > 0, batch.targets, (batch.targets + 7) % V)
  assert (others != batch.targets).any()
  loss = jax.jit(objective.loss)
  first = loss(model, on_device(batch))
  again = loss(model, on_device(dataclasses.replace(batch, targets=others)))
  assert jax.tree.map(float, first) == jax.tree.map(float, again)
  assert float(first[objective.kind][1]) == np.count_nonzero(batch.weights)


def test_what_it_cannot_train_is_refused_by_name():
  decoder = ModelConfig()
  for objective, model, words in (
    (SPANS, decoder, 'model.encoder_layers=0 has no encoder; set model.encoder_layers'),
    (MASKS, decoder, 'model.causal=True sees one; set model.causal=False'),
    (MASKS, ModelConfig(**T5), 'set model.causal=False and model.encoder_layers=0'),
    (NextToken(), ModelConfig(**T5), "use a decoder, or objective.kind='span_corruption'"),
    (NextToken(), ModelConfig(**BERT), "use a decoder, or objective.kind='masked_lm'"),
  ):
    with pytest.raises(NotImplementedError, match=words):
      objective.accepts({'policy': model})
  execution = ExecutionConfig(pipeline=PipelineConfig(schedule='1f1b'))
  with pytest.raises(NotImplementedError, match="1f1b.* is a second; use 'gpipe' or 'circular'"):
    SPANS.accepts({'policy': ModelConfig(**T5 | {'position': 'rope', 'execution': execution})})
  with jax.set_mesh(make_mesh(MeshConfig(context=2, data=1), jax.devices()[:2])):
    with pytest.raises(NotImplementedError, match='mesh.context=2; use data, fsdp or tensor'):
      program.make_program(config_of('spans', mesh={'context': 2}))


@pytest.mark.parametrize(
  'kind, changes, words',
  [
    (SpanCorruption, {'noise_density': 0.6}, 'noise_density=0.6 must be above 0 and at most 0.5'),
    (SpanCorruption, {'mean_span': 0.5}, 'mean_span=0.5 must be at least 1'),
    (SpanCorruption, {'sentinels': 0}, 'sentinels=0 must be at least 1'),
    (MaskedLM, {'masked': 0.0}, 'masked=0.0 must be above 0'),
    (MaskedLM, {'replaced': 0.95}, 'replaced=0.95 and objective.random=0.1 .*at most 1 together'),
    (MaskedLM, {'z_loss': -1.0}, 'z_loss=-1.0'),
  ],
)
def test_settings_that_cannot_be_are_refused(kind, changes, words):
  with pytest.raises(ValueError, match=words):
    kind(**changes)


def quiet(_):
  pass


def test_sentinels_are_ids_of_their_own_or_there_are_too_few(corpus):
  config = on(corpus)
  read = SPANS.read(config.data, quiet)
  # Behind the tokenizer's 259, counted down; the vocabulary that the run takes has them.
  assert read.noise.sentinels == (263, 262) and read.tokenizer.vocabulary == 264
  assert config.resolve(264).model.V == 264
  small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocabulary=260))
  with pytest.raises(ValueError, match="model.vocabulary=260 is smaller than the tokenizer's 264"):
    small.resolve(read.tokenizer.vocabulary)
  few = dataclasses.replace(SPANS, sentinels=1)
  with pytest.raises(ValueError, match='sequence_length=16 has 2 spans .* the tokenizer 1 sentin'):
    few.read(config.data, quiet)


def test_ids_that_a_tokenizer_has_are_taken(corpus, tmp_path):
  """T5's <extra_id_..>, wherever they are, and BERT's [MASK]; nothing is added."""
  for family, objective in (('t5', SPANS), ('bert', MASKS)):
    contents = families.contents(family)
    if family == 't5':
      # Which has the first; T5's own have all at the end, the last one first.
      contents = huggingface.HuggingFaceTokenizer(contents).extended(['<extra_id_1>'])._files()
    (tmp_path / family).mkdir()
    for file, content in contents.items():
      (tmp_path / family / file).write_bytes(content)
    settings = TokenizerConfig(kind='huggingface', path=str(tmp_path / family))
    read = objective.read(on(corpus, data={'tokenizer': settings}).data, quiet)
    before = tokenizers.load(tmp_path / family)
    assert read.tokenizer.vocabulary == before.vocabulary
    if family == 't5':
      first = before.encode('<extra_id_0>', special=True)
      assert read.noise.sentinels == (*first, before.vocabulary - 1)
      assert (read.noise.start, read.noise.eos) == (before.pad, before.eos)
    else:
      assert [read.noise.mask] == before.encode('[MASK]', special=True)
      assert not {read.noise.mask, before.bos, before.eos, before.pad} & {*read.noise.text}


def test_costs_are_of_sources_and_targets():
  config = config_of('spans')
  lengths = SPANS.lengths(config.data)
  assert SPANS.row_tokens(config.data) == lengths.source + lengths.target == 24
  of_pair = flops.pair_flops(config.model, lengths.source, lengths.target)
  assert spent.flops_per_token(config) == pytest.approx(3 * of_pair / 24)
  like = SPANS.batch_like(config.data)
  assert jax.tree.map(jnp.shape, on_device(batches('spans')[0])) == jax.tree.map(jnp.shape, like)
  assert int(SPANS.tokens(on_device(batches('spans')[0]))) == 24 * B
  masks = config_of('masks')
  whole = flops.forward_flops_per_token(masks.model, T, 5.0)
  head = 2 * masks.model.D * V
  assert spent.flops_per_token(masks, 5.0) == pytest.approx(3 * (whole - 0.6 * head))


@pytest.fixture(scope='module')
def run(corpus, tmp_path_factory):
  """(name) -> the directory of a run of four steps on all devices."""

  @functools.cache
  def made(name):
    directory = tmp_path_factory.mktemp(name)
    run_here(trained(name, corpus), directory)
    return directory

  return made


def trained(name, corpus, steps=4):
  objective, model = OBJECTIVES[name]
  mesh = {'data': 2, 'fsdp': 2, 'tensor': 2}
  train = {'steps': steps, 'save_every': 2, 'eval_every': 2}
  config = on(corpus, model=model, mesh=mesh, train=train)
  return dataclasses.replace(config, objective=objective)


@pytest.mark.slow
@pytest.mark.long
@each
def test_a_run_says_how_good_it_is(name, run, corpus, one_device):
  """The last evaluation is by hand that of all that is held out."""
  last = read_metrics(run(name) / 'metrics.jsonl')[-1]
  config = trained(name, corpus)
  opened = open_run(run(name))
  data = config.objective.read(config.data, quiet)
  by_hand = jax.jit(functools.partial(mean_loss, name))
  judged = jax.jit(lambda model, batch: config.objective.judged({'policy': model}, batch))
  total = scored = right = 0
  for batch in config.objective.validation_batches(data, config.data, range(B)):
    batch = on_device(batch)
    tokens = float(batch.weights.sum())
    if tokens:
      total += float(by_hand(opened.model, batch)) * tokens
      scored += tokens
      right += float(judged(opened.model, batch)['correct'])
  assert last['validation_loss'] == pytest.approx(total / scored, rel=1e-4)
  assert last['validation_accuracy'] == pytest.approx(right / scored, rel=1e-6)
  assert 'bits_per_byte' not in last
  report = json.loads((run(name) / 'run.json').read_text())
  assert report['flops_per_token'] == pytest.approx(
    spent.flops_per_token(config.resolve(V), data.document_length)
  )


@pytest.mark.slow
@each
def test_resumed_is_uninterrupted(name, run, corpus, tmp_path):
  run_here(trained(name, corpus, 2), tmp_path)
  run_here(trained(name, corpus), tmp_path)
  assert_same(open_run(run(name)).model, open_run(tmp_path).model)
  ours, theirs = (
    [line['loss'] for line in read_metrics(where / 'metrics.jsonl') if 'loss' in line]
    for where in (run(name), tmp_path)
  )
  assert ours == theirs


@pytest.mark.slow
def test_a_run_of_spans_generates_with_its_sentinels(run):
  generator = Generator.load(str(run('spans')))
  assert generator.tokenizer.vocabulary == 264
  (made,) = generator([[70, 71, 263, 72, 2]], max_new_tokens=6, seed=0)
  assert made.ids and all(0 <= i < 264 for i in made.ids)
  with pytest.raises(ValueError, match='an encoder writes no text'):
    Generator.load(str(run('masks')))('a')
