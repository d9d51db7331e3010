"""What came of a model that was tuned in several ways? What it could do before, what each way has
gained on the target and kept of the rest, and which way is to be taken, by a rule and not by taste.
"""

import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import commands
import files
from evaluation import compare, page
from evaluation.forgetting import LINE, LOST, NO_NUMBER, Change, advice, mean_retention, percent
from evaluation.intervals import Estimate
from evaluation.running import Summary, duration, finite, shown

BASE, RESULTS = 'base', 'evaluation'  # directories: the model before, and results below a run's
PAGE, PICTURE, VALUES = 'report.md', 'report.png', 'report.json'
ALIKE = 0.95  # of the best gain on the target: as good

RULE = f"""Of the ways that have lost no task (no `WARNING`: retention and retention above chance of
{LINE:.0%} and more), those with {ALIKE:.0%} of the best gain among them are alike, and the one that
has kept most is taken; where none of them gains, the one that loses least on the target is. Where
every way has lost a task, or has no number on the target, who kept most is the least bad."""


@dataclasses.dataclass(frozen=True)
class Attempt:
  """A way to tune a model.

  Attributes:
    name: of its directory. about: in a line. rate: the learning rate. flags: of train.py, besides.
    replayed: whether half of what it learns is of the tasks that it is to keep.
  """

  name: str
  about: str
  rate: float
  flags: tuple[str, ...] = ()
  replayed: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Of a way: how the target and the other tasks changed, each by its first metric."""

  way: Attempt
  target: Change
  others: tuple[Change, ...]

  @property
  def gained(self) -> Estimate:
    """On the target; above 0 is better."""
    return compare.gained(self.target)

  @property
  def gain(self) -> float:
    return self.gained.value

  @property
  def mean_kept(self) -> Estimate | None:
    """Of the others; None where there was nothing that could be lost."""
    return mean_retention(self.others)

  @property
  def kept(self) -> float:
    """The mean of what was kept; of nothing that could be lost, all."""
    mean = self.mean_kept
    return 1.0 if mean is None else mean.value

  @property
  def lost(self) -> list[str]:
    """Tasks that fell below the line."""
    return [each.task for each in self.others if each.verdict == LOST]


def recommended(outcomes: Sequence[Outcome]) -> Outcome:
  """Which of several is to be taken, by RULE."""
  whole = _whole(outcomes)
  alike = [each for each in whole if each.gain >= _as_good(whole)] or outcomes
  return max(alike, key=lambda each: each.kept)


def _whole(outcomes: Sequence[Outcome]) -> list[Outcome]:
  """Those that have lost no task, and have a number on the target."""
  return [each for each in outcomes if not each.lost and math.isfinite(each.gain)]


def _as_good(whole: Sequence[Outcome]) -> float:
  """The least gain that is as good as the best of these."""
  best = max(each.gain for each in whole)
  return min(ALIKE * best, best)  # of a loss, 95% are less of a loss


def advised(outcome: Outcome, outcomes: Sequence[Outcome]) -> str:
  """What the table says of a way."""
  chosen = outcome is recommended(outcomes)
  if outcome.lost:
    said = f'forgets {len(outcome.lost)} of {len(outcome.others)} tasks'
    return f'{said}; the least bad' if chosen else said
  if not math.isfinite(outcome.gain):
    return f'keeps all, and has {NO_NUMBER} of the target' + ('; the least bad' if chosen else '')
  whole = _whole(outcomes)
  best = max(each.gain for each in whole)
  if best <= 0:
    return 'keeps all, and learns nothing' + ('; the best of these' if chosen else '')
  if chosen:
    return 'take this'
  if outcome.gain < _as_good(whole):
    return f'keeps all, and learns {max(outcome.gain, 0) / best:.0%} as much'
  return 'keeps all, and less of it'


def read(
  workdir: pathlib.Path, ways: Sequence[Attempt], target: str, seed: int = 0
) -> list[Outcome]:
  """Of the results of a model before and after each way.

  Raises ValueError where some are missing, or of other questions.
  """
  before = {each.name: each for each in page.read(workdir / BASE / RESULTS)}
  outcomes = []
  for way in ways:
    places = str(workdir / BASE / RESULTS), str(workdir / way.name / RESULTS)
    changes = compare.firsts(compare.compared(before, *places, seed))
    of_target = [each for each in changes if each.task.rpartition('-')[0] == target]
    others = tuple(each for each in changes if each not in of_target)
    outcomes.append(Outcome(way, of_target[0], others))
  return outcomes


def write(
  workdir: pathlib.Path, ways: Sequence[Attempt], target: str, stages: Mapping[str, Mapping]
) -> list[Outcome]:
  """Page, picture and values of all that was done; prints what matters.

  stages: {name: {'command', 'seconds'}} of what was run.
  """
  before = page.read(workdir / BASE / RESULTS)
  outcomes = read(workdir, ways, target)
  tables = {
    'What the model could do before': (BEFORE, before_rows(before)),
    'What it has learned': (LEARNED, learned_rows(outcomes)),
    'What it has kept, of its scores above chance': (
      ['task', *(way.name for way in ways)],
      kept_rows(outcomes),
    ),
    'Which way to take': (ADVICE, advice_rows(outcomes, stages)),
  }
  for title, (headers, rows) in tables.items():
    commands.table(title, headers, rows)
  parts = ['# What was gained by tuning, and what was forgotten', 'Intervals are of 95%.']
  for title, (headers, rows) in tables.items():
    parts += [f'## {title}', page.table(headers, rows)]
    if headers[1:2] == [ways[0].name]:
      parts.append('\n'.join(f'- {line}' for line in warnings(outcomes)) or LEGEND_KEPT)
      parts += [f'![what was kept, and what was gained]({PICTURE})']
  parts += [RULE, '## How it was done', '```sh\n' + '\n'.join(typed(stages)) + '\n```']
  values = {
    'target': target,
    'before': [vars(each) for each in before],
    'ways': [
      dataclasses.asdict(each.way)
      | {'target': each.target.values(), 'others': [other.values() for other in each.others]}
      | {'kept': each.mean_kept and each.mean_kept.values(), 'lost': each.lost}
      | {'advice': advised(each, outcomes)}
      for each in outcomes
    ],
    'recommended': recommended(outcomes).way.name,
    'stages': {name: dict(stage) for name, stage in stages.items()},
  }
  files.replace(workdir / VALUES, json.dumps(finite(values), indent=1) + '\n')
  files.replace(workdir / PICTURE, picture(outcomes, target))
  files.replace(workdir / PAGE, '\n\n'.join(parts) + '\n')
  return outcomes


def picture(outcomes: Sequence[Outcome], target: str) -> bytes:
  """A PNG: what each way has kept of each task, and the score on the target against the mean of
  that; before tuning all was kept.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 4), layout='constrained')
  left, right = figure.subplots(1, 2)
  of_way = {each.way.name: [each.target, *each.others] for each in outcomes}
  compare.what_was_kept(left, of_way, [target])
  first = outcomes[0].target
  right.plot([100], [first.before], 's', color='0.4', label='before')
  for each in outcomes:
    x, xerr = 100 * each.kept, each.mean_kept and compare.span(each.mean_kept, 100.0)
    d = compare.span(each.target.difference)
    right.errorbar([x], [each.target.after], d, xerr, fmt='o', capsize=3, label=each.way.name)
  right.axvline(100 * LINE, color='C3', linewidth=1, linestyle='--')
  right.set(xlabel='mean retention of the others, %', ylabel=f'{target}: {first.metric}')
  right.legend(fontsize=7)
  file = io.BytesIO()
  figure.savefig(file, dpi=110, format='png')
  return file.getvalue()


