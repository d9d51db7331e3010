"""How do documents become tokens, many at a time, each side of a split on its own?"""

import itertools
from collections.abc import Iterator

import numpy as np

from data.tokenizer import Tokenizer

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
