"""How is a DeepSeek-V2 (arXiv:2405.04434) or V3 (arXiv:2412.19437) written in transformers?

Rotary positions turn neighbours there (2i, 2i + 1) and the pairs (i, i + H/2) here: the entries are
reordered on the way. Modules that predict further tokens are no part of the model; their tensors
have to be named to be left out.
"""

from model.config import LatentConfig, ModelConfig, MoEConfig
from model.families import common
from model.families.keys import Keys

TYPES = ('deepseek_v3', 'deepseek_v2')
BUFFERS, TIED = common.BUFFERS, common.TIED
EPSILON = 1e-6  # of the norms of latents, whatever rms_norm_eps says
DEFAULTS = common.LLAMA_LIKE | dict(
  q_lora_rank=1536,
  kv_lora_rank=512,
  qk_nope_head_dim=128,
  qk_rope_head_dim=64,
  v_head_dim=128,
  n_shared_experts=1,
  n_group=None,
  topk_group=None,
  routed_scaling_factor=1.0,
  norm_topk_prob=False,
  first_k_dense_replace=0,
  topk_method='greedy',
)
DEFAULTS_V3 = DEFAULTS | dict(
  n_group=8,
  topk_group=4,
  routed_scaling_factor=2.5,
  norm_topk_prob=True,
  first_k_dense_replace=3,
  num_experts_per_tok=8,
)


def config(hf: dict) -> ModelConfig:
  """The ModelConfig of a config.json."""
  v3 = hf['model_type'] == 'deepseek_v3'
  keys = Keys(hf, **(DEFAULTS_V3 if v3 else DEFAULTS))
  rotated, H = keys('qk_rope_head_dim'), keys('qk_nope_head_dim')
  for name, *built in (
    ('attention_bias', False),
    ('mlp_bias', False),
    ('moe_layer_freq', 1),
    ('rope_interleave', True),
    ('rms_norm_eps', EPSILON),
    ('head_dim', rotated, None),
    ('qk_head_dim', rotated + H),
    ('num_key_value_heads', keys('num_attention_heads'), None),
    ('scoring_func', 'sigmoid' if v3 else 'softmax'),
    ('topk_method', *(('noaux_tc',) if v3 else ('greedy', 'group_limited_greedy'))),
  ):
    keys.only(name, *built)
  parameters = keys('rope_parameters', 'rope_scaling') or {}
  network = common.llama_like(
    keys,
    head_width=H,
    moe=_moe(keys, v3),
    norm_epsilon=EPSILON,
    attention_scale=(H + rotated) ** -0.5 * _scale(parameters),
    latent=LatentConfig(
      width=keys('kv_lora_rank'),
      query_width=keys('q_lora_rank') or 0,
      rope_width=rotated,
      value_width=keys('v_head_dim'),
    ),
  )
  keys.close('num_nextn_predict_layers', 'num_mtp_layers')
  return network


def _moe(keys: Keys, v3: bool) -> MoEConfig:
  grouped = v3 or keys('topk_method') == 'group_limited_greedy'
  groups, best = keys('n_group'), keys('topk_group')
  renormalise = keys('norm_topk_prob')
  if not v3:
    keys.only('norm_topk_prob', False)
  F = keys('moe_intermediate_size')
  return MoEConfig(
    experts=keys('n_routed_experts', 'num_experts'),
    per_token=keys('num_experts_per_tok'),
    feed_forward=F,
    shared_feed_forward=F * keys('n_shared_experts'),
    first=keys('first_k_dense_replace'),
    router='sigmoid' if v3 else 'softmax',
    renormalise=renormalise,
    groups=groups if grouped else 1,
    groups_per_token=best if grouped else 1,
    scale=float(keys('routed_scaling_factor')),
    selection_bias=v3,
  )


def _scale(parameters: dict) -> float:
  """What scores are multiplied with besides, where YaRN stretches the positions."""
  stretched = parameters.get('rope_type', parameters.get('type', 'default')) != 'default'
  weight = float(parameters.get('mscale_all_dim') or 0)
  return common.mscale(float(parameters['factor']), weight) ** 2 if stretched and weight else 1.0


