"""How is a Gemma 2 (arXiv:2408.00118) written in transformers?
Soft-caps, windows, norms on both sides.
"""

from model.config import ModelConfig
from model.families import common
from model.families.keys import Keys

TYPES = ('gemma2',)
BUFFERS, TIED = common.BUFFERS, common.TIED
NORMS = {
  'attention_norm': 'input_layernorm',
  'attention_post_norm': 'post_attention_layernorm',
  'feed_forward_norm': 'pre_feedforward_layernorm',
  'feed_forward_post_norm': 'post_feedforward_layernorm',
}
DEFAULTS = common.LLAMA_LIKE | dict(
  head_dim=256,
  hidden_activation='gelu_pytorch_tanh',
  tie_word_embeddings=True,
  query_pre_attn_scalar=256,
  sliding_window=4096,
  layer_types=None,
  final_logit_softcapping=30.0,
  attn_logit_softcapping=50.0,
)


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  keys = Keys(hf, **DEFAULTS)
  layers = keys('num_hidden_layers')
  windows = common.windows(
    keys('layer_types') or alternating(layers, 2), layers, keys('sliding_window')
  )
  network = gemma_like(keys, **windows)
  keys.close(
    'hidden_act', 'sliding_window_size'
  )  # of the first Gemma; hidden_activation is what counts
  return network


def gemma_like(keys: Keys, **others) -> ModelConfig:
  """What Gemma 2 and 3 have in common."""
  keys.only('attention_bias', False)
  return common.llama_like(
    keys,
    activation=common.activation(keys('hidden_activation')),
    norm_offset=True,
    norm_placement='both',
    embedding_scale=True,
    attention_scale=keys('query_pre_attn_scalar') ** -0.5,
    attention_softcap=float(keys('attn_logit_softcapping') or 0),
    logit_softcap=float(keys('final_logit_softcapping') or 0),
    **others,
  )


def alternating(layers: int, every: int) -> list[str]:
  """Layer types where every n-th layer sees all."""
  return ['sliding_attention' if (i + 1) % every else 'full_attention' for i in range(layers)]


def gemma_like_hf(config: ModelConfig, model_type: str, architecture: str, **others) -> dict:
  """The inverse of `gemma_like`."""
  scale = config.attention_scale or config.H**-0.5
  hf = common.llama_like_hf(
    config,
    model_type,
    architecture,
    query_pre_attn_scalar=round(scale**-2),
    attn_logit_softcapping=config.attention_softcap or None,
    final_logit_softcapping=config.logit_softcap or None,
    # transformers needs a number even where no layer has a window.
    sliding_window=config.window or DEFAULTS['sliding_window'],
    layer_types=common.layer_types(config),
    attention_bias=False,
    **others,
  )
  return hf | {'hidden_activation': hf.pop('hidden_act')}


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  return gemma_like_hf(config, 'gemma2', 'Gemma2ForCausalLM')


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  return common.decoder(config, **NORMS)
