"""What does a person see of an evaluation? A page, and a picture of scores, over the number of
examples where there are several.
"""

import io
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import files
from evaluation.differences import settings_in
from evaluation.running import SAID, Summary, finite, read_lines, shown
from evaluation.scoring import Line

PAGE, PICTURE, VALUES = 'evaluation.md', 'evaluation.png', 'evaluation.json'
SHOWN = 2  # questions of each task
LONGEST = 600  # characters of a text that is shown


def write(output: pathlib.Path, run: Mapping, failed: Mapping[str, str]) -> list[Summary]:
  """Writes page, picture and values of all that is complete in a directory, which it returns.

  run: what was evaluated. failed: tasks that were not, and why.
  """
  summaries = read(output)
  values = {'run': dict(run), 'results': [vars(summary) for summary in summaries]}
  values = finite(values | {'failed': dict(failed)})
  files.replace(output / VALUES, json.dumps(values, indent=1) + '\n')
  if summaries:
    files.replace(output / PICTURE, picture(summaries, str(run.get('workdir', ''))))
  files.replace(output / PAGE, page(output, run, summaries, failed))
  return summaries


def read(output: pathlib.Path) -> list[Summary]:
  """All that are complete, by task and number of examples."""
  found = [Summary(**content) for _, content in settings_in(output) if 'metrics' in content]
  return sorted(found, key=lambda summary: (summary.task, summary.shots))


def page(
  output: pathlib.Path, run: Mapping, summaries: Sequence[Summary], failed: Mapping[str, str]
) -> str:
  """Markdown."""
  about = ', '.join(f'{name} {value}' for name, value in run.items() if value not in ('', None))
  parts = [f'# Evaluation of {run.get("workdir", "a model")}', f'Of {about}. Intervals are of 95%.']
  if failed:
    parts += ['**Not evaluated:**', '\n'.join(f'- {name}: {why}' for name, why in failed.items())]
  if not summaries:
    return '\n\n'.join(parts) + '\n'
  parts += [f'![scores]({PICTURE})', _scores(summaries)]
  parts += ['\n'.join(f'- {note}' for note in notes(summaries))]
  parts += ['## How it was asked', _settings(summaries)]
  for summary in summaries:
    if summary.by:
      first = next(iter(summary.metrics))
      rows = [[value, shown(each[first]), each[first]['n']] for value, each in summary.by.items()]
      parts += [f'## {summary.name} by {summary.settings["task"]["by"]}']
      parts.append(table(['', first, 'n'], rows))
  parts.append(
    '## As examples\n\nThe first questions of each, without the examples that stood before. Of '
    'choices, log-probabilities: `*` is right, `>` was said.'
  )
  for summary in summaries:
    parts += _examples(output, summary)
  return '\n\n'.join(parts) + '\n'


def _scores(summaries: Iterable[Summary]) -> str:
  rows = []
  for summary in summaries:
    first = True
    for name, metric in summary.metrics.items():
      task = [summary.task, summary.shots] if first else ['', '']
      chance = f'{summary.chance_of(name):.3g}' if summary.chance_of(name) else ''
      lower = ' ↓' if metric['lower_is_better'] else ''
      rows.append([*task, name + lower, shown(metric), metric['n'], chance])
      first = False
  return table(['task', 'shots', 'metric (↓ lower is better)', 'score', 'n', 'chance'], rows)


def notes(summaries: Iterable[Summary]) -> list[str]:
  """What is to be known of scores besides: what was counted, a line each."""
  return [
    f'{summary.name}: {count} of {summary.counted(what)} {SAID[what]}'
    for summary in summaries
    for what, count in summary.counts.items()
    if count
  ]


def _settings(summaries: Iterable[Summary]) -> str:
  rows = []
  for summary in summaries:
    settings = summary.settings
    kind = settings['task']['kind']
    given = {name: value for name, value in kind.items() if name != 'name' and value}
    given |= {name: settings[name] for name in ('limit', 'system', 'chat') if settings[name]}
    said = ', '.join(f'{name}={value!r}' for name, value in given.items())
    signatures = [
      metric['signature'] for metric in summary.metrics.values() if 'signature' in metric
    ]
    said = '; '.join([said, *signatures])
    rows.append([summary.name, kind['name'], said, settings['seed'], f'`{summary.prompts}`'])
  return table(['', 'kind', 'settings', 'seed', 'digest of the prompts'], rows)