def to_hf(config: ModelConfig) -> dict:
  """The config.json of a ModelConfig."""
  moe, latent, v3 = config.moe, config.latent, config.moe.router == 'sigmoid'
  F = moe.feed_forward or config.F
  if moe.shared_feed_forward % F or not moe.shared_feed_forward:
    raise ValueError(
      f'model.moe.shared_feed_forward={moe.shared_feed_forward} is not a positive multiple of '
      f'model.moe.feed_forward={F}, as DeepSeek writes it'
    )
  version = (
    ('deepseek_v3', 'DeepseekV3ForCausalLM') if v3 else ('deepseek_v2', 'DeepseekV2ForCausalLM')
  )
  hf = common.llama_like_hf(
    config,
    *version,
    kv_lora_rank=latent.width,
    q_lora_rank=latent.query_width or None,
    qk_nope_head_dim=config.H,
    qk_rope_head_dim=latent.rope_width,
    v_head_dim=config.value_width,
    head_dim=latent.rope_width,
    n_routed_experts=config.E,
    num_experts_per_tok=moe.per_token,
    moe_intermediate_size=F,
    n_shared_experts=moe.shared_feed_forward // F,
    first_k_dense_replace=moe.first,
    norm_topk_prob=moe.renormalise,
    routed_scaling_factor=moe.scale,
    n_group=moe.groups,
    topk_group=moe.groups_per_token,
    attention_bias=False,
  )
  hf |= (
    dict(rope_interleave=True, num_nextn_predict_layers=0)
    if v3
    else dict(topk_method='greedy' if moe.groups == 1 else 'group_limited_greedy')
  )
  hf['rope_parameters'] |= _weight(config)
  return hf


def _weight(config: ModelConfig) -> dict:
  """The inverse of `_scale`: the mscale_all_dim that gives the config's attention_scale,
  in as few digits as do.
  """
  plain = (config.H + config.latent.rope_width) ** -0.5
  extra = (config.attention_scale or plain) / plain
  if extra == 1 or config.rope.factor == 1:
    return {}
  weight = (extra**0.5 - 1) / (common.mscale(config.rope.factor, 1.0) - 1)
  rounded = (round(weight, digits) for digits in range(17))

  def fits(w):
    return plain * common.mscale(config.rope.factor, w) ** 2 == config.attention_scale

  return {'mscale_all_dim': next(filter(fits, rounded), weight)}


def tensors(config: ModelConfig) -> dict[str, common.Source]:
  """Where each parameter lies."""
  at, mlp, latent, H = f'{common.LAYER}.self_attn', f'{common.LAYER}.mlp', config.latent, config.H

  def span(start, length):
    return tuple(range(start, start + length))

  def pairs(start):
    return tuple(start + i for parity in (0, 1) for i in range(parity, latent.rope_width, 2))

  query = ('q_b_proj', 'Q') if latent.query_width else ('q_proj', 'D')
  mixed = {
    'attention.q': common.Source(
      f'{at}.{query[0]}.weight',
      f'(N key) {query[1]} -> {query[1]} N key',
      ('key', span(0, H) + pairs(H)),
    ),
    'attention.kv_down': common.Source(
      f'{at}.kv_a_proj_with_mqa.weight',
      'latent_key D -> D latent_key',
      ('latent_key', span(0, latent.width)),
    ),
    'attention.rope_key': common.Source(
      f'{at}.kv_a_proj_with_mqa.weight',
      'latent_key D -> D latent_key',
      ('latent_key', pairs(latent.width)),
    ),
    'attention.kv_norm.scale': common.Source(f'{at}.kv_a_layernorm.weight', 'R -> R'),
    'attention.k': common.Source(
      f'{at}.kv_b_proj.weight', '(N key_value) R -> R N key_value', ('key_value', span(0, H))
    ),
    'attention.v': common.Source(
      f'{at}.kv_b_proj.weight',
      '(N key_value) R -> R N key_value',
      ('key_value', span(H, config.value_width)),
    ),
    'attention.o': common.Source(f'{at}.o_proj.weight', 'D (N Hv) -> N Hv D'),
  }
  if latent.query_width:
    mixed |= {
      'attention.q_down': common.Source(f'{at}.q_a_proj.weight', 'Q D -> D Q'),
      'attention.q_down_norm.scale': common.Source(f'{at}.q_a_layernorm.weight', 'Q -> Q'),
    }
  experts = common.experts(mlp) | common.feed_forward(
    f'{mlp}.shared_experts', config, 'S', 'feed_forward.shared'
  )
  if config.moe.selection_bias:
    experts['feed_forward.selection_bias'] = common.Source(
      f'{mlp}.gate.e_score_correction_bias', 'E -> E'
    )
  return common.decoder(
    config, lambda kind: mixed | (experts if kind.moe else common.feed_forward(mlp, config))
  )
