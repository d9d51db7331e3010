"""Do both sides of the benchmark of DPO and GRPO train the same, and is its table what was found?
No timing is looked at.
"""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import rl, rl_tandem
from model import params, transformer

SETTING = rl.Setting(**rl.QUICK | {'model': 'toy', 'prompt': 8, 'new': 6, 'length': 128})


def answers_of(pairs):
  """(ids, how many of them are the prompt's) of every chosen, and of every rejected one."""
  halves = [[(tuple(half), len(pair.prompt)) for half in pair.halves] for pair in pairs]
  return [sorted(side) for side in zip(*halves, strict=True)]


def test_rows_are_all_pairs_once():
  setting = dataclasses.replace(SETTING, pairs=6, steps=3, rows=3)
  first, others = rl.pairs_of(setting)
  warm, batches = rl_tandem.batches_of(setting)
  assert len(first) == 6 and len(others) == 18 and len(batches) == 3
  for given, found in ((first, [warm]), (others, batches)):
    sides = [], []
    for batch in found:
      assert batch.tokens.shape == warm.tokens.shape and len(batch.tokens) == 3
      for row in range(3):
        for segment in range(1, batch.segments[row].max() + 1):
          here = batch.segments[row] == segment
          ids = (batch.tokens[row, here][0].item(), *batch.targets[row, here].tolist())
          assert ids[:-1] == tuple(batch.tokens[row, here].tolist())
          prompt = int(np.flatnonzero(batch.weights[row, here])[0]) + 1
          assert (batch.weights[row, here] == (np.arange(len(ids) - 1) >= prompt - 1)).all()
          sides[1 - segment % 2].append((ids, prompt))
    assert [sorted(side) for side in sides] == answers_of(given)


def test_what_is_asked_for_is_over_what_is_quick():
  options = dict.fromkeys(vars(rl.Setting()), None) | {'quick': True, 'new': 7}
  found = rl.setting_of(type('Options', (), options))
  assert found == rl.Setting(**rl.QUICK | {'new': 7})
  model = jax.eval_shape(lambda: transformer.init(rl.Setting().network(), 0))
  assert params.count(model) == 31_990_272


def dpo(steps, **more):
  found = {'steps': steps, 'tokens': 60, 'positions': 80, 'peak_bytes': 2**30, 'parameters': 5}
  found['processors'] = [2 * x for x in steps]
  found |= {'device': 'cpu', 'device_peak_bytes': None, 'logp_chosen': -500.0}
  return found | {'losses': [0.6931, 0.5]} | more


def test_the_ratio_is_of_the_better_runs(capsys):
  runs = {'tandem': [dpo([1.0, 1.0]), dpo([1.0, 3.0])], 'trl': [dpo([2.0, 8.0]), dpo([2.0, 4.0])]}
  found = rl.show_dpo(SETTING, runs)
  assert found['ratio'] == pytest.approx({'pairs_per_second': 3, 'processors': 3, 'memory': 1})
  assert 'Tandem' in capsys.readouterr().out
  for wrong in ({'losses': [0.6931, 0.502]}, {'logp_chosen': -501.0}):
    with pytest.raises(RuntimeError, match='not the same was trained'):
      rl.show_dpo(SETTING, {'tandem': [dpo([1.0, 1.0])], 'trl': [dpo([1.0, 1.0], **wrong)]})


def test_the_phases_are_shares_of_the_step(capsys):
  ours = {'generate': 1.0, 'judge': 0.1, 'score': 0.0, 'step': 0.8, 'other': 0.1}
  theirs = dict.fromkeys(rl.PHASES) | {'generate': 4.0, 'other': 2.0}
  more = {'bandwidth': 1e9, 'read_bytes': 0.25e9}
  runs = {
    'tandem': [dpo([1.0, 1.0], phases=ours, **more)],
    'trl': [dpo([3.0, 3.0], phases=theirs)],
  }
  found = rl.show_grpo(SETTING, runs)
  assert found['ratio'] == pytest.approx(
    {'tokens_per_second': 3, 'generate': 4, 'else': 2, 'processors': 3, 'memory': 1}
  )
  assert found['share_of_bandwidth'] == pytest.approx(0.25)
  assert found['best']['tandem']['tokens_per_second'] == pytest.approx(2 * 4 * 6)
  said = capsys.readouterr().out
  assert '50.0%' in said and '4.00x as fast' in said


@pytest.mark.oracle
@pytest.mark.slow
def test_both_sides_train_the_same(tmp_path):
  """The same weights, pairs, loss, gradient and optimizer; as many answers of the same length."""
  pytest.importorskip('trl', reason='trl is not installed')
  from benchmarks import rl_trl

  rl_trl.weights(SETTING, str(tmp_path))
  sides = {'tandem': rl_tandem, 'trl': rl_trl}
  for kind, show in (('dpo', rl.show_dpo), ('grpo', rl.show_grpo)):
    runs = {name: side.__dict__[kind](SETTING, str(tmp_path)) for name, side in sides.items()}
    for run in runs.values():
      assert len(run['steps']) == SETTING.steps
    found = show(SETTING, {name: [run | {'peak_bytes': 1}] for name, run in runs.items()})
    if kind == 'dpo':
      before, after = runs['trl']['losses']
      assert before == pytest.approx(np.log(2), abs=1e-4) and after < before - 3 * rl.AGREE
  for run in found['best'].values():
    assert sum(s for s in run['shares'].values() if s is not None) == pytest.approx(1)
    assert run['shares']['generate'] > 0
