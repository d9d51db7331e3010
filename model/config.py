"""Which network? ModelConfig: every size and choice of the decoder, validated when it is built.

Sizes have long names as fields and the letters of the dimension legend as properties; the letters are what the code uses,
with defaults resolved (a field left 0 follows from the others).
"""
import dataclasses

import names

CHOICES = {
    'norm': ('rms', 'layer'),
    'position': ('rope', 'learned', 'none'),
    'activation': ('silu', 'gelu', 'relu', 'relu2'),
    'dtype': ('float32', 'bfloat16', 'float16'),
    'parameter_dtype': ('float32', 'bfloat16'),
    'attention': ('auto', 'reference', 'blocked', 'xla'),
    'remat': ('none', 'full', 'dots'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A pre-norm decoder.

  Attributes:
    vocabulary: V; 0 takes the tokenizer's size.
    width, layers, heads: D, L, N.
    kv_heads: K; 0 means as many as heads.
    head_width: H; 0 means width / heads.
    feed_forward: F; 0 means 4 x width, or 8/3 x width rounded up to 64 when gated.
    gated: feed-forward is act(x gate) * (x up) rather than act(x up) (Shazeer, arXiv:2002.05202).
    norm_epsilon: added to the mean square (or variance) in norms.
    position: rotary (Su et al., arXiv:2104.09864), a learned table of max_length rows, or none.
    max_length: longest sequence that the model accepts, in tokens; 0 takes the data's sequence length.
    window: a query sees this many keys, itself included; 0 means all.
    attention_softcap, logit_softcap: cap * tanh(x / cap) on scores and logits; 0 means none.
    qk_norm: RMS norm of queries and keys per head before the rotation.
    biases: on every projection of attention and feed-forward, and on layer norms.
    dtype: of activations and matrix products. parameter_dtype: of what the optimizer updates.
    attention: backend of kernels.attention. remat: policy of parallel.remat around each block.
    init_scale: standard deviation of the initial embedding; projections use 1 / sqrt(inputs), residual outputs that
      divided by sqrt(2 L) (Radford et al., GPT-2).

  Raises ValueError when a value is impossible.
  """
  vocabulary: int = 0
  width: int = 256
  layers: int = 4
  heads: int = 4
  kv_heads: int = 0
  head_width: int = 0
  feed_forward: int = 0
  gated: bool = True
  activation: str = 'silu'
  norm: str = 'rms'
  norm_epsilon: float = 1e-5
  position: str = 'rope'
  rope_base: float = 10000.0
  max_length: int = 0
  window: int = 0
  attention_softcap: float = 0.0
  logit_softcap: float = 0.0
  qk_norm: bool = False
  biases: bool = False
  tie_embeddings: bool = False
  init_scale: float = 0.02
  dtype: str = 'float32'
  parameter_dtype: str = 'float32'
  attention: str = 'auto'
  remat: str = 'none'

  def __post_init__(self):
    for field, known in CHOICES.items():
      names.check(f'model.{field}', getattr(self, field), known)
    for field in ('width', 'layers', 'heads'):
      if getattr(self, field) < 1:
        raise ValueError(f'model.{field}={getattr(self, field)} must be at least 1')
    for field in ('vocabulary', 'kv_heads', 'head_width', 'feed_forward', 'max_length', 'window'):
      if getattr(self, field) < 0:
        raise ValueError(f'model.{field}={getattr(self, field)} must be 0 (derived) or more')
    for field in ('attention_softcap', 'logit_softcap'):
      if getattr(self, field) < 0:
        raise ValueError(f'model.{field}={getattr(self, field)} must be 0 (none) or positive')
    for field in ('norm_epsilon', 'rope_base', 'init_scale'):
      if not getattr(self, field) > 0:
        raise ValueError(f'model.{field}={getattr(self, field)} must be positive')
    if not self.head_width and self.width % self.heads:
      raise ValueError(f'model.width={self.width} is not divisible by model.heads={self.heads}; set model.head_width explicitly')
    if self.heads % self.K:
      raise ValueError(f'model.heads={self.heads} is not divisible by model.kv_heads={self.kv_heads}; '
                       f'kv_heads must be one of {[k for k in range(1, self.heads + 1) if self.heads % k == 0]}')
    if self.position == 'rope' and self.H % 2:
      raise ValueError(f'head width {self.H} is odd, rotary positions turn pairs; set model.head_width to an even number')

  D = property(lambda self: self.width, doc='Model width.')
  L = property(lambda self: self.layers, doc='Layers.')
  N = property(lambda self: self.heads, doc='Query heads.')
  K = property(lambda self: self.kv_heads or self.heads, doc='Key/value heads.')
  G = property(lambda self: self.N // self.K, doc='Query heads per key/value head.')
  H = property(lambda self: self.head_width or self.width // self.heads, doc='Head width.')
  V = property(lambda self: self.vocabulary, doc='Vocabulary; 0 until the tokenizer is known.')

  @property
  def F(self) -> int:
    """Feed-forward width."""
    if self.feed_forward:
      return self.feed_forward
    return -(-8 * self.width // 3 // 64) * 64 if self.gated else 4 * self.width
