"""How near do predicted step times come to what others measured on TPUs?

    python -m benchmarks.published [--only v5e] [--json published.json]

Plans each run of analysis/published.py by the command that it prints, one after the other: minutes
each on two cores. The file keeps what is known, and a run that has a prediction there, of the same
flags and versions, is not planned again; one that was refused, or did not fit, is. The seconds are
then written into that table by hand, from which plan.py says its error, and docs/plans.md has its
rows. Needs libtpu (the extra `plan`), no TPU.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable

import commands
from analysis.published import PublishedRun, runs

ROOT = pathlib.Path(__file__).resolve().parents[1]


def planned(run: PublishedRun) -> dict:
  """What plan.py says of a run, as its JSON. Raises CalledProcessError where it refuses."""
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / 'plan.json'
    # What else would fit is no answer here, and takes as long as all the others together.
    command = ['plan.py', *asked_of(run)['flags'], '--nearest=false']
    print('python', *command, flush=True)
    subprocess.run(
      [sys.executable, *command, f'--json={path}'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    return json.loads(path.read_text())


def parts_of(plan: dict) -> dict:
  """What a predicted step is made of: seconds by what they go to, bytes that are reserved, MFU;
  {} where nothing is predicted.
  """
  prediction = plan['prediction']
  if prediction is None:
    return {}
  parts = {name: prediction[name] for name in ('operations', 'kernels', 'copies')}
  parts |= {name: sum(prediction[name].values()) for name in ('links', 'exposed')}
  kept = {name: plan[name] for name in ('mfu', 'compile_seconds', 'memory')}
  return {'parts': parts, **kept}


def asked_of(run: PublishedRun) -> dict:
  """What a prediction hangs on, besides our own code."""
  versions = commands.machine()
  flags = [*run.flags, f'--topology={run.topology}']
  return {'flags': flags, 'jax': versions['jax'], 'libtpu': versions['libtpu']}


def plan_all(asked: Iterable[PublishedRun], path: str) -> None:
  """Plans what the file does not know yet, and writes it there after each."""
  file = pathlib.Path(path)
  known = json.loads(file.read_text()).get('results', {}) if file.exists() else {}
  for run in asked:
    of, before = asked_of(run), known.get(run.name, {})
    if before.get('predicted') is not None and before.get('asked') == of:
      continue
    try:
      plan = planned(run)
    except subprocess.CalledProcessError as error:
      print(f'{run.name}: {error}', flush=True)
      continue
    seconds = plan['prediction'] and plan['prediction']['seconds']
    known[run.name] = {
      'predicted': seconds,
      'published': run.published,
      'fits': plan['fits'],
      'compiler': plan['compiler'],
      'asked': of,
    } | parts_of(plan)
    short = '' if plan['fits'] else f'; does not fit {plan["problem"]}'
    print(f'{run.name}: published {run.published:.3f} s, predicted {seconds} s{short}', flush=True)
    commands.write_json(path, 'published', known)


def main():
  arguments = commands.parser(__doc__)
  arguments.add_argument('--only', default='', help='runs whose name or chip holds this')
  arguments.set_defaults(json='published.json')
  options = arguments.parse_args()
  plan_all([run for run in runs() if options.only in f'{run.chip} {run.name}'], options.json)


if __name__ == '__main__':
  main()
