"""Which small models stand for the families? Configurations of transformers' classes,
and weights that hide no fault.

A weight is drawn from its name, so that a file of results is enough to repeat a comparison:
the weights need no storing.
"""

import zlib

import numpy as np

WIDE = dict(
  vocab_size=67,
  hidden_size=32,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=48,
  max_position_embeddings=64,
)
LATENT = dict(
  vocab_size=67,
  hidden_size=32,
  num_attention_heads=4,
  num_key_value_heads=4,
  intermediate_size=48,
  moe_intermediate_size=24,
  max_position_embeddings=64,
  q_lora_rank=20,
  kv_lora_rank=16,
  qk_nope_head_dim=8,
  qk_rope_head_dim=4,
  v_head_dim=6,
  num_hidden_layers=3,
  first_k_dense_replace=1,
  n_routed_experts=8,
  num_experts_per_tok=3,
  n_shared_experts=2,
  n_group=4,
  topk_group=2,
)
YARN = dict(rope_type='yarn', rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
T5 = dict(
  vocab_size=67,
  d_model=32,
  d_kv=6,
  d_ff=48,
  num_layers=3,
  num_decoder_layers=2,
  num_heads=4,
  relative_attention_num_buckets=8,
  relative_attention_max_distance=16,
  decoder_start_token_id=0,
)
BERT = dict(
  vocab_size=67,
  hidden_size=32,
  num_attention_heads=4,
  intermediate_size=48,
  num_hidden_layers=3,
  max_position_embeddings=64,
)

LLAMA3 = dict(
  rope_type='llama3',
  rope_theta=500.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
LINEAR = dict(rope_type='linear', rope_theta=10000.0, factor=4.0)
GEMMA3 = dict(
  full_attention=dict(rope_type='linear', factor=8.0, rope_theta=1e6),
  sliding_attention=dict(rope_type='default', rope_theta=1e4),
)

# name: (class, arguments of its configuration).
# Windows are shorter than the sequences that are compared.
CASES = {
  'gpt2': (
    'GPT2LMHeadModel',
    dict(vocab_size=67, n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=64),
  ),
  'llama': (
    'LlamaForCausalLM',
    WIDE | dict(num_hidden_layers=3, rms_norm_eps=1e-5, rope_parameters=LLAMA3),
  ),
  'llama_biased': (
    'LlamaForCausalLM',
    WIDE
    | dict(
      num_hidden_layers=2,
      attention_bias=True,
      mlp_bias=True,
      head_dim=6,
      tie_word_embeddings=True,
      rope_parameters=LINEAR,
    ),
  ),
  'mistral': ('MistralForCausalLM', WIDE | dict(num_hidden_layers=3, sliding_window=7)),
  'qwen2': ('Qwen2ForCausalLM', WIDE | dict(num_hidden_layers=3, tie_word_embeddings=True)),
  'qwen3': (
    'Qwen3ForCausalLM',
    WIDE | dict(num_hidden_layers=3, head_dim=12, rope_parameters=YARN),
  ),
  'gemma2': (
    'Gemma2ForCausalLM',
    WIDE
    | dict(
      num_hidden_layers=5,
      head_dim=12,
      sliding_window=7,
      query_pre_attn_scalar=40,
      attn_logit_softcapping=5.0,
      final_logit_softcapping=10.0,
    ),
  ),
  'gemma3': (
    'Gemma3ForCausalLM',
    WIDE
    | dict(
      num_hidden_layers=8,
      head_dim=12,
      sliding_window=7,
      sliding_window_pattern=3,
      query_pre_attn_scalar=20,
      rope_parameters=GEMMA3,
    ),
  ),
  'gpt_oss': (
    'GptOssForCausalLM',
    WIDE
    | dict(
      num_hidden_layers=4,
      head_dim=12,
      sliding_window=7,
      num_local_experts=6,
      num_experts_per_tok=2,
      rope_parameters=YARN | dict(truncate=False),
    ),
  ),
  'mixtral': (
    'MixtralForCausalLM',
    WIDE | dict(num_hidden_layers=2, num_local_experts=6, num_experts_per_tok=2),
  ),
  'qwen3_moe': (
    'Qwen3MoeForCausalLM',
    WIDE
    | dict(
      num_hidden_layers=4,
      head_dim=12,
      num_experts=6,
      num_experts_per_tok=3,
      moe_intermediate_size=24,
      decoder_sparse_step=2,
    ),
  ),
  'deepseek_v2': (
    'DeepseekV2ForCausalLM',
    LATENT
    | dict(
      topk_method='group_limited_greedy',
      routed_scaling_factor=1.5,
      rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707),
    ),
  ),
  'deepseek_v3': (
    'DeepseekV3ForCausalLM',
    LATENT
    | dict(
      num_mtp_layers=0,
      norm_topk_prob=True,
      rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.5),
    ),
  ),
  't5': ('T5ForConditionalGeneration', T5),
  't5_v1_1': (
    'T5ForConditionalGeneration',
    T5 | dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False),
  ),
  'bert': ('BertForMaskedLM', BERT),
  'bert_pooled': ('BertModel', BERT),
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """f32 values of the tensor of that name: matrices N(0, (1.5 / sqrt(inputs))^2),
  vectors 0.3 N around 1 or 0.
  """
  noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
  if len(shape) == 1:
    centre = 1.0 if name.lower().endswith('weight') else 0.0
    return np.float32(centre) + np.float32(0.3) * noise
  # T5 does not divide scores, but starts with small queries
  gain = 0.6 if 'Attention.q.' in name else 1.5
  return noise * np.float32(gain / np.sqrt(shape[-1] if len(shape) == 2 else shape[-2]))


def inputs(name: str) -> dict[str, np.ndarray]:
  """What the models are compared on: int32 `tokens`, `targets` [2, 24];
  `source` [2, 19] and `types` where needed.
  """
  rng = np.random.default_rng(zlib.crc32(name.encode()))

  def ids(*shape):
    return rng.integers(2, 67, shape).astype(np.int32)

  found = {'tokens': ids(2, 24), 'targets': ids(2, 24)}
  if name.startswith('t5'):
    found['source'] = ids(2, 19)
  if name.startswith('bert'):
    found['types'] = ids(2, 24) % 2
  return found


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A direction to look at a tensor from: its product with the tensor is one number
  that every entry takes part in.
  """
  return np.random.default_rng(zlib.crc32(b'direction ' + name.encode())).standard_normal(
    shape, np.float32
  )
