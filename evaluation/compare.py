"""How do evaluations of the same questions differ? `evaluate.py compare BEFORE AFTER [AFTER ..]`:
paired differences, what was kept of each task, and what a gain has cost.
"""

import argparse
import dataclasses
import io
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence

import commands
import files
from evaluation import page, task as tasks
from evaluation.differences import differences
from evaluation.forgetting import LINE, LOST, Change, advice, change, mean_retention, percent
from evaluation.intervals import Estimate, mean_of
from evaluation.measures import known
from evaluation.paired import holm
from evaluation.running import Summary, alone_in, finite, read_lines

PAGE, PICTURE, VALUES = 'compare.md', 'compare.png', 'compare.json'


def parser() -> argparse.ArgumentParser:
  made = argparse.ArgumentParser(
    prog='evaluate.py compare',
    description='Compares evaluations of the same questions, one by one: what is gained, what is '
    f'kept (a WARNING below {LINE:.0%}), and whether it may be luck.',
  )
  made.add_argument('before', help='directory of an evaluation (--output of evaluate.py)')
  made.add_argument('after', nargs='+', help='of another model, or of several')
  made.add_argument('--target', default='', help='the tasks that it was tuned for, by commas')
  made.add_argument('--output', default='', help='directory of the page; default: the first after')
  made.add_argument('--seed', type=int, default=0, help='of the bootstrap')
  return made


def main(arguments: Sequence[str]) -> None:
  """The command; its exit status is 0 also where something was forgotten: that is a finding."""
  given = parser().parse_args(arguments)
  output = pathlib.Path(given.output or given.after[0])
  with commands.mendable(ImportError), alone_in(output):
    target = [name for name in given.target.split(',') if name]
    before = {s.name: s for s in _read(given.before)}
    known = {summary.task for summary in before.values()}
    for name in target:
      if name not in known:
        raise ValueError(f'--target={name} is none of the tasks of {given.before}: {known}')
    changes, asked = {}, {given.before: [*before.values()]}
    for after in given.after:
      asked[after] = _read(after)
      changes[after] = compared(before, given.before, after, given.seed)
      show(given.before, after, changes[after], target)
    print(f'seed {given.seed}: of intervals and of permutations')
    write(output, given.before, changes, target, asked, given.seed)
    print(f'\nwrote {output}/{PAGE}, {PICTURE} and {VALUES}')


def _read(directory: str) -> list[Summary]:
  summaries = page.read(pathlib.Path(directory))
  if not summaries:
    raise ValueError(f'{directory} has no evaluation; write one by evaluate.py --tasks=..')
  return summaries


def compared(before: Mapping[str, Summary], place: str, after: str, seed: int = 0) -> list[Change]:
  """Changes of all tasks that both have, each metric; those that one alone has, and metrics of
  which it is not known how they add up, are said.

  Raises ValueError where nothing is left to compare, and for other questions or settings.
  """
  others = {summary.name: summary for summary in _read(after)}
  shared = [name for name in before if name in others]
  for of, names in ((place, before.keys() - others), (after, others.keys() - before.keys())):
    if names:
      print(f'NOTE: in {of} only: {", ".join(sorted(names))}')
  if not shared:
    raise ValueError(f'{place} and {after} have no task in common; evaluate both with the same')
  changes = []
  for name in shared:
    _check_same(before[name], others[name])
    lines = [[*read_lines(pathlib.Path(at) / f'{name}.jsonl')] for at in (place, after)]
    if [line['digest'] for line in lines[0]] != [line['digest'] for line in lines[1]]:
      raise ValueError(f'{name}: the lines of {place} and {after} are of other questions')
    directed = _is_directed(before[name])
    for metric in before[name].metrics:
      measure = known(metric, before[name].settings['task'], name)
      if measure is None:
        continue
      sides = [[line['stats'] and line['stats'][metric] for line in of] for of in lines]
      chance = before[name].chance_of(metric)
      changes.append(change(name, measure, *sides, chance, seed, directed))
  if not changes:
    raise ValueError(
      f'{place} and {after} have no metric that can be compared; see the notes above'
    )
  return changes


def _is_directed(summary: Summary) -> bool:
  """Task.directed; of results from before there was that, as the task of this name says now."""
  said = summary.settings['task'].get('directed')
  if said is None and summary.task in tasks.known():
    said = tasks.read(summary.task)[1].directed
  return said is None or said


def _check_same(before: Summary, after: Summary) -> None:
  """Raises ValueError where two summaries are not of the same questions, asked in the same way."""
  ways = [{k: v for k, v in s.settings.items() if k != 'run'} for s in (before, after)]
  lines = differences(*ways)
  if before.prompts != after.prompts:
    lines.append(f'the questions were {before.prompts} and are {after.prompts}')
  if lines:
    raise ValueError(
      f'{before.name} was asked otherwise: {"; ".join(lines)}; evaluate both in the same way'
    )


