"""How is a Mistral written in transformers?
A Llama whose every layer has a window (arXiv:2310.06825).
"""

from model.config import ModelConfig
from model.families import common
from model.families.keys import Keys

TYPES = ('mistral',)
BUFFERS, TIED = common.BUFFERS, common.TIED


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  keys = Keys(hf, **common.LLAMA_LIKE, sliding_window=4096)
  network = common.llama_like(keys, window=keys('sliding_window') or 0)
  keys.close()
  return network


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  return common.llama_like_hf(
    config, 'mistral', 'MistralForCausalLM', sliding_window=config.window or None
  )


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  return common.decoder(config)
