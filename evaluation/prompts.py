"""Which examples are shown before a question? As many of each label, by a seed, and never the one
that is asked.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence

from data.records import LabelRecord


def ranked(records: Sequence[LabelRecord], seed: int) -> list[LabelRecord]:
  """In an order that depends on the seed and on each record alone, whatever the others are and
  whatever machine draws.
  """

  def rank(record):
    content = json.dumps([seed, record.text, record.label]).encode()
    return hashlib.blake2b(content, digest_size=16).digest()

  return sorted(dict.fromkeys(records), key=rank)


class Shots:
  """k examples for every question.

  Args:
    records: to draw from.
    labels: the order in which labels take turns, where k is no multiple of how many they are.

  Raises ValueError where a label has fewer records than are to be shown of it.
  """

  def __init__(self, records: Sequence[LabelRecord], labels: Sequence[str], k: int, seed: int = 0):
    self.k, self._seed = k, seed
    self._by_label = {}
    if k < 0:
      raise ValueError(f'shots={k} must be at least 0')
    order = ranked(records, seed) if k else []
    # With fewer shots than labels, which labels are shown is the seed's choice, too.
    turns = [record.label for record in ranked([LabelRecord('', x) for x in labels], seed)]
    for i, label in enumerate(turns):
      of = [record for record in order if record.label == label]
      count = k // len(labels) + (i < k % len(labels))
      self._by_label[label] = (of, count)
    self.before()

  def before(self, text: str | None = None) -> list[LabelRecord]:
    """The examples that are shown before this text, which is none of them; None: before any other
    text.
    """
    shown = []
    for label, (of, count) in self._by_label.items():
      others = [*itertools.islice((record for record in of if record.text != text), count)]
      if len(others) < count:
        named = f' of label {label!r}' if label else ''
        raise ValueError(
          f'shots={self.k} shows {count} examples{named}, and there are {len(others)} besides the '
          'record that is asked; ask for fewer shots, or give more training records'
        )
      shown += others
    return ranked(shown, self._seed)
