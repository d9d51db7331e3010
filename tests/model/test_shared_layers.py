"""Is a model whose layers share parameters the one whose layers are copies of each other?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from test_meshes import batch

from model import adapters, drawn, flops, params, rearranged, transformer
from model.adaptation import AdapterConfig
from model.cache import init_cache
from model.config import MoEConfig
from model.dropout import Rates
from model.params import named_leaves
from model.weights.int8 import in_bytes
from objectives.next_token import summed_loss
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

SHARED = 3
# Two sets of parameters, each of three layers; one set of all layers; experts; a loop.
CONFIGS = {
  'two sets': laws.make_config(layers=6, shared_layers=SHARED, width=32, vocabulary=48),
  'one set': laws.make_config('mistral', layers=3, shared_layers=3, width=32, vocabulary=48),
  'experts': laws.make_config(
    'mixtral',
    layers=4,
    shared_layers=2,
    width=32,
    vocabulary=48,
    moe=MoEConfig(experts=4, feed_forward=8, balance_loss=0.1),
  ),
}


def copies(model):
  """The unshared model of the same values: what repeats is stacked again and again."""
  config = dataclasses.replace(model.config, shared_layers=1)
  target = params.abstract(lambda: transformer.init(config, 0), jax.sharding.get_mesh())
  values = named_leaves(model)

  def leaf(name, shape):
    x = values[name]
    if x.shape != shape.shape:
      x = jnp.repeat(x, model.config.shared_layers, 0)
    return jax.device_put(x, shape.sharding)

  leaves = [leaf(name, shape) for name, shape in named_leaves(target).items()]
  return jax.tree.unflatten(jax.tree.structure(target), leaves)


def loss_and_gradients(model, batch):
  loss = functools.partial(summed_loss, z_loss=1e-2)
  (value, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model, batch)
  return value, named_leaves(gradients)


def check_copies(model, batch, tolerance=2e-5):
  """The same loss; of every parameter the gradient is the sum over its copies'."""
  value, gradients = loss_and_gradients(model, batch)
  expected, apart = loss_and_gradients(copies(model), batch)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for name, wanted in apart.items():
    actual, wanted = np.asarray(gradients[name]), np.asarray(wanted)
    if actual.shape != wanted.shape:
      wanted = wanted.reshape(-1, model.config.shared_layers, *actual.shape[1:]).sum(1)
    np.testing.assert_allclose(
      actual, wanted, atol=tolerance * np.abs(wanted).max(), err_msg=name, rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', ['two sets', *(pytest.param(x, marks=pytest.mark.slow) for x in ('one set', 'experts'))]
)
def test_gradients_are_sums_over_copies(one_device, name):
  check_copies(laws.make_model(CONFIGS[name]), batch())


@pytest.mark.slow
@pytest.mark.parametrize('run', [{'remat': 'full'}, {'remat': 'sqrt'}, {'scan': False}], ids=str)
def test_ways_to_run_change_nothing(one_device, run):
  model = laws.make_model(CONFIGS['two sets'])
  expected, apart = loss_and_gradients(model, batch())
  if 'scan' in run:
    other = rearranged.unstacked(model)
    value, gradients = loss_and_gradients(other, batch())
    gradients = {
      name: np.concatenate(
        [
          gradients[name.replace('blocks.0.', f'blocks.{i}.')]
          for i in range(2 if '.blocks.' in name else 1)
        ]
      )
      if '.blocks.' in name
      else gradients[name]
      for name in apart
    }
  else:
    model.config = model.config.with_execution(**run)
    model.stack.remat = model.config.kept
    value, gradients = loss_and_gradients(model, batch())
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for name, wanted in apart.items():
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(gradients[name], wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def test_every_layer_has_a_cache_of_its_own():
  laws.check_cached_decode(CONFIGS['two sets'], splits=([4, 1, 4],))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['one set', 'experts'])
