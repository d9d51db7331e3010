"""Do soft tokens stand before texts as tokens do, and are they all that is trained?"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objective import Run

from data import showing
from data.batch import Batch
from data.config import CleanConfig, SourceConfig
from model import soft
from model.adaptation import AdapterConfig
from model.config import LatentConfig, ModelConfig, MoEConfig
from model.soft import TABLE
from model.weights import read
from objectives.sft import SFT
from tests.training.conftest import RATE, SGD, B, T, assert_close, assert_same, host, tiny
from training import program, soft as soft_runs, state as states
from training.spent import flops_per_token

P = 3
PROMPT = AdapterConfig(kind='prompt', tokens=P)
PREFIX = dataclasses.replace(PROMPT, kind='prefix')
# Of a product each value is met by CI, the rest by `make test-all`.
SLOW = {True: [pytest.mark.slow], False: [pytest.mark.slow, pytest.mark.long]}
KINDS = pytest.mark.parametrize('adapter', [PROMPT, PREFIX], ids=['prompt', 'prefix'])
FAMILIES = {
  'llama': {},
  'windows': {'window': 4, 'global_every': 2, 'qk_norm': True},
  'experts': {'moe': MoEConfig(experts=4)},
  'biases': {'biases': 'all', 'norm': 'layer', 'gated': False, 'position': 'learned'},
  'gemma': {'tie_embeddings': True, 'embedding_scale': True, 'vocabulary_multiple': 16},
  'sinks': {'sinks': True, 'attention_softcap': 20.0},
}
LATENT = {'kv_heads': 4, 'latent': LatentConfig(width=16, rope_width=8)}
# Lengths that pack into rows of T with very unequal numbers of learned tokens.
PAIRS = [('a', 'b' * n) for n in range(1, 10)] + [('ask' * 2, 'c' * n) for n in range(1, 4)]


def adapted(adapter, **parts):
  made = tiny(**{'optimizer': SGD} | parts)
  return dataclasses.replace(made, adapter=adapter, objective=SFT())


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp('records') / 'pairs.jsonl'
  rows = [{'prompt': prompt, 'completion': answer} for prompt, answer in PAIRS]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return SourceConfig(kind='jsonl', path=str(path), format='completion')


def read_for(source, adapter, objective=SFT()):
  """A config of a run, and what it reads."""
  data = {
    'sources': (source,),
    'validation': (source,),
    'validation_fraction': 0.0,
    'clean': CleanConfig(anonymise=(), near_duplicates=0, exact_duplicates=False),
    'split': 'hash',
    'cache_dir': str(source.path) + '.cache',
  }
  made = dataclasses.replace(tiny(data=data), adapter=adapter, objective=objective)
  return made, made.objective.read(
    made.data, lambda line: None, **(soft_runs.ids(made) if adapter.kind else {})
  )


def rows_of(source, adapter, objective=SFT()) -> Batch:
  """All training rows of a run, as one batch filled up with padding to whole batches of B."""
  _, prepared = read_for(source, adapter, objective)
  batch = Batch.empty(-(-prepared.rows // B) * B, T)
  for row in range(prepared.rows):
    prepared.train[0].fill(row, batch, row)
  return batch


def moved(models, seed=0):
  """With soft tokens that are those of no token any more."""
  draw = np.random.default_rng(seed)

  def one(p):
    return p + jnp.float32(0.1 * draw.normal(size=p.shape))

  return models | {'adapter': jax.tree.map(one, models['adapter'])}


def started(config, devices=1, seed=0):
  run = Run(config, devices)
  run.state = dataclasses.replace(run.state, models=moved(run.state.models, seed))
  return run


@jax.jit
def logits(model, tokens):
  return model.logits(model(tokens).hidden)


def texts(draw, width, vocabulary=250):
  return jnp.asarray(draw.integers(3, vocabulary, (2, width)), jnp.int32)


@pytest.mark.slow
@pytest.mark.parametrize(
  'adapter, family',
  [
    pytest.param(
      adapter,
      family,
      id=f'{adapter.kind} {family}',
      marks=[] if (adapter, family) == (PREFIX, 'windows') else SLOW[i % 2 == j],
    )
    for j, adapter in enumerate((PROMPT, PREFIX))
    for i, family in enumerate([*FAMILIES, 'latent'])
    if (adapter.kind, family) != ('prefix', 'latent')
  ],
)
def test_tokens_that_begin_as_a_text_are_that_text(one_device, adapter, family):
  """Before any step a model with them is the model with the text before its own."""
  network = FAMILIES.get(family, LATENT)
  run = Run(adapted(adapter, model=network))
  model, draw = run.state.models['policy'], np.random.default_rng(0)
  ids, x = [7, 99], texts(draw, T - P)
  thin = jax.jit(functools.partial(states.new_adapter, run.config, ids=ids))(model)
  put = soft.applied(model, thin)
  virtual = jnp.asarray(read(put.embedding.tokens).virtual)
  assert virtual[0] == model.config.table_rows and len(virtual) == P
  front = jnp.asarray([7, 99, 7])  # again, until there are enough
  before = [jnp.concatenate([jnp.broadcast_to(ids, (2, P)), x], 1) for ids in (virtual, front)]
  ours, expected = logits(put, before[0])[:, P:], logits(model, before[1])[:, P:]
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
  assert np.abs(logits(model, x)[:, 1:] - expected[:, 1:]).max() > 1e-2


def by_hand(table, model, soft_rows):
  """The loss of all pairs, each in a row of its own, of a model with one large table."""
  model = jax.tree.map(lambda x: x, model)
  rows = jnp.concatenate([table, soft_rows])
  model.embedding.tokens = model.embedding.tokens.replace(rows)
  first, total, weight = len(table), 0.0, 0
  ids = np.zeros((len(PAIRS), T + 1), np.int32)
  for row, (prompt, answer) in enumerate(PAIRS):
    text = [*range(first, first + P), 1, *(b + 3 for b in (prompt + answer).encode()), 2]
    ids[row, : len(text)] = text
  nll = -jax.nn.log_softmax(model.logits(model(jnp.asarray(ids[:, :-1])).hidden))
  for row, (prompt, answer) in enumerate(PAIRS):
    answers = range(P + len(prompt), P + len(prompt) + len(answer) + 1)
    total += sum(nll[row, t, ids[row, t + 1]] for t in answers)
    weight += len(answers)
  return total / weight


@pytest.mark.slow
def test_a_step_is_the_absolute_step_and_the_base_stays(source, one_device):
  """Rows - rate * gradient of the mean over answers, packed here and one by one by hand."""
  batch = rows_of(source, PROMPT)
  assert batch.segments.max() > 1
  run = started(adapted(PROMPT, data={'batch_size': len(batch.tokens)}))
  base = jax.tree.map(jnp.copy, run.state.models['policy'])
  begun = jnp.copy(run.state.models['adapter'][TABLE]['soft'][...])
  table = jnp.copy(base.embedding.tokens[...])
  value = jax.jit(jax.value_and_grad(functools.partial(by_hand, table, base)))
  loss, gradient = value(begun)
  metrics, _ = run.go([batch])
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  ended = run.state.models['adapter'][TABLE]['soft'][...]
  np.testing.assert_allclose(ended, begun - RATE * gradient, rtol=0, atol=3e-6)
  assert np.abs(gradient).max(1).min() > 1e-3
  assert metrics['predicted_tokens'] == sum(len(answer) + 1 for _, answer in PAIRS)
  assert_same(run.state.models['policy'], base)


@pytest.mark.slow
@KINDS
def test_the_gradient_is_the_slope_in_a_direction(source, one_device, adapter):
  batch = jax.tree.map(lambda x: jnp.asarray(x[:B]), rows_of(source, adapter))
  run = started(adapted(adapter))
  models = run.state.models
  base, thin = models['policy'], models['adapter']

  @jax.jit
  def loss(thin):
    put = states.applied(run.config, {'policy': base, 'adapter': thin})
    return sum(total / weight for total, weight in run.config.objective.loss(put, batch).values())

  gradient = jax.grad(loss)(thin)
  draw = np.random.default_rng(0)
  direction = jax.tree.map(lambda p: jnp.float32(draw.normal(size=p.shape)), thin)

  def at(step):
    return float(loss(jax.tree.map(lambda p, d: p + step * d, thin, direction)))

  slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
  np.testing.assert_allclose(slope, (at(1e-2) - at(-1e-2)) / 2e-2, rtol=2e-2)
  assert all(np.abs(g).max() > 0 for g in host(gradient).values())


@pytest.mark.slow
@KINDS
def test_packing_changes_nothing(source, one_device, adapter):
  """The loss and the gradient of rows of several examples and of one each."""
  run = started(adapted(adapter))
  base, thin = (run.state.models[name] for name in ('policy', 'adapter'))

  @jax.jit
  def value(thin, batch):
    def loss(thin):
      put = states.applied(run.config, {'policy': base, 'adapter': thin})
      return sum(total / weight for total, weight in SFT().loss(put, batch).values())

    return jax.value_and_grad(loss)(thin)

  (packed, gradient), (alone, other) = (
    value(thin, jax.tree.map(jnp.asarray, rows_of(source, adapter, SFT(packing=packing))))
    for packing in ('fit', 'alone')
  )
  np.testing.assert_allclose(packed, alone, rtol=1e-6)
  assert_close(gradient, other, 1e-6)


@pytest.fixture(scope='module')
def whole(source):
  """Of every kind and family, two steps on one device."""

  @functools.cache
  def ended(adapter, family):
    run = started(adapted(adapter, model=FAMILIES[family]))
    begun = host(run.state.models)
    batch = jax.tree.map(lambda x: x[:B], rows_of(source, adapter))
    return begun, run.go([batch] * 2)[0], host(run.state.models)

  return ended


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'adapter, family, devices, mesh, train',
  [
    (PROMPT, 'llama', 1, {}, {'accumulation': 4}),
    (PROMPT, 'llama', 8, {'data': 2, 'fsdp': 2, 'tensor': 2}, {'accumulation': 2}),
    (PREFIX, 'llama', 4, {'fsdp': 2, 'tensor': 2}, {}),
    pytest.param(PREFIX, 'llama', 1, {}, {'accumulation': 4}, marks=SLOW[False]),
    (PREFIX, 'llama', 4, {'stage': 2, 'fsdp': 2}, {}),
    pytest.param(PROMPT, 'llama', 4, {'stage': 2, 'fsdp': 2}, {}, marks=SLOW[False]),
    pytest.param(PREFIX, 'llama', 4, {'context': 2, 'data': 2}, {}, marks=SLOW[False]),
    (PROMPT, 'llama', 4, {'context': 2, 'tensor': 2}, {}),
    pytest.param(PREFIX, 'llama', 8, {'tensor': 4, 'data': 2}, {}, marks=SLOW[False]),
    (PROMPT, 'gemma', 4, {'fsdp': 2, 'data': 2, 'zero': 1}, {}),
    (PREFIX, 'llama', 4, {'fsdp': 2, 'data': 2, 'zero': 2}, {}),
    pytest.param(PROMPT, 'experts', 4, {'expert': 2, 'tensor': 2}, {}, marks=SLOW[False]),
    (PREFIX, 'experts', 4, {'expert': 2, 'fsdp': 2}, {}),
  ],
)
def test_devices_and_microbatches_are_one(whole, source, adapter, family, devices, mesh, train):
  begun, metrics, ended = whole(adapter, family)
  run = Run(adapted(adapter, model=FAMILIES[family], mesh=mesh, train=train), devices)
  leaves = jax.tree.leaves(run.state.models)
  placed = [jax.device_put(begun[n], x.sharding) for n, x in zip(host(run.state.models), leaves)]
  models = jax.tree.unflatten(jax.tree.structure(run.state.models), placed)
  run.state = dataclasses.replace(run.state, models=models)
  batch = jax.tree.map(lambda x: x[:B], rows_of(source, adapter))
  again, _ = run.go([batch] * 2)
  np.testing.assert_allclose(again['loss'], metrics['loss'], rtol=1e-5)
  for name, x in host(run.state.models).items():
    np.testing.assert_allclose(x, ended[name], rtol=0, atol=5e-6, err_msg=name)


@pytest.mark.slow
@KINDS
def test_a_new_one_is_the_same_on_every_mesh(adapter):
  alone, spread = (
    host(Run(adapted(adapter, mesh=mesh), devices).state.models)
    for mesh, devices in (({}, 1), ({'data': 2, 'fsdp': 2, 'tensor': 2}, 8))
  )
  for name, x in alone.items():
    np.testing.assert_allclose(spread[name], x, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('remat', ['full', 'dots'])
@KINDS
def test_recomputing_and_a_base_in_bytes(source, one_device, adapter, remat):
  batch = jax.tree.map(lambda x: x[:B], rows_of(source, adapter))
  ends = []
  for kept, how in (('', 'none'), ('', remat), ('int8', 'none')):
    made = adapted(dataclasses.replace(adapter, base=kept))
    made = dataclasses.replace(made, model=made.model.with_execution(remat=how))
    run = Run(made)
    begun = host(run.state.models)
    run.go([batch])
    ended = host(run.state.models)
    for name, x in ended.items():
      trained = 'adapter' in name
      assert (begun[name].tobytes() != x.tobytes()) == trained, name
    ends.append({name: x for name, x in ended.items() if 'adapter' in name})
  plain, recomputed, in_bytes = ends
  for name, x in plain.items():
    np.testing.assert_allclose(recomputed[name], x, rtol=0, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(in_bytes[name], x, rtol=0, atol=0.1 * np.abs(x).max())


@pytest.mark.slow
def test_they_cost_their_places_and_nothing_more(one_device):
  config = adapted(PROMPT, optimizer={'name': 'adamw', 'momentum': -1.0})
  run = Run(config)
  state = sum(x.size for x in jax.tree.leaves(run.state.optimizer))
  assert 2 * P * 32 <= state <= 2 * P * 32 + 8  # two moments, and counts
  whole = dataclasses.replace(config, adapter=AdapterConfig())
  np.testing.assert_allclose(flops_per_token(config) / flops_per_token(whole), 2 / 3)


def test_examples_begin_with_them(source):
  batch = rows_of(source, PROMPT)
  for row in range(len(batch.tokens)):
    for segment in range(1, batch.segments[row].max() + 1):
      inside = batch.segments[row] == segment
      tokens, weights = batch.tokens[row, inside], batch.weights[row, inside]
      assert tokens[: P + 1].tolist() == [264, 265, 266, 1]
      assert not weights[:P].any() and weights[P + 1 :].any()
      assert batch.positions[row, inside].tolist() == [*range(len(tokens))]
  # Of the pairs that fit without them, some do not.
  lengths = [len(prompt + answer) + 1 + P for prompt, answer in PAIRS]
  assert (batch.segments > 0).sum() == sum(n for n in lengths if n <= T)
  assert '<264><265><266>' in showing.examples(*read_for(source, PROMPT), 1)


def test_a_corpus_without_them_is_the_one_that_it_was(source):
  """Keys and rows of no prompt are those of before, and every prompt has its own."""
  keys = [
    read_for(source, adapter)[1].key
    for adapter in (AdapterConfig(), PROMPT, dataclasses.replace(PROMPT, tokens=2))
  ]
  assert len(set(keys)) == 3
  assert rows_of(source, AdapterConfig()).tokens.max() < 259


@pytest.mark.slow
def test_several_on_one_model_keep_their_ids(one_device):
  run = Run(adapted(PROMPT))
  model, draw = run.state.models['policy'], np.random.default_rng(1)
  ids = {'a': [11, 12, 13], 'b': [21, 22, 23], 'c': [31]}
  kinds = {'a': PREFIX, 'b': PROMPT, 'c': dataclasses.replace(PREFIX, tokens=1)}
  config = {name: dataclasses.replace(run.config, adapter=kind) for name, kind in kinds.items()}
  thin = {name: states.new_adapter(config[name], model, ids[name]) for name in ids}
  put, ranges = soft.together(model, [*thin.values()])
  assert [*map(len, ranges)] == [3, 3, 1]
  assert sorted(i for each in ranges for i in each) == [*range(264, 271)]
  x = texts(draw, 8)
  for name, virtual in zip(ids, ranges, strict=True):
    front = [
      jnp.concatenate([jnp.broadcast_to(jnp.asarray(each), (2, len(each))), x], 1)
      for each in (ids[name], virtual)
    ]
    ours, expected = logits(put, front[1]), logits(model, front[0])
    n = len(virtual)
    np.testing.assert_allclose(ours[:, n:], expected[:, n:], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  'adapter, parts, said',
  [
    (PREFIX, {'model': LATENT}, "adapter.kind='prefix' of a model with model.latent.width=16"),
    (
      PROMPT,
      {'objective': None},
      "objective.kind='next_token' are none; use an objective of records",
    ),
    (
      dataclasses.replace(PROMPT, tokens=16),
      {},
      'adapter.tokens=16 leave no room for an example in data.sequence_length=16',
    ),
    (
      dataclasses.replace(PROMPT, initial='text', text='ab'),
      {},
      'is of the tokenizer of config.init',
    ),
  ],
)
def test_what_cannot_have_them_is_said(adapter, parts, said):
  without = parts.pop('objective', SFT) is None
  config = adapted(adapter, **parts)
  if without:
    config = dataclasses.replace(config, objective=tiny().objective)
  with pytest.raises((ValueError, NotImplementedError), match=said):
    program.check_models(config)


def test_an_encoder_decoder_has_no_prefix():
  network = ModelConfig(vocabulary=32, width=16, heads=2, layers=1, encoder_layers=1)
  with pytest.raises(NotImplementedError, match="encoder_layers=1.*use adapter.kind='prompt'"):
    soft.check(network, PREFIX)
  soft.check(network, PROMPT)
  with pytest.raises(ValueError, match='model.vocabulary=0 leaves it open; begin with a run'):
    soft_runs.ids(dataclasses.replace(adapted(PROMPT), model=ModelConfig()))


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'tokens': 0}, 'adapter.tokens=0 must be at least 1'),
    ({'initial': 'words'}, "adapter.initial='words' is unknown"),
    ({'initial': 'text'}, "adapter.initial='text' with adapter.text=''"),
    ({'text': 'a'}, "adapter.initial='vocabulary' with adapter.text='a'"),
    ({'rank': 8}, "adapter.rank=8 would not be read by adapter.kind='prompt': it is of lora and"),
    ({'targets': ('*.q',)}, "adapter.targets=.* would not be read by adapter.kind='prompt'"),
    ({'kind': 'lora', 'tokens': 5}, "adapter.tokens=5 would not be read by adapter.kind='lora'"),
    ({'kind': '', 'initial': 'random'}, "adapter.initial='random' would not be read"),
  ],
)
def test_settings_that_are_not_read_are_refused(fields, said):
  with pytest.raises(ValueError, match=said):
    AdapterConfig(**{'kind': 'prompt'} | fields)
