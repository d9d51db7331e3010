"""Which pieces of text is a model asked to go on with? Passages of documents, each a prompt and
what truly follows it, drawn by a seed from a stream of any length.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np

from data.tokenizer import Tokenizer

FEW = 10  # documents, of which one passage each would tell next to nothing


@dataclasses.dataclass(frozen=True)
class Passage:
  """A piece of a document.

  Attributes:
    place, document: where it is from.
    prompt: ids, with what begins a text. behind: those that truly follow.
    learned: the first of all ids that training asks for; the one that begins a text is not.
  """

  place: str
  prompt: tuple[int, ...]
  behind: tuple[int, ...]
  learned: int = 1
  document: str = ''

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

  def passage(self, place: str, ids: Sequence[int], bos: int, document: str = '') -> Passage | None:
    """The beginning of a document, with bos or from its middle; None where it is too short."""
    at = self.prompt + int(ids[0] == bos)
    if len(ids) < at + self.new:
      return None
    prompt, behind = (tuple(map(int, part)) for part in (ids[:at], ids[at : at + self.new]))
    return Passage(place, prompt, behind, document=document or place)


class Passages(list[Passage]):
  """Those that were drawn. of: what from, in words. documents: how many these were, fewer than
  passages where several are of one. short: pieces that were too short.
  """

  def __init__(self, passages: Iterable[Passage], of: str, documents: int, short: int):
    super().__init__(passages)
    self.of, self.documents, self.short = of, documents, short

  @property
  def digest(self) -> str:
    """Of the set, in its order."""
    content = ' '.join(passage.digest for passage in self)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


class PassageDraw:
  """Draws passages from a stream, the beginning of each document with the same chance (Vitter's
  algorithm R): memory holds those that are drawn. Intervals take passages for independent, which
  those of one document are not: only where fewer than FEW begin, other parts are taken, too. (And
  what is drawn by pieces is of long documents, beside a control that has few.)
  """

  def __init__(self, cut: Cut):
    self._cut = cut
    self._draw = np.random.Generator(np.random.Philox(cut.seed))
    self._kept: tuple[list[Passage], list[Passage]] = ([], [])
    self._met, self._short = [0, 0], 0

  @property
  def full(self) -> bool:
    """Whether there are as many documents as passages are wanted."""
    return len(self._kept[0]) == self._cut.limit

  def add(self, passage: Passage | None, inside: bool) -> None:
    """One more, or None of a piece that is too short; inside: of a document, not its beginning."""
    if passage is None:
      self._short += 1
      return
    kept = self._kept[inside]
    self._met[inside] += 1
    if len(kept) < self._cut.limit:
      kept.append(passage)
    elif (at := int(self._draw.integers(0, self._met[inside]))) < len(kept):
      kept[at] = passage

  def passages(self, of: str) -> Passages:
    """What was drawn. Raises ValueError where all was too short."""
    firsts, more = self._kept
    if not firsts and not more:
      raise ValueError(
        f'{of}: none of {self._short} pieces has {self._cut.prompt + self._cut.new} tokens, '
        f'--prompt={self._cut.prompt} and --new={self._cut.new}; make these smaller, or give '
        'longer documents'
      )
    kept = firsts if len(firsts) >= FEW else [*firsts, *more][: self._cut.limit]
    return Passages(kept, of, len({passage.document for passage in kept}), self._short)


def drawn(texts: Iterable[str], of: str, tokenizer: Tokenizer, cut: Cut) -> Passages:
  """Of documents that are streamed: the beginning of each, or, of few, their other parts, too.

  Raises ValueError where all are too short.
  """
  drawing, size = PassageDraw(cut), cut.prompt + cut.new
  for number, text in enumerate(texts, 1):
    ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
    place = f'{of}, document {number}'
    drawing.add(cut.passage(place, ids, tokenizer.bos), False)
    for at in range(size + 1, len(ids) - size + 1, size) if number < FEW else ():
      drawing.add(cut.passage(f'{place}, token {at}', ids[at:], tokenizer.bos, place), True)
  return drawing.passages(of)
