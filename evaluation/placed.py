"""Which question, of which row, was each line of results made of? For reports of what a line does
not say itself.
"""

import argparse
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from evaluation import page, task as tasks
from evaluation.examples import Item, Manner, examples
from evaluation.running import Summary, read_lines

OTHER = 'this is not what was asked; give the --data, and all else, that it was evaluated with'


def parser(name: str, about: str) -> argparse.ArgumentParser:
  """Of a command that reports on results: where they are, and what they are of."""
  made = argparse.ArgumentParser(
    prog=f'evaluate.py {name}',
    description=about,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  made.add_argument('results', help='directory of an evaluation (--output of evaluate.py)')
  made.add_argument('--data', default='.', help='directory of the files that were asked')
  made.add_argument('--tasks', default='', help="files of one's own tasks, by commas")
  return made


def results(
  place: pathlib.Path, data: str, own: Sequence[str], field: str
) -> Iterator[tuple[Summary, list[tuple[dict, dict]]]]:
  """(summary, [(line, row)]) of the evaluations in a directory whose tasks' rows have a field.

  data: the directory of the files that were asked. own: files of tasks that are not in
    configs/tasks. Raises ValueError where they are not what was asked.
  """
  known = dict(map(tasks.read, own))
  for summary in page.read(place):
    if summary.task not in known and summary.task not in tasks.known():
      print(
        f'NOTE: {summary.name} is left out: {summary.task} is none of configs/tasks, so what its '
        f'rows have is not known; name its file by --tasks=FILE'
      )
      continue
    task = known.get(summary.task) or tasks.read(summary.task)[1]
    try:
      if not all(field in row for _, row in tasks.rows_of(task, task.data, data)):
        continue
      asked = examples(task, summary.shots, manner_of(summary, data))
    except FileNotFoundError as error:
      print(f'NOTE: {summary.name} is left out: {error}')
      continue
    pairs = beside(place / f'{summary.name}.jsonl', asked)
    yield summary, [(dict(line), dict(item.row)) for line, item in pairs]


def manner_of(summary: Summary, data: str) -> Manner:
  """How a task was asked, with its files in this directory."""
  asked = {name: summary.settings[name] for name in ('limit', 'seed', 'system', 'chat')}
  return Manner(data=data, attacks=summary.settings.get('attacks', {}), **asked)


def beside(path: pathlib.Path, asked: Sequence[Item]) -> list[tuple[Mapping, Item]]:
  """Each line of results with its question. Raises ValueError where they are of other questions, or
  of as many others.
  """
  lines = [*read_lines(path)]
  if len(lines) != len(asked):
    raise ValueError(f'{path} is of {len(lines)} questions, and there are {len(asked)}: {OTHER}')
  for line, item in zip(lines, asked):
    if line['digest'] != item.digest:
      raise ValueError(
        f'{path}: line {line["i"]}, of {line["place"]}, is of another question than {item.place} '
        f'is now: {OTHER}'
      )
  return [*zip(lines, asked)]
