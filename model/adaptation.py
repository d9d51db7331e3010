"""What is trained on top of a model that stays as it is? The settings of an adapter; one is made in
model/adapters.py.
"""

import dataclasses
import math

import names

LOW_RANK = ('lora', 'dora')
SOFT = ('prompt', 'prefix')
KINDS = ('', *LOW_RANK, *SOFT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
  """Attributes:
    kind: '' trains the model itself; 'lora' (Hu et al., arXiv:2106.09685) and 'dora' (Liu et al.,
      arXiv:2402.09353) leave it frozen, and train a low-rank update of its matrices; 'prompt'
      (prompt tuning, Lester et al., arXiv:2104.08691) and 'prefix' (prefix tuning, Li and Liang,
      arXiv:2101.00190) leave it as it is, too, and train what it reads before every text: vectors
      in the place of embeddings, or keys and values of every layer.
    rank: of the updates.
    alpha: their scale is alpha / rank.
    stabilised: it is alpha / sqrt(rank) (rsLoRA, Kalajdzievski, arXiv:2312.03732).
    targets: patterns over names of the model's matrices, such as 'stack.blocks.*.attention.[qv]';
      '*' is all in its blocks, but routers. Tables are named whole: 'embedding.tokens',
      'head.tokens'.
    dropout: share of what A sees that training sets to 0; the base sees it all.
    tokens: of a prompt or prefix, which every text is longer by.
    initial: what these begin as: tokens drawn from the 'vocabulary' (of its first 5,000, which are
      the commonest where a tokenizer sorts them), 'random' numbers, or a 'text' of the tokenizer of
      config.init. A prefix begins with the keys and values that the model itself has of them.
    text: that one, again and again or cut, until there are so many tokens.
    base: how the frozen model lies in memory: '' as it was kept, or a scheme of
      model/weights/scheme.py, such as int8 or nf4:group=64.

  Raises ValueError for names that are unknown, for sizes that make no adapter, and for fields that
  the kind would not read.
  """

  kind: str = ''
  rank: int = 16
  alpha: float = 32.0
  stabilised: bool = False
  targets: tuple[str, ...] = ('*',)
  dropout: float = 0.0
  tokens: int = 20
  initial: str = 'vocabulary'
  text: str = ''
  base: str = ''

  def __post_init__(self):
    names.check('adapter.kind', self.kind, KINDS)
    if any(getattr(self, field.name) != field.default for field in dataclasses.fields(self)):
      # Who reads training meets what an adapter is, and not all that it cannot be.
      names.imported('model.adaptable.check')(self)

  @property
  def scale(self) -> float:
    """What the product of the two thin matrices is multiplied with."""
    return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

  @property
  def soft(self) -> bool:
    """Whether it stands before texts, as tokens that nobody wrote (model.soft)."""
    return self.kind in SOFT