def _rows(changes: Sequence[Change]) -> list[list[str]]:
  adjusted = iter(holm([each.p for each in changes if each.p is not None]))
  return [
    [
      each.task,
      each.metric + (' ↓' if each.lower_is_better else ''),
      _number(each.before),
      _number(each.after),
      *(_told(each, next(adjusted)) if each.is_compared else [''] * 5),
      each.verdict,
    ]
    for each in changes
  ]


def _told(each: Change, adjusted: float) -> list[str]:
  """Of what is compared; adjusted: its p, by Holm."""
  gap = each.difference
  return [
    f'{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]',
    f'{each.p:.2g}',
    f'{adjusted:.2g}',
    percent(each.retention) if each.directed else '',
    percent(each.corrected) if each.chance and each.directed else '',
  ]


def _number(value: float) -> str:
  return f'{value:.3f}' if math.isfinite(value) else 'no number'


LEGEND = f"""Differences and retentions are of the same questions on both sides, with the 95%
interval of a paired bootstrap. p: that a difference as large is luck (McNemar's of rates, else a
permutation test); Holm: corrected for as many tests as there are. What is no number on a side, such
as a perplexity beyond all numbers, is not compared, and is no test. Retention is after / before,
and before / after where lower is better; above chance, both less the score of guessing. Tasks at
which the model was at chance before, or of which neither way is better (a share of stereotypes, of
refusals), count nowhere. Not shown above {LINE:.0%}: the interval begins below it."""
HEADERS = (
  'task',
  'metric (↓ lower is better)',
  'before',
  'after',
  'difference',
  'p',
  'p (Holm)',
  'retention',
  'above chance',
  '',
)


def show(before: str, after: str, changes: Sequence[Change], target: Sequence[str]) -> None:
  """Prints it."""
  rows = [[*row[:5], *row[6:9]] for row in _rows(changes)]
  headers = ['task', 'metric', 'before', 'after', *HEADERS[4:5], *HEADERS[6:9]]
  commands.table(f'{before} -> {after}, with 95% intervals', headers, rows)
  for line in _said(changes, target):
    print(line)


def firsts(changes: Sequence[Change]) -> list[Change]:
  """Of each task the metric that it is judged by."""
  seen: dict[str, Change] = {}
  for each in changes:
    seen.setdefault(each.task, each)
  return [*seen.values()]


def _split(changes: Sequence[Change], target: Sequence[str]) -> tuple[list[Change], list[Change]]:
  """Changes of what it was tuned for, and of the others."""
  of = [each for each in firsts(changes) if each.task.rpartition('-')[0] in target]
  return of, [each for each in firsts(changes) if each not in of]


def _said(changes: Sequence[Change], target: Sequence[str]) -> list[str]:
  tuned, others = _split(changes, target)
  lines = [f'NOTE: {c.task}: {c.left_out} questions have no score' for c in others if c.left_out]
  lines += [
    f'NOTE: {c.task}: {c.metric} is {_number(c.before)} before and {_number(c.after)} after, and '
    'is not compared'
    for c in changes
    if not c.is_compared
  ]
  lines += advice(others)
  mean = mean_retention(others)
  if mean is not None:
    warn = f'  {LOST}' if mean.value < LINE else ''
    count = sum(each.kept is not None for each in others)
    of = f'{count} task{"s" * (count > 1)}'
    lines.append(f'mean retention of {of}: {percent(mean)}{warn}')
  for each in tuned:
    scores = f'{_number(each.before)} -> {_number(each.after)}'
    lines.append(f'target {each.task}: {each.metric} {scores}')
  return lines


