"""How is a dense Qwen3 written in transformers?
A Llama with norms of queries and keys (arXiv:2505.09388).
"""

from model.config import ModelConfig
from model.families import common, qwen2
from model.families.keys import Keys

TYPES = ('qwen3',)
BUFFERS, TIED = common.BUFFERS, common.TIED


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  keys = Keys(hf, **common.LLAMA_LIKE | dict(head_dim=128), **qwen2.WINDOWS)
  keys.only('attention_bias', False)
  network = common.llama_like(keys, qk_norm=True, **qwen2.windows(keys))
  keys.close()
  return network


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  return common.llama_like_hf(config, 'qwen3', 'Qwen3ForCausalLM', **qwen2.windows_to_hf(config))


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  return common.decoder(config)
