"""Does the decoder obey its laws, and compute what an independent float64 forward computes?"""

import math

import float64
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from kernels.mask import Mask
from model import params, router, transformer
from model.config import MoEConfig
from model.execution import ExecutionConfig
from model.params import named_leaves

EXACT = [name for name in laws.CONFIGS if name != 'bfloat16']
# Their layers differ from others' in what a cache has no part in: experts, norms, activations.
NO_CACHE_OF_THEIR_OWN = ('layer norm', 'no positions', 'mixtral')


@pytest.mark.costly
@pytest.mark.parametrize('name', EXACT)
def test_logits_are_those_of_the_float64_forward(name, one_device):
  config = laws.make_config(name)
  model, tokens, actual = (
    laws.make_model(config),
    laws.tokens_of(config, 2, 9),
    laws.full_logits(config),
  )
  for row in range(2):
    expected = float64.logits(config, named_leaves(model), np.asarray(tokens[row]))
    assert np.abs(expected).max() > 0.5, 'too small to tell anything'
    np.testing.assert_allclose(actual[row], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_gradients_are_those_of_the_float64_forward(one_device):
  """Along random directions, by central differences in float64."""
  config = laws.make_config('gpt2', position='rope', gated=True, qk_norm=True, layers=1)
  model, tokens = laws.make_model(config), laws.tokens_of(config, 1, 5)
  weights = np.random.default_rng(3).normal(size=(5, config.V))

  def loss(model):
    return jnp.sum(model.logits(model(tokens).hidden) * weights[None].astype(np.float32))

  gradient = named_leaves(jax.jit(jax.grad(loss))(model))
  values = {name: np.asarray(x, np.float64) for name, x in named_leaves(model).items()}
  assert len(values) == 23
  for index, name in enumerate(values):
    direction = np.random.default_rng([4, index]).normal(size=values[name].shape)

    def moved(h):
      return values | {name: values[name] + h * direction}

    def at(h):
      return (float64.logits(config, moved(h), np.asarray(tokens[0])) * weights).sum()

    parts = np.asarray(gradient[name], np.float64) * direction
    assert abs(parts.sum() - (at(1e-5) - at(-1e-5)) / 2e-5) < 1e-5 * np.abs(parts).sum(), name


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'mistral'])
def test_causality(name):
  laws.check_causality(laws.make_config(name))


@pytest.mark.parametrize('backend', ['reference', 'xla'])
def test_causality_of_other_backends(backend):
  laws.check_causality(laws.make_config(execution=ExecutionConfig(attention=backend)))


def test_window():
  laws.check_window(laws.make_config('mistral'))


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'mistral'])
def test_segments(name):
  laws.check_segments(laws.make_config(name))


@pytest.mark.costly
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in NO_CACHE_OF_THEIR_OWN)) for name in EXACT
  ],
)
def test_cached_decode(name):
  laws.check_cached_decode(laws.make_config(name))


def test_cached_decode_in_bfloat16():
  laws.check_cached_decode(
    laws.make_config('bfloat16'), 3e-2, [[4, 1, 4]]
  )  # 8 bits of mantissa over two layers


@pytest.mark.parametrize('name', ['llama', 'bfloat16'])
def test_unused_slots(name):
  laws.check_unused_slots(laws.make_config(name))


def test_padding_and_neighbours():
  laws.check_padding_and_neighbours(laws.make_config('gpt2', position='rope'))


