"""Does a student that has little text to learn from learn more from a teacher that had much? Real
text, the interpreter's own library, byte by byte; docs/alignment.md tells of it.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import sysconfig

import pytest

from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from objectives.distil import Distil
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig
from workdir.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
LIBRARY = sysconfig.get_paths()['stdlib']
SEEDS = range(3)
# A process of its own: tests have eight devices, and programs that are not optimised.
CODE = 'import sys; from tests.training.test_distil_demo import everything; everything(sys.argv[1])'


def config(directory, files, width, steps, seed=0, teacher='') -> Config:
  """Of a run on files of the library; those from ta to tk are held out."""
  made = Config(
    model=ModelConfig(
      width=width, layers=2, heads=2, kv_heads=1, feed_forward=3 * width, qk_norm=True
    ),
    data=DataConfig(
      sources=(SourceConfig(kind='text', path=f'{LIBRARY}/{files}'),),
      validation=(SourceConfig(kind='text', path=f'{LIBRARY}/t[a-k]*.py'),),
      validation_fraction=0.0,
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      tokenizer=TokenizerConfig(kind='byte'),
      sequence_length=64,
      batch_size=16,
      cache_dir=f'{directory}/cache',
      seed=seed,
    ),
    optimizer=OptimizerConfig(
      name='muon', learning_rate=0.018, schedule='linear', warmup_steps=20, weight_decay=0.01
    ),
    train=TrainConfig(steps=steps, seed=seed, log_every=100, save_every=steps),
  )
  return dataclasses.replace(made, objective=Distil(teacher=teacher)) if teacher else made


def everything(directory: str) -> None:
  """A teacher on 70 files, and students on one, alone and taught."""
  import train

  place = pathlib.Path(directory)
  train.run(config(directory, '[m-s]*.py', 64, 600), place / 'teacher')
  for seed in SEEDS:
    for name, teacher in (('alone', ''), ('taught', str(place / 'teacher'))):
      student = config(directory, 'textwrap.py', 32, 300, seed, teacher)
      train.run(student, place / f'{name}-{seed}')


@pytest.mark.slow
@pytest.mark.long
def test_a_student_is_better_than_alone_by_more_than_the_spread(tmp_path):
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  command = [sys.executable, '-c', CODE, str(tmp_path)]
  subprocess.run(command, cwd=ROOT, env=environment | {'JAX_PLATFORMS': 'cpu'}, check=True)
  losses = {'alone': [], 'taught': []}
  for name, of in losses.items():
    for seed in SEEDS:
      last = read_metrics(tmp_path / f'{name}-{seed}' / 'metrics.jsonl')[-1]
      of.append(last.get('validation_cross_entropy', last['validation_loss']))
  print(json.dumps(losses))
  spread = max(max(of) - min(of) for of in losses.values())
  assert min(losses['alone']) - max(losses['taught']) > spread, losses
