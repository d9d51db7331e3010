"""Is a run in a bucket the run that it would be on a disk, whatever happens to its processes?"""

import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.remote.conftest import BOTH
from workdir import arrays
from workdir.checkpoint import Checkpoints
from workdir.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
TEXT = '\n'.join(f'{i} times {i + 1} is {i * i + i}.' for i in range(400))
CONFIG = """
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from training.config import Config, TrainConfig


def get_config():
  data = DataConfig(
    sources=(SourceConfig(kind='text', path='HERE/*.md'),),
    clean=CleanConfig(near_duplicates=0.0),
    tokenizer=TokenizerConfig(kind='byte'),
    sequence_length=16,
    batch_size=8,
    split='tail',
  )
  model = ModelConfig(width=16, layers=1, heads=2, feed_forward=32, max_length=16)
  return Config(model=model, data=data, train=TrainConfig(steps=6, log_every=1, save_every=1))
"""


def command(tmp_path, workdir, *more) -> list[str]:
  path = tmp_path / 'small.py'
  path.write_text(CONFIG.replace('HERE', str(tmp_path)))
  (tmp_path / 'text.md').write_text(TEXT)
  cache = f'--config.data.cache_dir={tmp_path / "cache"}'
  return [sys.executable, 'train.py', f'--config={path}', f'--workdir={workdir}', cache, *more]


def leaves(place, step: int) -> dict[str, np.ndarray]:
  checkpoints = Checkpoints(place)
  assert checkpoints.latest() == step
  at = checkpoints.directory / f'{step:08d}'
  return {
    name: np.asarray(arrays.ts.open(arrays.spec(at / name)).result().read().result())
    for name in checkpoints.record(step)['leaves']
  }


def run(arguments) -> str:
  done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_is_killed_in_a_bucket_ends_as_one_on_a_disk(bucket, tmp_path, monkeypatch):
  """Killed after steps, with a checkpoint under way; bit for bit, every step once."""
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  run(command(tmp_path, tmp_path / 'disk'))
  for step in (2, 4, 5):
    arguments = command(tmp_path, bucket / 'run')
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1)
    for line in process.stdout:
      if line.startswith(f'step {step}/'):
        break
    process.kill()
    process.wait()
    process.stdout.close()
  said = run(command(tmp_path, bucket / 'run'))
  assert 'going on from checkpoint' in said and f'wrote {bucket}/run/report.md' in said
  here, there = leaves(tmp_path / 'disk', 6), leaves(bucket / 'run', 6)
  assert here.keys() == there.keys()
  for name, x in here.items():
    np.testing.assert_array_equal(x, there[name], err_msg=name)
  lines = read_metrics(bucket / 'run' / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [*range(1, 7)]
  expected = read_metrics(tmp_path / 'disk' / 'metrics.jsonl')
  assert [line['loss'] for line in lines] == [line['loss'] for line in expected]
  assert not (bucket / 'run' / 'lock').exists() and os.listdir(tmp_path / 'disk')


KILLS = 15  # of each kind of bucket


@BOTH
@pytest.mark.slow
@pytest.mark.long
def test_kills_at_any_moment_change_nothing(bucket, tmp_path, monkeypatch):
  """Within half a second after one of a process's first steps, at each of which it saves: with
  arrays under way, before their record, within it, in metrics, in the lock.
  """
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  draw, steps = random.Random(7), 60
  length = f'--config.train.steps={steps}'
  run(command(tmp_path, tmp_path / 'disk', length, '--config.train.save_every=20'))
  arguments = command(tmp_path, bucket / 'run', length)
  reached = []
  for kill in range(KILLS):
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1)
    # When a third step is told, the checkpoint of the first is whole.
    left = 1 + kill % 3
    for line in process.stdout:
      left -= line.startswith('step ')
      if not left:
        break
    time.sleep(draw.uniform(0, 0.5))
    process.kill()
    process.wait()
    process.stdout.close()
    reached.append(Checkpoints(bucket / 'run', log=lambda line: None).latest() or 0)
  assert reached == sorted(reached) and len({*reached}) >= KILLS // 3
  assert 'going on from checkpoint' in run(arguments)
  here, there = leaves(tmp_path / 'disk', steps), leaves(bucket / 'run', steps)
  for name, x in here.items():
    np.testing.assert_array_equal(x, there[name], err_msg=name)
  lines = read_metrics(bucket / 'run' / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [*range(1, steps + 1)]
  expected = read_metrics(tmp_path / 'disk' / 'metrics.jsonl')
  assert [line['loss'] for line in lines] == [line['loss'] for line in expected]
  assert not (bucket / 'run' / 'lock').exists()


@pytest.mark.slow
@pytest.mark.long
def test_everything_of_a_run_may_be_in_a_bucket(bucket, tmp_path, monkeypatch):
  """Text, cache, the model that it begins with, itself; and what is done with it."""
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  (bucket / 'text' / 'text.md').write_text(TEXT)
  places = (
    f'--config.data.sources[0].path={bucket}/text/*.md',
    f'--config.data.cache_dir={bucket}/cache',
    '--config.train.steps=1',
  )
  first = run(command(tmp_path, bucket / 'first', *places))
  assert f'data: sent it to {bucket}/cache/' in first
  monkeypatch.setenv('TANDEM_CACHE', str(tmp_path / 'another-machine'))
  second = run(command(tmp_path, bucket / 'second', *places, f'--config.init={bucket}/first'))
  assert f'data: copying {bucket}/cache/' in second
  assert f'beginning with the parameters of {bucket}/first' in second
  python = sys.executable
  workdir = f'--workdir={bucket}/second'
  run([python, 'generate.py', workdir, '--prompt=The', '--max_new_tokens=4'])
  said = run([python, 'evaluate.py', workdir, '--tasks=stdlib', '--limit=1'])
  assert f'sent to {bucket}/second/evaluation' in said
  assert (bucket / 'second' / 'evaluation' / 'evaluation.json').is_file()
  run([python, 'convert.py', 'export', workdir, f'--to={tmp_path / "hf"}'])
  run([python, 'convert.py', 'import', f'--from={tmp_path / "hf"}', f'--workdir={bucket}/again'])
  said = run([python, 'convert.py', 'inspect', f'{bucket}/again'])
  assert said.startswith(f'{bucket}/again: ')