def test_others_decode(name):
  laws.check_cached_decode(CONFIGS[name])


def test_it_is_kept_once_and_counted_by_layers(one_device):
  config = CONFIGS['two sets']
  alone = dataclasses.replace(config, shared_layers=1)
  sizes = [
    params.count(params.abstract(lambda c=c: transformer.init(c, 0), jax.sharding.get_mesh()))
    for c in (config, alone)
  ]
  tables = sizes[0] - (sizes[1] - sizes[0]) // (SHARED - 1)
  assert tables == 2 * 48 * 32 + 32 < sizes[0]
  assert flops.forward_flops_per_token(config, 9) == flops.forward_flops_per_token(alone, 9)
  cache = init_cache(config, 2, 16)
  assert cache.held[0].keys.shape[0] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 2, 'context': 2}], ids=str
)
def test_on_meshes(sizes):
  with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
    rows = jax.NamedSharding(jax.sharding.get_mesh(), ax.spec('batch', 'length'))
    placed = jax.tree.map(lambda x: jax.device_put(x, rows), batch())
    check_copies(laws.make_model(CONFIGS['two sets']), placed)


@pytest.mark.slow
def test_in_bytes_and_with_an_adapter(one_device):
  """Of int8, and of matrices that share an update as they share their numbers."""
  config = CONFIGS['two sets']
  tokens, run = laws.tokens_of(config, 2, 9), laws.forward()
  model = laws.make_model(config)
  small = jax.jit(in_bytes)
  np.testing.assert_allclose(
    run(small(model), tokens), run(small(copies(model)), tokens), atol=1e-4
  )
  settings = AdapterConfig(kind='lora', rank=2, targets=('stack.blocks.*.attention.[qv]',))
  adapter = laws.randomised(jax.jit(lambda m: adapters.new(m, settings, jax.random.key(0)))(model))
  applied = jax.jit(lambda m, a: adapters.applied(m, a, settings))(model, adapter)
  merged = jax.jit(lambda m, a: adapters.merged(m, a, settings))(model, adapter)
  np.testing.assert_allclose(run(applied, tokens), run(copies(merged), tokens), atol=1e-4)


@pytest.mark.slow
def test_layers_that_share_leave_out_as_layers_of_their_own_do(one_device):
  """Dropout draws by layer, and not by set of parameters."""
  model = laws.make_model(CONFIGS['two sets'])
  keys = jnp.arange(16, dtype=jnp.uint32).reshape(8, 2)
  draw = drawn.Drawn(keys=keys, rates=Rates(residual=0.3))
  run = jax.jit(lambda model, batch: summed_loss(model, batch, 0.0)[0])
  values = [run(drawn.put(m, draw), batch()) for m in (model, copies(model))]
  plain = run(model, batch())
  np.testing.assert_allclose(*values, rtol=1e-5)
  assert abs(values[0] - plain) > 1e-3 * abs(plain)


@pytest.mark.parametrize(
  'change, said',
  [
    ({'shared_layers': 4}, 'shared_layers=4 does not divide model.layers=6'),
    ({'shared_layers': 0}, 'model.shared_layers=0'),
    ({'window': 4, 'global_every': 2, 'shared_layers': 2}, 'layers of one set .* are of one kind'),
    ({'encoder_layers': 6}, 'in one stack'),
  ],
)
def test_what_cannot_be_shared_is_said(change, said):
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(CONFIGS['two sets'], **change)


def test_stages_are_refused():
  with pytest.raises(NotImplementedError, match='shared_layers=3 over mesh.stage=2'):
    CONFIGS['two sets'].check_stages(2)


def test_the_first_layers_are_whole_sets(one_device):
  model = rearranged.unstacked(laws.make_model(CONFIGS['two sets']))
  assert len(rearranged.shallow(model, 3).stack.blocks) == 1
  with pytest.raises(ValueError, match='shared_layers=3 each: take a multiple'):
    rearranged.shallow(model, 2)
