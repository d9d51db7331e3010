"""How do two answers to a prompt become rows in which each is judged by one of its tokens? As those
that are compared token by token (data/preferences.py), but that all of an answer is read, its end
too: there a decoder has seen everything, and an encoder has at the first token.

    row       tokens    p p C C e p p R q D D e q E e
              segments  1 1 1 1 1 2 2 2 3 3 3 3 4 4 4
              weights   0 0 0 0 1 0 0 1 0 0 0 1 0 0 1    (of a decoder)
"""

import dataclasses

import numpy as np

from data.batch import Batch
from data.preferences import ChoiceBatch, ChoiceRows, ChoiceSettings, ChoiceSource
from data.prepared import Prepared


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardedSettings(ChoiceSettings):
  """What is made of prompts with two answers, as ChoiceSettings has it."""

  tunes = 'reward'
  unread = 0
  # Whether an answer is judged by its first token, and not by its last.
  by_first = False

  def facts(self, config):
    return super().facts(config) | {'rewarded': 1}

  def rows_of(self, config, tokenizer):
    del tokenizer
    return RewardedRows(config.sequence_length, self.packing, self.unread, self.by_first)


@dataclasses.dataclass(frozen=True)
class RewardedRows(ChoiceRows):
  """As ChoiceRows, of whole answers. by_first: of which token the weight is 1, else of the last."""

  by_first: bool = False

  def source(self, *parts):
    return RewardedSource(*parts, by_first=self.by_first)


@dataclasses.dataclass(frozen=True)
class RewardedSource(ChoiceSource):
  """As ChoiceSource, of whole answers, each with a weight of 1 at one token."""

  by_first: bool = False

  def fill(self, index: int, batch: ChoiceBatch, into: int) -> None:
    shard, pieces = self.pieces(index)
    at = segment = 0
    for begin, middle, end, document in pieces:
      for first, last in ((begin, middle), (middle, end)):
        n, segment = last - first, segment + 1
        here = slice(at, at + n)
        batch.tokens[into, here] = shard.tokens[first:last]
        batch.targets[into, at : at + n - 1] = shard.tokens[first + 1 : last]  # to be shown
        batch.positions[into, here] = np.arange(n, dtype=np.int32)
        batch.segments[into, here] = segment
        batch.weights[into, at if self.by_first else at + n - 1] = 1
        batch.margins[into, here] = shard.notes[document, 1]
        at += n


def held_out(prepared: Prepared, length: int) -> list[tuple[list[int], list[int]]]:
  """The ids of chosen and rejected of every pair that is held out, in order; length: of rows."""
  pairs = []
  for index in range(len(prepared.validation)):
    row: Batch = ChoiceBatch.empty(1, length)
    prepared.validation.fill(index, row, 0)
    tokens, segments = row.tokens[0], row.segments[0]
    answers = [tokens[segments == i].tolist() for i in range(1, segments.max() + 1)]
    pairs += zip(answers[::2], answers[1::2], strict=True)
  return pairs
