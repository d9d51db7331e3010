"""Are layers that are split over pipeline stages one stack?
Loss, gradients, reports, memory, on products of meshes, by every schedule.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from jax.sharding import AxisType
from test_meshes import CONFIG, batch, born, check, loss_and_gradients

from data.batch import Batch
from model import transformer
from model.cache import init_cache
from model.config import MoEConfig
from model.execution import ExecutionConfig
from model.params import abstract, named_leaves, specs
from objectives.next_token import summed_loss
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh
from parallel.pipeline import PipelineConfig

GPIPE, F1B1 = PipelineConfig(microbatches=4), PipelineConfig(schedule='1f1b', microbatches=4)
CIRCULAR = PipelineConfig(schedule='circular', repeats=2, microbatches=4)
EXPERTS = MoEConfig(experts=4, feed_forward=8, balance_loss=0.3, z_loss=0.1)
PRODUCT, DATA, FSDP = (
  {'stage': 2, 'data': 1, 'fsdp': 2, 'tensor': 2},
  {'stage': 4, 'data': 2},
  {'stage': 2, 'data': 1, 'fsdp': 4},
)
TENSOR, FOUR, TWO = (
  {'stage': 2, 'data': 1, 'tensor': 4},
  {'stage': 4, 'data': 1, 'tensor': 2},
  {'stage': 2, 'data': 1, 'tensor': 2},
)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@functools.cache
def alone(config):
  return loss_and_gradients(make_mesh(MeshConfig(), jax.devices()[:1]), config)


def model_config(name='', **changes):
  config = CONFIG if not name else dataclasses.replace(laws.make_config(name), vocabulary=48)
  return dataclasses.replace(config, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
  'pipeline, sizes, config',
  [
    slow(CIRCULAR, {'stage': 2, 'data': 1, 'fsdp': 2}, model_config('llama', layers=4)),
    (F1B1, {'stage': 2, 'data': 1, 'tensor': 2}, model_config('llama', layers=4)),
    slow(CIRCULAR, PRODUCT, model_config(layers=4)),
    slow(F1B1, PRODUCT, model_config('mixtral', moe=EXPERTS)),
    slow(F1B1, DATA, model_config(layers=4, execution=ExecutionConfig(remat='full'))),
    slow(
      PipelineConfig(schedule='1f1b'),
      FSDP,
      model_config(layers=4, execution=ExecutionConfig(remat='dots')),
    ),
    slow(F1B1, TWO, model_config('gemma2', layers=4)),
    slow(PipelineConfig(schedule='1f1b', microbatches=8), FOUR, model_config(layers=4)),
    slow(GPIPE, DATA, model_config(layers=4, execution=ExecutionConfig(remat='full'))),
    slow(
      GPIPE,
      TENSOR,
      model_config(
        'mixtral', moe=EXPERTS, execution=ExecutionConfig(remat='full'), heads=4, kv_heads=4
      ),
    ),
    slow(GPIPE, PRODUCT, model_config('relative')),
    slow(GPIPE, PRODUCT, model_config('deepseek')),
    slow(
      GPIPE, PRODUCT, model_config('deepseek moe', execution=ExecutionConfig(remat='full'))
    ),  # its first layer is not split
    slow(GPIPE, PRODUCT, model_config('gemma3')),  # nor its last
    slow(CIRCULAR, TWO, model_config('gpt-oss', layers=8, execution=ExecutionConfig(remat='full'))),
    slow(
      PipelineConfig(schedule='circular', repeats=2),
      FSDP,
      model_config('mixtral', moe=EXPERTS, layers=4, execution=ExecutionConfig(remat='dots')),
    ),
  ],
  ids=lambda x: (
    ' '.join(f'{name}{n}' for name, n in x.items())
    if isinstance(x, dict)
    else getattr(x, 'schedule', None)
  ),
)
def test_stages_are_one_stack(pipeline, sizes, config):
  """Packed rows of unequal padding, so that no two microbatches weigh the same."""
  mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
  check(mesh, alone(config), config.with_execution(pipeline=pipeline))


@pytest.mark.slow
def test_the_auto_twin_gives_the_same():
  mesh = make_mesh(MeshConfig(stage=2, fsdp=2, tensor=2), axis_type=AxisType.Auto)
  check(mesh, alone(CONFIG), CONFIG.with_execution(pipeline=GPIPE))


def reports(mesh, config):
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, ax.spec('batch', 'length'))
    given = laws.make_model(config), jax.tree.map(lambda x: jax.device_put(x, rows), batch())
    value = jax.jit(functools.partial(summed_loss, z_loss=1e-2))
    step = jax.jit(jax.grad(functools.partial(summed_loss, z_loss=1e-2), has_aux=True))
    return value(*given), step(*given)[1]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('pipeline', [GPIPE, CIRCULAR, F1B1], ids=lambda x: x.schedule)
def test_experts_report_what_real_microbatches_did(pipeline):
  """Loads and losses of every layer, in order; idle slots, which compute too, count nowhere."""
  config = dataclasses.replace(laws.make_config('mixtral'), vocabulary=48, layers=4, moe=EXPERTS)
  (expected, expected_sums), _ = reports(make_mesh(MeshConfig(), jax.devices()[:1]), config)
  mesh = make_mesh(MeshConfig(stage=2, data=1, fsdp=2), jax.devices()[:4])
  (value, sums), with_gradients = reports(mesh, config.with_execution(pipeline=pipeline))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for actual in (sums, with_gradients):
    assert (
      actual.keys() == expected_sums.keys() >= {'load', 'dropped', 'balance_loss', 'router_z_loss'}
    )
    for name, wanted in expected_sums.items():
      np.testing.assert_allclose(actual[name], wanted, rtol=1e-5, err_msg=name)
  np.testing.assert_array_equal(sums['load'], expected_sums['load'])
  assert sums['load'].shape == (4, 4)


@pytest.mark.slow
def test_parameters_are_born_split_over_stages():
  """All of the stack that is split, biases and norms too;
  embedding and head over what the loss is split over.
  """
  config = model_config('llama', layers=4)
  mesh = make_mesh(MeshConfig(stage=2, data=1, fsdp=2), jax.devices()[:4])
  actual, alone = (
    named_leaves(born(config, mesh)),
    named_leaves(born(config, make_mesh(MeshConfig(), jax.devices()[:1]))),
  )
  with jax.set_mesh(mesh):
    described = jax.tree.leaves(
      specs(abstract(lambda: transformer.init(config, 0), mesh)),
      is_leaf=lambda x: hasattr(x, 'axes'),
    )
  for (name, x), spec in zip(actual.items(), described, strict=True):
    np.testing.assert_allclose(x, alone[name], rtol=5e-7, err_msg=name)
    if name.startswith('stack.blocks'):
      assert (
        spec.axes[0] == 'layers'
        and x.sharding.spec[0] == 'stage'
        and x.addressable_shards[0].data.shape[0] == 2
      ), name
    else:
      assert 'layers' not in spec.axes and (x.sharding.spec[0] == 'stage') == (
        spec.axes[0] == 'vocab'
      ), name


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, sizes',
  [
    ('llama', {'stage': 2, 'data': 1, 'fsdp': 2}),
    slow('deepseek', {'stage': 2, 'data': 1, 'tensor': 2}),
    slow('mixtral', PRODUCT),
    slow('relative', {'stage': 2, 'data': 4}),
  ],
  ids=str,
)
def test_prefill_and_decode_through_stages(name, sizes):
  """Each stage holds the cache of its layers. Unused slots hold NaN, also while a stage is idle."""
  config = dataclasses.replace(laws.make_config(name), vocabulary=48)
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    full = np.asarray(laws.forward()(laws.make_model(config), laws.tokens_of(config, 4, 6)))
  mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
  with jax.set_mesh(mesh):
    model, tokens = (
      laws.make_model(config),
      jax.device_put(laws.tokens_of(config, 4, 6), ax.spec('batch', 'length')),
    )
    step, cache = (
      laws.cached(),
      jax.tree.map(
        lambda x: jnp.full_like(x, np.nan) if x.ndim == 5 else x, init_cache(config, 4, 8)
      ),
    )
    born = [x.sharding for x in jax.tree.leaves(cache.held)]
    assert all(x.spec[0] == 'stage' for x in born)
    for first, last in ((0, 3), (3, 5), (5, 6)):
      logits, cache = step(model, tokens[:, first:last], cache, fresh=not first)
      np.testing.assert_allclose(
        logits, full[:, first:last], rtol=1e-4, atol=1e-5 * np.abs(full).max()
      )
  assert jnp.all(cache.lengths == 6)
  assert all(
    x.sharding.is_equivalent_to(like, 5)
    for x, like in zip(jax.tree.leaves(cache.held), born, strict=True)
  )


@pytest.mark.parametrize(
  'changes, words',
  [
    (
      {'layers': 5, 'moe': MoEConfig(experts=2, first=1)},
      r'layers of 2 scans \(model.stacks\) is not split over mesh.stage=2; generate on',
    ),
    (
      {'layers': 4, 'encoder_layers': 2, 'position': 'relative'},
      'model.encoder_layers=2 is not split',
    ),
  ],
)
def test_caches_that_do_not_split_raise(changes, words):
  with jax.set_mesh(make_mesh(MeshConfig(stage=2, data=4))):
    with pytest.raises(NotImplementedError, match=words):
      init_cache(laws.make_config('llama', **changes), 4, 8)


def temporaries(pipeline):
  """Bytes that a gradient step needs besides its arguments and results, as the compiler says."""
  M = pipeline.microbatches
  config = laws.make_config(
    'llama',
    width=32,
    layers=4,
    feed_forward=64,
    vocabulary=64,
    max_length=64,
    execution=ExecutionConfig(remat='full', pipeline=pipeline),
  )
  mesh = make_mesh(MeshConfig(stage=4, data=1), jax.devices()[:4])
  with jax.set_mesh(mesh):
    batch = Batch.abstract(2 * M, 64, jax.NamedSharding(mesh, ax.spec('batch', 'length')))
    model = abstract(lambda: transformer.init(config, 0), mesh)
    step = jax.jit(jax.grad(functools.partial(summed_loss, z_loss=0.0), has_aux=True))
    return step.lower(model, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_1f1b_does_not_grow_with_the_microbatches():
  """But for what a batch says of its tokens (five fields), twice;
  GPipe keeps what enters stages.
  """
  ids, entering = 5 * 2 * 64 * 4, 2 * 64 * 32 * 4  # bytes of a microbatch
  few, many = (temporaries(PipelineConfig(schedule='1f1b', microbatches=M)) for M in (8, 32))
  assert 0 <= many - few <= 2 * 24 * ids
  few, many = (temporaries(PipelineConfig(microbatches=M)) for M in (8, 32))
  assert many - few >= 24 * entering
