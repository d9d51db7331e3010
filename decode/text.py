"""How does text come out while tokens are still being generated? What is certain of it:
whole characters, and none of a stop string.
"""

import codecs
from collections.abc import Sequence

from data.tokenizer import Tokenizer


class TextStream:
  """Turns ids into text as they come, up to a stop string.

  A character split over tokens is held back until it is whole, text that may begin a stop string
  until it turns out not to. The stop string that is complete first ends the text, the longest of
  several; the text before it is kept. None of this depends on how the ids come in pieces.

  Attributes:
    stopped: the stop string that ended the text, None so far.
    ids_used: how many ids belong to the text: all that were added, up to the one that completed
      the stop string.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    """Raises ValueError for stops that are one text, not several, or for an empty one."""
    if isinstance(stops, str) or '' in stops:
      raise ValueError(
        f'stops={stops!r} must be several texts, none of them empty, such as ["###"]'
      )
    self.stopped: str | None = None
    self.ids_used = 0
    self._tokenizer, self._stops = tokenizer, tuple(stops)
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    self._held = ''

  def add(self, ids: Sequence[int]) -> str:
    """The text that these ids make certain; '' behind a stop string."""
    if not self._stops:
      self.ids_used += len(ids)
      return self._decoder.decode(self._tokenizer.decode_bytes(ids))
    pieces = []
    for id_ in ids:  # one by one, to know which of them completes a stop string
      if self.stopped is None:
        self.ids_used += 1
        pieces.append(self._certain(self._decoder.decode(self._tokenizer.decode_bytes([id_]))))
    return ''.join(pieces)

  def end(self) -> str:
    """What is left: text that was held back, U+FFFD for a character that was never completed."""
    if self.stopped is not None:
      return ''
    piece = self._certain(self._decoder.decode(b'', final=True))
    rest, self._held = self._held, ''
    return piece + rest

  def _certain(self, new: str) -> str:
    text = self._held + new
    ends = [
      (text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text
    ]
    if ends:
      end, _, self.stopped = min(ends)
      certain, self._held = end - len(self.stopped), ''
    else:
      longest = min(len(text), max(map(len, self._stops), default=1) - 1)
      held = next(
        (
          n
          for n in range(longest, 0, -1)
          if any(stop.startswith(text[-n:]) for stop in self._stops)
        ),
        0,
      )
      certain = len(text) - held
      self._held = text[certain:]
    return text[:certain]
