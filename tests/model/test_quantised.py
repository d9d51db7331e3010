"""Is a matrix of bytes the matrix that it stands for, and the product with it theirs to 15 bits?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import params, rearranged
from model.weights.int8 import Int8, in_bytes
from tests.model import laws

BYTES = jax.jit(in_bytes)
NAMES = ['llama', 'gpt2', 'qwen3', 'deepseek', 'mixtral', 'relative']


def whole(model):
  """The model with the numbers that its bytes stand for."""

  def plain(p):
    value = p.get_value()
    assert isinstance(value, Int8 | jax.Array), type(value)
    return p.replace(value.whole('float32')) if isinstance(value, Int8) else p

  return jax.tree.map(plain, model, is_leaf=lambda x: isinstance(x, params.nnx.Variable))


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_logits_are_those_of_the_numbers(name):
  """Few rows go by two digits of a byte, many by numbers made of the bytes: one model."""
  config = dataclasses.replace(laws.make_config(name), tie_embeddings=False)
  with jax.set_mesh(laws.make_mesh(laws.MeshConfig(), jax.devices()[:1])):
    model = rearranged.unstacked(laws.make_model(config))
    small = BYTES(model)
    numbers = whole(small)
    for tokens in (laws.tokens_of(config, 2, 3), laws.tokens_of(config, 2, 12)):
      expected, actual = laws.forward()(numbers, tokens), laws.forward()(small, tokens)
      np.testing.assert_allclose(
        actual, expected, atol=2e-3 * np.abs(expected).max()
      )  # 15 bits of every row's largest number
      exact = laws.forward()(model, tokens)
      assert (
        1e-5 < np.abs(actual - exact).max() / np.abs(exact).max() < 0.2
      )  # 8 bits of a weight are another model, a near one


def test_every_matrix_is_bytes_and_errs_by_half_a_step():
  with jax.set_mesh(laws.make_mesh(laws.MeshConfig(), jax.devices()[:1])):
    model = rearranged.unstacked(
      laws.make_model(laws.make_config('llama', width=512, heads=8, feed_forward=1024))
    )
    small = BYTES(model)
  named = {
    name: p
    for name, p in jax.tree_util.tree_leaves_with_path(
      small, is_leaf=lambda x: isinstance(x, params.nnx.Variable)
    )
  }
  before = dict(
    jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, params.nnx.Variable))
  )
  seen = 0
  for name, p in named.items():
    value = p.get_value()
    if p.kind == 'vector' or 'embedding' in jax.tree_util.keystr(name):
      assert isinstance(value, jax.Array)
      continue
    assert isinstance(value, Int8) and value.values.dtype == jnp.int8, name
    seen += 1
    step = np.asarray(value.scale)
    assert (
      np.abs(np.asarray(value.whole('float32') - before[name][...])) <= step * 0.5001 + 1e-7
    ).all(), name
  assert seen > 7


def test_a_tied_table_is_looked_up_as_it_is_and_scores_in_bytes():
  config = laws.make_config('gpt2', position='rope')
  with jax.set_mesh(laws.make_mesh(laws.MeshConfig(), jax.devices()[:1])):
    small = BYTES(laws.make_model(config))
  assert isinstance(small.head.tokens.get_value(), Int8) and isinstance(
    small.embedding.tokens.get_value(), jax.Array
  )


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [dict(data=2), dict(tensor=2), dict(fsdp=2, data=1)])
def test_on_meshes(sizes):
  config = laws.make_config('llama', vocabulary=48)
  outputs = []
  for devices, mesh in ((1, {}), (2, sizes)):
    with jax.set_mesh(laws.make_mesh(laws.MeshConfig(**mesh), jax.devices()[:devices])):
      small = BYTES(rearranged.unstacked(laws.make_model(config)))
      tokens = jax.device_put(laws.tokens_of(config, 2, 12), laws.ax.spec('batch', 'length'))
      outputs.append(np.asarray(laws.forward()(small, tokens)))
  np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5 * np.abs(outputs[0]).max())


def test_digits_are_15_bits_of_a_rows_largest_number():
  """The bound that docs state: half a unit, 1/16,256 of the largest, of each of K numbers."""
  x = jax.random.normal(jax.random.key(0), (4, 64))
  weight = Int8.of(jax.random.normal(jax.random.key(1), (64, 32)), (-2,), (None, None))
  with jax.set_mesh(laws.make_mesh(laws.MeshConfig(), jax.devices()[:1])):
    found = jax.jit(lambda x, w: w.product('BD,DF->BF', x, 'float32'))(x, weight)
  numbers = np.asarray(weight.numbers('float32'), np.float64)
  error = np.abs(found - np.asarray(x, np.float64) @ numbers)
  bound = np.abs(x).max(1, keepdims=True) / (2 * 127 * 128) * np.abs(numbers).sum(0)
  assert (error <= bound * 1.01 + 1e-6).all() and error.max() > bound.max() / 100
