"""Does a step leave out what its keys say, the same on any mesh, in any microbatches, in any way to
run it; and nothing does but a step?
"""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_denoise import BERT, MASKS, SPANS, T5, batches as noised_batches
from test_objective import Run

from kernels import draws
from kernels.draws import Dropout
from model import drawn, rearranged
from model.adaptation import AdapterConfig
from model.config import LatentConfig, MoEConfig
from model.drawn import ENCODER, MATRICES, NUMBERS, Drawn
from model.dropout import PLACES, Rates, rates
from model.execution import ExecutionConfig
from model.params import named_leaves
from model.weights.low_rank import LowRank
from model.weights.plain import Plain
from objectives.next_token import NextToken
from objectives.sft import SFT
from parallel.pipeline import PipelineConfig
from tests.training.conftest import (
  SGD,
  B,
  T,
  Trainer,
  assert_close,
  assert_same,
  make_batches,
  on,
  run_here,
  tiny,
)
from training import drawing, evaluation, state as states
from training.drawing import MODEL
from workdir.metrics import read_metrics
from workdir.open import open_run

RATES = Rates(embedding=0.1, residual=0.2, attention=0.3, feed_forward=0.25)
WHOLE = dataclasses.replace(RATES, attention=0.0)  # what rows that are split may leave out
RESIDUAL = Rates(embedding=0.1, residual=0.2)
LORA = AdapterConfig(kind='lora', rank=4, alpha=8.0, dropout=0.3)
ALPHA = 5.0


def config_of(dropout=RATES, objective=SFT(neftune_alpha=ALPHA), adapter=AdapterConfig(), **parts):
  train = {'dropout': entries(dropout)} | parts.get('train', {})
  made = tiny(**{'optimizer': SGD} | parts | {'train': train})
  return dataclasses.replace(made, objective=objective, adapter=adapter)


def entries(dropout):
  return tuple(f'{name}={rate}' for name, rate in dataclasses.asdict(dropout).items())


# The same in numpy, the hash included: nothing of it is imported.


def threefry(first, second, high, low):
  """Salmon et al., SC 2011, 20 rounds."""
  first, second, high, low = (
    np.asarray(x, np.uint32) for x in np.broadcast_arrays(first, second, high, low)
  )
  schedule = [first, second, first ^ second ^ np.uint32(0x1BD11BDA)]
  a, b = high + schedule[0], low + schedule[1]
  for i in range(5):
    for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
      a = a + b
      b = (b << np.uint32(turn) | b >> np.uint32(32 - turn)) ^ a
    a, b = a + schedule[(i + 1) % 3], b + schedule[(i + 2) % 3] + np.uint32(i + 1)
  return a, b


class ByHand:
  """What the rows of a step draw."""

  def __init__(self, seed, step):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
    rows = [jax.random.key_data(jax.random.fold_in(key, row)) for row in range(B)]
    self.rows = threefry(*np.stack(rows, 1), MODEL, 0)

  def bits(self, site, layer, high, low):
    """[B, ...] of counters [1, ...]."""
    keys = threefry(*self.rows, NUMBERS[site], layer)
    behind = tuple(range(1, np.ndim(high)))
    return np.bitwise_xor(*threefry(*(np.expand_dims(x, behind) for x in keys), high, low))

  def of_tokens(self, site, layer, width):
    return self.bits(site, layer, np.arange(T)[None, :, None], np.arange(width)[None, None])

  def kept(self, site, layer, width, rate):
    return (self.of_tokens(site, layer, width) >= rate * 2**32) / (1 - rate)

  def weights(self, layer, heads, rate):
    head, query, key = np.ix_(range(heads), range(T), range(T))
    bits = self.bits('weights', layer, (query * heads + head)[None], (key + 0 * query)[None])
    return (bits >= rate * 2**32) / (1 - rate)


