"""How do documents become tokens, many at a time, each side of a split on its own; and a text that
stands behind another?
"""

import itertools
from collections.abc import Iterator

import numpy as np

from data.tokenizer import Tokenizer, in_utf8

ENCODE_CHARACTERS = 2**22  # encoded at a time: SentencePiece returns Python integers, 36 bytes each


def sides_of(
  documents: Iterator[tuple[int, str]], boundary: np.ndarray
) -> Iterator[tuple[bool, str]]:
  """Cuts documents at their boundaries: (is for training, text), without empty texts."""
  for d, text in documents:
    for for_training, part in ((True, text[: boundary[d]]), (False, text[boundary[d] :])):
      if part:
        yield for_training, part


def encoded_by(
  made: Tokenizer, sides: Iterator[tuple[bool, str]]
) -> Iterator[tuple[bool, str, np.ndarray]]:
  """Adds each text's ids, encoding many texts together."""
  batch, characters = [], 0
  for side in itertools.chain(sides, [None]):
    if side is not None:
      batch.append(side)
      characters += len(side[1])
    if batch and (side is None or characters >= ENCODE_CHARACTERS):
      encoded = made.encode_arrays([text for _, text in batch])
      yield from ((for_training, text, ids) for (for_training, text), ids in zip(batch, encoded))
      batch, characters = [], 0


# Characters to put before a text: one that no vocabulary has a piece of, so that nothing is merged
# with it, and, for a tokenizer that has no bytes to spell it by, others.
ANCHORS = '\U0010fffd', '.', 'a', '0'


def encoded_behind(made: Tokenizer, text: str) -> list[int]:
  """Ids of a text that stands behind another one, without bos and eos: without the space that some
  tokenizers (SentencePiece's dummy prefix) put before every text. Raises as Tokenizer.encode.
  """
  ids = made.encode(in_utf8(text))
  if _spaces(made.decode_bytes(ids)) <= _spaces(text.encode()):
    return ids
  for anchor in ANCHORS:
    before, whole = made.encode(anchor), made.encode(anchor + text)
    # A piece for whatever is unknown would swallow what is unknown of the text.
    if made.decode(before) == anchor and whole[: len(before)] == before:
      return whole[len(before) :]
  return ids


def _spaces(text: bytes) -> int:
  """How many it begins with."""
  return len(text) - len(text.lstrip(b' '))
