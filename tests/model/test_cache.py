"""Do models remember what they have read: in rings, in fewer bits, layer by layer,
and after something was taken back?
"""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from model import rearranged
from model.cache import init_cache
from model.config import ModelConfig
from model.weights.int8 import in_bytes

T5 = ModelConfig(
  **laws.TINY
  | dict(
    kv_heads=4, encoder_layers=2, position='relative', relative_buckets=8, relative_distance=12
  )
)


def slow(*case):
  return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, rings',
  [
    ('mistral', 1),
    ('gemma2', 1),
    slow('gemma3', 2),
    ('gpt-oss', 1),
    slow('llama', 0),
    ('deepseek', 0),
  ],
)
def test_rows_that_grow_by_unequal_pieces(name, rings):
  """Rings of 16 slots turn three times while rows come to 49 tokens and more."""
  laws.check_appending(laws.make_config(name), rings=rings)


@pytest.mark.costly
@pytest.mark.parametrize(
  'name, dtype, bound',
  [
    ('deepseek', 'int8', 0.08),
    ('gpt-oss', 'bfloat16', 0.02),
    slow('gpt-oss', 'int8', 0.02),
    slow('deepseek', 'bfloat16', 0.02),
    slow('llama', 'int8', 0.03),
    slow('llama', 'bfloat16', 0.03),
  ],
)
def test_fewer_bits_are_near(name, dtype, bound):
  """The bound is that of the largest logit's size.
  A scale serves a whole latent vector, its keys of positions included.
  """
  laws.check_appending(laws.make_config(name), bound, dtype, least=1e-4, calls=laws.CALLS[:6])


@pytest.mark.costly
@pytest.mark.parametrize(
  'name', [name if name in ('llama', 'gemma3', 'gpt-oss') else slow(name) for name in laws.CONFIGS]
)
def test_layers_by_themselves_are_the_scanned_ones(name, one_device):
  config = laws.make_config(name)
  stacked, tokens = laws.make_model(config), laws.tokens_of(config, 2, 7)
  outputs = []
  for model in (stacked, rearranged.unstacked(stacked)):
    step, cache = laws.cached(), init_cache(model.config, 2, 12)
    first, cache = step(model, tokens[:, :5], cache, fresh=True)
    outputs.append([np.asarray(x) for x in (first, step(model, tokens[:, 5:6], cache)[0])])
  for a, b in zip(*outputs, strict=True):
    np.testing.assert_allclose(
      a, b, rtol=0, atol=(3e-2 if name == 'bfloat16' else 1e-6) * np.abs(b).max()
    )


def test_an_encoder_decoder_layer_by_layer(one_device):
  """What it has read is the source's; a row that has ended,
  padding and a draft that was taken back leave it alone.
  """
  stacked, tokens, source = (
    laws.make_model(T5),
    laws.tokens_of(T5, 2, 9),
    laws.tokens_of(T5, 2, 7, seed=5),
  )
  real = jnp.asarray([[1] * 7, [1] * 4 + [0] * 3], jnp.int32)
  full = jax.jit(
    lambda model: model.logits(model(tokens, source=source, source_segments=real).hidden)
  )(stacked)
  model, run = rearranged.unstacked(stacked), laws.appending(4)
  cache = jax.jit(lambda *args: args[0].read(*args[1:]))(
    model, init_cache(model.config, 2, 12), source, real.sum(1)
  )
  logits, cache = run(model, cache, tokens[:, :4], jnp.asarray([4, 3]), fresh=True)

  def close(a, b):
    return np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(full).max())

  close(logits[0], full[0, :4]), close(logits[1, :3], full[1, :3])
  _, drafted = run(model, cache, tokens[:, :4], jnp.asarray([4, 4]))
  cache = dataclasses.replace(drafted, lengths=cache.lengths)
  logits, cache = run(
    model, cache, jnp.stack([tokens[0, 4:8], tokens[1, 3:7]]), jnp.asarray([0, 4])
  )
  close(logits[1], full[1, 3:7])
  logits, cache = run(
    model, cache, jnp.stack([tokens[0, 4:8], tokens[1, 5:9]]), jnp.asarray([4, 0])
  )
  close(logits[0], full[0, 4:8])
  assert cache.lengths.tolist() == [8, 7]


@pytest.mark.slow
def test_bytes_of_weights_and_of_a_cache_go_together(one_device):
  model = jax.jit(in_bytes)(rearranged.unstacked(laws.make_model(laws.make_config('gpt-oss'))))
  tokens, step = laws.tokens_of(model.config, 2, 6), laws.cached()
  full = np.asarray(laws.forward()(model, tokens))
  first, cache = step(model, tokens[:, :5], init_cache(model.config, 2, 8, 'int8'), fresh=True)
  after, _ = step(model, tokens[:, 5:], cache)
  assert {x.dtype for x in jax.tree.leaves(cache.held)} == {jnp.dtype('int8'), jnp.dtype('float32')}
  np.testing.assert_allclose(first, full[:, :5], rtol=0, atol=1e-5 * np.abs(full).max())
  np.testing.assert_allclose(after, full[:, 5:], rtol=0, atol=0.02 * np.abs(full).max())


@pytest.mark.parametrize(
  'changes, arguments, words',
  [
    (
      {'causal': False},
      (8,),
      'model.causal=False: an encoder sees all tokens at once and has no use for a cache',
    ),
    ({}, (25,), 'a cache of 25 tokens passes model.max_length=24; ask for fewer tokens'),
    ({}, (0,), 'capacity=0 tokens with append=256 at once: both must be at least 1'),
    ({}, (8, '', 0), 'capacity=8 tokens with append=0 at once'),
    ({}, (8, 'int4'), "dtype of a cache='int4' is unknown; did you mean 'int8'"),
  ],
)
def test_caches_that_make_no_sense_raise(changes, arguments, words, one_device):
  with pytest.raises(ValueError, match=words):
    init_cache(laws.make_config(**changes), 2, *arguments)


def test_more_tokens_than_a_ring_has_room_for_raise(one_device):
  config = laws.make_config('mistral', max_length=64)
  model, cache = laws.make_model(config), init_cache(config, 1, 60, append=6)
  assert cache.held[0].slots == 8
  with pytest.raises(
    ValueError,
    match=r'7 tokens at once overwrite what a window of 3 .* ring of 8 slots; '
    r'append at most 6, or .*append=7',
  ):
    jax.eval_shape(lambda: model(laws.tokens_of(config, 1, 7), cache=cache))
  jax.eval_shape(lambda: model(laws.tokens_of(config, 1, 7), cache=cache, fresh=True))


def test_a_token_beyond_the_capacity_is_not_written(one_device):
  """Nor does it push out another one."""
  config = laws.make_config()
  model, run, tokens = laws.make_model(config), laws.appending(4), laws.tokens_of(config, 1, 8)
  _, cache = run(model, init_cache(config, 1, 6), tokens[:, :4], jnp.asarray([4]), fresh=True)
  _, beyond = run(model, cache, tokens[:, 4:], jnp.asarray([4]))
  _, within = run(model, cache, tokens[:, 4:], jnp.asarray([2]))
  for a, b in zip(jax.tree.leaves(beyond.held), jax.tree.leaves(within.held), strict=True):
    np.testing.assert_array_equal(a[:, :, :, :6], b[:, :, :, :6])
    np.testing.assert_array_equal(a[:, :, :, 6:], 0)
