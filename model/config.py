"""Which network? ModelConfig: every size and choice of an architecture, validated when it is built.

Sizes have long names as fields and the letters of the dimension legend as properties; the letters are what the code uses,
with defaults resolved (a field left 0 follows from the others).
"""

import dataclasses
from typing import NamedTuple

import names
from kernels import blocks
from kernels.attention import HONOURS, WIDE, check
from kernels.blocks import Blocks
from kernels.context import STRATEGIES
from parallel import pipeline
from parallel.pipeline import PipelineConfig
from parallel.remat import NAMES, POLICIES, Remat

CHOICES = {
  'norm': ('rms', 'layer'),
  'norm_placement': ('pre', 'post', 'both'),
  'position': ('rope', 'learned', 'relative', 'none'),
  'biases': ('none', 'qkv', 'all'),
  'activation': ('silu', 'gelu', 'gelu_exact', 'relu', 'relu2', 'clamped_silu'),
  'head': ('plain', 'mlm'),
  'dtype': ('float32', 'bfloat16', 'float16'),
  'parameter_dtype': ('float32', 'bfloat16'),
  'attention': ('auto', *HONOURS),
  'context': STRATEGIES,
  'remat': tuple(POLICIES),
}


def _check(prefix: str, config, choices: dict, **least: int) -> None:
  """Raises ValueError for a name that is unknown, or a number that is not finite and at least `least`."""
  for field, known in choices.items():
    names.check(f'{prefix}.{field}', getattr(config, field), known)
  for field, bound in least.items():
    value = getattr(config, field)
    if not bound <= value < float('inf'):
      raise ValueError(
        f'{prefix}.{field}={value} must be at least {bound:g}'
        + (' (0 is the default)' if bound == 0 else '')
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Rotary positions (Su et al., arXiv:2104.09864), and how they are stretched beyond the length of the first training.

  Attributes:
    base: of the frequencies, base^(-2i/H). local_base: of layers with a window, which are never stretched; 0: as `base`,
      and stretched as all others (Gemma 3 has two).
    scaling: 'none'; 'linear': positions / factor (Chen et al., arXiv:2306.15595); 'llama3': only low frequencies, with a ramp
      between (Llama 3.1's code); 'yarn': the same with YaRN's ramp (Peng et al., arXiv:2309.00071, section 3.2).
    factor, original_length: by how much, and from which length.
    low, high: turns over original_length below which a frequency is divided by `factor`, and above which it stays as it is
      (llama3 1 and 4; YaRN 1 and 32).
    attention_factor: YaRN: what cosines and sines are multiplied with; 0: 0.1 ln(factor) + 1.
    truncate: YaRN: round the ramp's ends outwards to whole frequencies.

  Raises ValueError when a value is impossible.
  """

  base: float = 10000.0
  local_base: float = 0.0
  scaling: str = 'none'
  factor: float = 1.0
  original_length: int = 0
  low: float = 1.0
  high: float = 4.0
  attention_factor: float = 0.0
  truncate: bool = True

  def __post_init__(self):
    _check(
      'model.rope',
      self,
      {'scaling': ('none', 'linear', 'llama3', 'yarn')},
      local_base=0,
      factor=1,
      original_length=0,
      low=0,
      high=0,
      attention_factor=0,
    )
    if not 0 < self.base < float('inf'):
      raise ValueError(f'model.rope.base={self.base} must be positive')
    if self.scaling in ('llama3', 'yarn') and not self.original_length:
      raise ValueError(
        f'model.rope.scaling={self.scaling!r} needs model.rope.original_length, the length of the first training'
      )
    if self.scaling in ('llama3', 'yarn') and not self.low < self.high:
      raise ValueError(f'model.rope.low={self.low} must be below model.rope.high={self.high}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
  """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values from one small vector per token.

  Attributes:
    width: of the vector that keys and values come from, which is what the cache holds; 0: no latent attention.
    query_width: of the vector that queries come from; 0: from the full width.
    rope_width: of the part of a key that carries the position, one for all heads.
    value_width: of a head's values; 0: model.head_width.
  """

  width: int = 0
  query_width: int = 0
  rope_width: int = 0
  value_width: int = 0

  def __post_init__(self):
    _check('model.latent', self, {}, width=0, query_width=0, rope_width=0, value_width=0)
    if self.width and (not self.rope_width or self.rope_width % 2):
      raise ValueError(
        f'model.latent.rope_width={self.rope_width} must be even and positive: rotary positions turn pairs'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """A mixture of experts in place of the feed-forward of some layers (Shazeer et al., arXiv:1701.06538).

  Attributes:
    experts: E; 0: none. per_token: experts that a token is sent to.
    feed_forward: F of an expert; 0: model.feed_forward. shared_feed_forward: F of the expert that sees every token; 0: none.
    every, first: layers `first`, `first + every`, ... have experts.
    router: 'softmax' or 'sigmoid' of the scores. renormalise: gates of the chosen experts are divided by their sum.
    groups, groups_per_token: experts are chosen within the best groups only (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    scale: of the gates. selection_bias: a bias per expert that takes part in the choice and not in the gate (arXiv:2408.15664).
    bias_rate: by how much that bias moves after a step, towards experts with less than their share; 0: never.
    dispatch: 'dropless'; 'capacity': an expert takes the first capacity_factor * tokens * per_token / experts of each device;
      'dense': every expert computes every token (the obviously right twin). Where experts are split over devices, a dropless
      exchange has capacity_factor times the room that a balanced routing needs, and is repeated until it has sent everything.
    balance_loss: weight of the load-balancing loss (Fedus et al., arXiv:2101.03961, eq. 4), over each 'sequence' or the whole
      'batch' as balance_over says. z_loss: weight of log(Z)^2 of the router (arXiv:2202.08906, eq. 5).

  Raises ValueError when a value is impossible.
  """

  experts: int = 0
  per_token: int = 2
  feed_forward: int = 0
  shared_feed_forward: int = 0
  every: int = 1
  first: int = 0
  router: str = 'softmax'
  renormalise: bool = True
  groups: int = 1
  groups_per_token: int = 1
  scale: float = 1.0
  selection_bias: bool = False
  bias_rate: float = 0.0
  dispatch: str = 'dropless'
  capacity_factor: float = 1.25
  balance_loss: float = 0.0
  balance_over: str = 'sequence'
  z_loss: float = 0.0

  def __post_init__(self):
    _check(
      'model.moe',
      self,
      {
        'router': ('softmax', 'sigmoid'),
        'dispatch': ('dropless', 'capacity', 'dense'),
        'balance_over': ('sequence', 'batch'),
      },
      experts=0,
      per_token=1,
      feed_forward=0,
      shared_feed_forward=0,
      every=1,
      first=0,
      groups=1,
      groups_per_token=1,
      scale=0,
      bias_rate=0,
      capacity_factor=0,
      balance_loss=0,
      z_loss=0,
    )
    if not self.experts:
      return
    if self.experts % self.groups or self.groups_per_token > self.groups:
      raise ValueError(
        f'model.moe.groups={self.groups} must divide model.moe.experts={self.experts}, '
        f'and model.moe.groups_per_token={self.groups_per_token} be at most that'
      )
    able = self.experts // self.groups * self.groups_per_token
    if self.per_token > able:
      raise ValueError(
        f'model.moe.per_token={self.per_token} passes the {able} experts that a token can choose from'
      )
    if self.bias_rate and not self.selection_bias:
      raise ValueError(
        f'model.moe.bias_rate={self.bias_rate} moves a bias that is not there; set model.moe.selection_bias=True'
      )


class Kind(NamedTuple):
  """What sets one layer apart from another: its window (0: sees all) and whether it has experts."""

  window: int = 0
  moe: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder; with `causal=False` an encoder; with `encoder_layers` both.

  Attributes:
    vocabulary: V; 0 takes the tokenizer's size.
    width, layers, heads: D, L, N.
    kv_heads: K; 0 means as many as heads.
    head_width: H; 0 means width / heads. Of latent attention: the part of a key without position.
    feed_forward: F; 0 means 4 x width, or 8/3 x width rounded up to 64 when gated.
    gated: feed-forward is act(x gate) * (x up) rather than act(x up) (Shazeer, arXiv:2002.05202).
    activation: 'gelu' is the tanh approximation, 'gelu_exact' is not; 'clamped_silu' is gpt-oss's: gate * sigmoid(1.702 gate)
      * (up + 1), gate at most 7, up within 7 (gated only).
    norm_epsilon: added to the mean square (or variance) in norms. norm_offset: norms multiply with 1 + scale.
    norm_placement: of the norms of a block: 'pre', before attention and feed-forward; 'post', after the residual sum (and after
      the embedding; no final norm); 'both', before and after, inside the residual branch.
    position: rotary, a learned table of max_length rows, T5's relative bias, or none. rope: see RopeConfig.
    relative_buckets, relative_distance: of the relative bias (Raffel et al., arXiv:1910.10683, section 2.1).
    max_length: longest sequence that the model accepts, in tokens; 0 takes the data's sequence length.
    causal: whether a token sees only what is before it.
    window: a query sees this many keys, itself included, an encoder's as many on either side; 0 means all. global_every: every n-th
      layer sees all; 0: none does.
    attention_softcap, logit_softcap: cap * tanh(x / cap) on scores and logits; 0 means none.
    attention_scale: of q.k; 0 means 1 / sqrt(width of a key). sinks: a learned logit per head joins the softmax (gpt-oss).
    qk_norm: RMS norm of queries and keys per head before the rotation.
    biases: 'none', on the projections of queries, keys and values, or on every projection and layer norm.
    token_types: rows of a table of segment embeddings (BERT); 0: none.
    embedding_scale: embeddings are multiplied with sqrt(width), rounded to the compute dtype.
    logit_scale: of the final hidden states. head: 'mlm': a projection, activation and norm before, a bias after the output
      embedding (BERT). pooler: a projection and tanh of the first token.
    latent, moe: see there. encoder_layers: of an encoder that the decoder attends to; 0: decoder only.
    dtype: of activations and matrix products. parameter_dtype: of what the optimizer updates.
    attention: backend of kernels.attention. attention_blocks: what its kernels work on at a time, see kernels.blocks.
    context: how devices that share a row attend to all of it (kernels.context).
    remat, remat_save, remat_offload: what is kept of each block for the backward pass, see parallel.remat.Remat.
    pipeline: see parallel.pipeline. scan: layers of a kind are stacked, and one program runs over them; False: each has its own,
      whose matrices decoding reads where they lie, and which takes the longer to compile the more layers there are.
    init_scale: standard deviation of the initial embedding; projections use 1 / sqrt(inputs), residual outputs that
      divided by sqrt(2 L) (Radford et al., GPT-2).

  Raises ValueError when a value is impossible, NotImplementedError when the attention backend cannot honour it.
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
  norm_offset: bool = False
  norm_placement: str = 'pre'
  position: str = 'rope'
  rope: RopeConfig = RopeConfig()
  relative_buckets: int = 32
  relative_distance: int = 128
  max_length: int = 0
  causal: bool = True
  window: int = 0
  global_every: int = 0
  attention_softcap: float = 0.0
  logit_softcap: float = 0.0
  attention_scale: float = 0.0
  sinks: bool = False
  qk_norm: bool = False
  biases: str = 'none'
  tie_embeddings: bool = False
  token_types: int = 0
  embedding_scale: bool = False
  logit_scale: float = 1.0
  head: str = 'plain'
  pooler: bool = False
  latent: LatentConfig = LatentConfig()
  moe: MoEConfig = MoEConfig()
  encoder_layers: int = 0
  init_scale: float = 0.02
  dtype: str = 'float32'
  parameter_dtype: str = 'float32'
  attention: str = 'auto'
  attention_blocks: Blocks = Blocks()
  context: str = 'ring'
  remat: str = 'none'
  remat_save: tuple[str, ...] = ()
  remat_offload: tuple[str, ...] = ()
  pipeline: PipelineConfig = PipelineConfig()
  scan: bool = True

  def __post_init__(self):
    _check(
      'model',
      self,
      CHOICES,
      width=1,
      layers=1,
      heads=1,
      vocabulary=0,
      kv_heads=0,
      head_width=0,
      feed_forward=0,
      max_length=0,
      window=0,
      global_every=0,
      attention_softcap=0,
      logit_softcap=0,
      attention_scale=0,
      token_types=0,
      encoder_layers=0,
      relative_buckets=4,
      relative_distance=1,
    )
    for field in ('norm_epsilon', 'init_scale', 'logit_scale'):
      if not 0 < getattr(self, field) < float('inf'):
        raise ValueError(f'model.{field}={getattr(self, field)} must be positive')
    if not self.head_width and self.width % self.heads:
      raise ValueError(
        f'model.width={self.width} is not divisible by model.heads={self.heads}; set model.head_width explicitly'
      )
    if self.heads % self.K:
      raise ValueError(
        f'model.heads={self.heads} is not divisible by model.kv_heads={self.kv_heads}; '
        f'kv_heads must be one of {[k for k in range(1, self.heads + 1) if self.heads % k == 0]}'
      )
    if self.position == 'rope' and not self.latent.width and self.H % 2:
      raise ValueError(
        f'head width {self.H} is odd, rotary positions turn pairs; set model.head_width to an even number'
      )
    for wrong, message in (
      (
        self.activation == 'clamped_silu' and not self.gated,
        "activation='clamped_silu' works on a gate; set model.gated=True",
      ),
      (
        self.global_every and not self.window,
        f'global_every={self.global_every} chooses between layers with a window and without; '
        'set model.window',
      ),
      (
        self.encoder_layers and not self.causal,
        'causal=False is an encoder already; set model.encoder_layers=0, or model.causal=True '
        'for a decoder with an encoder',
      ),
      (
        self.latent.width
        and (
          self.position != 'rope'
          or self.K != self.N
          or self.qk_norm
          or self.sinks
          or self.biases != 'none'
        ),
        'latent.width: latent attention works with rotary positions, one key per head, and without qk_norm, sinks and biases',
      ),
      (
        self.moe.experts and self.encoder_layers,
        'moe.experts: an encoder-decoder has no experts; set model.encoder_layers=0',
      ),
      (
        self.encoder_layers and self.position == 'learned',
        "position='learned' has one table; an encoder-decoder needs 'relative', 'rope' or 'none'",
      ),
      (
        self.moe.experts and self.moe.first >= self.layers,
        f'moe.first={self.moe.first} leaves none of {self.layers} layers with '
        'experts; lower it, or set model.moe.experts=0',
      ),
      (
        self.token_types and self.encoder_layers,
        'token_types are of an encoder; set model.encoder_layers=0',
      ),
    ):
      if wrong:
        raise ValueError(f'model.{message}')
    self.kept
    if self.attention != 'auto':
      check(self.attention, self.attention_spec)
    blocks.check(self.attention_blocks, self.attention, self._widest)

  D = property(lambda self: self.width, doc='Model width.')
  L = property(lambda self: self.layers, doc='Layers (of the decoder).')
  N = property(lambda self: self.heads, doc='Query heads.')
  K = property(lambda self: self.kv_heads or self.heads, doc='Key/value heads.')
  G = property(lambda self: self.N // self.K, doc='Query heads per key/value head.')
  H = property(
    lambda self: self.head_width or self.width // self.heads,
    doc='Head width; of latent attention, without the rotary part.',
  )
  V = property(lambda self: self.vocabulary, doc='Vocabulary; 0 until the tokenizer is known.')
  E = property(lambda self: self.moe.experts, doc='Experts.')

  @property
  def F(self) -> int:
    """Feed-forward width."""
    if self.feed_forward:
      return self.feed_forward
    return -(-8 * self.width // 3 // 64) * 64 if self.gated else 4 * self.width

  @property
  def kept(self) -> Remat:
    """What is kept of each block. Raises ValueError for a name that no block of this model has."""
    kept, plain = (
      Remat(self.remat, self.remat_save, self.remat_offload),
      bool(self.moe.shared_feed_forward) or not all(kind.moe for kind in self.kinds),
    )
    missing = {name for name, there in (('gate', self.gated and plain), ('up', plain)) if not there}
    if wrong := missing & {*self.remat_save, *self.remat_offload}:
      raise ValueError(
        f'model.remat_save and remat_offload name {sorted(wrong)}, which no block of this model has; it has '
        f'{", ".join(name for name in NAMES if name not in missing)}'
      )
    return kept

  @property
  def value_width(self) -> int:
    """Width of a head's values."""
    return self.latent.value_width or self.H

  @property
  def _widest(self) -> int:
    """Of a head's keys and values."""
    return max(self.H + (self.latent.rope_width if self.latent.width else 0), self.value_width)

  @property
  def attention_spec(self) -> set[str]:
    """What training asks of an attention backend, in the words of kernels.attention.HONOURS."""
    asked = {
      'causal': self.causal,
      'window': self.window,
      'softcap': self.attention_softcap,
      'sinks': self.sinks,
      'relative': self.position == 'relative',
      'value_width': self.latent.width,
      'float32': self.dtype == 'float32',
      'wide_heads': self._widest > WIDE,
    }
    return {'segments'} | {name for name, wanted in asked.items() if wanted}

  @property
  def kinds(self) -> tuple[Kind, ...]:
    """The kind of each layer."""
    every, moe = self.global_every, self.moe
    return tuple(
      Kind(
        0 if every and (i + 1) % every == 0 else self.window,
        bool(moe.experts) and i >= moe.first and (i - moe.first) % moe.every == 0,
      )
      for i in range(self.L)
    )

  @property
  def stacks(self) -> tuple[tuple[tuple[Kind, ...], int], ...]:
    """The layers as (period of kinds, repeats), in order: each is one scan, so that compile time does not grow with depth."""
    if not self.scan:
      return tuple(((kind,), 1) for kind in self.kinds)
    left, stacks = self.kinds, []
    longest = (
      max(1, self.global_every) * self.moe.every
    )  # what the windows and the experts repeat after together
    while left:
      periods = [
        p for p in range(1, min(longest, len(left)) + 1) if p == 1 or _repeats(left, p) > 1
      ]
      period = max(
        periods, key=lambda p: (p * _repeats(left, p), -p)
      )  # the one that covers most; of those, the shortest
      stacks.append((left[:period], _repeats(left, period)))
      left = left[period * stacks[-1][1] :]
    return tuple(stacks)

  @property
  def encoder_stacks(self) -> tuple[tuple[tuple[Kind, ...], int], ...]:
    """The same of the encoder's layers."""
    return (
      (((Kind(),), self.encoder_layers),) if self.scan else (((Kind(),), 1),) * self.encoder_layers
    )

  def check_stages(self, stages: int) -> None:
    """Raises ValueError or NotImplementedError where layers or losses cannot be split over so many pipeline stages."""
    if stages == 1:
      return
    for what, periods in (
      ('model.layers', self.stacks),
      ('model.encoder_layers', (((Kind(),), self.encoder_layers),)),
    ):
      if periods[-1][1]:
        pipeline.check(what, periods, self.pipeline, stages)
    if (
      self.moe.balance_loss and self.moe.balance_over == 'batch' and self.pipeline.count(stages) > 1
    ):
      raise ValueError(
        f"model.moe.balance_over='batch' looks at one of model.pipeline.microbatches={self.pipeline.count(stages)} at a "
        "time: parts would not add up to the whole; use balance_over='sequence'"
      )
    for wrong, what in (
      (
        len(self.stacks) > 1,
        f'layers of {len(self.stacks)} scans (model.stacks): all have to be in the one that is split',
      ),
      (
        self.position == 'relative',
        "model.position='relative': it does not train a table that all layers share",
      ),
      (
        self.dtype == 'float16',
        "model.dtype='float16': it finds gradients before the loss is scaled",
      ),
    ):
      if wrong and self.pipeline.schedule == '1f1b':
        raise NotImplementedError(
          f"model.pipeline.schedule='1f1b' does not work with {what}; use 'gpipe' or 'circular'"
        )

  @property
  def places(self) -> tuple[tuple[Kind, tuple[int, ...]], ...]:
    """The kind, and the layers in order, of each place of each period: of transformer.Stack's blocks, one by one."""
    places, first = [], 0
    for kinds, repeats in self.stacks:
      places += [
        (kind, tuple(first + i + len(kinds) * r for r in range(repeats)))
        for i, kind in enumerate(kinds)
      ]
      first += len(kinds) * repeats
    return tuple(places)


def _repeats(kinds: tuple[Kind, ...], period: int) -> int:
  """How many times the first `period` kinds follow one another from the start."""
  return next(
    (
      n
      for n in range(1, len(kinds) // period + 1)
      if kinds[n * period :][:period] != kinds[:period]
    ),
    1,
  )
