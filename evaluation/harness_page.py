"""What does a person see of an evaluation by the lm-evaluation-harness? A page of lm_eval.json, and
a picture of its scores.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import files
from evaluation import harness_results, page
from evaluation.intervals_picture import picture

PAGE, PICTURE = 'lm_eval.md', 'lm_eval.png'
HEADERS = ('task, or group', 'metric', 'score', 'n', 'digest of the prompts')


def write(output: pathlib.Path, said: Mapping[str, Any]) -> None:
  """Writes both into a directory. said: what lm_eval.json has."""
  panels: dict[str, list] = {}
  for kind in ('groups', 'tasks'):
    for name, of in said[kind].items():
      for key, metric in of['metrics'].items():
        panels.setdefault(key, []).append((name, metric))
  if panels:
    title = f'{said.get("workdir", "")}, lm_eval {said["lm_eval"]}'
    files.replace(output / PICTURE, picture(panels, title))
  files.replace(output / PAGE, text_of(said, bool(panels)))


def text_of(said: Mapping[str, Any], drawn: bool) -> str:
  """The page, in Markdown. drawn: whether there is a picture."""
  about = ', '.join(
    f'{name} {said[name]}' for name in ('workdir', 'step', 'digest', 'weights') if said.get(name)
  )
  parts = [f'# Evaluation by lm_eval {said["lm_eval"]}', f'Of {about}. Intervals are of 95%.']
  if said['failed']:
    parts += ['**Not evaluated:**', *(f'- {name}: {why}' for name, why in said['failed'].items())]
  if drawn:
    rows = [
      [*row, f'`{said["tasks"][row[0]]["prompts"]}`' if row[0] in said['tasks'] else '']
      for row in harness_results.rows(said)
    ]
    parts += [f'![scores]({PICTURE})', page.table(HEADERS, rows)]
  parts += [f'- {note}' for note in harness_results.notes(said)]
  settings = [(name, repr(value)) for name, value in said['settings'].items()]
  parts += ['## How it was asked', page.table(['setting', ''], settings)]
  return '\n\n'.join(parts) + '\n'
