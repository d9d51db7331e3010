"""Does the exercise take a T5 in the form that transformers writes?"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from evaluation import exercise_report, generated
from tests.oracle.test_harness import T5, tokenizer_files

pytestmark = [pytest.mark.oracle, pytest.mark.long]
transformers = pytest.importorskip('transformers')
ROOT = pathlib.Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}


def exercise(*flags) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'evaluation.flan_t5_exercise', *map(str, flags)]
  return subprocess.run(command, cwd=ROOT, env=CLEAN, capture_output=True, text=True)


def test_a_t5_of_transformers_is_tuned_in_every_way(tmp_path):
  """Two steps of a model that knows nothing: what is told is that all four ways come to a report,
  by the config, rates and questions of --model.
  """
  directory = tmp_path / 'flan'
  transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).save_pretrained(directory)
  tokenizer_files(directory, 't5')
  place = tmp_path / 'exercise'
  ended = exercise(f'--model={directory}', f'--workdir={place}', '--steps=2', '--limit=4')
  assert not ended.returncode, ended.stdout[-2000:] + ended.stderr[-2000:]

  report = json.loads((place / exercise_report.VALUES).read_text())
  tasks = {*generated.GENERAL, generated.TARGET}
  assert {each['task'] for each in report['before']} == tasks
  assert {each['n'] for each in report['before']} == {4}
  rates = {each['name']: each['rate'] for each in report['ways']}
  assert rates == {'full': 1e-3, 'lower': 3e-5, 'lora': 1e-3, 'replay': 1e-3}
  for name in rates:
    record = json.loads((place / name / 'config.json').read_text())
    assert record['model']['d_model'] == T5['d_model'] and record['train']['steps'] == 2
  again = exercise(f'--model={directory}', f'--workdir={place}', '--steps=2', '--limit=4')
  assert again.stdout.count('is there already') == 10, 'one import, and asked and tuned four ways'

  other = exercise(f'--model={directory}', f'--workdir={place}', '--steps=3', '--limit=4')
  assert other.returncode and '--config.train.steps=2' in other.stderr