def write(
  output: pathlib.Path,
  before: str,
  changes: Mapping[str, Sequence[Change]],
  target: Sequence[str],
  asked: Mapping[str, Sequence[Summary]],
  seed: int,
) -> None:
  """Page, picture and values. asked: of each place its evaluations."""
  parts = ['# What was gained, and what was kept', f'![retention]({PICTURE})']
  for after, of in changes.items():
    parts += [f'## {before} → {after}', page.table(HEADERS, _rows(of))]
    parts.append('\n'.join(f'- {line}' for line in _said(of, target)))
  parts.append(LEGEND)
  told = {each.task for of in changes.values() for each in of}
  prompts = {s.name: s.prompts for s in asked[before] if s.name in told}
  runs = {place: of[0].settings.get('run', {}) for place, of in asked.items()}
  parts += ['## Of what', page.table(['task', 'digest of the prompts'], prompts.items())]
  about = [[place, json.dumps(run)] for place, run in runs.items()]
  parts += [page.table(['evaluation', 'run'], about), f'Seed of intervals and tests: {seed}.']
  values = {
    'seed': seed,
    'prompts': prompts,
    'runs': runs,
    'before': before,
    'after': {after: [each.values() for each in of] for after, of in changes.items()},
    'target': [*target],
    'mean retention': {
      after: (mean := mean_retention(_split(of, target)[1])) and mean.values()
      for after, of in changes.items()
    },
  }
  files.replace(output / VALUES, json.dumps(finite(values), indent=1) + '\n')
  files.replace(output / PICTURE, picture(changes, target))
  files.replace(output / PAGE, '\n\n'.join(parts) + '\n')


def picture(changes: Mapping[str, Sequence[Change]], target: Sequence[str]) -> bytes:
  """A PNG: what was kept of each task, and, where there is a target, its gain against that."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9 if target else 5.5, 4), layout='constrained')
  axes = figure.subplots(1, 2 if target else 1, squeeze=False)[0]
  what_was_kept(axes[0], changes, target)
  if target:
    _trade_off(axes[1], changes, target)
  file = io.BytesIO()
  figure.savefig(file, dpi=110, format='png')
  return file.getvalue()


def span(estimate: Estimate, scale: float = 1) -> list[list[float]]:
  """How far its interval reaches below and above it, as errorbar of matplotlib takes it."""
  below, above = estimate.value - estimate.low, estimate.high - estimate.value
  return [[scale * max(below, 0)], [scale * max(above, 0)]]


def what_was_kept(ax, changes: Mapping[str, Sequence[Change]], target: Sequence[str]) -> None:
  """Of each task but the target, with intervals, side by side."""
  for i, (after, of) in enumerate(changes.items()):
    _, others = _split(of, target)
    kept = [(c.task, c.kept) for c in others if c.kept is not None]
    y = [j + 0.15 * i for j in range(len(kept))]
    x = [min(e.value, 2) for _, e in kept]
    errors = [[max(e.value - max(e.low, -2), 0) for _, e in kept]]
    errors.append([max(min(e.high, 2) - e.value, 0) for _, e in kept])
    ax.errorbar(x, y, xerr=errors, fmt='o', capsize=3, markersize=4, label=after)
    ax.set_yticks(range(len(kept)), [task for task, _ in kept], fontsize=8)
  ax.axvline(LINE, color='C3', linewidth=1, linestyle='--')
  ax.axvline(1, color='0.6', linewidth=1)
  ax.set(xlabel='retention, above chance where there is one', ylim=ax.get_ylim()[::-1])
  ax.legend(fontsize=7)


def _trade_off(ax, changes: Mapping[str, Sequence[Change]], target: Sequence[str]) -> None:
  """What the target gained, in per cent of before, against the mean of what was kept; where some
  of it was 0 before, as answers to a task that it did not know, the gain itself. Intervals are of
  the mean, and of the difference.
  """
  compared = {
    after: [each for each in _split(of, target)[0] if each.is_compared]
    for after, of in changes.items()
  }
  relative = all(each.before for tuned in compared.values() for each in tuned)
  for after, tuned in compared.items():
    kept = mean_retention(_split(changes[after], target)[1])
    if kept is None or not tuned:
      why = 'no retention is known of the others' if tuned else 'no target is compared'
      print(f'NOTE: {after} has no point: {why}', file=sys.stderr)
      continue
    gain = mean_of([gained(each, relative) for each in tuned])
    ends = span(gain), span(kept, 100.0)
    ax.errorbar([100 * kept.value], [gain.value], *ends, fmt='o', capsize=3, label=after)
  ax.axvline(100 * LINE, color='C3', linewidth=1, linestyle='--')
  ax.axhline(0, color='0.6', linewidth=1)
  unit = ', %' if relative else ''
  ax.set(xlabel='mean retention of the others, %', ylabel=f'gain on {", ".join(target)}{unit}')
  if ax.get_legend_handles_labels()[0]:
    ax.legend(fontsize=7)


def gained(each: Change, relative: bool = False) -> Estimate:
  """The difference, upwards where it is better; relative: in per cent of what was before."""
  gap, unit = each.difference, 100 / abs(each.before) if relative else 1.0
  ends = sorted(unit * x * (-1 if each.lower_is_better else 1) for x in (gap.low, gap.high))
  value = unit * gap.value * (-1 if each.lower_is_better else 1)
  return dataclasses.replace(gap, value=value, low=ends[0], high=ends[1])
