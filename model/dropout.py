"""How much of a network is left out, at random, while it trains? Rates, by which model/drawn.py
draws.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropoutConfig:
  """Shares that training sets to 0 (Srivastava et al., JMLR 15, 2014), each step and row others;
  nothing else does, and 0 leaves all in.

  Attributes:
    embedding: of what enters the first block.
    residual: of what attention and feed-forward, or experts, add to the residual stream.
    attention: of the weights that values are mixed by.
    feed_forward: of the hidden numbers of a feed-forward.

  Raises ValueError for a rate that is none.
  """

  embedding: float = 0.0
  residual: float = 0.0
  attention: float = 0.0
  feed_forward: float = 0.0

  def __post_init__(self):
    for name, rate in dataclasses.asdict(self).items():
      check_rate(f'dropout.{name}', rate)


def check_rate(field: str, rate: float) -> None:
  """Raises ValueError for what is no share that can be left out."""
  if not 0 <= rate < 1:
    raise ValueError(f'{field}={rate} must be at least 0, and below 1: a share that is left out')
