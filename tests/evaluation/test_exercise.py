"""Does the exercise find what is forgotten, go on where it was killed, and advise by its rule?"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from evaluation import exercise_report, flan_t5_exercise, generated
from evaluation.exercise_report import Attempt, Outcome
from evaluation.forgetting import LOST, Change
from evaluation.intervals import Estimate

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def stages(tmp_path, monkeypatch):
  """Stages of a program that notes its argument and fails where it is told to."""
  monkeypatch.setattr(flan_t5_exercise, 'ROOT', tmp_path)
  (tmp_path / 'note.py').write_text(
    f'import sys\nopen({str(tmp_path / "ran")!r}, "a").write(sys.argv[1])\n'
    f'sys.exit({str(tmp_path / "broken")!r} in sys.argv)\n'
  )
  return lambda: flan_t5_exercise.Stages(tmp_path)


def test_a_stage_is_run_once_to_its_end(stages, tmp_path, capsys):
  stages().run('a', 'first', ('note.py', 'a'))
  with pytest.raises(SystemExit, match='error: b failed'):
    stages().run('b', 'second', ('note.py', 'b', str(tmp_path / 'broken')))
  assert [*stages().done] == ['a'], 'what failed is not over'
  for name in 'ab':
    command = ('note.py', name, *[str(tmp_path / 'broken')] * (name == 'b'))
    if name == 'b':
      (tmp_path / 'note.py').write_text(f'open({str(tmp_path / "ran")!r}, "a").write("B")\n')
    stages().run(name, 'again', command)
  assert (tmp_path / 'ran').read_text() == 'abB'
  assert [*stages().done] == ['a', 'b'] and stages().done['b']['seconds'] is None
  assert '== a: is there already' in capsys.readouterr().out
  with pytest.raises(ValueError, match='a was run with a, and is now with z'):
    stages().run('a', 'other', ('note.py', 'z'))


def change(task: str, before: float, after: float, chance: float = 0.0) -> Change:
  """Of a task with intervals of nothing."""

  def exactly(value):
    return Estimate(value, value, value, 200, 'bootstrap')

  corrected = exactly((after - chance) / (before - chance)) if chance else None
  difference, kept = exactly(after - before), exactly(after / before)
  return Change(
    task, 'accuracy', False, chance, before, after, difference, kept, corrected, 0.01, 0
  )


def outcome(name: str, target: float, *others: float) -> Outcome:
  changes = tuple(change(f't{i}', 0.9, after, 0.5) for i, after in enumerate(others))
  return Outcome(Attempt(name, '', 1e-3), change('target', 0.2, target), changes)


def test_advice_is_by_the_rule():
  full, lower = outcome('full', 0.95, 0.5, 0.9), outcome('lower', 0.4, 0.9, 0.9)
  lora, replay = outcome('lora', 0.88, 0.85, 0.85), outcome('replay', 0.9, 0.89, 0.9)
  every = [full, lower, lora, replay]
  assert full.lost == ['t0'] and full.others[0].verdict == LOST
  assert exercise_report.recommended(every) is replay  # within 95% of the gain, and keeps more
  said = [exercise_report.advised(each, every) for each in every]
  assert said == [
    'forgets 1 of 2 tasks',
    'keeps all, and learns 29% as much',
    'keeps all, and less of it',
    'take this',
  ]
  worse = outcome('worse', 0.99, 0.5, 0.5)
  assert exercise_report.recommended([worse, full]) is full
  assert exercise_report.advised(full, [worse, full]) == 'forgets 1 of 2 tasks; the least bad'


def test_gain_and_what_was_kept_have_intervals():
  changes = change('t0', 0.9, 0.7, 0.5), change('t1', 0.9, 0.9, 0.5)
  wide = Estimate(0.5, 0.1, 0.7, 200, 'bootstrap')
  others = dataclasses.replace(changes[0], corrected=wide), changes[1]
  errors = dataclasses.replace(change('target', 0.2, 0.1), lower_is_better=True)
  fewer = Estimate(-0.1, -0.3, -0.05, 200, 'bootstrap')
  errors = dataclasses.replace(errors, difference=fewer)
  way = Outcome(Attempt('full', '', 1e-3), errors, others)
  (row,) = exercise_report.advice_rows([way], {})
  # The mean of two of which one is sure: half of the other's interval on either side.
  assert row[:3] == ['full', '+0.100 [+0.050, +0.300]', '75.0% [55%, 85%]']
  (row,) = exercise_report.advice_rows([Outcome(way.way, errors, ())], {})
  assert row[2] == 'nothing to lose'


@pytest.mark.parametrize('gains', [(-0.1, -0.05), (float('nan'), -0.05), (0.0, 0.0)])
def test_a_way_is_named_where_none_gains(gains):
  ways = [outcome(name, 0.2 + gain, 0.9, 0.9) for name, gain in zip(('worse', 'least'), gains)]
  assert exercise_report.recommended(ways) is ways[gains[0] < gains[1] or gains[0] != gains[0]]
  said = {exercise_report.advised(each, ways) for each in ways}
  first = 'has no number on a side of the target' if gains[0] != gains[0] else 'learns nothing'
  assert said == {f'keeps all, and {first}', 'keeps all, and learns nothing; the best of these'}
  nothing = [outcome(name, float('nan'), 0.9) for name in 'ab']
  assert exercise_report.recommended(nothing) is nothing[0]
  assert exercise_report.advised(nothing[0], nothing).endswith('; the least bad')


OWN_METRIC = """
from evaluation.task import Generate, Task
from evaluation.text_metrics import Length


