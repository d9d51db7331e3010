"""What do the families share? Rotary positions, windows, and where a parameter lies in a file.

A family is a module with `TYPES`, `config`, `to_hf` and `tensors`; see model.families.
"""

import dataclasses
import math
from collections.abc import Callable

from model.config import Kind, LatentConfig, ModelConfig, MoEConfig, RopeConfig
from model.families.keys import Keys, unsupported
from model.families.layout import Source
from model.parts import SCALINGS

ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu_pytorch_tanh': 'gelu',
  'gelu_new': 'gelu',
  'gelu_fast': 'gelu',
  'gelu': 'gelu_exact',
  'relu': 'relu',
  'relu2': 'relu2',
}
ACTIVATIONS_TO_HF = {
  'silu': 'silu',
  'gelu': 'gelu_pytorch_tanh',
  'gelu_exact': 'gelu',
  'relu': 'relu',
  'relu2': 'relu2',
}


def activation(name: str) -> str:
  """Our name of an activation of transformers."""
  if name not in ACTIVATIONS:
    raise unsupported(f'activation {name!r}', ACTIVATIONS)
  return ACTIVATIONS[name]


def rope(parameters: dict, base: float, longest: int) -> RopeConfig:
  """RopeConfig of one set of rotary parameters ('rope_parameters', or the older 'rope_scaling').

  Args: base: taken when `rope_theta` is not there. longest: max_position_embeddings.
  """
  left = {name: value for name, value in parameters.items() if value is not None}
  kind = left.pop('rope_type', left.pop('type', 'default'))
  left.pop('type', None)
  base = float(left.pop('rope_theta', base))
  if left.pop('partial_rotary_factor', 1.0) != 1.0:
    raise unsupported(f'partial_rotary_factor={parameters["partial_rotary_factor"]}', ['1.0'])
  original = int(left.pop('original_max_position_embeddings', longest))

  def need(name):
    if name not in left:
      raise ValueError(f'rope parameters of rope_type={kind!r} in config.json have no {name!r}')
    return float(left.pop(name))

  if kind == 'default':
    config = RopeConfig(base=base)
  elif kind == 'linear':
    config = RopeConfig(base=base, scaling='linear', factor=need('factor'))
  elif kind == 'llama3':
    config = RopeConfig(
      base=base,
      scaling='llama3',
      factor=need('factor'),
      original_length=original,
      low=need('low_freq_factor'),
      high=need('high_freq_factor'),
    )
  elif kind == 'yarn':
    factor = float(left.pop('factor', longest / original))
    one, all_ = float(left.pop('mscale', 0)), float(left.pop('mscale_all_dim', 0))
    attention = float(left.pop('attention_factor', 0))
    if not attention and one and all_:
      attention = mscale(factor, one) / mscale(factor, all_)
    config = RopeConfig(
      base=base,
      scaling='yarn',
      factor=factor,
      original_length=original,
      low=float(left.pop('beta_slow', 1)),
      high=float(left.pop('beta_fast', 32)),
      attention_factor=attention,
      truncate=left.pop('truncate', True),
    )
  else:
    raise unsupported(f'rope_type={kind!r}', ['default', 'linear', 'llama3', 'yarn'])
  if left:
    raise ValueError(
      f'rope parameters {sorted(left)} in config.json are unknown for rope_type={kind!r}'
    )
  return config


def mscale(factor: float, weight: float) -> float:
  """What YaRN multiplies with, as DeepSeek weighs it: 0.1 weight ln(factor) + 1."""
  return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_parameters(config: ModelConfig, base: float = 0.0) -> dict:
  """The inverse of `rope`."""
  r = config.rope
  parameters = {
    'rope_type': {'none': 'default'}.get(r.scaling, r.scaling),
    'rope_theta': base or r.base,
  }
  if r.scaling == 'none':
    return parameters
  parameters['factor'] = r.factor
  if r.scaling == 'llama3':
    parameters |= {
      'low_freq_factor': r.low,
      'high_freq_factor': r.high,
      'original_max_position_embeddings': r.original_length,
    }
  if r.scaling == 'yarn':
    parameters |= {
      'beta_slow': r.low,
      'beta_fast': r.high,
      'original_max_position_embeddings': r.original_length,
      'truncate': r.truncate,
      'attention_factor': r.attention_factor or mscale(r.factor, 1.0),
    }
  return parameters


def read_rope(keys: Keys, otherwise: dict | None = None) -> RopeConfig:
  """The RopeConfig of a model, from the new spelling (rope_parameters) or the old
  (rope_theta, rope_scaling); otherwise: parameters where neither has a value.
  """
  parameters = keys('rope_parameters', 'rope_scaling')
  return rope(
    otherwise or {} if parameters is None else parameters,
    float(keys('rope_theta')),
    keys('max_position_embeddings'),
  )


