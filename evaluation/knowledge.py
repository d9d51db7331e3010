"""Up to when does a model know what happened? Scores of texts or questions by their dates, and from
when on they are worse.

    python evaluate.py --workdir=RUN --tasks=dated --data=DIRECTORY
    python evaluate.py --workdir=RUN --tasks=dated_questions --shots=3 --data=DIRECTORY
    python evaluate.py knowledge RUN/evaluation --data=DIRECTORY --by=month

A rise is looked for at every date, and told where it is larger than chance would make the largest
one, were the dates dealt out anew. What is written changes with time for other reasons, too: texts
of one kind and one source tell most.
"""

import argparse
import dataclasses
import datetime
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

import commands
import files
from evaluation import page, placed
from evaluation.intervals import Estimate
from evaluation.measures import Measure, known
from evaluation.paired import SWAPS
from evaluation.running import Summary, alone_in, finite, shown
from evaluation.task import Row, field_of

FILE, PAGE = 'knowledge.json', 'knowledge.md'
PERIODS = {'year': '%Y', 'month': '%Y-%m'}
SIDE = 5  # documents that a side of a cut has, at least


def dated(row: Row) -> Iterator[Row]:
  """A row with a date, YYYY-MM-DD, YYYY-MM or YYYY, as tasks take it, with its periods."""
  text = str(field_of('date', 'a dated row', row))
  yield {**row, 'date': text, 'year': str(day_of(text).year)}


def day_of(text: str) -> datetime.date:
  """The first day that a date means. Raises ValueError for what is none."""
  for form in ('%Y-%m-%d', '%Y-%m', '%Y'):
    try:
      return datetime.datetime.strptime(text[:10], form).date()
    except ValueError:
      continue
  raise ValueError(f'date={text!r} is no date, as 2024-03-31, 2024-03 or 2024')


@dataclasses.dataclass(frozen=True)
class Rise:
  """From when on documents are worse.

  Attributes:
    period: the first of them. before, after: the value of all documents on either side.
    p: of a difference as large by chance. shown: whether it is below 0.05.
  """

  period: str
  before: Estimate
  after: Estimate
  p: float

  @property
  def shown(self) -> bool:
    return self.p < 0.05

  def values(self) -> dict:
    """JSON-able."""
    sides = {'before': self.before.values(), 'after': self.after.values()}
    return {'period': self.period, **sides, 'p': self.p, 'shown': self.shown}


def by_period(
  periods: Sequence[str], statistics: np.ndarray, measure: Measure, seed: int
) -> dict[str, Estimate]:
  """Of documents [n, S], the value of each period, in their order."""
  of = np.array(periods)
  return {str(period): measure.estimate(statistics[of == period], seed) for period in np.unique(of)}


def rise(
  periods: Sequence[str],
  statistics: np.ndarray,
  measure: Measure,
  seed: int = 0,
  deals: int = SWAPS // 10,
) -> Rise | None:
  """The cut between periods, with the largest step to the worse for how many documents each side
  has; None where no cut leaves SIDE of them on either. Raises ValueError for a document whose value
  is not finite.

  Steps are of means over documents, each by its own value; `before` and `after` are of their sums.
  p: how often dates that are dealt out anew have as large a step anywhere (a permutation test of
  the largest, so that looking everywhere is accounted for).
  """
  order = np.argsort(np.array(periods), kind='stable')
  of = np.array(periods)[order]
  cuts = [i for i in range(SIDE, len(of) - SIDE + 1) if of[i - 1] != of[i]]
  if not cuts:
    return None
  sums = statistics[order]
  sign = 1.0 if measure.lower_is_better else -1.0
  values = sign * np.array([measure.value(row) for row in sums])
  if not np.isfinite(values).all():
    raise ValueError(
      f'{int((~np.isfinite(values)).sum())} documents have no finite {measure.name}; leave them out'
    )
  cut, seen = _largest(values, cuts)
  draw = np.random.Generator(np.random.Philox(seed))
  larger = sum(_largest(draw.permutation(values), cuts)[1] >= seen for _ in range(deals))
  return Rise(
    str(of[cut]),
    measure.estimate(sums[:cut], seed),
    measure.estimate(sums[cut:], seed),
    (larger + 1) / (deals + 1),
  )