def get_task():
  return Task(Generate(), 'rows.jsonl', prompt='{{ q }}', target='x', metrics=(Length(),))
"""


def test_a_target_that_cannot_be_compared_is_refused_first(tmp_path):
  (tmp_path / 'own.py').write_text(OWN_METRIC)
  (tmp_path / 'rows.jsonl').write_text('{"q": "a"}')
  flags = [f'--target={tmp_path}/own.py', f'--train={tmp_path}/rows.jsonl']
  with pytest.raises(SystemExit, match='how metrics of its own add up is not known.*give own one'):
    flan_t5_exercise.main([f'--workdir={tmp_path / "exercise"}', *flags])
  assert not (tmp_path / 'exercise').exists()


@pytest.mark.parametrize(
  'flags, said',
  [
    (['--model=nowhere'], '--model=nowhere is no directory'),
    (['--target=squad'], '--target=squad needs rows to tune on'),
    (['--columns=source=a'], '--columns=source=a is of --train'),
    (['--tasks=nothing'], "--tasks='nothing' is unknown"),
    (['--train=rows.jsonl'], 'rows.jsonl is not there'),
  ],
)
def test_flags_that_mean_nothing_are_refused_first(flags, said, tmp_path):
  with pytest.raises(SystemExit, match=f'error: .*{said}'):
    flan_t5_exercise.main([f'--workdir={tmp_path / "exercise"}', *flags])
  assert not (tmp_path / 'exercise').exists()


def notebook_shows(place: pathlib.Path, environment: dict) -> None:
  """The notebook, of an exercise that is over."""
  import nbclient
  import nbformat

  notebook = nbformat.read(ROOT / 'notebooks' / 'flan_t5_exercise.ipynb', as_version=4)
  (chosen,) = (cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', []))
  chosen.source = f'MODEL, WORKDIR = "tiny", {str(place)!r}'
  resources = {'metadata': {'path': str(ROOT / 'notebooks')}}
  environment = environment | {'PYTHONPATH': str(ROOT)}
  nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute(env=environment)
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
  kinds = {kind for output in outputs for kind in output.get('data', ())}
  assert {'image/png', 'text/markdown'} <= kinds
  printed = ''.join(output.get('text', '') for output in outputs)
  assert '== full: is there already' in printed and '  after: ' in printed


@pytest.mark.slow
@pytest.mark.long
def test_full_tuning_at_a_high_rate_forgets_what_others_keep(tmp_path):
  """The exercise as a person runs it, killed while its model is taught."""
  place = tmp_path / 'exercise'
  command = [sys.executable, '-m', 'evaluation.flan_t5_exercise', f'--workdir={place}']
  # As elsewhere: tests compile without optimizations, and on eight devices.
  clean = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  run = subprocess.Popen(command, cwd=ROOT, env=clean)
  while not [*(place / 'base' / 'checkpoints').glob('[0-9]*')]:
    assert run.poll() is None, 'ended before there was anything to go on from'
    time.sleep(1)
  run.send_signal(signal.SIGKILL)
  run.wait()
  again = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
  assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
  assert '== pretrained: is there already' in again.stdout
  assert 'going on from checkpoint' in again.stdout

  report = json.loads((place / exercise_report.VALUES).read_text())
  first = {each['task']: each for each in report['before']}
  assert {*first} == {*generated.GENERAL, generated.TARGET}
  for name in generated.GENERAL:
    score = next(iter(first[name]['metrics'].values()))
    assert score['low'] > first[name]['chance'] > 0, f'{name} is above chance'

  ways = {each['name']: each for each in report['ways']}
  for way in ways.values():
    assert way['target']['difference']['low'] > 0, f'{way["name"]} learns'
  full = {each['task']: each for each in ways['full']['others']}
  forgotten = [task for task, each in full.items() if each['corrected']['high'] < 0.8]
  assert forgotten, 'whose interval ends below the line'
  kept = {
    each['task']
    for name in ('lora', 'replay')
    for each in ways[name]['others']
    if each['corrected']['low'] > full[each['task']]['corrected']['high']
  }
  assert kept & {*forgotten}, 'what is kept by LoRA or replay'
  assert report['recommended'] != 'full'
  notebook_shows(place, clean)
  page = (place / exercise_report.PAGE).read_text()
  assert 'WARNING: below 80%' in page and (place / exercise_report.PICTURE).stat().st_size > 10_000
