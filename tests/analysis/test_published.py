"""Are published step times what their sources say, and is each beside a plan of the same run?"""

import json
import math
import pathlib
import re
import sys

import pytest
from absl import flags

from analysis import hardware, published
from training import overrides

ROOT = pathlib.Path(__file__).parents[2]
# What MaxText's README said, in TFLOP/s of a chip, and what its step computes.
RATES = {'64b dots v5p:4x4x4': 323, '16b v5e:16x16': 120, '32b v5e:16x16': 132}
RATES['64b v5e:16x16'] = 118
# Tokens a second and chip in the logs of the recipes, which say seconds, too.
TOKENS = {
  'llama3.1-8b v6e:2x4': 7138.890,
  'llama3.1-8b v6e:4x4': 7243.378,
  'llama3.1-8b v6e:4x8': 7031.689,
  'llama3.1-8b v6e:8x8': 7247.111,
  'llama3.1-8b v6e:16x16': 7207.336,
  'mistral-7b v6e:2x4': 7776.813,
  'llama3.1-70b v6e:8x16': 941.976,
  'llama3.1-70b v6e:16x16': 960.248,
}


def config_of(run, monkeypatch):
  """The config that plan.py would make of a run's flags."""
  among = flags.FlagValues()
  holder = overrides.define_flag(among)
  monkeypatch.setattr(overrides.app, 'parse_flags_with_usage', among)
  monkeypatch.setattr(sys, 'argv', ['plan.py', *run.flags])
  overrides.parsed(sys.argv)
  return overrides.from_flag(holder.value)


def chips(run) -> int:
  return math.prod(map(int, run.topology.partition(':')[2].split('x')))


@pytest.mark.parametrize('run', published.runs(), ids=lambda run: run.name)
def test_a_plan_is_of_the_run_that_was_published(run, monkeypatch):
  config = config_of(run, monkeypatch)
  m, T, n = config.model, config.data.sequence_length, chips(run)
  assert math.prod(config.mesh.resolve(n).values()) == n and run.rows % n == 0
  tokens = run.rows // n * T
  if run.name in TOKENS:
    assert tokens / run.published == pytest.approx(TOKENS[run.name], rel=1e-3)
    return
  # MaxText's count: matrices three times, all pairs of attention three times.
  H = m.head_width
  layer = 3 * m.width * m.feed_forward + 2 * m.width * H * (m.N + m.K)
  matrices = 6 * tokens * (m.L * layer + m.width * m.vocabulary)
  attention = 12 * tokens * T * m.N * H * m.L
  rate = (matrices + attention) / run.published / 1e12
  assert rate == pytest.approx(RATES[run.name], rel=2e-3)


def test_every_run_stands_in_the_docs():
  page = (ROOT / 'docs/plans.md').read_text()
  for row in published.table():
    assert row in page
  assert {run.chip for run in published.runs()} == {'TPU v5e', 'TPU v5p', 'TPU v6e'}
  assert len({run.name for run in published.runs()}) == len(published.runs()) >= 8


def test_predictions_are_those_that_the_benchmark_wrote():
  written = json.loads((ROOT / 'benchmarks/results/published.json').read_text())['results']
  predicted = {run.name: run for run in published.runs() if run.predicted is not None}
  assert {*predicted} == {*written}
  for name, run in predicted.items():
    kept = written[name]
    assert run.predicted == pytest.approx(kept['predicted'], abs=5e-4)
    assert run.fits == kept['fits'], name
    assert kept['asked']['flags'] == [*run.flags, f'--topology={run.topology}'], name


def test_a_plan_says_what_predictions_for_its_chip_are_worth(monkeypatch):
  v6e, v4 = hardware.lookup('TPU v6e'), hardware.lookup('TPU v4')
  run = published.runs()[0]
  made = [
    published.dataclasses.replace(run, published=2.0, predicted=seconds) for seconds in (1.6, 2.1)
  ]
  monkeypatch.setattr(published, 'runs', lambda: made)
  assert re.search('of 2 step times published for a TPU v6e.*80% to 105%', published.band(v6e))
  monkeypatch.setattr(published, 'runs', lambda: made[:1])
  assert 'of the one step time published' in published.band(v6e)
  assert 'no step time that was published for a TPU v4' in published.band(v4)
