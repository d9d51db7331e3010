"""How is a BERT (arXiv:1810.04805) written in transformers?

BertModel is hidden states and a pooler, BertForMaskedLM has a head instead. The head of
BertForPreTraining that tells whether one sentence follows another is no part of the model; its
tensors have to be named to be left out.
"""

from model.config import ModelConfig
from model.families import common
from model.families.keys import Keys, unsupported

TYPES = ('bert',)
BUFFERS = (r'(bert\.)?embeddings\.position_ids',)
PREFIXES = {'bert.': ('',), '': ('bert.',)}
# How names ended in the first checkpoints, which transformers reads, too.
FORMERLY = {'LayerNorm.weight': 'LayerNorm.gamma', 'LayerNorm.bias': 'LayerNorm.beta'}
WEIGHTS = {
  'BertModel': ('plain', True),
  'BertForMaskedLM': ('mlm', False),
  'BertForPreTraining': ('mlm', True),
}  # head, pooler
TIED = {
  'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
  'cls.predictions.decoder.bias': 'cls.predictions.bias',
}
DEFAULTS = dict(
  hidden_act='gelu',
  type_vocab_size=2,
  layer_norm_eps=1e-12,
  architectures=['BertModel'],
  tie_word_embeddings=True,
)


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  keys = Keys(hf, **DEFAULTS)
  architecture = (keys('architectures') or ['BertModel'])[0]
  if architecture not in WEIGHTS:
    raise unsupported(f'architectures={architecture!r}', WEIGHTS)
  head, pooler = WEIGHTS[architecture]
  for key, *built in (
    ('position_embedding_type', 'absolute'),
    ('is_encoder_decoder', False),
    ('tie_word_embeddings', True),
  ):
    keys.only(key, *built)
  network = ModelConfig(
    vocabulary=keys('vocab_size'),
    width=keys('hidden_size'),
    layers=keys('num_hidden_layers'),
    heads=keys('num_attention_heads'),
    feed_forward=keys('intermediate_size'),
    max_length=keys('max_position_embeddings'),
    token_types=keys('type_vocab_size'),
    activation=common.activation(keys('hidden_act')),
    norm='layer',
    norm_epsilon=float(keys('layer_norm_eps')),
    norm_placement='post',
    gated=False,
    position='learned',
    causal=False,
    biases='all',
    tie_embeddings=True,
    head=head,
    pooler=pooler,
  )
  keys.close(
    'pooler_fc_size',
    'pooler_num_attention_heads',
    'pooler_num_fc_layers',
    'pooler_size_per_head',
    'pooler_type',
    'directionality',
  )
  return network


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  architecture = {parts: name for name, parts in WEIGHTS.items()}.get((config.head, config.pooler))
  if not architecture:
    raise ValueError(
      f'model.head={config.head!r} with model.pooler={config.pooler} is no model of transformers; '
      'set model.pooler=True'
    )
  act = {'gelu': 'gelu_new'}.get(
    config.activation, common.ACTIVATIONS_TO_HF.get(config.activation, config.activation)
  )
  return dict(
    architectures=[architecture],
    model_type='bert',
    vocab_size=config.V,
    hidden_size=config.D,
    num_hidden_layers=config.L,
    num_attention_heads=config.N,
    intermediate_size=config.F,
    max_position_embeddings=config.max_length,
    hidden_act=act,
    type_vocab_size=config.token_types,
    layer_norm_eps=config.norm_epsilon,
    tie_word_embeddings=config.tie_embeddings,
  )


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  Source, base = common.Source, '' if config.head == 'plain' else 'bert.'
  at = base + 'encoder.layer.{layer}'

  def norm(ours, theirs):
    return {
      f'{ours}.scale': Source(f'{theirs}.weight', 'D -> D'),
      f'{ours}.bias': Source(f'{theirs}.bias', 'D -> D'),
    }

  def dense(ours, bias, theirs, pattern, vector):
    return {
      ours: Source(f'{theirs}.weight', pattern),
      bias: Source(f'{theirs}.bias', vector),
    }

  block = norm('attention_norm', f'{at}.attention.output.LayerNorm') | norm(
    'feed_forward_norm', f'{at}.output.LayerNorm'
  )
  for x, theirs in (('q', 'query'), ('k', 'key'), ('v', 'value')):
    block |= dense(
      f'attention.{x}',
      f'attention.{x}_bias',
      f'{at}.attention.self.{theirs}',
      '(N H) D -> D N H',
      '(N H) -> N H',
    )
  block |= dense(
    'attention.o', 'attention.o_bias', f'{at}.attention.output.dense', 'D (N H) -> N H D', 'D -> D'
  )
  block |= dense(
    'feed_forward.up', 'feed_forward.up_bias', f'{at}.intermediate.dense', 'F D -> D F', 'F -> F'
  )
  block |= dense(
    'feed_forward.down', 'feed_forward.down_bias', f'{at}.output.dense', 'D F -> F D', 'D -> D'
  )
  sources = {
    'embedding.tokens': Source(f'{base}embeddings.word_embeddings.weight', 'V D -> V D'),
    'embedding.positions': Source(f'{base}embeddings.position_embeddings.weight', 'P D -> P D'),
    'embedding.types': Source(
      f'{base}embeddings.token_type_embeddings.weight', 'types D -> types D'
    ),
    **norm('embedding.norm', f'{base}embeddings.LayerNorm'),
    **common.blocks(config, lambda kind: block),
  }
  if config.head == 'mlm':
    sources |= dense(
      'head.dense', 'head.dense_bias', 'cls.predictions.transform.dense', 'D2 D -> D D2', 'D -> D'
    )
    sources |= norm('head.norm', 'cls.predictions.transform.LayerNorm') | {
      'head.bias': Source('cls.predictions.bias', 'V -> V')
    }
  if config.pooler:
    sources |= dense('pooler.dense', 'pooler.bias', f'{base}pooler.dense', 'D2 D -> D D2', 'D -> D')
  return sources
