"""How is a Llama written in transformers? (Llama 1-3, arXiv:2302.13971, arXiv:2407.21783)"""

from model.config import ModelConfig
from model.families import common
from model.families.keys import Keys, unsupported

TYPES = ('llama',)
BUFFERS, TIED = common.BUFFERS, common.TIED


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  keys = Keys(hf, **common.LLAMA_LIKE, mlp_bias=False)
  biased = keys('attention_bias'), keys('mlp_bias')
  if biased[0] != biased[1]:
    raise unsupported(f'attention_bias={biased[0]} with mlp_bias={biased[1]}', ['both, or neither'])
  network = common.llama_like(keys, biases='all' if biased[0] else 'none')
  keys.close()
  return network


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  biased = config.biases == 'all'
  return common.llama_like_hf(
    config, 'llama', 'LlamaForCausalLM', attention_bias=biased, mlp_bias=biased
  )


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  return common.decoder(config)
