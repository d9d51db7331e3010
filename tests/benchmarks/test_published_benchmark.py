"""Is a published run planned once, and again where that is no answer any more?"""

import json
import subprocess

import pytest

from analysis.published import runs
from benchmarks import published


@pytest.fixture
def plans(monkeypatch):
  """Seconds that a run is predicted by its name, None where it does not fit; missing: refused. And
  the names of those that were planned.
  """
  seconds, asked = {}, []

  def planned(run):
    asked.append(run.name)
    if run.name not in seconds:
      raise subprocess.CalledProcessError(1, 'plan.py')
    predicted = seconds[run.name]
    prediction = predicted and {
      'seconds': predicted,
      'operations': 2.0,
      'kernels': 0.5,
      'copies': 0.25,
      'links': {'all-gather over fsdp': 1.0, 'reduce-scatter over fsdp': 0.5},
      'exposed': {'all-gather over fsdp': 0.25},
    }
    return {
      'prediction': prediction,
      'fits': bool(prediction),
      'compiler': {},
      'problem': 'no room',
      'mfu': 0.5,
      'memory': {'peak': 1},
      'compile_seconds': 1.0,
    }

  monkeypatch.setattr(published, 'planned', planned)
  monkeypatch.setattr(published.commands, 'machine', lambda: {'jax': '1', 'libtpu': '1'})
  return seconds, asked


def test_what_is_known_is_kept_and_what_failed_is_tried_again(plans, tmp_path, monkeypatch):
  (seconds, asked), path = plans, tmp_path / 'found.json'
  of = runs()[:3]
  first, second, third = (run.name for run in of)
  seconds |= {first: 3.0, second: None}
  published.plan_all(of, str(path))
  assert asked == [first, second, third]
  written = json.loads(path.read_text())
  assert {name: run['predicted'] for name, run in written['results'].items()} == {
    first: 3.0,
    second: None,
  }
  assert written['machine'] and written['results'][first]['asked']['flags'][0].startswith(
    '--config'
  )
  # What a prediction is made of stays, too: it says where one goes wrong.
  parts = {'operations': 2.0, 'kernels': 0.5, 'copies': 0.25, 'links': 1.5, 'exposed': 0.25}
  assert written['results'][first]['parts'] == parts
  assert 'parts' not in written['results'][second]

  asked.clear()
  seconds |= {second: 4.0, third: 5.0}
  published.plan_all(of, str(path))
  assert asked == [second, third]
  asked.clear()
  published.plan_all(of, str(path))
  assert asked == []
  # By another compiler it is another prediction.
  monkeypatch.setattr(published.commands, 'machine', lambda: {'jax': '1', 'libtpu': '2'})
  published.plan_all(of, str(path))
  assert asked == [first, second, third]


def test_it_asks_for_no_change_that_would_fit(monkeypatch):
  """A dozen compilations, whose result nothing reads."""
  commands = []
  # Which asks the system's programs, too.
  monkeypatch.setattr(published.commands, 'machine', lambda: {'jax': '1', 'libtpu': '1'})

  def run(command, **_):
    commands.append(command)
    (path,) = [part.removeprefix('--json=') for part in command if part.startswith('--json=')]
    open(path, 'w').write('{}')

  monkeypatch.setattr(published.subprocess, 'run', run)
  published.planned(runs()[0])
  assert '--nearest=false' in commands[0] and f'--topology={runs()[0].topology}' in commands[0]
