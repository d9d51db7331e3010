"""Do policies learn what they are rewarded for, from what they write themselves? Demonstrations,
each of three seeds.
"""

import dataclasses
import json
import random

import numpy as np
import pytest
from conftest import run_here, tiny

from configs.rewards import brackets
from data.config import CleanConfig, SourceConfig
from objectives.policy import GRPO
from objectives.sft import SFT
from workdir.metrics import read_metrics

LENGTH, NEW = 24, 10
PAIRS = {'(': ')', '[': ']', '{': '}'}


def written(directory, name, rows, kind):
  path = directory / f'{name}.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return SourceConfig(kind='jsonl', path=str(path), format=kind)


def opened(draw):
  """Brackets that are open, two to five of them."""
  return ''.join(draw.choices('([{', k=draw.randint(2, 5)))


def closed(draw, text):
  """By somebody who gets every other bracket wrong."""
  right = [PAIRS[bracket] for bracket in reversed(text)]
  return ''.join(draw.choice(')]}') if draw.random() < 0.5 else bracket for bracket in right)


def config(directory, source, name, objective, rate, steps, **fields):
  made = tiny(
    model={'width': 64, 'layers': 2, 'feed_forward': 128, 'max_length': LENGTH},
    data={
      'sources': (source,),
      'clean': CleanConfig(anonymise=(), near_duplicates=0, exact_duplicates=False),
      'split': 'hash',
      'validation_fraction': 0.1,
      'sequence_length': LENGTH,
      'batch_size': 64,
      'cache_dir': str(directory / 'cache'),
    },
    optimizer={'learning_rate': rate, 'schedule': 'constant', 'warmup_fraction': 0.0},
    train={
      'steps': steps,
      'save_every': steps,
      'eval_every': steps // 4,
      **fields.pop('train', {}),
    },
  )
  return dataclasses.replace(made, objective=objective, **fields)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_brackets_are_closed(tmp_path, seed):
  """By somebody who has learned from what is right now and then."""
  draw = random.Random(seed)
  prompts = [opened(draw) for _ in range(3000)]
  closers = [{'prompt': prompt, 'completion': closed(draw, prompt)} for prompt in prompts]
  source = written(tmp_path, 'closers', closers, 'completion')
  base = config(tmp_path, source, 'base', SFT(), 3e-3, 200, train={'seed': seed})
  run_here(base, tmp_path / 'base', quick=False)

  source = written(tmp_path, 'asked', [{'prompt': prompt} for prompt in prompts], 'prompt')
  objective = GRPO(max_new_tokens=NEW, reward=(brackets.__file__,), group=8)
  made = config(
    tmp_path,
    source,
    'grpo',
    objective,
    3e-4,
    120,
    init=str(tmp_path / 'base'),
    train={'seed': seed, 'eval_every': 40, 'eval_batches': 2},
  )
  run_here(made, tmp_path / 'grpo', quick=False)
  lines = read_metrics(tmp_path / 'grpo' / 'metrics.jsonl')
  rewards = [line['validation_reward'] for line in lines if 'validation_reward' in line]
  print(rewards, [round(float(line['reward']), 2) for line in lines if 'reward' in line])
  assert rewards[0] < 0.2 and rewards[-1] > 0.9
  assert np.isfinite(rewards).all()