def _examples(output: pathlib.Path, summary: Summary) -> list[str]:
  """The first questions of a task, with what was said."""
  parts = []
  for line, _ in zip(read_lines(output / f'{summary.name}.jsonl'), range(SHOWN)):
    parts += [f'{summary.name}, {line["place"]}:', fenced(line['prompt'], _said(line))]
  return parts


def _said(line: Line) -> str:
  if 'choices' in line:
    return '\n'.join(
      f'{"*" if i == line["truth"] else " "} {">" if i == line["said"] else " "} '
      f'{"no number" if score is None else format(score, "9.3f")}  {choice}'
      for i, (choice, score) in enumerate(zip(line['choices'], line['logprobs']))
    )
  if 'labels' in line:
    said = [f'{p or 0:6.3f}  {label}' for label, p in line['labels'].items()]
    return '\n'.join([*said, f'true: {line["truth"]}'])
  if 'answers' in line:
    right = [f'right: {text}' for text in line['references'][:1]]
    return '\n'.join([f'answer ({line["finish"][0]}): {line["answers"][0]}', *right])
  return f'{line["tokens"]} tokens, {line["nats"]} nats'


def fenced(*texts: str) -> str:
  """Texts in a block that none of them can end."""
  given = [text for text in texts if text]
  shown = [text if len(text) <= LONGEST else f'.. {text[-LONGEST:]}' for text in given]
  longest = max([2, *(len(run) for run in re.findall('`+', ' '.join(shown)))])
  fence = '`' * (longest + 1)
  return '\n'.join([f'{fence}text', *shown, fence])


def table(headers: Sequence, rows: Iterable[Sequence]) -> str:
  """In Markdown."""

  def line(cells):
    # A pipe ends a cell, and what looks like a tag is one.
    texts = (' '.join(str(cell).split()) for cell in cells)
    return f'| {" | ".join(t.replace("|", chr(92) + "|").replace("<", "&lt;") for t in texts)} |'

  return '\n'.join([line(headers), line(['---'] * len(headers)), *map(line, rows)])


def picture(summaries: Sequence[Summary], title: str) -> bytes:
  """A PNG: a panel for each metric that tasks are judged by first, with intervals, over the number
  of examples where there are several; the score of who knows nothing is a dotted line.
  """
  from matplotlib.figure import Figure

  panels: dict[str, dict[str, list[Summary]]] = {}
  for summary in summaries:
    panels.setdefault(next(iter(summary.metrics)), {}).setdefault(summary.task, []).append(summary)
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for ax, (name, tasks) in zip(axes, panels.items()):
    sweep = any(len(of) > 1 for of in tasks.values())
    for i, (task, of) in enumerate(tasks.items()):
      # Side by side, so that no interval hides another.
      x = [summary.shots + 0.03 * i if sweep else i for summary in of]
      _marks(ax, x, of, name, task, f'C{i}')
    ax.set_title(name, fontsize=9)
    if sweep:
      ax.set_xlabel('shots')
      ax.set_xticks(sorted({summary.shots for of in tasks.values() for summary in of}))
      ax.legend(fontsize=7)
    else:
      ax.set_xticks(range(len(tasks)), tasks, rotation=30, ha='right', fontsize=8)
      ax.set_xlim(-0.6, len(tasks) - 0.4)
  for ax in axes[len(panels) :]:
    ax.set_visible(False)
  figure.suptitle(title, fontsize=9)
  file = io.BytesIO()
  figure.savefig(file, dpi=110, format='png')
  return file.getvalue()


def _marks(
  ax, x: Sequence[int], of: Sequence[Summary], metric: str, task: str, colour: str
) -> None:
  """A task's scores in a panel."""
  values = [[summary.metrics[metric][key] for key in ('value', 'low', 'high')] for summary in of]
  nothing = [[math.nan if v is None else v for v in each] for each in values]
  y = [value for value, _, _ in nothing]
  errors = [[max(v - low, 0) for v, low, _ in nothing], [max(h - v, 0) for v, _, h in nothing]]
  ax.errorbar(x, y, errors, fmt='o-', color=colour, capsize=3, markersize=4, label=task)
  if of[0].chance:
    ends = (min(x) - 0.3, max(x) + 0.3)
    ax.plot(ends, [of[0].chance] * 2, ':', color=colour, linewidth=1)