def _largest(values: np.ndarray, cuts: Sequence[int]) -> tuple[int, float]:
  """(cut, step of the means there in units of what chance makes of it)."""
  n, at = len(values), np.array(cuts)
  before = np.cumsum(values)[at - 1]
  steps = (values.sum() - before) / (n - at) - before / at
  steps = steps * np.sqrt(at * (n - at) / n)
  best = int(steps.argmax())
  return cuts[best], float(steps[best])


def parser() -> argparse.ArgumentParser:
  """What the command takes."""
  made = placed.parser('knowledge', __doc__)
  made.add_argument('--by', default='year', choices=[*PERIODS], help='what scores are told by')
  made.add_argument('--seed', type=int, default=0, help='of the bootstrap, and of the test')
  return made


def main(arguments: Sequence[str]) -> None:
  """The command."""
  options = parser().parse_args(arguments)
  place = pathlib.Path(options.results)
  with commands.mendable(ImportError), alone_in(place):
    own = [*filter(None, options.tasks.split(','))]
    said = {}
    for summary, told in placed.results(place, options.data, own, 'date'):
      measure = known(next(iter(summary.metrics)), summary.settings['task'], summary.name)
      if measure is not None:
        said[summary.name] = report(summary, measure, told, options.by, options.seed)
    if not said:
      raise ValueError(f'{place} has no results of tasks of dates; evaluate --tasks=dated')
    files.replace(place / FILE, json.dumps(finite(said), indent=1) + '\n')
    text = [paragraph for name, of in said.items() for paragraph in text_of(name, of)]
    title = f'# What {place} knows by date'
    files.replace(place / PAGE, '\n\n'.join([title, *text]) + '\n')
    print('\n'.join(['', *text]))
    print(f'\nwrote {place}/{PAGE} and {FILE}')


def report(
  summary: Summary,
  measure: Measure,
  told: Sequence[tuple[Mapping, Mapping]],
  by: str,
  seed: int,
) -> dict:
  """What is said of one task's lines with their rows, JSON-able."""
  metric = measure.name
  scored = [(line['stats'][metric], row) for line, row in told if line['stats'] is not None]
  # A text without a byte has no bits per byte, and is neither better nor worse than others.
  kept = [(of, row) for of, row in scored if math.isfinite(measure.value(np.array(of, np.float64)))]
  if not kept:
    raise ValueError(f'{summary.name}: no text has a finite score; the model is broken')
  for _, row in kept:
    if by == 'month' and len(str(row['date'])) < 7:
      raise ValueError(f'{summary.name}: date={row["date"]!r} has no month; give --by=year')
  periods = [day_of(row['date']).strftime(PERIODS[by]) for _, row in kept]
  statistics = np.array([of for of, _ in kept], np.float64)
  found = rise(periods, statistics, measure, seed)
  return {
    'prompts': summary.prompts,
    'run': summary.settings['run'],
    'metric': metric,
    'lower_is_better': measure.lower_is_better,
    'by': by,
    'seed': seed,
    'left out': len(told) - len(kept),
    'periods': {
      period: each.values()
      for period, each in by_period(periods, statistics, measure, seed).items()
    },
    'rise': None if found is None else found.values(),
  }


def text_of(name: str, of: Mapping) -> list[str]:
  """Paragraphs of Markdown."""
  rows = [[period, each['n'], shown(each)] for period, each in of['periods'].items()]
  metric = of['metric'] + (' ↓' if of['lower_is_better'] else '')
  left_out = f' {of["left out"]} without a finite score are left out.' if of['left out'] else ''
  return [
    f'## {name}',
    f'Of prompts `{of["prompts"]}`, seed {of["seed"]}. 95% intervals.{left_out}',
    page.table([of['by'], 'n', metric], rows),
    said_of(of['rise']),
  ]


def said_of(found: Mapping | None) -> str:
  """A rise in a sentence."""
  if found is None:
    return f'No date has {SIDE} documents before and behind it: nothing is said of a rise.'
  if not found['shown']:
    return (
      f'**No rise is shown**: the largest step, at {found["period"]}, has p = {found["p"]:.2g}.'
    )
  return (
    f'**Worse from {found["period"]} on**: {shown(found["before"])} before, '
    f'{shown(found["after"])} since then (p = {found["p"]:.2g}).'
  )
