"""Which parts of a network have choices of their own?
Rotary positions, latent attention, experts.
"""

import dataclasses

import names


def check(prefix: str, config, choices: dict, **least: int) -> None:
  """Raises ValueError for a name that is unknown, or a number that is not finite and at least
  `least`.
  """
  for field, known in choices.items():
    names.check(f'{prefix}.{field}', getattr(config, field), known)
  for field, bound in least.items():
    value = getattr(config, field)
    if not bound <= value < float('inf'):
      raise ValueError(
        f'{prefix}.{field}={value} must be at least {bound:g}'
        + (' (0 is the default)' if bound == 0 else '')
      )


# What each scaling of rotary positions reads.
SCALINGS = {
  'none': (),
  'linear': ('factor',),
  'llama3': ('factor', 'original_length', 'low', 'high'),
  'yarn': ('factor', 'original_length', 'low', 'high', 'attention_factor', 'truncate'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Rotary positions (Su et al., arXiv:2104.09864), and how they are stretched beyond the length of
  the first training.

  Attributes:
    base: of the frequencies, base^(-2i/H). local_base: of layers with a window, which are never
      stretched; 0: as `base`, and stretched as all others (Gemma 3 has two).
    scaling: 'none'; 'linear': positions / factor (Chen et al., arXiv:2306.15595); 'llama3': only
      low frequencies, with a ramp between (Llama 3.1's code); 'yarn': the same with YaRN's ramp
      (Peng et al., arXiv:2309.00071, section 3.2).
    factor, original_length: by how much, and from which length.
    low, high: turns over original_length below which a frequency is divided by `factor`, and above
      which it stays as it is (llama3 1 and 4; YaRN 1 and 32).
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
    check(
      'model.rope',
      self,
      {'scaling': (*SCALINGS,)},
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
        f'model.rope.scaling={self.scaling!r} needs model.rope.original_length, the length of the '
        'first training'
      )
    if self.scaling in ('llama3', 'yarn') and not self.low < self.high:
      raise ValueError(f'model.rope.low={self.low} must be below model.rope.high={self.high}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
  """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values from
  one small vector per token.

  Attributes:
    width: of the vector that keys and values come from, which is what the cache holds; 0: no latent
      attention.
    query_width: of the vector that queries come from; 0: from the full width.
    rope_width: of the part of a key that carries the position, one for all heads.
    value_width: of a head's values; 0: model.head_width.
  """

  width: int = 0
  query_width: int = 0
  rope_width: int = 0
  value_width: int = 0

  def __post_init__(self):
    check('model.latent', self, {}, width=0, query_width=0, rope_width=0, value_width=0)
    if self.width and (not self.rope_width or self.rope_width % 2):
      raise ValueError(
        f'model.latent.rope_width={self.rope_width} must be even and positive: rotary positions '
        'turn pairs'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """A mixture of experts in place of the feed-forward of some layers (Shazeer et al.,
  arXiv:1701.06538).

  Attributes:
    experts: E; 0: none. per_token: experts that a token is sent to.
    feed_forward: F of an expert; 0: model.feed_forward. shared_feed_forward: F of the expert that
      sees every token; 0: none.
    every, first: layers `first`, `first + every`, ... have experts.
    router: 'softmax' or 'sigmoid' of the scores. renormalise: gates of the chosen experts are
      divided by their sum.
    groups, groups_per_token: experts are chosen within the best groups only (DeepSeek-V3,
      arXiv:2412.19437, section 2.1.2).
    scale: of the gates. selection_bias: a bias per expert that takes part in the choice and not in
      the gate (arXiv:2408.15664).
    bias_rate: by how much that bias moves after a step, towards experts with less than their share,
      where it is trained (train.trained, train.frozen); 0: never.
    dispatch: 'dropless'; 'capacity': an expert takes the first capacity_factor * tokens * per_token
      / experts of each device; 'dense': every expert computes every token (the obviously right
      twin).
    capacity_factor: of 'capacity'. Where experts are split over devices, a dropless exchange has
      that times the room that a balanced routing needs, and is repeated until all is sent.
    balance_loss: weight of the load-balancing loss (Fedus et al., arXiv:2101.03961, eq. 4).
    balance_over: each 'sequence' or the whole 'batch'. z_loss: weight of log(Z)^2 of the
      router (arXiv:2202.08906, eq. 5).

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
    check(
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
        f'model.moe.per_token={self.per_token} passes the {able} experts that a token can choose '
        'from'
      )
    if self.bias_rate and not self.selection_bias:
      raise ValueError(
        f'model.moe.bias_rate={self.bias_rate} moves a bias that is not there; set '
        'model.moe.selection_bias=True'
      )
