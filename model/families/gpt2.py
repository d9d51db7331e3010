"""How is a GPT-2 (Radford et al. 2019) written in transformers?
Queries, keys and values as one, [inputs, outputs].
"""

from model.config import ModelConfig
from model.families import common
from model.families.keys import Keys

TYPES = ('gpt2',)
BUFFERS = (r'(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)',)  # the causal mask
TIED = {'lm_head.weight': 'transformer.wte.weight'}
PREFIXES = {'transformer.': ('',)}  # OpenAI's files were saved without the head
DEFAULTS = dict(
  n_inner=None, activation_function='gelu_new', layer_norm_epsilon=1e-5, tie_word_embeddings=True
)


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  keys = Keys(hf, **DEFAULTS)
  keys.only('scale_attn_weights', True)
  keys.only('scale_attn_by_inverse_layer_idx', False)
  width, length = keys('n_embd'), keys('n_positions')
  keys.only('n_ctx', length)
  network = ModelConfig(
    vocabulary=keys('vocab_size'),
    width=width,
    layers=keys('n_layer'),
    heads=keys('n_head'),
    feed_forward=keys('n_inner') or 4 * width,
    max_length=length,
    activation=common.activation(keys('activation_function')),
    norm='layer',
    norm_epsilon=float(keys('layer_norm_epsilon')),
    gated=False,
    position='learned',
    biases='all',
    tie_embeddings=keys('tie_word_embeddings'),
  )
  keys.close()
  return network


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  act = {'gelu': 'gelu_new'}.get(
    config.activation, common.ACTIVATIONS_TO_HF.get(config.activation, config.activation)
  )
  return dict(
    architectures=['GPT2LMHeadModel'],
    model_type='gpt2',
    vocab_size=config.V,
    n_embd=config.D,
    n_layer=config.L,
    n_head=config.N,
    n_inner=config.F,
    n_positions=config.max_length,
    activation_function=act,
    layer_norm_epsilon=config.norm_epsilon,
    tie_word_embeddings=config.tie_embeddings,
  )


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  at, Source = 'transformer.h.{layer}', common.Source
  block = {
    f'attention.{x}': Source(f'{at}.attn.c_attn.weight', 'D (3 N H) -> D N H', ('3', i))
    for i, x in enumerate('qkv')
  }
  block |= {
    f'attention.{x}_bias': Source(f'{at}.attn.c_attn.bias', '(3 N H) -> N H', ('3', i))
    for i, x in enumerate('qkv')
  }
  block |= {
    'attention.o': Source(f'{at}.attn.c_proj.weight', '(N H) D -> N H D'),
    'attention.o_bias': Source(f'{at}.attn.c_proj.bias', 'D -> D'),
    'feed_forward.up': Source(f'{at}.mlp.c_fc.weight', 'D F -> D F'),
    'feed_forward.up_bias': Source(f'{at}.mlp.c_fc.bias', 'F -> F'),
    'feed_forward.down': Source(f'{at}.mlp.c_proj.weight', 'F D -> F D'),
    'feed_forward.down_bias': Source(f'{at}.mlp.c_proj.bias', 'D -> D'),
  }

  def norms(ours, theirs):
    return {
      f'{ours}.scale': Source(f'{theirs}.weight', 'D -> D'),
      f'{ours}.bias': Source(f'{theirs}.bias', 'D -> D'),
    }

  block |= norms('attention_norm', f'{at}.ln_1') | norms('feed_forward_norm', f'{at}.ln_2')
  sources = {
    'embedding.tokens': Source('transformer.wte.weight', 'V D -> V D'),
    'embedding.positions': Source('transformer.wpe.weight', 'P D -> P D'),
    **common.blocks(config, lambda kind: block),
    **norms('stack.norm', 'transformer.ln_f'),
  }
  return (
    sources
    if config.tie_embeddings
    else sources | {'head.tokens': Source('lm_head.weight', 'V D -> V D')}
  )
