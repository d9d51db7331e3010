"""Does an adapter train alone, on a model that stays, and is it what merging makes of it?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objective import Run

from data.batch import Batch
from model import adapters
from model.adaptation import AdapterConfig
from model.config import LatentConfig, MoEConfig
from model.execution import ExecutionConfig
from tests.training.conftest import RATE, SGD, assert_close, assert_same, host, make_batches, tiny
from training import state as states
from training.program import make_program
from training.spent import flops_per_token

LORA = AdapterConfig(kind='lora', rank=4, alpha=8.0)
DORA = dataclasses.replace(LORA, kind='dora')
TABLES = dataclasses.replace(LORA, targets=('*', 'embedding.tokens', 'head.tokens'))
FAMILIES = {
  'llama': {},
  'windows': {'window': 4, 'global_every': 2},
  'experts': {'moe': MoEConfig(experts=4)},
  'shared experts': {'moe': MoEConfig(experts=4, shared_feed_forward=32)},
  'biases': {'biases': 'all', 'norm': 'layer', 'gated': False, 'position': 'learned'},
  'latent': {'kv_heads': 4, 'latent': LatentConfig(width=16, rope_width=8)},
  'tied': {'tie_embeddings': True},
}


def adapted(adapter=LORA, **parts):
  made = tiny(**{'optimizer': SGD} | parts)
  return dataclasses.replace(made, adapter=adapter)


def awake(models, seed=0):
  """With an adapter whose B is not zero any more."""
  draw = np.random.default_rng(seed)

  def one(p):
    return p + jnp.float32(0.1 * draw.normal(size=p.shape))

  return models | {'adapter': jax.tree.map(one, models['adapter'])}


@jax.jit
def logits(model):
  batch = make_batches(1)[0]
  return model.logits(
    model(*map(jnp.asarray, (batch.tokens, batch.positions, batch.segments))).hidden
  )


@pytest.mark.costly
@pytest.mark.parametrize('adapter', [LORA, DORA, TABLES], ids=['lora', 'dora', 'with tables'])
def test_a_fresh_adapter_changes_no_bit_of_lora_and_a_rounding_of_dora(one_device, adapter):
  run = Run(adapted(adapter))
  base = logits(run.state.models['policy'])
  with_it = jax.jit(lambda models: logits(states.applied(run.config, models)['policy']))
  fresh = with_it(run.state.models)
  if adapter is DORA:
    np.testing.assert_allclose(fresh, base, rtol=0, atol=2e-6)
  else:
    np.testing.assert_array_equal(fresh, base)
  assert np.abs(with_it(awake(run.state.models)) - base).max() > 1e-2


@pytest.mark.costly
@pytest.mark.parametrize('adapter', [LORA, DORA, TABLES], ids=['lora', 'dora', 'with tables'])
def test_merged_is_applied_and_what_the_formula_says(one_device, adapter):
  run = Run(adapted(adapter))
  models = awake(run.state.models)
  base, thin = models['policy'], models['adapter']
  merged = jax.jit(functools.partial(adapters.merged, config=adapter))(base, thin)
  put = jax.jit(functools.partial(adapters.applied, config=adapter))(base, thin)
  np.testing.assert_allclose(logits(put), logits(merged), rtol=0, atol=1e-5)
  # By numpy, of one matrix of two inputs: the rank is summed over, s = alpha / rank.
  name = 'stack.blocks.0.attention.o'
  w, sums = (np.array(m.stack.blocks[0].attention.o[...], np.float64) for m in (base, merged))
  a, b = (np.array(thin[name][part][...], np.float64) for part in 'ab')
  v = w + 2.0 * np.einsum('LNHZ,LZD->LNHD', a, b)
  if adapter is DORA:
    m = np.array(thin[name]['magnitude'][...], np.float64)
    v = v * (m / np.sqrt((v**2).sum((1, 2))))[:, None, None]
  np.testing.assert_allclose(sums, v, rtol=0, atol=1e-6)


def test_the_golden_values():
  """Of ../shared's notes: W [[3, 4], [1, 0]] by outputs, A [[1, -1]], B [[.5], [.2]], s = 2."""
  from flax import nnx

  def matrix(values, inputs=1):
    return nnx.Param(
      jnp.float32(values), axes=(None, None), kind='matrix', inputs=inputs, wide=False
    )

  model = {'w': matrix([[3, 1], [4, 0]])}
  pair = {'a': matrix([[1], [-1]]), 'b': matrix([[0.5, 0.2]])}
  lora = AdapterConfig(kind='lora', rank=1, alpha=2.0)
  merged = adapters.merged(model, {'w': pair}, lora)['w'][...]
  np.testing.assert_allclose(merged.T, [[4, 3], [1.4, -0.4]], rtol=1e-6)
  pair['magnitude'] = nnx.Param(
    jnp.float32([5, 2]), axes=(None,), kind='vector', inputs=1, wide=False
  )
  merged = adapters.merged(model, {'w': pair}, dataclasses.replace(lora, kind='dora'))['w'][...]
  np.testing.assert_allclose(merged.T, [[4, 3], [1.9230479, -0.5494423]], rtol=1e-6)
  assert AdapterConfig(kind='lora', rank=4, alpha=8.0, stabilised=True).scale == 4.0


