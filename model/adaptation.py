"""What is trained on top of a model that stays as it is? The settings of an adapter; one is made in
model/adapters.py.
"""

import dataclasses
import math

import names

KINDS = ('', 'lora', 'dora')
BASES = ('', 'int8')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
  """Attributes:
    kind: '' trains the model itself; 'lora' (Hu et al., arXiv:2106.09685) and 'dora' (Liu et al.,
      arXiv:2402.09353) leave it frozen, and train a low-rank update of its matrices.
    rank: of the updates.
    alpha: their scale is alpha / rank.
    stabilised: it is alpha / sqrt(rank) (rsLoRA, Kalajdzievski, arXiv:2312.03732).
    targets: patterns over names of the model's matrices, such as 'stack.blocks.*.attention.[qv]';
      '*' is all in its blocks, but routers. Tables are named whole: 'embedding.tokens',
      'head.tokens'.
    dropout: share of what A sees that training sets to 0; the base sees it all.
    base: how the frozen model lies in memory: '' as it was kept, or 'int8'.

  Raises ValueError for names that are unknown, and for sizes that make no adapter.
  """

  kind: str = ''
  rank: int = 16
  alpha: float = 32.0
  stabilised: bool = False
  targets: tuple[str, ...] = ('*',)
  dropout: float = 0.0
  base: str = ''

  def __post_init__(self):
    names.check('adapter.kind', self.kind, KINDS)
    names.check('adapter.base', self.base, BASES)
    if self.rank < 1:
      raise ValueError(f'adapter.rank={self.rank} must be at least 1')
    if not 0 < self.alpha < math.inf:
      raise ValueError(f'adapter.alpha={self.alpha} must be above 0, and finite')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'adapter.dropout={self.dropout} must be at least 0, and below 1')
    if self.dropout and not self.kind:
      raise ValueError(
        f"adapter.dropout={self.dropout} with adapter.kind='' is of no adapter; choose one, or use "
        'train.dropout'
      )
    if not self.targets:
      raise ValueError("adapter.targets=() names no matrix; ('*',) is all in the model's blocks")

  @property
  def scale(self) -> float:
    """What the product of the two thin matrices is multiplied with."""
    return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)
