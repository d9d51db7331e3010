"""Which network? ModelConfig: every size and choice of an architecture, validated when it is built.

Sizes have long names as fields and the letters of the dimension legend as properties; the letters
are what the code uses, with defaults resolved (a field left 0 follows from the others). How the
network runs is a part of its own: `execution`.
"""

import dataclasses
import math
from typing import NamedTuple

from kernels import attention, blocks
from model.execution import ExecutionConfig
from model.parts import LatentConfig, MoEConfig, RopeConfig, check
from parallel import pipeline
from parallel.remat import NAMES, Remat

CHOICES = {
  'norm': ('rms', 'layer'),
  'norm_placement': ('pre', 'post', 'both'),
  'position': ('rope', 'learned', 'relative', 'none'),
  'biases': ('none', 'qkv', 'all'),
  'activation': ('silu', 'gelu', 'gelu_exact', 'relu', 'relu2', 'clamped_silu'),
  'head': ('plain', 'mlm'),
}


class Kind(NamedTuple):
  """What sets one layer apart from another: its window (0: sees all) and whether it has experts."""

  window: int = 0
  moe: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder; with `causal=False` an encoder; with `encoder_layers` both.

  Attributes:
    vocabulary: V; 0 takes the tokenizer's size.
    vocabulary_multiple: of which the rows of embedding and head are a multiple, so that devices
      can share them. Rows behind V are no ids: no law and no loss has them, and no export.
    width, layers, heads: D, L, N.
    kv_heads: K; 0 means as many as heads.
    head_width: H; 0 means width / heads. Of latent attention: the part of a key without position.
    feed_forward: F; 0 means 4 x width, or 8/3 x width rounded up to 64 when gated.
    gated: feed-forward is act(x gate) * (x up) rather than act(x up) (Shazeer, arXiv:2002.05202).
    activation: 'gelu' is the tanh approximation, 'gelu_exact' is not; 'clamped_silu' is gpt-oss's:
      gate * sigmoid(1.702 gate) * (up + 1), gate at most 7, up within 7 (gated only).
    norm: 'rms' or 'layer'. norm_epsilon: added to the mean square (or variance) in norms.
    norm_offset: norms multiply with 1 + scale.
    norm_placement: of the norms of a block: 'pre', before attention and feed-forward; 'post', after
      the residual sum (and after the embedding; no final norm); 'both', before and after, inside
      the residual branch.
    position: rotary, a learned table of max_length rows, T5's relative bias, or none. rope: see
      RopeConfig.
    relative_buckets, relative_distance: of the relative bias (Raffel et al., arXiv:1910.10683,
      section 2.1).
    max_length: longest sequence that the model accepts, in tokens; 0 takes the data's sequence
      length.
    causal: whether a token sees only what is before it.
    window: a query sees this many keys, itself included, an encoder's as many on either side; 0
      means all. global_every: every n-th layer sees all; 0: none does.
    attention_softcap, logit_softcap: cap * tanh(x / cap) on scores and logits; 0 means none.
    attention_scale: of q.k; 0 means 1 / sqrt(width of a key). sinks: a learned logit per head joins
      the softmax (gpt-oss).
    qk_norm: RMS norm of queries and keys per head before the rotation.
    biases: 'none', on the projections of queries, keys and values, or on every projection and layer
      norm.
    tie_embeddings: the output's embedding is the input's.
    token_types: rows of a table of segment embeddings (BERT); 0: none.
    embedding_scale: embeddings are multiplied with sqrt(width), rounded to the compute dtype.
    logit_scale: of the final hidden states. head: 'mlm': a projection, activation and norm before,
      a bias after the output embedding (BERT). pooler: a projection and tanh of the first token.
    latent, moe: see there. encoder_layers: of an encoder that the decoder attends to; 0: decoder
      only.
    init_scale: standard deviation of the initial embedding; projections use 1 / sqrt(inputs),
      residual outputs that divided by sqrt(2 L) (Radford et al., GPT-2).
    shared_layers: so many layers in a row are one set of parameters, used again and again (ALBERT,
      Lan et al., arXiv:1909.11942): layers / shared_layers sets; 1: every layer has its own.
    execution: how it runs, see ExecutionConfig; all other fields say what the network is.

  Raises ValueError when a value is impossible, NotImplementedError when the attention backend
  cannot honour it, TypeError for a field that is one of `execution`.
  """

  vocabulary: int = 0
  vocabulary_multiple: int = 1
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
  shared_layers: int = 1
  execution: ExecutionConfig = ExecutionConfig()

  def __new__(cls, **values):
    """Where a field has moved from here into `execution`, the error says so."""
    for field in dataclasses.fields(ExecutionConfig):
      if field.name in values:
        raise TypeError(
          f'model.{field.name} is model.execution.{field.name} now: give ModelConfig '
          f'execution=ExecutionConfig({field.name}=...), or change a config with '
          f'config.with_execution({field.name}=...)'
        )
    return super().__new__(cls)

  def __post_init__(self):
    self._check_sizes()
    self._check_choices()
    self.kept
    if self.execution.attention != 'auto':
      attention.check(self.execution.attention, self.attention_spec)
    blocks.check(self.execution.attention_blocks, self.execution.attention, self._widest)

  def _check_sizes(self):
    """Raises ValueError for unknown names, impossible sizes, and heads that do not divide."""
    check(
      'model',
      self,
      CHOICES,
      width=1,
      layers=1,
      heads=1,
      vocabulary=0,
      vocabulary_multiple=1,
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
      shared_layers=1,
      relative_buckets=4,
      relative_distance=1,
    )
    for field in ('norm_epsilon', 'init_scale', 'logit_scale'):
      if not 0 < getattr(self, field) < float('inf'):
        raise ValueError(f'model.{field}={getattr(self, field)} must be positive')
    if not self.head_width and self.width % self.heads:
      raise ValueError(
        f'model.width={self.width} is not divisible by model.heads={self.heads}; set '
        'model.head_width explicitly'
      )
    if self.heads % self.K:
      raise ValueError(
        f'model.heads={self.heads} is not divisible by model.kv_heads={self.kv_heads}; '
        f'kv_heads must be one of {[k for k in range(1, self.heads + 1) if self.heads % k == 0]}'
      )
    if self.position == 'rope' and not self.latent.width and self.H % 2:
      raise ValueError(
        f'head width {self.H} is odd, rotary positions turn pairs; set model.head_width to an even '
        'number'
      )

  def _check_choices(self):
    """Raises ValueError for parts of an architecture that do not go together."""
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
        'latent.width: latent attention works with rotary positions, one key per head, and without '
        'qk_norm, sinks and biases',
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
      (
        self.layers % self.shared_layers,
        f'shared_layers={self.shared_layers} does not divide model.layers={self.layers}: all sets '
        'of parameters are used as often',
      ),
      (
        self.shared_layers > 1 and (len(set(self.kinds)) > 1 or self.encoder_layers),
        f'shared_layers={self.shared_layers}: layers of one set of parameters are of one kind, '
        'and in one stack; set global_every=0, moe.every=1, moe.first=0, encoder_layers=0',
      ),
    ):
      if wrong:
        raise ValueError(f'model.{message}')

  def with_execution(self, **changes) -> 'ModelConfig':
    """The same network, run in another way: changes are fields of ExecutionConfig."""
    return dataclasses.replace(self, execution=dataclasses.replace(self.execution, **changes))

  @property
  def network(self) -> 'ModelConfig':
    """What the network is, whatever way it runs: with the default execution."""
    return dataclasses.replace(self, execution=ExecutionConfig())

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
  table_rows = property(
    lambda self: -(-self.V // self.vocabulary_multiple) * self.vocabulary_multiple,
    doc='Rows of embedding and head.',
  )
  vocabulary_limit = property(
    lambda self: self.V if self.table_rows > self.V else 0,
    doc="From which id on a table's rows are none, as model.vocabulary.Law has it; 0: all are.",
  )

  @property
  def F(self) -> int:
    """Feed-forward width."""
    if self.feed_forward:
      return self.feed_forward
    return -(-8 * self.width // 3 // 64) * 64 if self.gated else 4 * self.width

  @property
  def kept(self) -> Remat:
    """What is kept of each block. Raises ValueError for a name that no block of this model has."""
    run, kept = self.execution, self.execution.kept
    plain = bool(self.moe.shared_feed_forward) or not all(kind.moe for kind in self.kinds)
    missing = set() if plain else {'up'}
    if not (plain and self.gated):
      missing.add('gate')
    if wrong := missing & {*run.remat_save, *run.remat_offload}:
      raise ValueError(
        f'model.execution.remat_save and remat_offload name {sorted(wrong)}, which no block of '
        f'this model has; it has {", ".join(name for name in NAMES if name not in missing)}'
      )
    return kept

  @property
  def stream_dtype(self) -> str:
    """Of the residual stream and of what a feed-forward adds to it: the compute dtype, but f32 in a
    T5 of float16, whose feed-forwards give numbers that float16 does not hold.
    """
    run = self.execution
    return 'float32' if self.encoder_layers and run.dtype == 'float16' else run.dtype

  @property
  def value_width(self) -> int:
    """Width of a head's values."""
    return (self.latent.width and self.latent.value_width) or self.H

  @property
  def rope_width(self) -> int:
    """Width of what latent attention has in a key for its position alone; 0: all of a key turns."""
    return self.latent.rope_width if self.latent.width else 0

  @property
  def _widest(self) -> int:
    """Of a head's keys and values."""
    return max(self.H + self.rope_width, self.value_width)

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
      'float32': self.execution.dtype == 'float32',
      'wide_heads': self._widest > attention.WIDE,
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
    """The layers as (period of kinds, repeats), in order: each is one scan, so that compile time
    does not grow with depth.
    """
    if not self.execution.scan:
      # Those that share parameters are a loop all the same.
      sets = self.kinds[:: self.shared_layers]
      return tuple(((kind,), self.shared_layers) for kind in sets)
    left, stacks = self.kinds, []
    # What the windows and the experts repeat after together.
    longest = max(1, self.global_every) * self.moe.every
    while left:
      periods = [
        p for p in range(1, min(longest, len(left)) + 1) if p == 1 or _repeats(left, p) > 1
      ]
      # The one that covers most; of those, the shortest.
      period = max(periods, key=lambda p: (p * _repeats(left, p), -p))
      stacks.append((left[:period], _repeats(left, period)))
      left = left[period * stacks[-1][1] :]
    return tuple(stacks)

  @property
  def encoder_stacks(self) -> tuple[tuple[tuple[Kind, ...], int], ...]:
    """The same of the encoder's layers."""
    if self.execution.scan:
      return (((Kind(),), self.encoder_layers),)
    return (((Kind(),), 1),) * self.encoder_layers

  def check_stages(self, stages: int) -> None:
    """Raises ValueError or NotImplementedError where layers or losses cannot be split over so many
    pipeline stages.
    """
    if stages == 1:
      return
    run = self.execution
    if self.shared_layers > 1:
      raise NotImplementedError(
        f'model.shared_layers={self.shared_layers} over mesh.stage={stages}: the gradient of a set '
        'of parameters would be summed over stages; use data, fsdp, tensor or context'
      )
    for field, periods in (
      ('model.layers', self.stacks),
      ('model.encoder_layers', (((Kind(),), self.encoder_layers),)),
    ):
      if periods[-1][1]:
        pipeline.check(field, periods, run.pipeline, stages)

    batch_wide = self.moe.balance_loss and self.moe.balance_over == 'batch'
    if batch_wide and run.pipeline.count(stages) > 1:
      raise ValueError(
        "model.moe.balance_over='batch' looks at one of "
        f'model.execution.pipeline.microbatches={run.pipeline.count(stages)} at a time: parts '
        "would not add up to the whole; use balance_over='sequence'"
      )
    for wrong, feature in (
      (
        len(self.stacks) > 1,
        f'layers of {len(self.stacks)} scans (model.stacks): all have to be in the one that is '
        'split',
      ),
      (
        self.position == 'relative',
        "model.position='relative': it does not train a table that all layers share",
      ),
      (
        run.dtype == 'float16',
        "model.execution.dtype='float16': it finds gradients before the loss is scaled",
      ),
    ):
      if wrong and run.pipeline.schedule == '1f1b':
        raise NotImplementedError(
          f"model.execution.pipeline.schedule='1f1b' does not work with {feature}; use 'gpipe' or "
          "'circular'"
        )

  def check_parameters(self, sizes: dict[str, int]) -> None:
    """Raises ValueError when a parameter cannot be split evenly over a mesh of these sizes."""
    embed, tensor, stages = ('fsdp', 'expert', 'context'), sizes['tensor'], sizes['stage']
    self.check_stages(stages)
    if self.table_rows % (tensor * stages):
      raise ValueError(
        f'model.vocabulary={self.V} does not split over mesh.tensor={tensor} x '
        f'mesh.stage={stages}, which share embedding and loss; make model.vocabulary_multiple '
        f'{tensor * stages}, or a multiple of it (rows that no token has cost little; a new import '
        'has 128), or an axis smaller'
      )
    for field, size, axes in (
      ('model.width', self.D, embed),
      ('model.heads', self.N, ('tensor',)),
      ('model.feed_forward', self.F, ('tensor',)),
      ('model.moe.experts', self.E, ('expert',)),
      ('model.moe.feed_forward', self.moe.feed_forward, ('tensor',)),
      ('model.moe.shared_feed_forward', self.moe.shared_feed_forward, ('tensor',)),
      ('model.latent.width', self.latent.width, embed),
      ('model.latent.query_width', self.latent.query_width, embed),
    ):
      if size % math.prod(sizes[axis] for axis in axes):
        raise ValueError(
          f'{field}={size} does not split over {named_axes(sizes, axes)}; make it a multiple, or '
          'the axis smaller'
        )
    if self.K % tensor and tensor % self.K:
      raise ValueError(
        f'model.kv_heads={self.K} and mesh.tensor={tensor}: one has to be a multiple of the other; '
        'change either'
      )

  @property
  def places(self) -> tuple[tuple[Kind, tuple[int, ...]], ...]:
    """The kind, and the layers in order, of each place of each period: of transformer.Stack's
    blocks, one by one.
    """
    places, first = [], 0
    for kinds, repeats in self.stacks:
      places += [
        (kind, tuple(first + i + len(kinds) * r for r in range(repeats)))
        for i, kind in enumerate(kinds)
      ]
      first += len(kinds) * repeats
    return tuple(places)


def named_axes(sizes: dict[str, int], axes: tuple[str, ...]) -> str:
  """Axes of a mesh with their sizes, as messages have them."""
  return ' x '.join(f'mesh.{axis}={sizes[axis]}' for axis in axes if sizes[axis] > 1)


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
