"""How does text come out while tokens are still being generated? Bytes of whole characters only."""
import codecs
from collections.abc import Sequence

from data.tokenizer import Tokenizer


class TextStream:
  """Turns ids into text as they come: a character split over tokens is held back until it is whole."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def add(self, ids: Sequence[int]) -> str:
    """The text that these ids complete."""
    return self._decoder.decode(self._tokenizer.decode_bytes(ids))

  def end(self) -> str:
    """What is left: U+FFFD for a character that was never completed, else ''."""
    return self._decoder.decode(b'', final=True)
