"""Are eight devices one device? Loss, gradients and decoding on meshes, explicit or auto,
are those of one device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from jax.sharding import AxisType

from data.batch import Batch
from model import transformer
from model.cache import init_cache
from model.params import named_leaves
from objectives.next_token import summed_loss
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

CONFIG = laws.make_config(
  'gpt2', width=32, kv_heads=2, feed_forward=64, vocabulary=48, gated=True, qk_norm=True
)
MESHES = [{'data': 8}, {'fsdp': 8, 'data': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2}]


def batch():
  draw = np.random.default_rng(0)
  tokens = draw.integers(0, CONFIG.V, (8, 9)).astype(np.int32)
  lengths = np.array(
    [[3, 5, 0]] * 4 + [[8, 0, 0]] * 2 + [[2, 2, 3]] * 2
  )  # 0 padding or one token of it
  segments = np.stack([np.repeat([1, 2, 3, 0], [*row, 8 - row.sum()]) for row in lengths]).astype(
    np.int32
  )
  positions = np.stack(
    [np.concatenate([np.arange(n) for n in [*row, 8 - row.sum()]]) for row in lengths]
  )
  weights = (segments > 0).astype(np.float32)
  return Batch(tokens[:, :-1], tokens[:, 1:], positions.astype(np.int32), segments, weights)


@functools.cache
def born(config, mesh):
  with jax.set_mesh(mesh):
    return jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)


def loss_and_gradients(mesh, config=CONFIG):
  """(loss, gradients by name, the model) of the randomised model, on `mesh`."""
  with jax.set_mesh(mesh):
    model = (
      laws.randomised(born(config, mesh))
      if AxisType.Auto in mesh.axis_types
      else laws.make_model(config)
    )
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, ax.spec('batch', 'length'))
    run = jax.jit(jax.value_and_grad(functools.partial(summed_loss, z_loss=1e-2), has_aux=True))
    (value, sums), gradients = run(model, jax.tree.map(lambda x: jax.device_put(x, rows), batch()))
  return float(value) / float(sums['tokens']), named_leaves(gradients), named_leaves(model)


@pytest.fixture(scope='module')
def expected():
  return loss_and_gradients(make_mesh(MeshConfig(), jax.devices()[:1]))


def check(mesh, expected, config=CONFIG):
  loss, gradients, model = loss_and_gradients(mesh, config)
  np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
  for name, wanted in expected[1].items():
    actual, wanted = np.asarray(gradients[name]), np.asarray(wanted)
    np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=name)
    laid_out_alike = gradients[name].sharding.is_equivalent_to(model[name].sharding, wanted.ndim)
    assert laid_out_alike or AxisType.Auto in mesh.axis_types, name


@pytest.mark.parametrize(
  'sizes',
  [pytest.param(sizes, marks=pytest.mark.slow) for sizes in MESHES[:2]] + MESHES[2:],
  ids=str,
)
def test_eight_devices_are_one(sizes, expected):
  check(make_mesh(MeshConfig(**sizes)), expected)


@pytest.mark.slow
def test_the_auto_twin_gives_the_same(expected):
  """The same code on a mesh of auto axes."""
  check(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), axis_type=AxisType.Auto), expected)


def test_another_backend_and_remat_split_too(expected):
  config = CONFIG.with_execution(attention='xla', remat='dots')
  check(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), expected, config)


@pytest.mark.slow
@pytest.mark.parametrize(
  'strategy, remat, sizes',
  [
    ('ring', 'full', {'context': 4, 'tensor': 2}),
    ('ulysses_ring', 'none', {'fsdp': 2, 'context': 4}),
    ('gather', 'none', {'fsdp': 2, 'context': 2}),
    ('ulysses', 'dots', {'context': 2, 'tensor': 2}),
  ],
)
def test_rows_split_over_devices(strategy, remat, sizes, expected):
  config = CONFIG.with_execution(context=strategy, remat=remat)
  check(make_mesh(MeshConfig(**sizes)), expected, config)


@pytest.mark.slow
def test_the_auto_twin_splits_rows_too(expected):
  check(make_mesh(MeshConfig(context=2, tensor=2), axis_type=AxisType.Auto), expected)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('strategy', ['ring', 'gather'])
@pytest.mark.parametrize(
  'name',
  [
    'gemma2',
    'gemma3',
    'gpt-oss',
    'deepseek',
    'relative',
    pytest.param('deepseek moe', marks=pytest.mark.slow),
  ],
)
def test_architectures_split_their_rows(name, strategy):
  config = dataclasses.replace(
    laws.make_config(name).with_execution(context=strategy), vocabulary=48
  )
  alone = loss_and_gradients(make_mesh(MeshConfig(), jax.devices()[:1]), config)
  check(make_mesh(MeshConfig(context=2 if config.latent.width else 4)), alone, config)


@pytest.mark.costly
@pytest.mark.parametrize(
  'sizes, axis_type',
  [
    (MESHES[1], AxisType.Explicit),
    (MESHES[2], AxisType.Explicit),
    (MESHES[2], AxisType.Auto),
    ({'data': 1, 'fsdp': 4, 'tensor': 2}, AxisType.Auto),
  ],
  ids=str,
)
def test_parameters_are_born_sharded_and_equal(sizes, axis_type):
  alone = born(CONFIG, make_mesh(MeshConfig(), jax.devices()[:1]))
  mesh = make_mesh(MeshConfig(**sizes), axis_type=axis_type)
  for (name, x), wanted in zip(
    named_leaves(born(CONFIG, mesh)).items(), named_leaves(alone).values(), strict=True
  ):
    # The same random bits; another partition may round the normal's polynomial otherwise in the
    # last bit (seen on jax 0.12).
    np.testing.assert_allclose(np.asarray(x), np.asarray(wanted), rtol=5e-7, err_msg=name)
    assert x.sharding.mesh.shape == mesh.shape
    split = mesh.shape['fsdp'] * (mesh.shape['tensor'] if 'positions' not in name else 1)
    assert x.size < 300 or x.addressable_shards[0].data.size * split == x.size, (
      f'{name} {x.shape} is {x.sharding.spec}'
    )


@pytest.mark.costly
@pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto], ids=str)
def test_cached_decode_on_a_mesh(axis_type):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), axis_type=axis_type)
  model, tokens = laws.randomised(born(CONFIG, mesh)), laws.tokens_of(CONFIG, 4, 6)
  with jax.set_mesh(mesh):
    tokens = jax.device_put(tokens, jax.NamedSharding(mesh, ax.spec('batch', 'length')))
    full, step, cache = laws.forward()(model, tokens), laws.cached(), init_cache(CONFIG, 4, 8)
    assert all(x.addressable_shards[0].data.size * 8 == x.size for x in jax.tree.leaves(cache.held))
    for first, last in ((0, 4), (4, 5), (5, 6)):
      logits, cache = step(model, tokens[:, first:last], cache)
      np.testing.assert_allclose(logits, full[:, first:last], rtol=1e-5, atol=1e-5)
  assert jnp.all(cache.lengths == 6)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'name',
  [
    pytest.param('gemma3', marks=pytest.mark.slow),
    'gpt-oss',
    pytest.param('deepseek', marks=pytest.mark.slow),
    'relative',
    pytest.param('deepseek moe', marks=pytest.mark.slow),
  ],
)
def test_architectures_split_and_decode_on_a_mesh(name):
  """Packed rows through loss and gradients with remat, then prefill and decode."""
  config = dataclasses.replace(laws.make_config(name).with_execution(remat='full'), vocabulary=48)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  check(mesh, loss_and_gradients(make_mesh(MeshConfig(), jax.devices()[:1]), config), config)
  with jax.set_mesh(mesh):
    model, tokens = (
      laws.make_model(config),
      jax.device_put(laws.tokens_of(config, 4, 6), ax.spec('batch', 'length')),
    )
    full, step, cache = laws.forward()(model, tokens), laws.cached(), init_cache(config, 4, 8)
    for first, last in ((0, 5), (5, 6)):
      logits, cache = step(model, tokens[:, first:last], cache)
      np.testing.assert_allclose(
        logits, full[:, first:last], rtol=1e-4, atol=1e-5 * np.abs(full).max()
      )
