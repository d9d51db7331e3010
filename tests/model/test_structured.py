"""Is a model without heads, channels or layers the model in which these add nothing, and do those
go that add least?
"""

import dataclasses

import jax
import numpy as np
import pytest

from compression import structured
from model.config import RopeConfig
from tests.model import laws


def named(model):
  flat = jax.tree_util.tree_leaves_with_path(model, is_leaf=structured._is_param)
  return {structured._name(path): p for path, p in flat}


def silenced(model, small, picked):
  """The model whose parts that go are multiplied with 0 where they are read; by hand, and not by
  what takes them out.
  """
  config, G = model.config, model.config.G
  stays = {one['layer']: one for one in picked}

  def one(path, p):
    name, x = structured._name(path), np.array(p.get_value())
    parts = name.split('.')
    if parts[-1] not in ('o', 'down', 'o_bias', 'down_bias'):
      return p
    for row, layer in enumerate(config.places[int(parts[2])][1]):
      if layer not in stays:
        x[row] = 0
      elif parts[-1] == 'o':
        lost = set(range(config.K)) - {*stays[layer]['kv_heads'].tolist()}
        for group in lost:
          x[row, group * G : (group + 1) * G] = 0
      elif parts[-1] == 'down' and 'feed_forward' in stays[layer]:
        x[row, [*set(range(config.F)) - {*stays[layer]['feed_forward'].tolist()}]] = 0
    return p.replace(jax.numpy.asarray(x))

  return jax.tree_util.tree_map_with_path(one, model, is_leaf=structured._is_param)


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
  influence = [0.3, 0.1, 0.2, 0.4][: config.L]
  picked = structured.chosen(config, small, structured.scores(model, None), influence)
  made = structured.without(model, small, picked, one_device)
  for unit, size in sizes.items():
    have = {'heads': small.N, 'channels': small.F, 'layers': small.L}[unit]
    assert have == size < {'heads': config.N, 'channels': config.F, 'layers': config.L}[unit]
  wanted = {n: p.get_value().shape for n, p in named(laws.make_model(small)).items()}
  assert {n: p.get_value().shape for n, p in named(made).items()} == wanted
  tokens = laws.tokens_of(config, 2, 9)
  run = laws.forward()
  np.testing.assert_allclose(
    run(made, tokens), laws.forward()(silenced(model, small, picked), tokens), atol=1e-4
  )


def test_those_go_that_add_least(one_device):
  """A head, a channel whose numbers are a hundredth; by norms of what comes in, what is never
  anything; the layers of the least influence.
  """
  config = laws.make_config('llama', layers=3)
  model = laws.make_model(config)
  block = model.stack.blocks[0]
  block.attention.v[...] = block.attention.v[...].at[1, :, 0].multiply(0.01)
  block.feed_forward.up[...] = block.feed_forward.up[...].at[2, :, 5].multiply(0.01)
  small = structured.smaller(config, {'heads': 2, 'channels': 23, 'layers': 2})
  picked = structured.chosen(config, small, structured.scores(model, None), [0.1, 0.2, 0.3])
  assert [one['layer'] for one in picked] == [1, 2]
  assert picked[0]['kv_heads'].tolist() == [1] and picked[0]['heads'].tolist() == [2, 3]
  assert 5 not in picked[1]['feed_forward'] and len(picked[1]['feed_forward']) == 23
  norms = {}
  for layer in range(3):
    norms[layer, 'attention.o'] = np.ones(16)
    norms[layer, 'attention.o'][8:] = 0
    norms[layer, 'feed_forward.down'] = np.ones(24)
    norms[layer, 'feed_forward.down'][layer] = 0
  picked = structured.chosen(config, small, structured.scores(model, norms), [0.1, 0.2, 0.3])
  assert [one['kv_heads'].tolist() for one in picked] == [[0], [0]]
  assert [*set(range(24)) - {*picked[1]['feed_forward'].tolist()}] == [2]


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


def test_layers_that_differ_stay_in_their_order(one_device):
  config = laws.make_config('gemma2', layers=4)
  small = structured.smaller(config, {'layers': 3})
  with pytest.raises(ValueError, match='layers of this model differ'):
    structured.chosen(config, small, {}, [0.1, 0.2, 0.3, 0.4])
  assert dataclasses.replace(small, layers=4) == dataclasses.replace(config, head_width=config.H)
