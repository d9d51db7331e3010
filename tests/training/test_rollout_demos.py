"""Do policies learn what they are rewarded for, from what they write themselves? Demonstrations,
each of three seeds.
"""

import dataclasses
import json
import random

import numpy as np
import pytest

from configs.rewards import brackets
from data.config import CleanConfig, SourceConfig
from decode.generator import Generator
from objectives.policy import GRPO
from objectives.ppo import PPO
from objectives.reward import Reward
from objectives.sft import SFT
from parallel.mesh import MeshConfig
from tests.training.conftest import run_here, tiny
from workdir.metrics import read_metrics
from workdir.reward import judge, normalise
from workdir.rollouts import FILE

LENGTH, NEW = 24, 10
TARGET = 2.0  # nats of an answer from the policy as it began
PAIRS = {'(': ')', '[': ']', '{': '}'}


def written(directory, name, rows, kind):
  path = directory / f'{name}.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return SourceConfig(kind='jsonl', path=str(path), format=kind)


def opened(draw):
  """Brackets that are open, two to five of them."""
  return ''.join(draw.choices('([{', k=draw.randint(2, 5)))


def closed(draw, text):
  """By somebody who is right about half of the time, a bracket."""
  right = [PAIRS[bracket] for bracket in reversed(text)]
  return ''.join(draw.choice(')]}') if draw.random() < 0.65 else bracket for bracket in right)


def config(directory, source, name, objective, rate, steps, length=LENGTH, asked=(), **fields):
  """asked: sources that are held out; none: a tenth of `source`."""
  made = tiny(
    model={'width': 64, 'layers': 2, 'feed_forward': 128, 'max_length': 80},
    data={
      'sources': (source,),
      'clean': CleanConfig(anonymise=(), near_duplicates=0, exact_duplicates=False),
      **(
        {'validation': asked, 'validation_fraction': 0.0}
        if asked
        else {'split': 'hash', 'validation_fraction': 0.1}
      ),
      'sequence_length': length,
      'batch_size': 64,
      'cache_dir': str(directory / 'cache'),
    },
    optimizer={
      'learning_rate': rate,
      'schedule': 'constant',
      'warmup_fraction': 0.0,
      **fields.pop('optimizer', {}),
    },
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
  """By somebody who has learned from what is right now and then. There are 360 prompts, most of
  which a policy meets; those it is asked at evaluations are drawn as they are.
  """
  draw = random.Random(seed)
  prompts = [opened(draw) for _ in range(20_000)]
  closers = [{'prompt': prompt, 'completion': closed(draw, prompt)} for prompt in prompts]
  source = written(tmp_path, 'closers', closers, 'completion')
  base = config(tmp_path, source, 'base', SFT(), 3e-3, 500, train={'seed': seed})
  run_here(base, tmp_path / 'base', quick=False)

  asked, held_out = (
    written(tmp_path, name, [{'prompt': prompt} for prompt in some], 'prompt')
    for name, some in (('asked', prompts[:3000]), ('held_out', prompts[-256:]))
  )
  objective = GRPO(max_new_tokens=NEW, reward=(brackets.__file__,), group=16, minibatches=2)
  made = config(
    tmp_path,
    asked,
    'grpo',
    objective,
    3e-4,
    240,
    asked=(held_out,),
    init=str(tmp_path / 'base'),
    optimizer={'schedule': 'linear'},
    train={'seed': seed, 'eval_every': 60, 'eval_batches': 4},
  )
  run_here(made, tmp_path / 'grpo', quick=False)
  lines = read_metrics(tmp_path / 'grpo' / 'metrics.jsonl')
  rewards = [line['validation_reward'] for line in lines if 'validation_reward' in line]
  print(rewards, [round(float(line['reward']), 2) for line in lines if 'reward' in line])
  assert rewards[0] < 0.2 and rewards[-1] > 0.9
  assert np.isfinite(rewards).all()


def answers(word):
  """Two ways: politely, and shouted; of one length."""
  return f'{word}, please.', f'{word.upper()}, NOW!!!'


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_what_a_reward_model_prefers_is_written(tmp_path, seed):
  """From either way by chance to the preferred one, on words that nobody showed, and no farther
  from where it began than the target.
  """
  draw = random.Random(seed)
  words = sorted({''.join(draw.choices('abcdefgh', k=draw.randint(3, 6))) for _ in range(900)})
  draw.shuffle(words)
  tuned, judged, asked = words[:300], words[300:500], words[500:]
  seeds = {'seed': seed}
  records = [{'prompt': f'{w}>', 'completion': answer} for w in tuned for answer in answers(w)]
  source = written(tmp_path, 'tuned', records, 'completion')
  made = config(tmp_path, source, 'tuned', SFT(), 3e-3, 300, length=40, train=seeds)
  run_here(made, tmp_path / 'tuned', quick=False)
  began = {'init': str(tmp_path / 'tuned')}

  pairs = [
    {'prompt': f'{word}>', 'chosen': polite, 'rejected': loud}
    for word in judged
    for polite, loud in [answers(word)]
  ]
  source = written(tmp_path, 'pairs', pairs, 'preference')
  made = config(
    tmp_path, source, 'reward', Reward(centring=0.01), 5e-4, 60, length=80, train=seeds, **began
  )
  run_here(made, tmp_path / 'reward', quick=False)
  found = judge(made, tmp_path / 'reward', MeshConfig(data=1), 'last', 0, 0, print)
  normalise(tmp_path / 'reward', found)

  prompts = [{'prompt': f'{word}>'} for word in asked]
  source = written(tmp_path, 'asked', prompts, 'prompt')
  objective = PPO(
    max_new_tokens=24,
    reward=(str(tmp_path / 'reward'),),
    missing_end=1.0,
    beta=0.05,
    kl_target=TARGET,
    minibatches=1,
    epochs=2,
  )
  made = config(
    tmp_path,
    source,
    'ppo',
    objective,
    3e-4,
    120,
    length=40,
    train=seeds | {'eval_every': 40},
    **began,
  )
  run_here(made, tmp_path / 'ppo', quick=False)
  lines = [json.loads(line) for line in (tmp_path / 'ppo' / FILE).read_text().splitlines()]
  metrics = read_metrics(tmp_path / 'ppo' / 'metrics.jsonl')
  of_answer = [line['kl'] * line['answer_length'] for line in metrics if 'kl' in line]
  polite = {}
  for name in ('tuned', 'ppo'):
    options = {'temperature': 1.0, 'max_new_tokens': 30, 'seed': seed}
    wrote = Generator.load(tmp_path / name)([f'{word}>' for word in judged[:60]], **options)
    polite[name] = np.mean([answer.text.endswith('please.') for answer in wrote])
  print(polite, lines[0]['reward'], lines[-1]['reward'], of_answer[::8])
  assert polite['tuned'] < 0.7 and polite['ppo'] > 0.9
  assert lines[-1]['reward'] > lines[0]['reward'] + 0.5
  assert np.mean(of_answer[-10:]) < TARGET