def test_scan_is_a_loop(one_device):
  config = laws.make_config('gpt2')
  model, tokens = laws.make_model(config), laws.tokens_of(config, 2, 7)

  def looped(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[None], (2, 7))
    x, view = model.embedding(tokens, positions, None), transformer.View(transformer.Mask())
    for layer in range(config.L):
      block = jax.tree.map(lambda x, layer=layer: x[layer], model.stack.blocks[0])
      x, _, _ = block(x, view, None)
    return model.logits(model.stack.norm(x))

  def loss(run):
    return jax.jit(jax.value_and_grad(lambda model: jnp.mean(jnp.sin(run(model, tokens)))))(model)

  for a, b in zip(
    jax.tree.leaves(loss(laws.forward())), jax.tree.leaves(loss(looped)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.costly
@pytest.mark.parametrize('name', laws.CONFIGS)
def test_the_abstract_model_is_the_model(name, one_device):
  config = laws.make_config(name)
  abstract = model = jax.eval_shape(lambda: transformer.init(config, 0))
  if name in ('gpt2', 'deepseek moe', 'bfloat16'):  # as for any function that is traced
    model = jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)

  def described(tree):
    return {name: (x.shape, x.dtype) for name, x in named_leaves(tree).items()}

  assert described(abstract) == described(model)

  def is_spec(x):
    return isinstance(x, params.ParamSpec)

  specs = jax.tree.leaves(params.specs(model), is_leaf=is_spec)
  assert jax.tree.leaves(params.specs(abstract), is_leaf=is_spec) == specs
  D, F, V, L, N, K, H = (getattr(config, letter) for letter in 'DFVLNKH')
  Q, R, Hr, Hv = (
    config.latent.query_width,
    config.latent.width,
    config.latent.rope_width,
    config.value_width,
  )
  attention = (
    D * Q + Q * N * (H + Hr) + D * (R + Hr) + R * N * (H + Hv) + N * Hv * D
    if R
    else 2 * D * (N + K) * H
  )
  moe, sparse = config.moe, sum(kind.moe for kind in config.kinds)
  matrices = L * attention + (L - sparse) * (3 if config.gated else 2) * D * F
  matrices += sparse * (
    D * config.E + 3 * D * (config.E * moe.feed_forward + moe.shared_feed_forward)
  )
  vectors = L * D * (4 if config.norm_placement == 'both' else 2) + D
  if config.norm == 'layer' and config.biases == 'all':
    vectors *= 2
  inner, outer = config.biases != 'none', config.biases == 'all'
  vectors += L * (
    2 * H * config.qk_norm
    + inner * (N + 2 * K) * H
    + outer * (2 * D + (2 if config.gated else 1) * F)
  )
  vectors += sparse * config.E * moe.selection_bias
  vectors += L * (N * config.sinks + Q + R) + (
    config.relative_buckets * N if config.position == 'relative' else 0
  )
  tables = V * D * (1 if config.tie_embeddings else 2) + (
    config.max_length * D if config.position == 'learned' else 0
  )
  assert params.count(model) == params.count(abstract) == matrices + vectors + tables
  assert sum(math.prod(spec.shape) for spec in specs if spec.kind == 'matrix') == matrices
  for spec, (shape, _) in zip(specs, described(model).values(), strict=True):
    assert (
      spec.shape == shape
      and len(spec.axes) == len(shape)
      and spec.kind in ('matrix', 'embedding', 'vector')
    )


def test_caches_and_masks_are_pytrees_of_anything():
  """Abstract arrays, shardings and placeholders take the place of arrays
  when programs are planned.
  """
  cache = jax.eval_shape(lambda: laws.init_cache(laws.make_config(), 2, 8))
  assert [x.shape for x in jax.tree.leaves(cache.held)] == [
    (2, 2, 2, 8, 4)
  ] * 2 and cache.capacity == 8
  assert jax.tree.leaves(jax.tree.map(lambda x: 'anything', cache)) == ['anything'] * 3
  mask = jax.eval_shape(lambda: transformer.Mask(prefix=jnp.zeros((2,), jnp.int32)))
  assert jax.tree.map(lambda x: 'anything', mask).prefix == 'anything'


@pytest.mark.slow
def test_layers_report_and_are_balanced_in_their_order(one_device):
  """Windows and experts alternate, so that periods have several places
  and the last one is cut off.
  """
  config = laws.make_config(
    layers=14,
    window=3,
    global_every=2,
    moe=MoEConfig(experts=14, per_token=1, feed_forward=8, every=3, first=1, selection_bias=True),
  )
  sparse = [1, 4, 7, 10, 13]
  assert [(len(kinds), repeats) for kinds, repeats in config.stacks] == [(6, 2), (1, 1), (1, 1)]
  model = laws.make_model(config)
  for block, (kind, layers) in zip(model.stack.blocks, config.places, strict=True):
    if kind.moe:  # expert 1 in layer 1, 4 in layer 4, ... is chosen by all
      bias = block.feed_forward.selection_bias
      bias[...] = jnp.asarray(
        [[10.0 * (expert == layer) for expert in range(14)] for layer in layers], jnp.float32
      )
  tokens = laws.tokens_of(config, 2, 6)
  load = jax.jit(lambda model: model(tokens).router['load'])(model)
  np.testing.assert_array_equal(
    load, [[12 * (expert == layer) for expert in range(14)] for layer in sparse]
  )
  moved = jax.jit(router.balanced, static_argnums=2)(model, load, 1.0)
  for block, (kind, layers) in zip(moved.stack.blocks, config.places, strict=True):
    for row, layer in zip(block.feed_forward.selection_bias[...] if kind.moe else (), layers):
      assert row.tolist() == [9.0 if expert == layer else 1.0 for expert in range(14)]


def test_seeds_and_layers_differ(one_device):
  config = laws.make_config()
  make = jax.jit(transformer.init, static_argnums=(0, 1))
  first, same, other = make(config, 0), make(config, 0), make(config, 1)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(same), strict=True):
    np.testing.assert_array_equal(a, b)
  assert (first.embedding.tokens[...] != other.embedding.tokens[...]).all()
  q = np.asarray(first.stack.blocks[0].attention.q[...])
  assert (q[0] != q[1]).all() and abs(q.std() * config.D**0.5 - 1) < 0.2


def test_bad_calls_raise(one_device):
  with pytest.raises(ValueError, match='model.vocabulary=0: set it to the size of the tokenizer'):
    transformer.init(laws.make_config(vocabulary=0), 0)
  with pytest.raises(ValueError, match='model.max_length=0: learned positions need'):
    transformer.init(laws.make_config('gpt2', max_length=0), 0)
  config = laws.make_config()
  model, tokens = laws.make_model(config), laws.tokens_of(config, 1, 4)
  with pytest.raises(ValueError, match='segments, branches and cache exclude each other'):
    model(tokens, segments=tokens, cache=laws.init_cache(config, 1, 8))
  with pytest.raises(ValueError, match='segments, branches and cache exclude each other'):
    model(tokens, laid=Mask(branches=2), cache=laws.init_cache(config, 1, 8))
  with pytest.raises(ValueError, match='cache of 25 tokens passes model.max_length=24'):
    laws.init_cache(config, 1, 25)
