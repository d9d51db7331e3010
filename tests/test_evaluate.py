"""Does the command say how good a model is, the same each time, and what is wrong before it takes
long?
"""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.test_commands import ROOT, Process

CONFIG = '''
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from objectives.classify import Classify
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config():
  return Config(
    model=ModelConfig(width=32, layers=2, heads=4, feed_forward=64),
    objective=Classify(template='DIRECTORY/template.toml'),
    data=DataConfig(
      sources=(SourceConfig(kind='csv', path='DIRECTORY/texts.csv', format='label'),),
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      tokenizer=TokenizerConfig(kind='byte'),
      sequence_length=64,
      batch_size=8,
      validation_fraction=0.5,
      cache_dir='DIRECTORY/cache',
    ),
    optimizer=OptimizerConfig(learning_rate=0.01, schedule='constant'),
    train=TrainConfig(steps=3, log_every=1),
  )
'''


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
  """A directory with a run of a few steps."""
  directory = tmp_path_factory.mktemp('evaluated')
  (directory / 'config.py').write_text(CONFIG.replace('DIRECTORY', str(directory)))
  (directory / 'template.toml').write_text(
    'pattern = "{{ text }}:"\nbetween = " "\n[words]\nup = "high"\ndown = "low"\n'
  )
  rows = [f'text {i},{("up", "down")[i % 2]}' for i in range(60)]
  (directory / 'texts.csv').write_text('\n'.join(['text,label', *rows]) + '\n')
  done = Process(
    directory, 'train.py', f'--config={directory}/config.py', f'--workdir={directory}/run'
  ).end()
  assert done.code == 0, done.error
  return directory


@pytest.mark.slow
@pytest.mark.long
def test_a_run_says_how_well_it_classifies(tuned):
  flags = ('--shots=0,2', '--calibration=none,contextual', f'--workdir={tuned}/run')
  done = Process(tuned, 'evaluate.py', *flags).end()
  assert done.code == 0 and 'Traceback' not in done.error, done.error
  output = tuned / 'run' / 'evaluation'
  results = json.loads((output / 'classify.json').read_text())['results']
  assert [(r['shots'], r['calibration']) for r in results] == [
    (0, 'none'),
    (0, 'contextual'),
    (2, 'none'),
    (2, 'contextual'),
  ]
  lines = [json.loads(line) for line in (output / 'classify.jsonl').read_text().splitlines()]
  for result in results:
    assert result['n'] == len(lines) and np.sum(result['confusion']) == len(lines)
    way = f'{result["shots"]} {result["calibration"]}'
    said = [max(line[way], key=line[way].get) == line['label'] for line in lines]
    assert result['metrics']['accuracy']['value'] == pytest.approx(np.mean(said))
    assert (output / f'classify-{way.replace(" ", "-")}.png').read_bytes()[:4] == b'\x89PNG'
  assert results[0]['prompts'] == results[1]['prompts'] != results[2]['prompts']
  assert '0 shots, contextual' in done.out and 'with 95% intervals' in done.out
  assert 'seed 0: of examples' in done.out

  again = Process(tuned, 'evaluate.py', *flags, f'--output={tuned}/again').end()
  assert again.code == 0, again.error
  assert json.loads((tuned / 'again' / 'classify.json').read_text())['results'] == results


