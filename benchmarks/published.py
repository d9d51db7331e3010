"""How near do predicted step times come to what others measured on TPUs?

    python -m benchmarks.published [--only v5e] [--json FILE]

Plans each run of analysis/published.py by the command that it prints, one after the other: minutes
each on two cores. FILE keeps what is known, and a run that is in it is not planned again. The
seconds are then written into that table by hand, from which plan.py says its error, and
docs/plans.md has its rows. Needs libtpu (the extra `plan`), no TPU.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import commands
import files
from analysis.published import runs

ROOT = pathlib.Path(__file__).resolve().parents[1]


def planned(run, flags_: tuple[str, ...] = ()) -> dict:
  """What plan.py says of a run, as its JSON. Raises CalledProcessError where it refuses."""
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / 'plan.json'
    command = ['plan.py', *run.flags, f'--topology={run.topology}', *flags_]
    print('python', *command, flush=True)
    subprocess.run(
      [sys.executable, *command, f'--json={path}'], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    return json.loads(path.read_text())


def main():
  arguments = commands.parser(__doc__)
  arguments.add_argument('--only', default='', help='runs whose name or chip holds this')
  options = arguments.parse_args()
  kept = pathlib.Path(options.json) if options.json else None
  known = json.loads(kept.read_text()) if kept and kept.exists() else {}
  for run in runs():
    if options.only not in f'{run.chip} {run.name}' or run.name in known:
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
    }
    print(f'{run.name}: published {run.published:.3f} s, predicted {seconds} s', flush=True)
    if kept:
      files.replace(kept, json.dumps(known, indent=1) + '\n')


if __name__ == '__main__':
  main()
