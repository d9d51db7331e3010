"""Are soft tokens of PEFT's read as they are written, layer by layer, and refused where they would
mean something else?
"""

import dataclasses
import json

import numpy as np
import pytest

from model import families, peft
from model.adaptation import AdapterConfig
from model.config import ModelConfig
from model.tensorfiles import TensorFiles

# Two periods of three kinds of layers: places are not in the order of layers.
NETWORK = ModelConfig(
  vocabulary=32,
  width=16,
  layers=6,
  heads=4,
  kv_heads=2,
  feed_forward=24,
  window=4,
  global_every=3,
)
LLAMA = families.FAMILIES['llama']
P = 5


def arrays(kind):
  draw = np.random.default_rng(0)

  def numbers(*shape):
    return np.float32(draw.normal(size=shape))

  if kind == 'prompt':
    return {'embedding.tokens': {'soft': numbers(P, 16)}}
  return {
    f'stack.blocks.{i}.attention': {
      part: numbers(len(layers), P, 2, 4) for part in ('keys', 'values')
    }
    for i, (_, layers) in enumerate(NETWORK.places)
  }


def change(directory, **settings):
  path = directory / peft.SETTINGS
  path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture(params=['prompt', 'prefix'])
def written(request, tmp_path):
  config = AdapterConfig(kind=request.param, tokens=P)
  peft.write(tmp_path, arrays(config.kind), config, NETWORK, LLAMA)
  return config, tmp_path


def test_what_is_written_is_read(written):
  config, directory = written
  again, read = peft.read(directory, NETWORK, LLAMA)
  assert again == config
  for leaf, parts in arrays(config.kind).items():
    for part, x in parts.items():
      np.testing.assert_array_equal(read[leaf][part], x, err_msg=f'{leaf} {part}')


def test_a_token_s_keys_come_before_its_values_in_every_layer(tmp_path):
  """As PEFT cuts them: view(P, layers * 2, heads, width)."""
  assert [layers for _, layers in NETWORK.places] == [(0, 3), (1, 4), (2, 5)]
  config = AdapterConfig(kind='prefix', tokens=P)
  peft.write(tmp_path, arrays('prefix'), config, NETWORK, LLAMA)
  rows = TensorFiles(tmp_path, peft.TENSORS).read('prompt_embeddings', 0, P)
  pairs, given = rows.reshape(P, 12, 2, 4), arrays('prefix')
  for i, (_, layers) in enumerate(NETWORK.places):
    for r, layer in enumerate(layers):
      for n, part in enumerate(('keys', 'values')):
        expected = given[f'stack.blocks.{i}.attention'][part][r]
        np.testing.assert_array_equal(pairs[:, 2 * layer + n], expected)
  settings = json.loads((tmp_path / peft.SETTINGS).read_text())
  sizes = settings['num_layers'], settings['num_attention_heads'], settings['token_dim']
  assert sizes == (6, 2, 8) and settings['num_transformer_submodules'] == 1


@pytest.mark.parametrize(
  'settings, said',
  [
    ({'a_new_thing': 1}, 'a_new_thing=1 changes what the soft tokens mean'),
    ({'num_virtual_tokens': 4}, r'one tensor prompt_embeddings of \[4, .* there is prompt_emb'),
    ({'num_virtual_tokens': '5'}, "num_virtual_tokens='5' must be a number"),
    ({'peft_type': 'P_TUNING'}, "peft_type='P_TUNING'; supported: 'LORA', 'PROMPT_TUNING'"),
  ],
)
def test_what_would_mean_something_else_is_refused(written, settings, said):
  _, directory = written
  change(directory, **settings)
  with pytest.raises((ValueError, NotImplementedError), match=said):
    peft.read(directory, NETWORK, LLAMA)
  change(directory, base_model_name_or_path='nobody/nothing', prompt_tuning_init='TEXT')


def test_another_model_s_are_refused(written):
  _, directory = written
  for other in ({'width': 8, 'head_width': 4}, {'layers': 3}):
    network = dataclasses.replace(NETWORK, **other)
    if written[0].kind == 'prompt' and 'layers' in other:
      continue  # which a prompt knows nothing of
    if written[0].kind == 'prefix' and 'width' in other:
      continue  # nor a prefix of that
    with pytest.raises(ValueError, match='there is prompt_embeddings'):
      peft.read(directory, network, LLAMA)
