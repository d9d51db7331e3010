"""Which row was each line of results made of? For reports of what a line does not say itself."""

import argparse
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from evaluation import page, task as tasks
from evaluation.running import Summary, read_lines


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
    configs/tasks. Raises ValueError for a line whose row is not there.
  """
  known = dict(map(tasks.read, own))
  for summary in page.read(place):
    if summary.task not in known and summary.task not in tasks.known():
      continue
    task = known.get(summary.task) or tasks.read(summary.task)[1]
    rows: dict[str, list] = {}
    try:
      for at, row in tasks.rows_of(task, task.data, data):
        rows.setdefault(at, []).append(row)
    except FileNotFoundError as error:
      print(f'NOTE: {summary.name} is left out: {error}')
      continue
    if all(field in row for of in rows.values() for row in of):
      lines = read_lines(place / f'{summary.name}.jsonl')
      yield summary, [*beside(lines, rows, summary.name)]


def beside(
  lines: Iterator[Mapping], rows: Mapping[str, Sequence[Mapping]], name: str
) -> Iterator[tuple[dict, dict]]:
  """Lines with their rows, by their places; a place that is of several rows has as many lines, in
  the same order.
  """
  waiting = {place: iter(of) for place, of in rows.items()}
  for line in lines:
    row = next(waiting.get(line['place'], iter(())), None)
    if row is None:
      raise ValueError(
        f'{name}: {line["place"]} is no row of which the task makes a question; give the --data '
        'that it was evaluated with'
      )
    yield dict(line), dict(row)
