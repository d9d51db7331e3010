"""What did a model lose that it could do before? Two evaluations of the same frozen questions,
before and after, question by question.

Retention is what is left of a score, s1 / s0, and s0 / s1 where lower is better; corrected for
chance c, (s1 - c) / (s0 - c), of which there is none where s0 is at chance.

n questions, in the same order on both sides · S statistics of a question (evaluation/measures.py)
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from evaluation import paired
from evaluation.intervals import Estimate, mean_of
from evaluation.measures import Measure

LINE = 0.8  # of what could be done before: below it, a model is said to have forgotten
KEPT, UNSURE, LOST = 'kept', 'not shown above 80%', 'WARNING: below 80%'
AT_CHANCE = 'at chance before'
NO_NUMBER = 'no number on a side'
NEITHER = 'neither way is better'


@dataclasses.dataclass(frozen=True)
class Change:
  """Of one task and metric, from before to after.

  Attributes:
    task: with its number of examples. metric: its name. chance: the score of who knows nothing.
    before, after: the scores. difference: after less before; NaN where one of them is no finite
      number: these are not compared.
    retention, corrected: see above; None where there is none.
    p: that a difference as large is luck: McNemar's of rates, else of a permutation test; None
      where nothing is compared.
    left_out: questions that have no score on a side.
    directed: whether one direction is the better one (Task.directed); else nothing is retained.
  """

  task: str
  metric: str
  lower_is_better: bool
  chance: float
  before: float
  after: float
  difference: Estimate
  retention: Estimate | None
  corrected: Estimate | None
  p: float | None
  left_out: int
  directed: bool = True

  @property
  def verdict(self) -> str:
    """By the worse of the two retentions that there are; who was at chance had nothing to lose."""
    if not self.is_compared:
      return NO_NUMBER
    if not self.directed:
      return NEITHER
    if self.at_chance:
      return AT_CHANCE
    there = [each for each in (self.retention, self.corrected) if each is not None]
    if any(each.value < LINE for each in there):
      return LOST
    if any(each.low < LINE for each in there):
      return UNSURE
    return KEPT if there else ''

  @property
  def at_chance(self) -> bool:
    """Whether it was at chance before: what is left of that says nothing."""
    told = self.is_compared and self.directed and self.chance and not self.lower_is_better
    return bool(told) and self.corrected is None

  @property
  def is_compared(self) -> bool:
    """Whether both scores are finite: a perplexity can be beyond all numbers."""
    return math.isfinite(self.before) and math.isfinite(self.after)

  @property
  def kept(self) -> Estimate | None:
    """The retention, above chance where there is one; None where nothing is told of it."""
    return None if self.at_chance else self.corrected or self.retention

  @property
  def better(self) -> bool:
    """Whether it is the better afterwards."""
    return self.after < self.before if self.lower_is_better else self.after > self.before

  def values(self) -> dict:
    """JSON-able."""
    return dataclasses.asdict(self) | {'verdict': self.verdict}


def change(
  task: str,
  measure: Measure,
  before: Sequence[Sequence[float] | None],
  after: Sequence[Sequence[float] | None],
  chance: float = 0.0,
  seed: int = 0,
  directed: bool = True,
) -> Change:
  """Of the statistics of the same questions before and after; None where a side has no score.

  Raises ValueError where no question has one on both sides.
  """
  pairs = [pair for pair in zip(before, after, strict=True) if None not in pair]
  if not pairs:
    raise ValueError(f'{task}: no question has a score on both sides')
  first, second = (np.array(side, np.float64) for side in zip(*pairs))
  value, lower = measure.value, measure.lower_is_better
  made = Change(
    task=task,
    metric=measure.name,
    lower_is_better=lower,
    chance=chance,
    before=value(first.sum(0)),
    after=value(second.sum(0)),
    difference=Estimate(math.nan, math.nan, math.nan, len(pairs), 'bootstrap'),
    retention=None,
    corrected=None,
    p=None,
    left_out=len(before) - len(pairs),
    directed=directed,
  )
  if not made.is_compared:
    return made
  made = dataclasses.replace(
    made,
    difference=paired.difference(first, second, value, seed),
    p=_luck(first, second, measure, seed),
  )
  if not directed:
    return made
  return dataclasses.replace(
    made,
    retention=_left(first, second, measure, 0.0, seed),
    corrected=_left(first, second, measure, chance, seed) if chance and not lower else None,
  )


def _left(first, second, measure: Measure, chance: float, seed: int) -> Estimate | None:
  """Retention. Of an unchanged model it is 1, whatever is drawn."""
  if measure.lower_is_better:
    first, second = second, first
  # At chance is who is so by the interval that reports show. That of a share, Wilson's, never
  # reaches 0 where some are right, and resamples do, in which there is nothing to divide by.
  before = measure.estimate(first, seed) if chance else None
  left = paired.ratio(first, second, measure.value, chance, seed, before=before)
  if left is not None and np.array_equal(first, second):
    return dataclasses.replace(left, value=1.0, low=1.0, high=1.0)
  return left


def _luck(first, second, measure: Measure, seed: int) -> float:
  if measure.rate:
    right = first[:, 0] > 0, second[:, 0] > 0
    return paired.mcnemar(int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum()))
  return paired.permutation_test(first, second, measure.value, seed)


def mean_retention(changes: Sequence[Change]) -> Estimate | None:
  """Of the retentions that there are, those that are corrected where they can be."""
  kept = [each.kept for each in changes if each.kept is not None]
  return mean_of(kept) if kept else None


def advice(changes: Sequence[Change]) -> list[str]:
  """A line for each that is not shown to be kept, and one of all."""
  lines = []
  for each in changes:
    if each.at_chance:
      lines.append(
        f'{each.task}: {AT_CHANCE}: the interval of {each.metric} {each.before:.3f} reaches '
        f'{each.chance:.3f}; what is left of it says nothing'
      )
      continue
    left = [(name, of) for name, of in _named(each).items() if of is not None and of.low < LINE]
    for name, of in left:
      said = LOST if of.value < LINE else UNSURE
      lines.append(f'{each.task}: {said}: {name} {percent(of)}')
  return lines


def _named(change: Change) -> Mapping[str, Estimate | None]:
  return {'retention': change.retention, 'retention above chance': change.corrected}


def percent(estimate: Estimate | None) -> str:
  """A retention for people."""
  if estimate is None:
    return 'undefined'
  low, high = (f'{x:.0%}' if np.isfinite(x) else 'any' for x in (estimate.low, estimate.high))
  return f'{estimate.value:.1%} [{low}, {high}]{" (few)" if estimate.small else ""}'
