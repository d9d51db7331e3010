"""How is the text model of a Gemma 3 (arXiv:2503.19786) written in transformers?
Two rotary bases, one of them local.

Of a checkpoint with a vision tower, the text model is read;
the tower's tensors have to be named to be left out.
"""

import dataclasses

from model.config import ModelConfig, RopeConfig
from model.families import common, gemma2
from model.families.keys import Keys, unsupported

TYPES = ('gemma3_text', 'gemma3')
BUFFERS, TIED = common.BUFFERS, common.TIED
PREFIXES = {
  'model.': ('language_model.model.', 'model.language_model.')
}  # with a vision tower, saved by transformers 4 and 5
# What a config.json says of images, and where it says the rest.
TOWER = (
  'text_config',
  'vision_config',
  'mm_tokens_per_image',
  'boi_token_index',
  'eoi_token_index',
  'image_token_index',
)
DEFAULTS = gemma2.DEFAULTS | dict(
  vocab_size=262_208,
  hidden_size=2304,
  intermediate_size=9216,
  num_hidden_layers=26,
  num_attention_heads=8,
  num_key_value_heads=4,
  max_position_embeddings=131_072,
  final_logit_softcapping=None,
  attn_logit_softcapping=None,
  sliding_window_pattern=6,
  rope_theta=1e6,
  rope_local_base_freq=1e4,
)  # transformers 4 wrote only what differs from these into a text_config


def flat(hf: dict) -> dict:
  """A config.json as a text model has it: keys of that, and beside them those of both that are not
  of the tower.
  """
  if hf.get('model_type') != 'gemma3':
    return hf
  return hf['text_config'] | {key: value for key, value in hf.items() if key not in TOWER}


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  keys = Keys(hf, **DEFAULTS)
  keys.only('attn_logit_softcapping', None)  # which transformers does not apply in Gemma 3
  layers, every = (
    keys('num_hidden_layers'),
    keys('sliding_window_pattern', '_sliding_window_pattern'),
  )
  windows = common.windows(
    keys('layer_types') or gemma2.alternating(layers, every), layers, keys('sliding_window')
  )
  network = gemma2.gemma_like(keys, rope=rope(keys), qk_norm=True, **windows)
  keys.close('hidden_act', 'sliding_window_size')
  return network


def rope(keys: Keys) -> RopeConfig:
  """Both sets of rotary parameters: of layers that see all, which may be stretched,
  and of those with a window.
  """
  parameters, longest = (
    keys('rope_parameters', 'rope_scaling') or {},
    keys('max_position_embeddings'),
  )
  base, local_base = float(keys('rope_theta')), float(keys('rope_local_base_freq'))
  if 'sliding_attention' in parameters or 'full_attention' in parameters:
    local = common.rope(parameters.get('sliding_attention') or {}, local_base, longest)
    whole = common.rope(parameters.get('full_attention') or {}, base, longest)
  else:
    local, whole = RopeConfig(base=local_base), common.rope(parameters, base, longest)
  if local.scaling != 'none':
    raise unsupported(
      f'rope_type={local.scaling!r} of sliding_attention',
      ['default: layers with a window are not stretched'],
    )
  return dataclasses.replace(whole, local_base=local.base)


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  local = {'rope_type': 'default', 'rope_theta': config.rope.local_base or config.rope.base}
  return gemma2.gemma_like_hf(
    config,
    'gemma3_text',
    'Gemma3ForCausalLM',
    rope_parameters={'full_attention': common.rope_parameters(config), 'sliding_attention': local},
  )


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  return common.decoder(config, **gemma2.NORMS)
