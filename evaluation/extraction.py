"""Does a model write what it has read, word for word? The likeliest continuations of prompts beside
the true ones (Carlini et al. 2021, arXiv:2012.07805; 2023, arXiv:2202.07646: "k-extractable").
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from decode.generator import Generator
from evaluation import unpaired
from evaluation.intervals import Estimate, wilson
from evaluation.journal import JournalPart
from evaluation.passages import Passage
from evaluation.writing import continued

EXACT, MATCHED, DISTANCE = 'exact match', 'tokens matched', 'edit distance'


@dataclasses.dataclass(frozen=True)
class Recalled:
  """What a model wrote behind a prompt.

  Attributes:
    ids: of it. matched: how many came before the first difference from the truth.
    exact: whether all are right. distance: edits that make it the truth, by the longer of both.
  """

  ids: tuple[int, ...]
  matched: int
  exact: bool
  distance: float


def recalled(
  model: Generator, passages: Sequence[Passage], kept: JournalPart | None = None
) -> list[Recalled]:
  """The likeliest continuation of each, compared with the true one; kept: as evaluation.writing has
  it.

  Raises FloatingPointError, naming the passage, where the model's scores are not finite.
  """
  new = max(len(passage.behind) for passage in passages)
  written = continued(model, [passage.prompt for passage in passages], new, kept=kept)
  made = []
  for passage, each in zip(passages, written, strict=True):
    if each.broken:
      raise FloatingPointError(
        f"{passage.place}: the model's scores are not finite; the checkpoint is broken: take "
        'another one (--checkpoint)'
      )
    made.append(compared(each.ids, passage.behind))
  return made


def compared(ids: Sequence[int], truth: Sequence[int]) -> Recalled:
  """Ids that were written, as many as the truth has, with these."""
  ids, truth = tuple(ids[: len(truth)]), tuple(truth)
  matched = next((i for i, pair in enumerate(zip(ids, truth)) if pair[0] != pair[1]), len(ids))
  distance = edit_distance(ids, truth) / max(len(ids), len(truth))
  return Recalled(ids, matched, ids == truth, distance)


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
  """The fewest ids to put in, take out or replace to make one of the other (Levenshtein)."""
  a, b = np.asarray(a, np.int64), np.asarray(b, np.int64)
  places = np.arange(len(b) + 1)
  row = places
  for i, each in enumerate(a, 1):
    # From above, and across; what comes from the left adds one a step: a running minimum of what is
    # left when the steps are taken off.
    best = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (b != each))])
    row = np.minimum.accumulate(best - places) + places
  return int(row[-1])


def findings(
  members: Sequence[Recalled], control: Sequence[Recalled], seed: int
) -> dict[str, dict[str, Estimate]]:
  """{what: {'members', 'control', 'difference': an estimate}}."""
  exact = [sum(each.exact for each in side) for side in (members, control)]
  rows = {
    EXACT: {
      'members': wilson(exact[0], len(members)),
      'control': wilson(exact[1], len(control)),
      'difference': unpaired.rate_difference(exact[0], len(members), exact[1], len(control)),
    }
  }
  for name, field in ((MATCHED, 'matched'), (DISTANCE, 'distance')):
    sides = [np.array([getattr(x, field) for x in side], float) for side in (members, control)]
    rows[name] = {
      'members': unpaired.mean(sides[0], seed),
      'control': unpaired.mean(sides[1], seed),
      'difference': unpaired.mean_difference(*sides, seed),
    }
  return rows