@pytest.mark.slow
@pytest.mark.long
def test_a_head_is_judged_beside_what_is_asked(tuned):
  """Of the same records, with the same metrics, from the command's own flags; and not with
  examples, nor of a run that has none.
  """
  head = (
    '--config.objective.kind=classify_head',
    f'--config.objective.template={tuned}/template.toml',
  )
  config, run = f'--config={tuned}/config.py', f'--workdir={tuned}/head'
  done = Process(tuned, 'train.py', config, *head, run).end()
  assert done.code == 0, done.error
  done = Process(tuned, 'evaluate.py', run, '--calibration=none,contextual').end()
  assert done.code == 0 and 'Traceback' not in done.error, done.error
  output = tuned / 'head' / 'evaluation'
  results = json.loads((output / 'classify.json').read_text())['results']
  assert [(r['objective'], r['calibration']) for r in results] == [
    ('classify_head', 'none'),
    ('classify_head', 'contextual'),
  ]
  lines = [json.loads(line) for line in (output / 'classify.jsonl').read_text().splitlines()]
  said = [max(line['0 none'], key=line['0 none'].get) == line['label'] for line in lines]
  assert results[0]['metrics']['accuracy']['value'] == pytest.approx(np.mean(said))

  done = Process(tuned, 'evaluate.py', run, config, f'--output={tuned}/asked').end()
  assert done.code == 0, done.error
  asked = [json.loads(line) for line in (tuned / 'asked' / 'classify.jsonl').open()]
  assert [line['place'] for line in asked] == [line['place'] for line in lines]

  for flags, said in (
    ((run, '--shots=0,2'), '--shots=0,2: a head reads texts as they are'),
    ((f'--workdir={tuned}/run', config, *head), "objective.kind='classify' and has no head"),
  ):
    done = Process(tuned, 'evaluate.py', *flags).end()
    assert done.code != 0 and said in done.error and 'Traceback' not in done.error, done.error


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags, said',
  [
    (('--shots=two',), '--shots=two must be whole numbers'),
    (('--calibration=context',), "--calibration='context' is unknown; did you mean 'contextual'"),
    (('--calibration=',), '--calibration= names none of'),
    (('--shots=',), '--shots= must be whole numbers'),
    (('--shots=40',), 'shots=40 shows 20 examples of label'),
    (('--config=tiny',), "objective.kind='next_token' names no template to classify by"),
    (('--config.objective.template=none.toml',), 'none.toml'),
    (('--attacks=prefix',), "--attacks=['prefix'] is of tasks; name some by --tasks"),
    (('--tasks=stdlib', '--attacks=prefix'), '--attacks=prefix is of tasks of safety, as xstest'),
  ],
  ids=range(9),
)
def test_what_cannot_be_asked_is_said(tuned, flags, said):
  done = Process(tuned, 'evaluate.py', f'--workdir={tuned}/run', *flags).end()
  assert done.code != 0 and said in done.error and 'Traceback' not in done.error, done.error


TASKS = '''
from evaluation.task import Generate, Perplexity, Task

TEXT = '{{ text }}'


def rows():
  for i in range(120):
    yield {'text': f'text {i} ' * (1 + i % 3)}


def get_task():
  return KIND
'''
OWN = {
  'write': "Task(Generate(max_new_tokens=40), rows, prompt=TEXT, target='x', metrics=('chrf',))",
  'foretell': 'Task(Perplexity(), rows, prompt=TEXT)',
  'broken': "Task(Perplexity(), 'texts.jsonl', prompt=TEXT)",
}


@pytest.mark.slow
@pytest.mark.long
def test_what_was_killed_goes_on_with_the_same_bytes(tuned):
  """By kill -9 while it writes; a task whose data is missing is named, and does not stop others."""
  for name, kind in OWN.items():
    (tuned / f'{name}.py').write_text(TASKS.replace('KIND', kind))

  def command(output):
    names = ','.join(f'{tuned}/{name}.py' for name in OWN)
    flags = f'--workdir={tuned}/run', f'--tasks={names}', f'--output={tuned}/{output}'
    return Process(tuned, 'evaluate.py', *flags)

  whole = command('whole').end()
  said = 'texts.jsonl is not there; give the directory that has texts.jsonl by --data=DIRECTORY'
  assert whole.code == 1 and said in whole.out and 'Traceback' not in whole.error
  assert whole.error.endswith('error: 1 of 3 tasks failed: broken\n')

  killed, lines = command('killed'), tuned / 'killed' / 'write-0.jsonl'
  assert killed.until(lambda: lines.exists() and lines.stat().st_size > 2000)
  killed.process.send_signal(signal.SIGSTOP)  # so that it cannot end meanwhile
  second = command('killed').end()
  assert second.code != 0 and 'is in use by process' in second.error
  killed.process.kill()
  killed.end()
  before = lines.read_bytes()
  assert not (tuned / 'killed' / 'foretell-0.json').exists()
  done = command('killed').end()
  assert f'{before.count(10)} of 120 are there already' in done.out
  for path in (tuned / 'whole').iterdir():
    assert (tuned / 'killed' / path.name).read_bytes() == path.read_bytes(), path.name
  assert {line['i'] for line in map(json.loads, open(lines))} == {*range(120)}