def windows(types: list[str], layers: int, window: int | None) -> dict[str, int]:
  """The fields window and global_every of a list of layer types.

  Raises NotImplementedError for a pattern other than every n-th layer global.
  """
  if len(types) != layers or set(types) - {'sliding_attention', 'full_attention'}:
    raise unsupported(f'layer_types={types}', [f'{layers} of sliding_attention or full_attention'])
  if not window or 'sliding_attention' not in types:
    return {'window': 0, 'global_every': 0}
  every = types.index('full_attention') + 1 if 'full_attention' in types else 0
  if any(
    (kind == 'full_attention') != bool(every and (i + 1) % every == 0)
    for i, kind in enumerate(types)
  ):
    raise unsupported(
      f'layer_types={types}', ['full_attention in every n-th layer, from the n-th on']
    )
  return {'window': window, 'global_every': every}


def layer_types(config: ModelConfig) -> list[str]:
  """The inverse of `windows`."""
  return ['sliding_attention' if kind.window else 'full_attention' for kind in config.kinds]


def llama_like(keys: Keys, **others) -> ModelConfig:
  """What all decoders of Llama's kind have in common; `others` are fields that differ."""
  width, heads = keys('hidden_size'), keys('num_attention_heads')
  if 'rope' not in others:
    others['rope'] = read_rope(keys)
  if 'activation' not in others:
    others['activation'] = activation(keys('hidden_act'))
  return ModelConfig(
    **dict(
      vocabulary=keys('vocab_size'),
      width=width,
      layers=keys('num_hidden_layers'),
      heads=heads,
      kv_heads=keys('num_key_value_heads') or heads,
      head_width=keys('head_dim') or width // heads,
      feed_forward=keys('intermediate_size'),
      norm_epsilon=float(keys('rms_norm_eps')),
      max_length=keys('max_position_embeddings'),
      tie_embeddings=keys('tie_word_embeddings'),
    )
    | others
  )


# What transformers takes where a config.json of Llama's kind is silent.
LLAMA_LIKE = dict(
  num_key_value_heads=None,
  head_dim=None,
  rms_norm_eps=1e-6,
  tie_word_embeddings=False,
  hidden_act='silu',
  rope_theta=10000.0,
  rope_parameters=None,
  attention_bias=False,
)


def llama_like_hf(config: ModelConfig, model_type: str, architecture: str, **others) -> dict:
  """The inverse of `llama_like`."""
  if not config.max_length or not config.V:
    raise ValueError(
      f'model.max_length={config.max_length} and model.vocabulary={config.vocabulary} must be '
      'known to write a config.json; set them'
    )
  return (
    dict(
      architectures=[architecture],
      model_type=model_type,
      vocab_size=config.V,
      hidden_size=config.D,
      num_hidden_layers=config.L,
      num_attention_heads=config.N,
      num_key_value_heads=config.K,
      head_dim=config.H,
      intermediate_size=config.F,
      rms_norm_eps=config.norm_epsilon,
      max_position_embeddings=config.max_length,
      tie_word_embeddings=config.tie_embeddings,
      hidden_act=ACTIVATIONS_TO_HF.get(config.activation, config.activation),
      rope_parameters=rope_parameters(config),
    )
    | others
  )


def blocks(
  config: ModelConfig, block: Callable[[Kind], dict[str, Source]], prefix: str = 'stack'
) -> dict[str, Source]:
  """Sources of all blocks of the decoder stack, from those of one block of a kind."""
  return {
    f'{prefix}.blocks.{j}.{leaf}': dataclasses.replace(source, layers=layers)
    for j, (kind, layers) in enumerate(config.places)
    for leaf, source in block(kind).items()
  }


def attention(at: str, config: ModelConfig) -> dict[str, Source]:
  """Projections called q_proj, k_proj, v_proj and o_proj below `at`,
  with the biases and norms that the config has.
  """
  sources = {
    'attention.q': Source(f'{at}.q_proj.weight', '(N H) D -> D N H'),
    'attention.k': Source(f'{at}.k_proj.weight', '(K H) D -> D K H'),
    'attention.v': Source(f'{at}.v_proj.weight', '(K H) D -> D K H'),
    'attention.o': Source(f'{at}.o_proj.weight', 'D (N H) -> N H D'),
  }
  if config.biases != 'none':
    sources |= {
      'attention.q_bias': Source(f'{at}.q_proj.bias', '(N H) -> N H'),
      'attention.k_bias': Source(f'{at}.k_proj.bias', '(K H) -> K H'),
      'attention.v_bias': Source(f'{at}.v_proj.bias', '(K H) -> K H'),
    }
  if config.biases == 'all':
    sources['attention.o_bias'] = Source(f'{at}.o_proj.bias', 'D -> D')
  if config.qk_norm:
    sources |= {
      f'attention.{x}_norm.scale': Source(f'{at}.{x}_norm.weight', 'H -> H') for x in 'qk'
    }
  return sources


