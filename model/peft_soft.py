"""How do soft tokens and a directory of PEFT's become each other? One tensor: of a prompt what the
first layer reads, of a prefix all keys and values of a token after one another.

P soft tokens · L layers · K key/value heads · H head width · D width
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from model.adaptation import AdapterConfig
from model.config import ModelConfig
from model.tensorfiles import TensorFiles

TENSOR = 'prompt_embeddings'
KINDS = {'PROMPT_TUNING': 'prompt', 'PREFIX_TUNING': 'prefix'}
TASKS = {'CAUSAL_LM', 'SEQ_2_SEQ_LM', 'FEATURE_EXTRACTION'}
# Of what the tokens began as, of training, of a base, of who wrote it: nothing of these changes
# what the tensor means. (Of a prefix that was trained through a projection, it is what came out.)
INDIFFERENT = {
  'auto_mapping',
  'base_model_name_or_path',
  'encoder_hidden_size',
  'inference_mode',
  'init_weights',
  'peft_version',
  'prefix_projection',
  'prompt_tuning_init',
  'prompt_tuning_init_text',
  'revision',
  'runtime_config',
  'task_type',
  'tokenizer_kwargs',
  'tokenizer_name_or_path',
}
SIZES = {
  'peft_type',
  'num_virtual_tokens',
  'token_dim',
  'num_transformer_submodules',
  'num_attention_heads',
  'num_layers',
}


def task_of(network: ModelConfig) -> str:
  """What PEFT calls what such a model is for."""
  if network.encoder_layers:
    return 'SEQ_2_SEQ_LM'
  return 'CAUSAL_LM' if network.causal else 'FEATURE_EXTRACTION'


def written(
  adapter: Mapping[str, Mapping[str, np.ndarray]], config: AdapterConfig, network: ModelConfig
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The tensors and settings of a soft adapter, {leaf: {part: array}}, there."""
  if config.kind == 'prompt':
    ((parts,),) = [adapter.values()]
    rows, heads = parts['soft'], network.N
  else:
    places = [adapter[f'stack.blocks.{i}.attention'] for i in range(len(network.places))]
    by_layer = {
      layer: np.stack([part['keys'][r], part['values'][r]], 1)
      for part, (_, layers) in zip(places, network.places, strict=True)
      for r, layer in enumerate(layers)
    }
    # [P, L, 2, K, H]: a layer's keys, then its values.
    pairs = np.stack([by_layer[layer] for layer in range(network.L)], 1)
    rows, heads = pairs.reshape(len(pairs), -1), network.K
  settings = {
    'peft_type': next(name for name, kind in KINDS.items() if kind == config.kind),
    'task_type': task_of(network),
    'base_model_name_or_path': None,
    'inference_mode': True,
    'num_virtual_tokens': config.tokens,
    'num_transformer_submodules': 1,
    'num_layers': network.L,
    'num_attention_heads': heads,
    'token_dim': network.D if config.kind == 'prompt' else network.K * network.H,
  }
  return {TENSOR: np.ascontiguousarray(rows)}, settings


def read(
  given: Mapping[str, Any], tensors: TensorFiles, network: ModelConfig, place: Any
) -> tuple[AdapterConfig, dict[str, dict[str, np.ndarray]]]:
  """The settings and arrays of soft tokens, as `written` takes them.

  given: adapter_config.json, of one of KINDS. place: of it, for messages. Of an encoder-decoder
  PEFT keeps rows for both stacks by default, of which it reads the encoder's, the first, alone.
  Raises NotImplementedError for settings that are not known and change what they mean, ValueError
    for a tensor of another shape.
  """
  for key, value in given.items():
    if key not in INDIFFERENT | SIZES and value not in (None, False, [], {}, ''):
      raise NotImplementedError(
        f'{place}: {key}={value!r} changes what the soft tokens mean, and is not supported'
      )
  kind, count = KINDS[given['peft_type']], given.get('num_virtual_tokens')
  if not isinstance(count, int) or count < 1:
    raise ValueError(f'{place}: num_virtual_tokens={count!r} must be a number from 1 up')
  width = network.D if kind == 'prompt' else 2 * network.L * network.K * network.H
  shapes = {name: tensor.shape for name, tensor in tensors.tensors.items()}
  taken = [(count, width)]
  if kind == 'prompt' and network.encoder_layers:
    taken.append((2 * count, width))
  if shapes.keys() != {TENSOR} or shapes[TENSOR] not in taken:
    found = ', '.join(f'{name} {list(shape)}' for name, shape in shapes.items()) or 'nothing'
    raise ValueError(
      f"{place}: soft tokens of this model are one tensor {TENSOR} of {list(taken[0])}, and there "
      f'is {found}'
    )
  rows = tensors.read(TENSOR, 0, count).astype(np.float32)
  config = AdapterConfig(kind=kind, tokens=count)
  if kind == 'prompt':
    return config, {'embedding.tokens': {'soft': rows}}
  pairs = rows.reshape(count, network.L, 2, network.K, network.H)
  arrays = {}
  for i, (_, layers) in enumerate(network.places):
    keys, values = (np.stack([pairs[:, layer, n] for layer in layers]) for n in (0, 1))
    arrays[f'stack.blocks.{i}.attention'] = {'keys': keys, 'values': values}
  return config, arrays
