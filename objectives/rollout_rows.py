"""How do a prompt and an answer to it lie in a row, and what is known of each token there?

    a decoder             tokens   p p p p A A A 0     the prompt, and the answer behind it
                          targets  p p p A A A A 0     of which the answer's are learned
    an encoder-decoder    source   p p p p 0 0         what the encoder reads
                          tokens   > A A A 0           what the decoder writes, behind its start
                          targets  A A A A 0

B rows of a batch · T length · S length of a source
"""

import base64
import dataclasses
import io
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from data.batch import Batch, SourceBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutBatch(Batch):
  """A batch of answers, each in a row of its own; `weights` is 1 where a target is one of the
  answer's tokens and counts. More of each target, all f32 [B, T]:

  Attributes:
    behaviour: its log-probability by the law that it was drawn from. reference: by the reference, 0
      without one.
    advantages: what it is credited with.
    values, returns: what the critic expected there, and what it is to expect; 0 without one.
    last: 1 at the last token of every answer. And there: lengths, its tokens; scores, its reward, 0
      if it has none; failed: 1 if it has none; ended: 1 if it ended by itself; equal: 1 if no
      answer to its prompt is better than another.
  """

  behaviour: Any
  reference: Any
  advantages: Any
  values: Any
  returns: Any
  last: Any
  lengths: Any
  scores: Any
  failed: Any
  ended: Any
  equal: Any

  @classmethod
  def empty(cls, rows: int, length: int) -> 'RolloutBatch':
    return cls(**_with_rollouts(Batch.empty(rows, length), np.zeros_like))

  @classmethod
  def abstract(cls, rows: int, length: int, sharding=None) -> 'RolloutBatch':
    return cls(**_with_rollouts(Batch.abstract(rows, length, sharding)))

  def cut(self, rows: Sequence[int]) -> 'RolloutBatch':
    """These rows of it."""
    return jax.tree.map(lambda x: x[np.asarray(rows)], self)


OF_ROLLOUTS = [
  field.name
  for field in dataclasses.fields(RolloutBatch)
  if field.name not in {of.name for of in dataclasses.fields(Batch)}
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceRolloutBatch(RolloutBatch, SourceBatch):
  """A batch of targets that an encoder-decoder wrote, whose prompts are the sources."""

  @classmethod
  def empty(cls, rows: int, length: int, source_length: int) -> 'SourceRolloutBatch':
    return cls(**_with_rollouts(SourceBatch.empty(rows, length, source_length), np.zeros_like))

  @classmethod
  def abstract(
    cls, rows: int, length: int, source_length: int, sharding=None
  ) -> 'SourceRolloutBatch':
    return cls(**_with_rollouts(SourceBatch.abstract(rows, length, source_length, sharding)))


def _with_rollouts(batch: Batch, make=lambda like: like) -> dict[str, Any]:
  """The arrays of a batch by name, with what rollouts have more, each made like the weights."""
  return vars(batch) | {name: make(batch.weights) for name in OF_ROLLOUTS}


@dataclasses.dataclass(frozen=True)
class AnswerRows:
  """Of a decoder, which goes on from a prompt.

  Attributes:
    length: T, of a prompt with its answer.
  """

  length: int

  @property
  def sizes(self) -> dict[str, int]:
    """What these rows depend on, by the names of settings."""
    return {'data.sequence_length': self.length}

  def empty(self, rows: int) -> RolloutBatch:
    """A batch of padding, numpy arrays to be filled in."""
    return RolloutBatch.empty(rows, self.length)

  def abstract(self, rows: int) -> RolloutBatch:
    """What a batch looks like, jax.ShapeDtypeStructs."""
    return RolloutBatch.abstract(rows, self.length)

  def fill(
    self, batch: RolloutBatch, row: int, prompt: Sequence[int], answer: Sequence[int]
  ) -> slice:
    """Puts ids into a row of padding; the places whose targets are the answer's."""
    ids = np.array([*prompt, *answer], np.int32)
    n = len(ids) - 1
    batch.tokens[row, :n], batch.targets[row, :n] = ids[:-1], ids[1:]
    batch.positions[row, :n] = np.arange(n)
    batch.segments[row, :n] = 1
    return slice(len(prompt) - 1, n)


@dataclasses.dataclass(frozen=True)
class SourceAnswerRows(AnswerRows):
  """Of an encoder-decoder, whose encoder reads the prompt.

  Attributes:
    length: T, of an answer. source_length: S, of a prompt. start: what the decoder begins with.
  """

  source_length: int
  start: int

  @property
  def sizes(self):
    return {'data.sequence_length': self.source_length}

  def empty(self, rows):
    return SourceRolloutBatch.empty(rows, self.length, self.source_length)

  def abstract(self, rows):
    return SourceRolloutBatch.abstract(rows, self.length, self.source_length)

  def fill(self, batch, row, prompt, answer):
    S, n = len(prompt), len(answer)
    batch.source[row, :S] = prompt
    batch.source_positions[row, :S] = np.arange(S)
    batch.source_segments[row, :S] = 1
    batch.tokens[row, 0], batch.tokens[row, 1:n] = self.start, answer[:-1]
    batch.targets[row, :n] = answer
    batch.positions[row, :n] = np.arange(n)
    batch.segments[row, :n] = 1
    return slice(0, n)


def packed(batch: RolloutBatch) -> str:
  """A batch of numpy arrays as text, for a checkpoint's record."""
  file = io.BytesIO()
  np.savez(file, **vars(batch))
  return base64.b64encode(zlib.compress(file.getvalue(), 1)).decode()


def unpacked(text: str) -> RolloutBatch:
  """What `packed` was given."""
  with np.load(io.BytesIO(zlib.decompress(base64.b64decode(text)))) as arrays:
    kind = SourceRolloutBatch if 'source' in arrays.files else RolloutBatch
    return kind(**{name: arrays[name] for name in arrays.files})
