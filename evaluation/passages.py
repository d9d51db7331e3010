"""Which pieces of text is a model asked to go on with? Passages of documents, each a prompt and what
truly follows it, drawn by a seed from a stream of any length.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Passage:
  """A piece of a document.

  Attributes:
    place: where it is from.
    prompt: ids, with what begins a text. behind: those that truly follow.
    learned: the first of all ids that training asks for; the one that begins a text is not.
  """

  place: str
  prompt: tuple[int, ...]
  behind: tuple[int, ...]
  learned: int = 1

  @property
  def ids(self) -> list[int]:
    return [*self.prompt, *self.behind]

  @property
  def digest(self) -> str:
    """Of all that is asked, and what would be right."""
    content = json.dumps([self.prompt, self.behind]).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class Cut:
  """How documents become passages.

  Attributes:
    prompt: tokens of a prompt, without what begins a text. new: tokens behind it.
    limit: passages that are drawn, at most. seed: which.

  Raises ValueError for sizes below 1.
  """

  prompt: int = 50
  new: int = 50
  limit: int = 200
  seed: int = 0

  def __post_init__(self):
    for name in ('prompt', 'new', 'limit'):
      if getattr(self, name) < 1:
        raise ValueError(f'--{name}={getattr(self, name)} must be at least 1')

  def check_context(self, context: int, limit: str) -> None:
    """Raises ValueError where a model cannot read a passage."""
    if self.prompt + self.new + 1 > context:
      raise ValueError(
        f'--prompt={self.prompt} and --new={self.new} tokens, and one that begins a text, pass '
        f'{limit}; make them smaller'
      )

  def passage(self, place: str, ids: Sequence[int], bos: int) -> Passage | None:
    """The beginning of a document, with bos or from its middle; None where it is too short."""
    at = self.prompt + int(ids[0] == bos)
    if len(ids) < at + self.new:
      return None
    return Passage(place, tuple(map(int, ids[:at])), tuple(map(int, ids[at : at + self.new])))


class Passages(list[Passage]):
  """Those that were drawn. of: what from, in words. short: documents that were too short."""

  def __init__(self, passages: Iterable[Passage], of: str, short: int):
    super().__init__(passages)
    self.of, self.short = of, short

  @property
  def digest(self) -> str:
    """Of the set, in its order."""
    content = ' '.join(passage.digest for passage in self)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

  def checked(self, cut: Cut) -> 'Passages':
    """Itself. Raises ValueError where there is none."""
    if not self:
      raise ValueError(
        f'{self.of}: none of {self.short} documents has {cut.prompt + cut.new} tokens, '
        f'--prompt={cut.prompt} and --new={cut.new}; make these smaller, or give longer documents'
      )
    return self


def drawn(texts: Iterable[str], of: str, tokenizer: Tokenizer, cut: Cut) -> Passages:
  """Of documents that are streamed, one passage each, every one of them with the same chance
  (Vitter's algorithm R): memory holds those that are drawn.
  """
  draw = np.random.Generator(np.random.Philox(cut.seed))
  kept: list[Passage] = []
  long = short = 0
  for number, ids in enumerate(_encoded(texts, tokenizer), 1):
    passage = cut.passage(f'{of}, document {number}', ids, tokenizer.bos)
    if passage is None:
      short += 1
      continue
    long += 1
    if len(kept) < cut.limit:
      kept.append(passage)
    elif (at := int(draw.integers(0, long))) < cut.limit:
      kept[at] = passage
  return Passages(kept, of, short).checked(cut)


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
  for text in texts:
    yield [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