@pytest.mark.slow
@pytest.mark.parametrize(
  'family',
  ['experts', *(pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES if x != 'experts')],
)
def test_every_family_takes_one_and_merged_is_applied(one_device, family):
  targets = ('*', 'embedding.tokens') if family != 'biases' else ('*',)
  adapter = dataclasses.replace(LORA, targets=targets)
  run = Run(adapted(adapter, model=FAMILIES[family]))
  models = awake(run.state.models)
  base, thin = models['policy'], models['adapter']
  merged = jax.jit(functools.partial(adapters.merged, config=adapter))(base, thin)
  put = jax.jit(functools.partial(adapters.applied, config=adapter))(base, thin)
  np.testing.assert_allclose(logits(put), logits(merged), rtol=0, atol=2e-5)
  assert np.abs(logits(put) - logits(base)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize('adapter', [LORA, DORA, TABLES], ids=['lora', 'dora', 'with tables'])
def test_a_step_is_the_absolute_step_and_the_base_stays(one_device, adapter):
  """Parameters - rate * gradient of the loss of the merged model, by hand; frozen bits stay."""
  run, batch = Run(adapted(adapter)), make_batches(1)[0]
  run.state = dataclasses.replace(run.state, models=awake(run.state.models))
  base = jax.tree.map(jnp.copy, run.state.models['policy'])
  thin = jax.tree.map(jnp.copy, run.state.models['adapter'])
  if adapter is DORA:  # whose gradient takes lengths as constants: not that of the merged model
    loss_of = functools.partial(adapters.applied, config=adapter)
  else:
    loss_of = functools.partial(adapters.merged, config=adapter)

  def by_hand(thin):
    nll = -jax.nn.log_softmax(logits(loss_of(base, thin)))
    picked = jnp.take_along_axis(nll, jnp.asarray(batch.targets)[..., None], -1)[..., 0]
    return (picked * batch.weights).sum() / batch.weights.sum()

  loss, gradient = jax.jit(jax.value_and_grad(by_hand))(thin)
  metrics, norms = run.go([batch])
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  expected = jax.tree.map(lambda p, g: p - RATE * g, thin, gradient)
  assert_close(run.state.models['adapter'], expected, 3e-6)
  assert all(np.abs(g).max() > 0 for g in host(gradient).values())
  assert_same(run.state.models['policy'], base)
  assert norms.keys() == thin.keys()


@pytest.mark.slow
def test_the_lengths_of_dora_are_constants_in_the_gradient(one_device):
  """Section 4.3: d/dm goes through, |V| does not; by finite differences with |V| held."""
  from model.weights.low_rank import LowRank
  from model.weights.plain import Plain

  draw = np.random.default_rng(0)
  w, a, b, m, x = (
    jnp.float32(draw.normal(size=size)) for size in ((5, 3), (5, 2), (2, 3), (3,), (7, 5))
  )

  def out(a, held=None):
    v = w + 2.0 * a @ b
    length = jnp.sqrt((v**2).sum(0)) if held is None else held
    return jnp.sin(x @ (v * (m / length)[None])).sum()

  def ours(a):
    weight = LowRank(
      *(Plain(value, (None, None)) for value in (w, a, b)), Plain(m, (None,)), 2.0, 1
    )
    return jnp.sin(weight.product('TD,DF->TF', x, 'float32')).sum()

  held = jnp.sqrt(((w + 2.0 * a @ b) ** 2).sum(0))
  # 21 sines that cancel to 0.02: a sum of numbers near 1.
  np.testing.assert_allclose(ours(a), out(a), rtol=0, atol=5e-6)
  np.testing.assert_allclose(
    jax.grad(ours)(a), jax.grad(lambda a: out(a, held))(a), rtol=1e-4, atol=1e-5
  )
  assert np.abs(jax.grad(ours)(a) - jax.grad(out)(a)).max() > 1e-2


@pytest.fixture(scope='module')
def whole():
  """Of every family, two steps on one device."""

  @functools.cache
  def ended(family):
    run = Run(adapted(TABLES if family == 'llama' else LORA, model=FAMILIES[family]))
    run.state = dataclasses.replace(run.state, models=awake(run.state.models))
    begun = host(run.state.models)
    return begun, run.go(make_batches(2))[0], host(run.state.models)

  return ended


@pytest.mark.slow
@pytest.mark.parametrize(
  'family, devices, mesh, train',
  [
    pytest.param('llama', 1, {}, {'accumulation': 2}, marks=pytest.mark.slow),
    ('llama', 8, {'data': 2, 'fsdp': 2, 'tensor': 2}, {}),
    pytest.param(
      'llama',
      4,
      {'fsdp': 2, 'data': 2, 'zero': 1},
      {'accumulation': 2},
      marks=pytest.mark.slow,
    ),
    pytest.param('llama', 4, {'fsdp': 2, 'data': 2, 'zero': 2}, {}, marks=pytest.mark.slow),
    pytest.param('llama', 4, {'stage': 2, 'fsdp': 2}, {}, marks=pytest.mark.slow),
    pytest.param('llama', 4, {'context': 2, 'tensor': 2}, {}, marks=pytest.mark.slow),
    pytest.param('experts', 8, {'expert': 2, 'fsdp': 2, 'tensor': 2}, {}, marks=pytest.mark.slow),
    pytest.param('latent', 4, {'fsdp': 2, 'tensor': 2}, {}, marks=pytest.mark.long),
  ],
)
def test_devices_and_microbatches_are_one(whole, family, devices, mesh, train):
  begun, metrics, ended = whole(family)
  adapter = TABLES if family == 'llama' else LORA
  run = Run(adapted(adapter, model=FAMILIES[family], mesh=mesh, train=train), devices)
  leaves = jax.tree.leaves(run.state.models)
  placed = [jax.device_put(begun[n], x.sharding) for n, x in zip(host(run.state.models), leaves)]
  models = jax.tree.unflatten(jax.tree.structure(run.state.models), placed)
  run.state = dataclasses.replace(run.state, models=models)
  again, _ = run.go(make_batches(2))
  np.testing.assert_allclose(again['loss'], metrics['loss'], rtol=1e-5)
  for name, x in host(run.state.models).items():
    np.testing.assert_allclose(x, ended[name], rtol=0, atol=5e-6, err_msg=name)


def test_only_the_adapter_has_state_and_gradients(one_device):
  config = adapted(optimizer={'name': 'adamw', 'momentum': -1.0})
  run = Run(config)
  state = sum(x.size for x in jax.tree.leaves(run.state.optimizer))
  thin = sum(x.size for x in jax.tree.leaves(run.state.models['adapter']))
  assert 2 * thin <= state <= 2 * thin + 8  # two moments, and counts
  whole = dataclasses.replace(config, adapter=AdapterConfig())
  share = flops_per_token(config) / flops_per_token(whole)
  assert 2 / 3 < share < 0.9  # no gradients of the base's weights


@pytest.mark.slow
def test_what_is_kept_of_a_product_is_its_sum(one_device):
  """remat='dots' keeps what a product gives, with an adapter on it once and not in two terms."""

  def temporary(adapter):
    model = {'width': 64, 'feed_forward': 256, 'layers': 8, 'max_length': 256}
    model |= {'execution': ExecutionConfig(remat='dots')}
    made = adapted(adapter, model=model, data={'sequence_length': 256})
    make_state, step = make_program(made.resolve(made.model.vocabulary))
    batch = Batch.abstract(16, 256)
    compiled = step.lower(jax.eval_shape(make_state), batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  whole, thin = temporary(AdapterConfig()), temporary(LORA)
  assert thin < 1.15 * whole  # 1.6 times as much, where both are kept


@pytest.mark.slow
def test_a_base_in_bytes_is_adapted(one_device):
  adapter = dataclasses.replace(LORA, base='int8')
  run = Run(adapted(adapter))
  before = host(run.state.models['policy'])
  begun = host(run.state.models['adapter'])
  run.go(make_batches(2))
  after = host(run.state.models['policy'])
  assert any(x.dtype == np.int8 for x in after.values())
  assert all(before[name].tobytes() == x.tobytes() for name, x in after.items())
  assert all(
    (begun[n] != x).any()
    for n, x in host(run.state.models['adapter']).items()
    if n.endswith("'b'].value")
  )


@pytest.mark.parametrize(
  'adapter, model, said',
  [
    (
      dataclasses.replace(LORA, targets=('*.attenton.q',)),
      {},
      r"adapter.targets: no matrix of the model is named like '\*.attenton.q'; its matrices: stack",
    ),
    (dataclasses.replace(LORA, rank=33), {}, 'adapter.rank=33 is more than stack.* has'),
    (
      dataclasses.replace(DORA, targets=('embedding.tokens',)),
      {},
      "adapter.kind='dora' of embedding.tokens",
    ),
    (DORA, FAMILIES['experts'], "adapter.kind='dora' of stack.*experts|feed_forward"),
  ],
)
def test_what_cannot_be_adapted_is_said(adapter, model, said):
  with pytest.raises((ValueError, NotImplementedError), match=said):
    Run(adapted(adapter, model=model))


def test_settings_that_make_no_adapter_are_refused():
  for fields, said in (
    ({'kind': 'lore'}, "adapter.kind='lore' is unknown; did you mean 'lora'"),
    ({'rank': 0}, 'adapter.rank=0 must be at least 1'),
    ({'alpha': 0.0}, 'adapter.alpha=0.0 must be above 0'),
    ({'targets': ()}, 'adapter.targets=.* names no matrix'),
    ({'base': 'int5'}, "a scheme='int5' is unknown"),
  ):
    with pytest.raises(ValueError, match=said):
      AdapterConfig(**{'kind': 'lora'} | fields)
