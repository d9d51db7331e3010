"""What stands before the rows that an adapter writes, and how much room does that leave them?

A soft token is a virtual id (model.soft), which a cache holds and a context counts as it does
others, and nobody who asks sees. So a length is one of two things: of ids that were asked for,
or of all that is read, which here are made of each other.
"""

import dataclasses
import sys
from collections.abc import Sequence

from data.tokenizer import Tokenizer, in_utf8
from decode.request import Bound


@dataclasses.dataclass(frozen=True)
class Front:
  """Of one adapter, or of the model by itself.

  Attributes:
    adapter: its name; '' for the model by itself.
    index: its number among the low-rank ones (model.weights.bank.Bank.index); 0: it is none.
    soft: virtual ids that stand before all that is read.
    positions: model.max_length; 0: there is no end of them.
    encoder: whether an encoder reads the soft tokens: none begins what is written then.
  """

  adapter: str = ''
  index: int = 0
  soft: tuple[int, ...] = ()
  positions: int = 0
  encoder: bool = False

  @property
  def begins(self) -> tuple[int, ...]:
    """Virtual ids that begin a row of a cache: all of them, but where an encoder reads them."""
    return () if self.encoder else self.soft

  @property
  def context(self) -> int:
    """Tokens that a text can have, its new ones included; sys.maxsize where there is no end."""
    return self.positions - len(self.begins) if self.positions else sys.maxsize

  @property
  def limit(self) -> str:
    """The context, as messages have it."""
    return self._less(len(self.begins))

  def behind(self, length: int) -> int:
    """Tokens of a cache's row in which so many are of its text."""
    return length + len(self.begins)

  def ids(self, text: str, tokenizer: Tokenizer) -> list[int]:
    """What is read of a text: it begins as documents do, and ends as sources do where an encoder
    reads it. Raises ValueError for what is no UTF-8.
    """
    ids = tokenizer.encode(in_utf8(text))
    return [*ids, tokenizer.eos] if self.encoder else [tokenizer.bos, *ids]

  def row(self, ids: Sequence[int]) -> list[int]:
    """What a cache's row begins with, of a text of these ids."""
    return [*self.begins, *ids]

  def whole(self, ids: Sequence[int]) -> list[int]:
    """What is read at once, by a forward pass or an encoder, of a text of these ids.

    Raises ValueError for a text that the model has no positions for.
    """
    if 0 < self.positions < len(self.soft) + len(ids):
      raise ValueError(
        f'a prompt of {len(ids)} tokens passes {self._less(len(self.soft))}; shorten it'
      )
    return [*self.soft, *ids]

  def read(self, ids: Sequence[int], pad: int) -> tuple[list[int], list[int]]:
    """What a decoder's row begins with, of a text of these ids, and what its encoder reads before
    that: nothing where there is none. pad: with which a decoder behind an encoder begins (T5).
    """
    return ([pad], self.whole(ids)) if self.encoder else (self.row(ids), [])

  def bound(self, length: int, new: int) -> Bound:
    """How far a row goes whose prompt has so many tokens: to `new` ones, or the end of the
    context.
    """
    if length + new <= self.context:
      return Bound(new)
    most = max(self.context - length, 0)
    return Bound(
      most,
      note=f'the context ended it: {length} tokens before it and {most} new ones fill '
      f'{self.limit}, before max_new_tokens={new}',
    )

  def check_room(self, length: int) -> None:
    """Raises ValueError where the context has no room behind a prompt of so many tokens."""
    if length >= self.context:
      raise ValueError(
        f'a prompt of {length} tokens leaves no room for new ones in {self.limit}; shorten the '
        'prompt'
      )

  def _less(self, soft: int) -> str:
    return f'model.max_length={self.positions}' + (
      f' less {soft} soft tokens (adapter.tokens)' if soft else ''
    )