def rms(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def turned(x, positions):
  half = x.shape[-1] // 2
  angle = positions[..., None, None] / 10000 ** (np.arange(half) / half)
  a, b = x[..., :half], x[..., half:]
  return np.concatenate(
    [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
  )


def loss_by_hand(model, batch, drawn):
  """Nats a target, in f64."""
  p = {name: np.asarray(x, np.float64) for name, x in named_leaves(model).items()}
  x = p['embedding.tokens'][batch.tokens]
  D, same = x.shape[-1], batch.segments[:, :, None] == batch.segments[:, None]
  uniform = (drawn.of_tokens('neftune', 0, D) >> 8) * 2.0**-23 - 1
  x = x + uniform * ALPHA / np.sqrt(same.sum(-1) * D)[..., None]
  x = x * drawn.kept('embedding', 0, D, RATES.embedding)
  seen = same & np.tri(T, dtype=bool)
  for layer in range(2):

    def of(name, layer=layer):
      return p[f'stack.blocks.0.{name}'][layer]

    h = rms(x, of('attention_norm.scale'))
    q, k, v = (np.einsum('btd,dnh->btnh', h, of(f'attention.{name}')) for name in 'qkv')
    q, k = (turned(a, batch.positions) for a in (q, k))
    k, v = (np.repeat(a, 2, 2) for a in (k, v))
    scores = np.where(seen[:, None], np.einsum('btnh,bsnh->bnts', q, k) * 8**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    weights = weights * drawn.weights(layer, 4, RATES.attention)
    y = np.einsum('bnts,bsnh,nhd->btd', weights, v, of('attention.o'))
    x = x + y * drawn.kept('attention', layer, D, RATES.residual)
    h = rms(x, of('feed_forward_norm.scale'))
    gate = h @ of('feed_forward.gate')
    hidden = gate / (1 + np.exp(-gate)) * (h @ of('feed_forward.up'))
    hidden = hidden * drawn.kept('hidden', layer, 64, RATES.feed_forward)
    y = hidden @ of('feed_forward.down')
    x = x + y * drawn.kept('feed_forward', layer, D, RATES.residual)
  logits = rms(x, p['stack.norm.scale']) @ p['head.tokens'].T
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  picked = np.take_along_axis(logs, batch.targets[..., None], -1)[..., 0]
  return -(picked * batch.weights).sum() / batch.weights.sum()


def ran(config, devices=1):
  """Two steps: the model before them, the trainer, metrics of each, models after each."""
  trainer = Trainer(config, devices)
  models, metrics = [jax.tree.map(jnp.copy, trainer.state.models)], []
  for batch in make_batches(2):
    metrics.append(trainer.step(batch)[0])
    models.append(jax.tree.map(jnp.copy, trainer.state.models))
  return models, metrics


alone = functools.cache(ran)


KNOWN = config_of()


def check_known_masks(models, metrics):
  for step, batch in enumerate(make_batches(2)):
    by_hand = loss_by_hand(models[step]['policy'], batch, ByHand(KNOWN.train.seed, step))
    np.testing.assert_allclose(metrics[step]['loss'], by_hand, rtol=1e-5)


@pytest.mark.slow
def test_a_step_leaves_out_what_is_known_by_hand():
  check_known_masks(*alone(KNOWN))
  # Which is not what all of it would give, nor what another step draws.
  (before, *_), (metrics, _) = alone(KNOWN)
  batch = make_batches(2)[0]
  other = loss_by_hand(before['policy'], batch, ByHand(0, 1))
  assert abs(other / metrics['loss'] - 1) > 1e-3


def check_like_alone(config, devices=1, like=KNOWN, tolerance=2e-6):
  models, metrics = ran(config, devices)
  wanted, said = alone(like)
  assert_close(models[-1], wanted[-1], tolerance)
  for name, value in said[-1].items():
    np.testing.assert_allclose(metrics[-1][name], value, rtol=1e-4, err_msg=name)


def parts_of(accumulation=1, model=(), **mesh):
  return {'train': {'accumulation': accumulation}, 'mesh': mesh, 'model': dict(model)}


@pytest.mark.slow
def test_microbatches_draw_what_the_batch_does():
  check_like_alone(config_of(**parts_of(4)))


MESHES = [
  (RATES, 2, 4, {'data': 2, 'fsdp': 2}),
  (RATES, 1, 8, {'data': 2, 'fsdp': 2, 'tensor': 2}),
  (RATES, 1, 4, {'data': 1, 'tensor': 4}),
  (RATES, 2, 4, {'data': 1, 'fsdp': 2, 'tensor': 2, 'zero': 1}),
  (RATES, 2, 4, {'data': 2, 'fsdp': 2, 'zero': 2}),
  (RATES, 1, 4, {'stage': 2, 'data': 2}),
  (WHOLE, 1, 4, {'context': 2, 'data': 2}),
  (WHOLE, 2, 8, {'context': 2, 'tensor': 2, 'fsdp': 2, 'data': 1}),
]


@pytest.mark.slow
@pytest.mark.parametrize('rates, accumulation, devices, mesh', MESHES, ids=str)
def test_devices_draw_what_one_does(rates, accumulation, devices, mesh):
  config = config_of(rates, **parts_of(accumulation, **mesh))
  check_like_alone(config, devices, config_of(rates), 5e-6)


def run_as(**execution):
  return {'model': {'execution': ExecutionConfig(**execution), 'layers': 4}}


FOUR = config_of(model={'layers': 4})


@pytest.mark.slow
@pytest.mark.parametrize(
  'execution',
  [
    {'remat': 'full'},
    {'remat': 'sqrt'},
    {'remat': 'dots'},
    {'remat': 'full', 'remat_save': ('attention_out',)},
    {'attention': 'reference'},
  ],
  ids=str,
)
def test_however_it_runs_it_draws_the_same(execution):
  check_like_alone(config_of(**run_as(**execution)), like=FOUR)


@pytest.mark.slow
@pytest.mark.parametrize(
  'pipeline', [{}, {'microbatches': 4}, {'schedule': 'circular', 'repeats': 2}], ids=str
)
def test_a_stage_draws_for_its_own_layers(pipeline):
  execution = run_as(pipeline=PipelineConfig(**pipeline), remat='full')
  mesh = {'stage': 2, 'fsdp': 2, 'data': 1}
  check_like_alone(config_of(**execution, mesh=mesh), 4, FOUR, 5e-6)


FAMILIES = {
  'windows': {'window': 4, 'global_every': 2, 'layers': 3},
  'experts': {'moe': MoEConfig(experts=4, shared_feed_forward=32)},
  'latent': {'kv_heads': 4, 'latent': LatentConfig(width=16, rope_width=8)},
  'post': {'norm_placement': 'post', 'biases': 'all', 'norm': 'layer', 'position': 'learned'},
  'both': {'norm_placement': 'both', 'embedding_scale': True, 'tie_embeddings': True},
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('family', FAMILIES)
def test_every_architecture_keeps_the_laws(family):
  rates = dataclasses.replace(RATES, feed_forward=0.0) if family == 'experts' else RATES
  like = config_of(rates, model=FAMILIES[family])
  none = config_of(Rates(), NextToken(), model=FAMILIES[family])
  assert abs(alone(like)[1][0]['loss'] / alone(none)[1][0]['loss'] - 1) > 1e-4
  check_like_alone(config_of(rates, **parts_of(2, FAMILIES[family])), 1, like, 5e-6)
  mesh = {'data': 2, 'fsdp': 2, 'tensor': 2}
  check_like_alone(config_of(rates, **parts_of(1, FAMILIES[family], **mesh)), 8, like, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_layers_one_by_one_draw_as_in_a_scan(family, one_device):
  config = config_of(model=FAMILIES[family], dropout=WHOLE if family != 'experts' else RESIDUAL)
  model = alone(config)[0][-1]['policy']
  batch = jax.tree.map(jnp.asarray, make_batches(1)[0])
  draw = Drawn(keys=draws.keys_of_rows(jnp.uint32([1, 2]), B), rates=config.dropout)

  @jax.jit
  def hidden(model):
    drawing = drawn.put(model, draw)
    return drawing(batch.tokens, batch.positions, batch.segments).hidden

  scanned = hidden(model)
  np.testing.assert_allclose(hidden(rearranged.unstacked(model)), scanned, rtol=1e-5, atol=1e-5)
  without = jax.jit(lambda model: model(batch.tokens, batch.positions, batch.segments).hidden)
  assert np.abs(without(model) - scanned).max() > 0.1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('name', ['spans', 'masks'])
def test_encoders_draw_apart(name):
  """T5's two stacks, and BERT, in microbatches and on devices."""
  objective, model = {'spans': (SPANS, T5), 'masks': (MASKS, BERT)}[name]

  def run(devices=1, **parts):
    trainer = Trainer(config_of(objective=objective, **parts | {'model': model}), devices)
    metrics = trainer.run(noised_batches(name))
    return trainer.state.models, metrics

  models, metrics = run()
  for parts, devices in (
    ({'train': {'accumulation': 4}}, 1),
    ({'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2}}, 8),
    ({'mesh': {'stage': 2, 'data': 2}}, 4),
  ):
    again, said = run(devices, **parts)
    assert_close(again, models, 1e-5)
    np.testing.assert_allclose(said[-1]['loss'], metrics[-1]['loss'], rtol=1e-4)


# What is drawn apart.


def test_no_two_rows_layers_sites_or_steps_share_a_key():
  state = dataclasses.make_dataclass('State', ['key', 'step'])
  config = config_of()
  met = set()
  for step in range(3):
    key = jax.random.key_data(jax.random.key(1, impl='threefry2x32'))
    batch = {'tokens': jnp.zeros((B, T))}
    keys = drawing.StepDraws(config).keys(state(key, jnp.int32(step)), batch)
    for first, layer in itertools.product((0, ENCODER), range(3)):
      made = Drawn(keys=draws.folded(keys, MODEL, 0), first=first).of_layer(
        jnp.uint32(first + layer)
      )
      for site in (*NUMBERS.values(), MATRICES, MATRICES + 1):
        met |= {tuple(row.tolist()) for row in np.asarray(made.at(site))}
  assert len(met) == 3 * B * 2 * 3 * (len(NUMBERS) + 2)
  assert max(NUMBERS.values()) < MATRICES < MODEL


# What does not draw.


def judge(config, models):
  class Stub:
    """Of a run's validation."""

    rows = range(B)

    def __call__(self, batch):
      return jax.tree.map(jnp.asarray, batch)

    def validation_documents(self):
      return ()

  class Judged(NextToken):
    """Its own validation batches, and sums as they are."""

    def validation_batches(self, prepared, config, rows):
      return make_batches(2)

    def verdict(self, sums, prepared):
      return dict(sums)

  config = dataclasses.replace(config, objective=Judged())
  return evaluation.make_evaluate(config, Stub(), Stub())(models)


def check_evaluation():
  models = alone(KNOWN)[0][-1]
  still = config_of(Rates())
  assert judge(KNOWN, models) == judge(still, models)
  assert models['policy'].drawn is None


@pytest.mark.slow
def test_an_evaluation_leaves_nothing_out(one_device):
  check_evaluation()


@pytest.mark.slow
def test_without_rates_a_step_has_nothing_to_do_with_it(one_device, monkeypatch):
  """Not even as an argument."""
  monkeypatch.setitem(sys.modules, 'training.drawing', None)
  assert not config_of(Rates(), SFT()).draws
  run = Run(config_of(Rates(), NextToken()))
  run.step.lower(run.state, jax.tree.map(jnp.asarray, make_batches(1)[0]))


# An adapter.


def test_only_what_a_sees_is_left_out():
  """By numpy: W x + s B A (what is left of x)."""
  draw = np.random.default_rng(0)
  shapes = {'w': (3, 4, 6), 'a': (3, 4, 2), 'b': (2, 6), 'x': (B, T, 3, 4)}
  w, a, b, x = (jnp.float32(draw.normal(size=shape)) for shape in shapes.values())
  axes = {'w': (None,) * 3, 'a': (None,) * 3, 'b': (None,) * 2}
  dropout = Dropout(keys=draws.keys_of_rows(jnp.uint32([1, 2]), B), rate=0.5)
  weight = LowRank(
    Plain(w, axes['w']), Plain(a, axes['a']), Plain(b, axes['b']), None, 2.0, 2, dropout
  )
  y = weight.product('BTNH,NHD->BTD', x, 'float32')
  left = np.asarray(x) * np.asarray(dropout.of_tokens(jnp.ones_like(x)))
  wanted = np.einsum('btnh,nhd->btd', x, w) + 2 * np.einsum('btnh,nhz,zd->btd', left, a, b)
  np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
  assert (left == 0).mean() > 0.4


def adapted_loss(config, models, keys):
  """Of a step's batch, with what a step draws."""
  drawn, batch = drawing.StepDraws(config), jax.tree.map(jnp.asarray, make_batches(1)[0])

  @jax.jit
  def loss(models):
    put = drawn.on(states.applied(config, models), keys)
    return config.objective.loss(put, batch)['next_token'][0]

  return loss(models)


@pytest.mark.slow
def test_a_fresh_adapter_leaves_the_base_as_it_is(one_device):
  """Bitwise, whatever A does not see; and one that has learned is not the same without."""
  config = config_of(Rates(), NextToken(), LORA)
  run = Run(config)
  keys = draws.keys_of_rows(jnp.uint32([1, 2]), B)
  without = dataclasses.replace(config, adapter=dataclasses.replace(LORA, dropout=0.0))
  base = adapted_loss(without, run.state.models, keys)
  assert float(adapted_loss(config, run.state.models, keys)) == float(base)
  awake = run.state.models | {
    'adapter': jax.tree.map(lambda p: p + jnp.float32(0.1), run.state.models['adapter'])
  }
  assert abs(adapted_loss(config, awake, keys) - adapted_loss(without, awake, keys)) > 1e-2


def steps_of_adapter(adapter, devices=1, **parts):
  run = Run(config_of(RATES, NextToken(), adapter, **parts), devices)
  draw = np.random.default_rng(0)
  with jax.set_mesh(run.mesh):
    awake = jax.tree.map(
      lambda p: p + jax.device_put(jnp.float32(0.1 * draw.normal(size=p.shape)), p.sharding),
      run.state.models['adapter'],
    )
  run.state = dataclasses.replace(run.state, models=run.state.models | {'adapter': awake})
  metrics, _ = run.go(make_batches(2))
  return run.state.models['adapter'], metrics['loss']


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('kind', ['lora', 'dora'])
def test_an_adapter_draws_the_same_anywhere(kind):
  adapter = dataclasses.replace(LORA, kind=kind)
  alone, loss = steps_of_adapter(adapter)
  for devices, parts in (
    (1, {'train': {'accumulation': 4}}),
    (1, {'model': {'execution': ExecutionConfig(remat='full')}}),
    (8, {'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2}}),
    (4, {'mesh': {'stage': 2, 'data': 2}, 'train': {'accumulation': 2}}),
  ):
    again, said = steps_of_adapter(adapter, devices, **parts)
    assert_close(again, alone, 5e-6)
    assert said == pytest.approx(loss, rel=1e-5)


# What is refused.


def test_what_cannot_draw_is_refused_by_name(one_device):
  moe = {'model': {'moe': MoEConfig(experts=4)}}
  pipelined = {'model': {'execution': ExecutionConfig(pipeline=PipelineConfig(schedule='1f1b'))}}
  kernel = {'model': {'execution': ExecutionConfig(attention='xla')}}
  for make, words in (
    (lambda: config_of(RATES, **moe), r'feed_forward=0.25 .*experts=4.* use residual'),
    (lambda: config_of(RATES, **kernel), r"attention=0.3 .*attention='xla'.* use one of .*auto"),
    (lambda: config_of(WHOLE, **pipelined), r"train.dropout=embedding=0.1 .*'1f1b'.* use 'gpipe'"),
    (
      lambda: config_of(Rates(), **pipelined),
      r"objective.neftune_alpha=5.0 .*'1f1b'.* use 'gpipe'",
    ),
    (
      lambda: config_of(RATES).check_mesh(
        {'context': 2} | dict.fromkeys(('data', 'fsdp', 'expert', 'tensor', 'stage'), 1)
      ),
      r'attention=0.3 with mesh.context=2.* use data, fsdp or tensor',
    ),
    (
      lambda: drawing.StepDraws(config_of(adapter=LORA, **moe | {'dropout': Rates()})),
      r'adapter.dropout=0.3 of stack.blocks.0.feed_forward.* leave it out of adapter.targets',
    ),
    (
      lambda: drawing.StepDraws(
        config_of(adapter=dataclasses.replace(LORA, targets=('*', 'head.tokens')))
      ),
      r'adapter.dropout=0.3 of head.tokens',
    ),
  ):
    with pytest.raises(NotImplementedError, match=words):
      make()


@pytest.mark.parametrize(
  'make, words',
  [
    (lambda: rates(('residual=1.0',)), "dropout='residual=1.0' must be at least 0, and below 1"),
    (lambda: tiny(train={'dropout': ('attention=-0.1',)}), "dropout='attention=-0.1' must be"),
    (lambda: rates(('atention=0.1',)), "dropout='atention' is unknown; did you mean 'attention'"),
    (lambda: rates(('residual',)), "dropout='residual' has no number; as in 'residual=0.1'"),
    (lambda: AdapterConfig(kind='lora', dropout=1.5), 'adapter.dropout=1.5 must be'),
    (lambda: AdapterConfig(dropout=0.1), "adapter.dropout=0.1 with adapter.kind='' is of no"),
    (lambda: SFT(neftune_alpha=-1.0), 'objective.neftune_alpha=-1.0 must be at least 0'),
  ],
)
def test_rates_that_cannot_be_are_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_rows_that_are_not_the_batch_s_are_refused(one_device):
  model = alone(KNOWN)[0][0]['policy']
  model = drawn.put(model, Drawn(keys=jnp.zeros((3, 2), jnp.uint32)))
  with pytest.raises(ValueError, match='4 rows enter a model that draws for 3'):
    model(jnp.zeros((4, T), jnp.int32))


# A run, and faults.


@pytest.mark.slow
@pytest.mark.long
def test_resumed_is_uninterrupted_bit_for_bit(corpus, tmp_path):
  def made(steps, dropout=RATES):
    train = {'steps': steps, 'save_every': 2, 'eval_every': 2, 'dropout': entries(dropout)}
    return on(corpus, train=train | {'accumulation': 2}, mesh={'fsdp': 2, 'tensor': 2})

  run_here(made(4), tmp_path / 'straight')
  run_here(made(2), tmp_path / 'twice')
  run_here(made(4), tmp_path / 'twice')
  assert_same(open_run(tmp_path / 'straight').model, open_run(tmp_path / 'twice').model)
  lines = [read_metrics(tmp_path / name / 'metrics.jsonl') for name in ('straight', 'twice')]
  assert [line.get('loss') for line in lines[0]] == [line.get('loss') for line in lines[1]]
  # It may go on with other rates.
  run_here(made(6, WHOLE), tmp_path / 'twice')


original_on, original_keys = drawing.StepDraws.on, drawing.StepDraws.keys


def by_microbatch(self, models, keys):
  """StepDraws.on by which row it is in its part."""
  return original_on(self, models, draws.keys_of_rows(jnp.uint32([1, 2]), len(keys)))


def without_step(self, state, batch):
  return original_keys(self, dataclasses.replace(state, step=0 * state.step), batch)


def unscaled(self, x, drawn):
  return jnp.where(drawn >= jnp.uint32(int(self.rate * 2**32)), x, 0)


def draws_at_evaluation(config, models):
  keys = draws.keys_of_rows(jnp.uint32([1, 2]), B)
  return drawing.StepDraws(config).on(models, keys) if config.draws else models


def known():
  check_known_masks(*ran(KNOWN))


def accumulated():
  assert_close(ran(config_of(**parts_of(4)))[0][-1], ran(KNOWN)[0][-1], 2e-6)


FAULTS = {
  'one mask for all layers': (Drawn, 'of_layer', lambda self, number: self, known),
  'one mask for all steps': (drawing.StepDraws, 'keys', without_step, known),
  'the scale forgotten': (Dropout, '_dropped', unscaled, known),
  'a mask by microbatch': (drawing.StepDraws, 'on', by_microbatch, accumulated),
  'dropout at evaluation': (evaluation.states, 'applied', draws_at_evaluation, check_evaluation),
}


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_met(fault, monkeypatch, one_device):
  alone(KNOWN)
  *place, law = FAULTS[fault]
  monkeypatch.setattr(*place)
  with pytest.raises(AssertionError):
    law()


def test_entries_are_rates():
  assert rates(()) == Rates() and rates(entries(RATES)) == RATES
  of_all = rates(('all=0.1', 'attention=0'))
  assert [getattr(of_all, name) for name in PLACES] == [0.1, 0.1, 0.0, 0.1]
