"""Does a model that answers in two ways come to prefer the one that is preferred, on prompts that
it never saw, and without longer answers?
"""

import dataclasses
import json
import random

import numpy as np
import pytest

from data.config import CleanConfig, SourceConfig
from decode.generator import Generator
from objectives.preference import Preference
from objectives.sft import SFT
from tests.training.conftest import run_here, tiny
from workdir.metrics import read_metrics

LENGTH = 64
STEPS = {'tuned': 300, 'dpo': 60}


def answers(word):
  """Two ways: as it is, politely, and shouted; of one length."""
  return f'{word}, please.', f'{word.upper()}, NOW!!!'


def written(directory, seed):
  """Words to tune on, which both ways answer alike; others to compare; and their files."""
  draw = random.Random(seed)
  words = sorted({''.join(draw.choices('abcdefgh', k=draw.randint(3, 6))) for _ in range(500)})
  draw.shuffle(words)
  tuned, compared = words[:250], words[250:]
  records = [
    {'prompt': f'{word}>', 'completion': answer} for word in tuned for answer in answers(word)
  ]
  pairs = [
    {'prompt': f'{word}>', 'chosen': polite, 'rejected': loud}
    for word in compared
    for polite, loud in [answers(word)]
  ]
  sources = {}
  for name, rows, kind in (('tuned', records, 'completion'), ('dpo', pairs, 'preference')):
    path = directory / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    sources[name] = SourceConfig(kind='jsonl', path=str(path), format=kind)
  return compared, sources


def config(directory, sources, name, objective, rate, **fields):
  made = tiny(
    model={'width': 64, 'layers': 2, 'feed_forward': 128, 'max_length': LENGTH},
    data={
      'sources': (sources[name],),
      'clean': CleanConfig(anonymise=(), near_duplicates=0),
      'split': 'hash',
      'validation_fraction': 0.2,
      'sequence_length': LENGTH,
      'batch_size': 16,
      'cache_dir': str(directory / 'cache'),
    },
    optimizer={'learning_rate': rate},
    train={
      'steps': STEPS[name],
      'save_every': STEPS[name],
      'log_every': 20,
      'eval_every': STEPS[name],
      **fields,
    },
    mesh={'data': -1},
  )
  return dataclasses.replace(made, objective=objective)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('seed', range(3))
def test_a_scripted_preference_is_learned(tmp_path, seed):
  compared, sources = written(tmp_path, seed)
  seeds = {'seed': seed}
  run_here(
    config(tmp_path, sources, 'tuned', SFT(), 3e-3, **seeds), tmp_path / 'tuned', quick=False
  )
  made = config(tmp_path, sources, 'dpo', Preference(), 2e-4, **seeds)
  made = dataclasses.replace(made, init=str(tmp_path / 'tuned'))
  run_here(made, tmp_path / 'dpo', quick=False)

  said = read_metrics(tmp_path / 'dpo' / 'metrics.jsonl')[-1]
  wrote = {}
  for name in ('tuned', 'dpo'):
    generator = Generator.load(tmp_path / name)
    options = {'temperature': 1.0, 'max_new_tokens': 40, 'seed': seed}
    made = generator([f'{word}>' for word in compared[:40]], **options)
    polite = np.mean([answer.text.endswith('please.') for answer in made])
    wrote[name] = polite, np.mean([len(answer.ids) for answer in made])
  print(f'seed {seed}: {wrote}, {said}')
  assert said['validation_accuracy'] > 0.95
  assert wrote['tuned'][0] < 0.75 < 0.9 < wrote['dpo'][0]
  assert wrote['dpo'][1] <= 1.1 * wrote['tuned'][1]
