"""Does the exercise take a T5 in the form that transformers writes?"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from evaluation import exercise_report, generated
from tests.oracle.test_harness import T5

pytestmark = [pytest.mark.oracle, pytest.mark.long]
transformers = pytest.importorskip('transformers')
ROOT = pathlib.Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}


def write_model(directory: pathlib.Path) -> None:
  """A new T5 and a tokenizer of words of dialogues, which fit into its rows, as those of Flan-T5
  do.
  """
  import tokenizers as library

  made = library.Tokenizer(library.models.BPE())
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = library.decoders.ByteLevel()
  alphabet, marks = library.pre_tokenizers.ByteLevel.alphabet(), ['<pad>', '<end>']
  trainer = library.trainers.BpeTrainer(
    vocab_size=512, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
  )
  rows = generated.rows(generated.TARGET, 200)
  made.train_from_iterator([f'{row["source"]} {row["target"]}' for row in rows], trainer)
  made.post_processor = library.processors.TemplateProcessing(
    single='$A <end>', special_tokens=[('<end>', 1)]
  )
  ids = {'pad_token_id': 0, 'decoder_start_token_id': 0, 'eos_token_id': 1}
  config = transformers.T5Config(**T5 | ids | {'vocab_size': made.get_vocab_size()})
  transformers.T5ForConditionalGeneration(config).save_pretrained(directory)
  made.save(str(directory / 'tokenizer.json'))
  settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<end>'}
  settings |= {'pad_token': '<pad>'}
  (directory / 'tokenizer_config.json').write_text(json.dumps(settings))


def exercise(*flags) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'evaluation.flan_t5_exercise', *map(str, flags)]
  return subprocess.run(command, cwd=ROOT, env=CLEAN, capture_output=True, text=True)


def test_a_t5_of_transformers_is_tuned_in_every_way(tmp_path):
  """Two steps of a model that knows nothing: what is told is that all four ways come to a report,
  by the config, rates and questions of --model.
  """
  directory = tmp_path / 'flan'
  write_model(directory)
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
    assert record['model']['width'] == T5['d_model'] and record['train']['steps'] == 2
  again = exercise(f'--model={directory}', f'--workdir={place}', '--steps=2', '--limit=4')
  assert again.stdout.count('is there already') == 10, 'one import, and asked and tuned four ways'

  other = exercise(f'--model={directory}', f'--workdir={place}', '--steps=3', '--limit=4')
  assert other.returncode and '--config.train.steps=2' in other.stderr
