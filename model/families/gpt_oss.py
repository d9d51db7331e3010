"""How is a gpt-oss (arXiv:2508.10925) written in transformers?
Attention sinks, windows, experts with biases.
"""

from model.config import ModelConfig, MoEConfig
from model.families import common, gemma2
from model.families.keys import Keys

TYPES = ('gpt_oss',)
BUFFERS, TIED = common.BUFFERS, common.TIED
YARN = dict(
  rope_type='yarn',
  factor=32.0,
  beta_fast=32.0,
  beta_slow=1.0,
  truncate=False,
  original_max_position_embeddings=4096,
)
DEFAULTS = common.LLAMA_LIKE | dict(
  rms_norm_eps=1e-5,
  head_dim=64,
  rope_theta=150000.0,
  sliding_window=128,
  layer_types=None,
  attention_bias=True,
)


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  keys = Keys(hf, **DEFAULTS)
  for name, built in (
    ('attention_bias', True),
    ('swiglu_alpha', 1.702),
    ('swiglu_limit', 7.0),
    ('hidden_act', 'silu'),
  ):
    keys.only(name, built)
  layers = keys('num_hidden_layers')
  windows = common.windows(
    keys('layer_types') or gemma2.alternating(layers, 2), layers, keys('sliding_window')
  )
  moe = MoEConfig(
    experts=keys('num_local_experts', 'num_experts'),
    per_token=keys('num_experts_per_tok', 'experts_per_token'),
    feed_forward=keys('intermediate_size'),
  )
  network = common.llama_like(
    keys,
    activation='clamped_silu',
    biases='all',
    sinks=True,
    moe=moe,
    rope=common.read_rope(keys, YARN),
    **windows,
  )
  keys.close('initial_context_length')
  return network


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  return common.llama_like_hf(
    config,
    'gpt_oss',
    'GptOssForCausalLM',
    hidden_act='silu',
    num_local_experts=config.E,
    num_experts_per_tok=config.moe.per_token,
    intermediate_size=config.moe.feed_forward or config.F,
    # transformers needs a number even where no layer has a window.
    sliding_window=config.window or 128,
    attention_bias=True,
    layer_types=common.layer_types(config),
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
  )


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies; gates and ups of an expert alternate."""
  mlp = f'{common.LAYER}.mlp'
  sources = {
    'feed_forward.router': common.Source(f'{mlp}.router.weight', 'E D -> D E'),
    'feed_forward.router_bias': common.Source(f'{mlp}.router.bias', 'E -> E'),
    'feed_forward.down': common.Source(f'{mlp}.experts.down_proj', 'E M D -> E M D'),
    'feed_forward.down_bias': common.Source(f'{mlp}.experts.down_proj_bias', 'E D -> E D'),
    'attention.sinks': common.Source(f'{common.LAYER}.self_attn.sinks', 'N -> N'),
  }
  for i, name in enumerate(('gate', 'up')):
    sources[f'feed_forward.{name}'] = common.Source(
      f'{mlp}.experts.gate_up_proj', 'E D (M 2) -> E D M', ('2', i)
    )
    sources[f'feed_forward.{name}_bias'] = common.Source(
      f'{mlp}.experts.gate_up_proj_bias', 'E (M 2) -> E M', ('2', i)
    )
  return common.decoder(
    config, lambda kind: common.attention(f'{common.LAYER}.self_attn', config) | sources
  )
