"""How is a Mixtral written in transformers?
A Mistral with experts in every layer (arXiv:2401.04088).
"""

from model.config import ModelConfig, MoEConfig
from model.families import common
from model.families.keys import Keys

TYPES = ('mixtral',)
BUFFERS, TIED = common.BUFFERS, common.TIED
DEFAULTS = common.LLAMA_LIKE | dict(rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None)


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  keys = Keys(hf, **DEFAULTS)
  moe = MoEConfig(
    experts=keys('num_local_experts', 'num_experts'),
    per_token=keys('num_experts_per_tok'),
    feed_forward=keys('intermediate_size'),
  )
  network = common.llama_like(keys, window=keys('sliding_window') or 0, moe=moe)
  keys.close()
  return network


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  return common.llama_like_hf(
    config,
    'mixtral',
    'MixtralForCausalLM',
    num_local_experts=config.E,
    num_experts_per_tok=config.moe.per_token,
    intermediate_size=config.moe.feed_forward or config.F,
    sliding_window=config.window or None,
  )


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  experts = common.experts(f'{common.LAYER}.block_sparse_moe', gate='w1', up='w3', down='w2')
  return common.decoder(
    config, lambda kind: common.attention(f'{common.LAYER}.self_attn', config) | experts
  )
