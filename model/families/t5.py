"""How is a T5 (arXiv:1910.10683) written in transformers?
Version 1.0; 1.1 and Flan: gated, logits not scaled, a head.

What config.json says of tied embeddings cannot be trusted (transformers 5 always writes true):
the tensors tell.
"""

import dataclasses

from model.config import ModelConfig
from model.families import common
from model.families.keys import Keys, unsupported

TYPES = ('t5',)
# Saved by some, used by none.
BUFFERS = (r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',)
TIED = {
  'lm_head.weight': 'shared.weight',
  'encoder.embed_tokens.weight': 'shared.weight',
  'decoder.embed_tokens.weight': 'shared.weight',
}
DEFAULTS = dict(
  num_decoder_layers=None,
  relative_attention_num_buckets=32,
  relative_attention_max_distance=128,
  layer_norm_epsilon=1e-6,
  feed_forward_proj='relu',
  tie_word_embeddings=True,
)


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  tied = hf.get('tie_word_embeddings', True)
  keys = Keys(hf, **DEFAULTS, scale_decoder_outputs=tied)
  gate, _, name = keys('feed_forward_proj').rpartition('-')
  if gate not in ('', 'gated'):
    raise unsupported(
      f'feed_forward_proj={hf["feed_forward_proj"]!r}', ['an activation', 'gated- and one']
    )
  name = 'gelu_new' if (gate, name) == ('gated', 'gelu') else name
  for key, *built in (
    ('is_gated_act', bool(gate)),
    ('dense_act_fn', name),
    ('is_encoder_decoder', True),
  ):
    keys.only(key, *built)
  keys.only(
    'decoder_start_token_id', hf.get('pad_token_id') or 0, None
  )  # decode.generator starts with padding
  width = keys('d_model')
  network = ModelConfig(
    vocabulary=keys('vocab_size'),
    width=width,
    layers=keys('num_decoder_layers') or keys('num_layers'),
    encoder_layers=keys('num_layers'),
    heads=keys('num_heads'),
    head_width=keys('d_kv'),
    feed_forward=keys('d_ff'),
    gated=bool(gate),
    activation=common.activation(name),
    norm_epsilon=float(keys('layer_norm_epsilon')),
    position='relative',
    relative_buckets=keys('relative_attention_num_buckets'),
    relative_distance=keys('relative_attention_max_distance'),
    attention_scale=1.0,
    tie_embeddings=keys('tie_word_embeddings'),
    logit_scale=width**-0.5 if keys('scale_decoder_outputs') else 1.0,
  )
  # Of `n_positions` no T5 makes anything: distances are in buckets.
  keys.close('output_past', 'n_positions')
  return network


def with_tensors(config: ModelConfig, names: set[str]) -> ModelConfig:
  """The config of a checkpoint that holds these tensors."""
  return dataclasses.replace(config, tie_embeddings='lm_head.weight' not in names)


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  act = {'gelu': 'gelu' if config.gated else 'gelu_new', 'gelu_exact': 'gelu'}.get(
    config.activation, config.activation
  )
  return dict(
    architectures=['T5ForConditionalGeneration'],
    model_type='t5',
    vocab_size=config.V,
    d_model=config.D,
    d_kv=config.H,
    d_ff=config.F,
    num_layers=config.encoder_layers,
    num_decoder_layers=config.L,
    num_heads=config.N,
    layer_norm_epsilon=config.norm_epsilon,
    relative_attention_num_buckets=config.relative_buckets,
    relative_attention_max_distance=config.relative_distance,
    feed_forward_proj=f'gated-{act}' if config.gated else act,
    is_encoder_decoder=True,
    decoder_start_token_id=0,
    tie_word_embeddings=config.tie_embeddings,
    scale_decoder_outputs=config.logit_scale != 1.0,
  )


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  Source = common.Source

  def attention(at, to):
    sources = {f'{to}.{x}': Source(f'{at}.{x}.weight', '(N H) D -> D N H') for x in 'qkv'}
    return sources | {f'{to}.o': Source(f'{at}.o.weight', 'D (N H) -> N H D')}

  def block(stack, last):
    at = f'{stack}.block.{{layer}}.layer'
    dense = f'{at}.{last}.DenseReluDense'
    sources = {
      'attention_norm.scale': Source(f'{at}.0.layer_norm.weight', 'D -> D'),
      **attention(f'{at}.0.SelfAttention', 'attention'),
      'feed_forward_norm.scale': Source(f'{at}.{last}.layer_norm.weight', 'D -> D'),
      'feed_forward.down': Source(f'{dense}.wo.weight', 'D F -> F D'),
    }
    names = {'gate': 'wi_0', 'up': 'wi_1'} if config.gated else {'up': 'wi'}
    return sources | {
      f'feed_forward.{ours}': Source(f'{dense}.{theirs}.weight', 'F D -> D F')
      for ours, theirs in names.items()
    }

  decoder = {
    **block('decoder', 2),
    'cross_norm.scale': Source('decoder.block.{layer}.layer.1.layer_norm.weight', 'D -> D'),
    **attention('decoder.block.{layer}.layer.1.EncDecAttention', 'cross'),
  }
  encoder = {
    f'encoder.blocks.0.{leaf}': dataclasses.replace(
      source, layers=tuple(range(config.encoder_layers))
    )
    for leaf, source in block('encoder', 1).items()
  }
  sources = {
    'embedding.tokens': Source('shared.weight', 'V D -> V D'),
    **common.blocks(config, lambda kind: decoder),
    **encoder,
  }
  for ours, theirs in (('stack', 'decoder'), ('encoder', 'encoder')):
    sources |= {
      f'{ours}.norm.scale': Source(f'{theirs}.final_layer_norm.weight', 'D -> D'),
      f'{ours}.relative': Source(
        f'{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
        'buckets N -> buckets N',
      ),
    }
  return (
    sources
    if config.tie_embeddings
    else sources | {'head.tokens': Source('lm_head.weight', 'V D -> V D')}
  )
