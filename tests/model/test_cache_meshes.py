"""Is a cache that devices share one cache? Slots over `context`, heads over `tensor`, rows,
experts, stages: as on one device.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels import cached
from model import moves
from model.cache import init_cache
from model.execution import ExecutionConfig
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh


def mesh_of(sizes, **kind):
  return make_mesh(
    MeshConfig(**{'data': 1} | sizes), jax.devices()[: math.prod(sizes.values())], **kind
  )


def check(config, sizes, pieces=(4, 3, 3, 1), **kind):
  """Prefill and decode of 4 rows in such pieces against the full forward on one device;
  slots that are unused hold NaN.
  """
  config = dataclasses.replace(config, vocabulary=48, max_length=64)
  tokens, edges = laws.tokens_of(config, 4, sum(pieces)), np.cumsum([0, *pieces])
  with jax.set_mesh(mesh_of({})):
    full = np.asarray(laws.forward()(laws.make_model(config), tokens))
  with jax.set_mesh(mesh_of(sizes, **kind)):
    model, cache = laws.make_model(config), init_cache(config, 4, 16, append=3)
    cache = jax.tree.map(lambda x: jnp.full_like(x, np.nan) if x.ndim == 5 else x, cache)
    parts = sizes.get('context', 1)
    for layer in cache.held:
      S, whole = layer.keys.addressable_shards[0].data.shape[3], layer.keys.shape[3]
      assert S * (1 if layer.ring else parts) == whole, (
        'a ring is whole on every device, other slots are split'
      )
    step, born = laws.cached(), [x.sharding for x in jax.tree.leaves(cache.held)]
    for first, last in zip(edges, edges[1:]):
      given = jax.device_put(
        tokens[:, first:last], jax.NamedSharding(jax.sharding.get_mesh(), ax.spec('batch', None))
      )
      logits, cache = step(model, given, cache, fresh=not first)
      np.testing.assert_allclose(
        logits,
        full[:, first:last],
        rtol=0,
        atol=1e-5 * np.abs(full).max(),
        err_msg=f'{first}:{last}',
      )
    for x, like in zip(jax.tree.leaves(cache.held), born, strict=True):
      assert x.sharding.is_equivalent_to(like, x.ndim)


def slow(*case):
  return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, changes, sizes',
  [
    ('gpt-oss', {}, {'context': 4}),
    (
      'llama',
      {'execution': ExecutionConfig(context='ulysses')},
      {'context': 2, 'tensor': 2, 'data': 2},
    ),
    ('mixtral', {}, {'context': 2, 'expert': 2}),
    ('gpt-oss', {'layers': 4}, {'stage': 2, 'context': 2}),
    slow('gemma3', {'execution': ExecutionConfig(context='gather')}, {'context': 4, 'data': 2}),
    slow('gemma2', {}, {'context': 2, 'fsdp': 2, 'tensor': 2}),
    slow('deepseek', {}, {'context': 2, 'tensor': 2}),
    slow(
      'relative', {'execution': ExecutionConfig(context='ulysses_ring')}, {'context': 2, 'data': 2}
    ),
    slow('qwen3', {}, {'context': 2, 'tensor': 4}),
    slow('deepseek moe', {}, {'expert': 4, 'tensor': 2}),
    slow('deepseek moe', {}, {'context': 2, 'expert': 2, 'tensor': 2}),
    slow('mixtral', {'layers': 4}, {'stage': 2, 'expert': 2, 'context': 2}),
  ],
  ids=str,
)
def test_devices_that_share_a_cache_are_one(name, changes, sizes):
  """A prompt that splits, and tokens that are too few to split:
  before, across and behind the edge of a device's 8 slots.
  """
  check(laws.make_config(name, **changes), sizes)


def test_a_prompt_that_does_not_split_is_read_by_all():
  check(laws.make_config(), {'context': 4}, pieces=(6, 3, 1))


@pytest.mark.slow
def test_the_auto_twin_shares_a_cache_too():
  check(laws.make_config('gpt-oss'), {'context': 2, 'tensor': 2}, axis_type=AxisType.Auto)


def test_no_slot_travels():
  """A step of decoding gathers weights, and of the cache nothing."""
  config, rows, slots = laws.make_config(max_length=2048), 2, 2048
  with jax.set_mesh(mesh_of({'context': 4})):
    given = laws.make_model(config), jnp.ones((rows, 1), jnp.int32), init_cache(config, rows, slots)
    text = laws.cached().lower(*given).compile().as_text()
  moved = [
    math.prod(map(int, shape.split(',')))
    for shape in re.findall(
      r'\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(', text
    )
  ]
  assert moved and max(moved) < rows * config.K * slots // 4


def test_rows_are_repeated_and_reordered_where_they_lie(monkeypatch):
  """Beams of a prompt exchange what they hold, on every device of its own slots."""
  monkeypatch.setattr(cached, 'BLOCK', 8)
  config = laws.make_config(max_length=64, window=5, global_every=2)
  sources, shared = np.array([[1, 1, 0], [0, 1, 2]], np.int32), np.array([19, 0], np.int32)

  def run(sizes):
    with jax.set_mesh(mesh_of(sizes)):

      def place(x, *axes):
        return jax.device_put(x, ax.spec(*axes))

      draw = np.random.default_rng(0)
      two, cache = init_cache(config, 2, 64, append=8), init_cache(config, 6, 64, append=8)

      def fill(cache):
        return dataclasses.replace(
          cache,
          held=tuple(
            jax.tree.map(
              lambda x, axes: place(draw.normal(size=x.shape).astype(np.float32), *axes),
              layer,
              layer.axes(),
            )
            for layer in cache.held
          ),
        )

      cache = dataclasses.replace(
        fill(cache), lengths=place(np.array([41] * 3 + [30] * 3, np.int32), 'batch')
      )
      actual = jax.jit(moves.reordered)(
        cache, place(sources, 'batch', None), place(shared, 'batch')
      )
      return [
        np.asarray(x)
        for x in jax.tree.leaves((actual, jax.jit(moves.repeated, static_argnums=1)(fill(two), 3)))
      ], cache

  (expected, before), (actual, _) = run({}), run({'context': 2, 'data': 2, 'tensor': 2})
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(a, b)
  whole, was = expected[2], np.asarray(before.held[1].keys)
  np.testing.assert_array_equal(whole[:, :3, :, 16:41], was[:, [1, 1, 0], :, 16:41])
