"""How is a Qwen3 with experts written in transformers? (arXiv:2505.09388)"""

from model.config import ModelConfig, MoEConfig
from model.families import common
from model.families.keys import Keys, unsupported

TYPES = ('qwen3_moe',)
BUFFERS, TIED = common.BUFFERS, common.TIED
DEFAULTS = common.LLAMA_LIKE | dict(
  decoder_sparse_step=1,
  mlp_only_layers=None,
  norm_topk_prob=False,
  num_experts_per_tok=8,
  use_sliding_window=False,
  sliding_window=4096,
)


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  keys = Keys(hf, **DEFAULTS)
  keys.only('attention_bias', False)
  step, dense, layers = (
    keys('decoder_sparse_step'),
    keys('mlp_only_layers') or [],
    keys('num_hidden_layers'),
  )
  sparse = [i for i in range(layers) if (i + 1) % step == 0 and i not in dense]
  first, every = (sparse or [0])[0], sparse[1] - sparse[0] if len(sparse) > 1 else 1
  if not sparse or sparse != list(range(first, layers, every)):
    raise unsupported(
      f'mlp_only_layers={dense}, decoder_sparse_step={step} (experts in layers {sparse})',
      ['every n-th layer, from the first one with experts on'],
    )
  moe = MoEConfig(
    experts=keys('num_local_experts', 'num_experts'),
    per_token=keys('num_experts_per_tok'),
    every=every,
    first=first,
    feed_forward=keys('moe_intermediate_size'),
    renormalise=keys('norm_topk_prob'),
  )
  used, window = keys('use_sliding_window'), keys('sliding_window')
  network = common.llama_like(keys, qk_norm=True, window=window or 0 if used else 0, moe=moe)
  keys.close('max_window_layers')  # transformers does not look at it in this family
  return network


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  return common.llama_like_hf(
    config,
    'qwen3_moe',
    'Qwen3MoeForCausalLM',
    num_experts=config.E,
    num_experts_per_tok=config.moe.per_token,
    decoder_sparse_step=1,
    moe_intermediate_size=config.moe.feed_forward or config.F,
    norm_topk_prob=config.moe.renormalise,
    attention_bias=False,
    mlp_only_layers=[i for i, kind in enumerate(config.kinds) if not kind.moe],
    use_sliding_window=bool(config.window),
    sliding_window=config.window or None,
  )


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  mlp = f'{common.LAYER}.mlp'
  return common.decoder(
    config,
    lambda kind: (
      common.attention(f'{common.LAYER}.self_attn', config)
      | (common.experts(mlp) if kind.moe else common.feed_forward(mlp, config))
    ),
  )