@pytest.mark.slow
def test_flags_of_tasks_are_checked_before_anything_is_read(tuned):
  run = f'--workdir={tuned}/run'
  for flags, said in (
    ((run, '--data=.', '--chat'), '--chat=True is of tasks; name some by --tasks'),
    ((run, '--tasks=blimp', '--calibration=pmi'), 'a task says how it is calibrated'),
    (('--tasks=blimp',), 'give the directory of a run by --workdir'),
    ((run, '--tasks=blimp', '--config=classify'), '--config=classify is of classification'),
    ((run, '--tasks=blimps'), "--tasks='blimps' is unknown; did you mean 'blimp'"),
  ):
    done = Process(tuned, 'evaluate.py', *flags).end()
    assert done.code != 0 and said in done.error + done.out, (flags, done.error)
  done = Process(tuned, 'evaluate.py', '--tasks=list').end()
  assert done.code == 0 and 'arc_easy' in done.out and 'stdlib' in done.out


OTHERS = """
import json
import pathlib
import sys
from types import SimpleNamespace as Of

import evaluate

config = Of(objective=Of(kind=sys.argv[1]), data=Of(cache_dir=sys.argv[2]))
evaluate.CONFIG = evaluate.WORKDIR = evaluate.CHECKPOINT = evaluate.WEIGHTS = Of(value='')
evaluate.TASKS = evaluate.LM_EVAL = Of(value=[])
evaluate.SEED = Of(value=0)
evaluate.overrides.from_flag = lambda _: config
evaluate.check_objective = lambda *_: None
evaluate.hosts.cache_compilations = lambda _: None
evaluate.run_of = lambda *_: {'workdir': 'r', 'step': 7, 'digest': 'd7', 'weights': ''}
output = pathlib.Path(sys.argv[2])
for name in ('classify', 'reward'):
  run = {'workdir': 'r', 'step': 3, 'digest': 'd3', 'weights': ''}
  (output / f'{name}.json').write_text(json.dumps({'run': run}))
try:
  evaluate.judge([0], output)
except ValueError as error:
  print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['classify', 'reward'])
def test_results_of_another_checkpoint_are_not_written_over(tmp_path, kind):
  command = [sys.executable, '-c', OTHERS, kind, str(tmp_path)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert f'{tmp_path}/{kind}.json is of another evaluation (run.step was 3 and is 7' in done.stdout


SCORES = """
import pathlib

from absl import flags

import evaluate

estimate = {'value': 0.5, 'low': 0.25, 'high': 0.75, 'n': 9, 'method': 'wilson', 'small': True}
metrics = {name: estimate | {'lower_is_better': False} for name in ('one', 'two', 'three')}
counts = dict.fromkeys(evaluate.running.COUNTED, 0)
done = evaluate.running.Summary('t', {'shots': 0}, 9, 'ab12', 0.0, metrics, {}, counts)
evaluate.opened = lambda: (None, {})
evaluate.running.evaluate = lambda *given: ([done], {})
evaluate.page.write = lambda *given: None
flags.FLAGS(['evaluate.py', '--tasks=stdlib'])
evaluate.evaluate_tasks([0], pathlib.Path())
"""


@pytest.mark.slow
def test_every_metric_of_a_task_is_printed():
  done = subprocess.run([sys.executable, '-c', SCORES], cwd=ROOT, capture_output=True, text=True)
  assert [name in done.stdout for name in ('one', 'two', 'three')] == [True] * 3, done.stderr


SHOTS = """
import pathlib

from absl import flags
from absl.testing import flagsaver

import evaluate

evaluate.opened = lambda: (None, {})
said = {'tasks': {}, 'failed': {}}
evaluate.harness_page.write = lambda output, said: print('a page')
evaluate.harness.evaluate = lambda model, settings, of, output: print(settings.shots) or said
for given in ((), ('--shots=0',), ('--shots=2',)):
  with flagsaver.flagsaver():
    flags.FLAGS(['evaluate.py', '--lm_eval=their_task', *given])
    evaluate.evaluate_harness(evaluate.check_flags(), pathlib.Path())
"""


@pytest.mark.slow
def test_no_examples_are_asked_of_the_harness_and_what_is_not_said_is_the_tasks_own():
  done = subprocess.run([sys.executable, '-c', SHOTS], cwd=ROOT, capture_output=True, text=True)
  said = [line for line in done.stdout.splitlines() if line in ('None', '0', '2')]
  assert said == ['None', '0', '2'] and done.stdout.count('a page\n') == 3, done.stderr
