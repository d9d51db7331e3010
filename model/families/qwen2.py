"""How is a Qwen2 or Qwen2.5 (arXiv:2412.15115) written in transformers?
A Llama with biases on q, k and v.
"""

from model.config import ModelConfig
from model.families import common
from model.families.keys import Keys

TYPES = ('qwen2',)
BUFFERS, TIED = common.BUFFERS, common.TIED
WINDOWS = dict(
  use_sliding_window=False, sliding_window=4096, max_window_layers=28, layer_types=None
)  # where config.json is silent


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  keys = Keys(hf, **common.LLAMA_LIKE, **WINDOWS)
  network = common.llama_like(keys, biases='qkv', **windows(keys))
  keys.close()
  return network


def windows(keys: Keys) -> dict[str, int]:
  """The windows of Qwen's four keys: where layer_types does not say otherwise,
  the first max_window_layers see all.
  """
  used, window, first = (
    keys('use_sliding_window'),
    keys('sliding_window'),
    keys('max_window_layers'),
  )
  types, layers, window = keys('layer_types'), keys('num_hidden_layers'), window if used else None
  types = types or [
    'sliding_attention' if window and i >= first else 'full_attention' for i in range(layers)
  ]
  return common.windows(types, layers, window)


def windows_to_hf(config: ModelConfig) -> dict:
  """The inverse of `windows`."""
  return dict(
    use_sliding_window=bool(config.window),
    sliding_window=config.window or None,
    max_window_layers=0,
    layer_types=common.layer_types(config),
  )


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  return common.llama_like_hf(config, 'qwen2', 'Qwen2ForCausalLM', **windows_to_hf(config))


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  return common.decoder(config)
