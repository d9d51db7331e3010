"""How much of a network is left out, at random, while it trains? Rates, by which model/drawn.py
draws.
"""

import dataclasses

import names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
  """Shares that a step sets to 0 (Srivastava et al., JMLR 15, 2014); nothing else does, and 0
  leaves all in.

  Attributes:
    embedding: of what enters the first block.
    residual: of what attention and feed-forward, or experts, add to the residual stream.
    attention: of the weights that values are mixed by.
    feed_forward: of the hidden numbers of a feed-forward.
  """

  embedding: float = 0.0
  residual: float = 0.0
  attention: float = 0.0
  feed_forward: float = 0.0


PLACES = tuple(field.name for field in dataclasses.fields(Rates))


def rates(entries: tuple[str, ...]) -> Rates:
  """Of entries such as 'residual=0.1', the later ones over the earlier; 'all=0.1' is of everything.

  Raises ValueError for what is none.
  """
  chosen: dict[str, float] = {}
  for entry in entries:
    place, _, given = entry.partition('=')
    names.check('train.dropout', place, (*PLACES, 'all'))
    try:
      rate = float(given)
    except ValueError:
      raise ValueError(f"train.dropout={entry!r} has no number; as in '{place}=0.1'") from None
    if not 0 <= rate < 1:
      raise ValueError(f'train.dropout={entry!r} must be at least 0, and below 1')
    chosen |= dict.fromkeys(PLACES, rate) if place == 'all' else {place: rate}
  return Rates(**chosen)