BEFORE = ['task', 'metric', 'score', 'n', 'chance', 'above chance']
LEARNED = ['way', 'what', 'metric', 'before', 'after', 'difference']
ADVICE = ['way', 'gain on the target', 'mean kept', 'trained in', 'advice']
LEGEND_KEPT = 'Nothing was lost.'


def before_rows(before: Sequence[Summary]) -> list[list[str]]:
  """A row of each task: its first metric, and whether the interval excludes chance."""
  rows = []
  for each in before:
    name, metric = next(iter(each.metrics.items()))
    above = 'yes' if metric['low'] is not None and metric['low'] > each.chance else 'no'
    said = (
      [f'{each.chance:.3g}', above] if each.chance and not metric['lower_is_better'] else ['', '']
    )
    rows.append([each.task, name, shown(metric), f'{each.n}', *said])
  return rows


def learned_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
  rows = []
  for each in outcomes:
    change, d = each.target, each.target.difference
    scores = f'{change.before:.3f}', f'{change.after:.3f}'
    rows.append([each.way.name, each.way.about, change.metric, *scores, _signed(d)])
  return rows


def kept_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
  """A row of each task: retention, above chance where there is one, by each way."""
  rows = []
  for changes in zip(*(each.others for each in outcomes), strict=True):
    cells = []
    for each in changes:
      kept = percent(each.corrected or each.retention)
      warned = f'{kept} {LOST.split(":")[0]}' if each.verdict == LOST else kept
      is_told = each.is_compared and each.directed and not each.at_chance
      cells.append(warned if is_told else each.verdict)
    rows.append([changes[0].task, *cells])
  return rows


def warnings(outcomes: Sequence[Outcome]) -> list[str]:
  """What is to be said of tasks that were lost, or not shown to be kept."""
  return [f'{each.way.name}: {line}' for each in outcomes for line in advice(each.others)]


def advice_rows(outcomes: Sequence[Outcome], stages: Mapping[str, Mapping]) -> list[list[str]]:
  rows = []
  for each in outcomes:
    seconds = stages.get(each.way.name, {}).get('seconds')
    kept = percent(each.mean_kept) if each.mean_kept else 'nothing to lose'
    took = '' if seconds is None else duration(seconds)
    rows.append([each.way.name, _signed(each.gained), kept, took, advised(each, outcomes)])
  return rows


def _signed(difference: Estimate) -> str:
  return f'{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]'


def typed(stages: Mapping[str, Mapping]) -> list[str]:
  """The commands of stages, as a person would type them."""
  lines = []
  for stage in stages.values():
    took = stage.get('seconds')
    lines.append(stage['typed'] + (f'  # {duration(took)}' if took is not None else ''))
  return lines
