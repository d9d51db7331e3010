"""Is a model without heads, channels or layers the model in which these add nothing, and do those
go that add least?
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compression import structured
from compression.calibration import InputStatistics
from model.config import RopeConfig
from model.params import by_name, is_param, name_of
from tests.model import laws


def silenced(model, made, layers):
  """The model whose parts that went are multiplied with 0 where they are read: those whose values
  are not among the others'.
  """
  config, there = model.config, by_name(made)

  def one(path, p):
    name, x = name_of(path), np.array(p.get_value())
    parts = name.split('.')
    if parts[-1] not in ('o', 'down', 'o_bias', 'down_bias'):
      return p
    for row, layer in enumerate(config.places[int(parts[2])][1]):
      if layer not in layers:
        x[row] = 0
      elif parts[-1] in ('o', 'down'):
        new = layers.index(layer)
        block = next(i for i, (_, ls) in enumerate(made.config.places) if new in ls)
        place = made.config.places[block][1].index(new)
        left = there[f'stack.blocks.{block}.{".".join(parts[3:])}'].get_value()[place]
        left = {np.asarray(y).tobytes() for y in left}
        x[row, [y.tobytes() not in left for y in x[row]]] = 0
    return p.replace(jnp.asarray(x))

  return jax.tree_util.tree_map_with_path(one, model, is_leaf=is_param)


@pytest.mark.parametrize(
  'name, changes, text',
  [
    ('llama', {'layers': 3}, 'heads=2,channels=10,layers=2'),
    pytest.param('gpt2', {}, 'heads=3,channels=7', marks=pytest.mark.slow),
    pytest.param('deepseek', {}, 'heads=1,channels=5,layers=1', marks=pytest.mark.slow),
    pytest.param('gemma2', {'layers': 4}, 'heads=2,channels=9', marks=pytest.mark.slow),
    pytest.param(
      'qwen3', {'kv_heads': 2, 'rope': RopeConfig()}, 'heads=2,layers=1', marks=pytest.mark.slow
    ),
  ],
)
def test_what_is_left_is_the_model_in_which_the_rest_is_silent(name, changes, text, one_device):
  config = laws.make_config(name, **changes)
  model, sizes = laws.make_model(config), structured.parse(text)
  small = structured.smaller(config, sizes)
  layers = structured.left(config, small, [0.3, 0.1, 0.2, 0.4][: config.L])
  made = structured.joined(structured.by_magnitude(model, small), small, layers, one_device)
  for unit, size in sizes.items():
    have = {'heads': small.N, 'channels': small.F, 'layers': small.L}[unit]
    assert have == size < {'heads': config.N, 'channels': config.F, 'layers': config.L}[unit]
  wanted = {n: p.get_value().shape for n, p in by_name(laws.make_model(small)).items()}
  assert {n: p.get_value().shape for n, p in by_name(made).items()} == wanted
  tokens = laws.tokens_of(config, 2, 9)
  outputs = laws.forward()(made, tokens), laws.forward()(silenced(model, made, layers), tokens)
  np.testing.assert_allclose(*outputs, atol=1e-4)


def test_those_go_that_add_least(one_device):
  """A head, a channel whose numbers are a hundredth; by norms of what comes in, what is never
  anything; the layers of the least influence.
  """
  config = laws.make_config('llama', layers=3)
  model = laws.make_model(config)
  block = model.stack.blocks[0]
  v, up = np.array(block.attention.v[...]), np.array(block.feed_forward.up[...])
  v[1, :, 0] *= 0.01
  up[2, :, 5] *= 0.01
  block.attention.v[...], block.feed_forward.up[...] = jnp.asarray(v), jnp.asarray(up)
  small = structured.smaller(config, {'heads': 2, 'channels': 23, 'layers': 2})
  assert structured.left(config, small, [0.1, 0.2, 0.3]) == [1, 2]
  made = structured.by_magnitude(model, small).stack.blocks[0]
  block = jax.tree.map(np.asarray, block)
  np.testing.assert_array_equal(made.attention.q[...][1], block.attention.q[...][1, :, 2:])
  np.testing.assert_array_equal(made.attention.k[...][1], block.attention.k[...][1, :, 1:])
  rest = [i for i in range(24) if i != 5]
  down = block.feed_forward.down[...]
  np.testing.assert_array_equal(made.feed_forward.down[...][2], down[2, rest])
  sizes = np.float32(np.arange(16) < 8), np.float32(np.arange(24) != 7)
  seen = {
    f'x.{name}': InputStatistics(None, None, size, None, None)
    for name, size in zip(('attention.o', 'feed_forward.down'), sizes)
  }
  layer = jax.tree.map(lambda x: x[:1], block)
  without = jax.jit(structured.without, static_argnums=(0, 3, 4))
  made = without('x', layer, seen, config, small)
  np.testing.assert_array_equal(made.attention.v[...][0], block.attention.v[...][0, :, :1])
  rest = [i for i in range(24) if i != 7]
  gate = block.feed_forward.gate[...]
  np.testing.assert_array_equal(made.feed_forward.gate[...][0], gate[0][:, rest])


@pytest.mark.parametrize(
  'name, text, words',
  [
    ('llama', 'heads=3', 'a multiple of the 2 that share keys and values'),
    ('llama', 'channels=25', 'at most 24'),
    ('llama', 'layers=0', 'at least 1'),
    ('mixtral', 'channels=4', 'channels of experts stay'),
    ('relative', 'heads=2', 'share their table'),
  ],
)
def test_what_is_no_smaller_model(name, text, words):
  with pytest.raises((ValueError, NotImplementedError), match=words):
    structured.smaller(laws.make_config(name), structured.parse(text))


def test_layers_that_differ_stay_in_their_order():
  config = laws.make_config('gemma2', layers=4)
  small = structured.smaller(config, {'layers': 3})
  with pytest.raises(ValueError, match='let another number stay'):
    structured.left(config, small, [0.1, 0.2, 0.3, 0.4])