def feed_forward(
  at: str, config: ModelConfig, size: str = 'F', to: str = 'feed_forward'
) -> dict[str, Source]:
  """Projections called gate_proj, up_proj and down_proj below `at`."""
  sources = {
    f'{to}.{x}': Source(f'{at}.{x}_proj.weight', f'{size} D -> D {size}') for x in ('gate', 'up')
  }
  sources[f'{to}.down'] = Source(f'{at}.down_proj.weight', f'D {size} -> {size} D')
  if config.biases == 'all':
    sources |= {
      f'{to}.{x}_bias': Source(f'{at}.{x}_proj.bias', f'{size} -> {size}') for x in ('gate', 'up')
    }
    sources[f'{to}.down_bias'] = Source(f'{at}.down_proj.bias', 'D -> D')
  return sources


def experts(
  at: str, gate: str = 'gate_proj', up: str = 'up_proj', down: str = 'down_proj'
) -> dict[str, Source]:
  """A router called gate, and experts with a tensor each, below `at`."""

  def each(name, pattern):
    return Source(f'{at}.experts.{{expert}}.{name}.weight', pattern)

  return {
    'feed_forward.router': Source(f'{at}.gate.weight', 'E D -> D E'),
    'feed_forward.gate': each(gate, 'M D -> D M'),
    'feed_forward.up': each(up, 'M D -> D M'),
    'feed_forward.down': each(down, 'D M -> M D'),
  }


LAYER = 'model.layers.{layer}'


def decoder(
  config: ModelConfig, block: Callable[[Kind], dict[str, Source]] | None = None, **norms: str
) -> dict[str, Source]:
  """Sources of a decoder of Llama's kind.

  Args:
    block: sources of a block apart from its norms; default: `attention` and `feed_forward`.
    norms: our norm -> their name, where it is not Llama's.
  """
  block = block or (
    lambda kind: attention(f'{LAYER}.self_attn', config) | feed_forward(f'{LAYER}.mlp', config)
  )
  norms = norms or {
    'attention_norm': 'input_layernorm',
    'feed_forward_norm': 'post_attention_layernorm',
  }
  scales = {
    f'{ours}.scale': Source(f'{LAYER}.{theirs}.weight', 'D -> D') for ours, theirs in norms.items()
  }
  sources = {
    'embedding.tokens': Source('model.embed_tokens.weight', 'V D -> V D'),
    **blocks(config, lambda kind: scales | block(kind)),
    'stack.norm.scale': Source('model.norm.weight', 'D -> D'),
  }
  return (
    sources
    if config.tie_embeddings
    else sources | {'head.tokens': Source('lm_head.weight', 'V D -> V D')}
  )


# Tensors that some checkpoints hold though the config alone decides them;
# names of one tensor twice.
BUFFERS = (r'.*rotary_emb\.inv_freq',)
TIED = {'lm_head.weight': 'model.embed_tokens.weight'}


def canonical(config: ModelConfig) -> ModelConfig:
  """The same function of the same parameters, defaults written out,
  choices of training and of what is not there reset.

  Two configs compute the same from the same parameters when their canonical forms are equal.
  """
  default, kinds = ModelConfig(), config.kinds
  looks = {kind.window for kind in kinds}
  every = config.global_every if len(looks) > 1 else 0
  key = (config.H + config.latent.rope_width) ** -0.5
  experts_at = [i for i, kind in enumerate(kinds) if kind.moe]
  changes = dict(
    init_scale=default.init_scale,
    kv_heads=config.K,
    head_width=config.H,
    feed_forward=config.F,
    window=max(looks),
    global_every=every,
    attention_scale=0.0 if config.attention_scale == key else config.attention_scale,
    latent=dataclasses.replace(config.latent, value_width=config.value_width)
    if config.latent.width
    else LatentConfig(),
    moe=MoEConfig(),
    rope=_canonical_rope(config, looks) if config.position == 'rope' else RopeConfig(),
  )
  if config.position == 'relative':
    changes['max_length'] = 0  # of data: distances are in buckets, and no table has rows of it
  else:
    changes |= dict(
      relative_buckets=default.relative_buckets, relative_distance=default.relative_distance
    )
  if experts_at:
    spacing = experts_at[1] - experts_at[0] if len(experts_at) > 1 else 1
    training = {
      field.name: field.default
      for field in dataclasses.fields(MoEConfig)
      if field.name
      in ('bias_rate', 'dispatch', 'capacity_factor', 'balance_loss', 'balance_over', 'z_loss')
    }
    changes['moe'] = dataclasses.replace(
      config.moe,
      first=experts_at[0],
      every=spacing,
      feed_forward=config.moe.feed_forward or config.F,
      **training,
    )
    if len(experts_at) == config.L:
      changes['feed_forward'] = changes['moe'].feed_forward
  return dataclasses.replace(config.network, vocabulary_multiple=1, **changes)


def _canonical_rope(config: ModelConfig, looks: set[int]) -> RopeConfig:
  r, default = config.rope, RopeConfig()
  kept = {field: getattr(r, field) for field in ('base', 'scaling', *SCALINGS[r.scaling])}
  if max(looks) and r.local_base and (r.local_base != r.base or r.scaling != 'none'):
    kept['local_base'] = r.local_base
  if kept.get('attention_factor') == mscale(r.factor, 1.0):
    kept['attention_factor'] = default.attention_factor
  return RopeConfig(**kept)
