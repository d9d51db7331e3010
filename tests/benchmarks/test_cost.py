"""Are the tables of cost what they say? The paper's figures by its formula; toys by command."""

import pytest

from benchmarks import checkpointing, cost, train_cpu
from benchmarks.zero import State
from data.config import DataConfig
from model.config import ModelConfig
from training.config import Config

TOY = ModelConfig(vocabulary=256, width=64, layers=4, heads=4, feed_forward=128, max_length=64)


@pytest.mark.parametrize('stage, gigabytes', [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_formula_gives_the_papers_figure(stage, gigabytes):
  """arXiv:1910.02054, figure 1: 7.5 B parameters on 64 GPUs."""
  assert cost.taught(7.5e9, 64, stage) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_stages_of_a_toy():
  """A whole copy of 16 bytes a parameter on each chip, and an eighth of it on each of eight."""
  whole, split = cost.state(TOY, 8, 0), cost.state(TOY, 8, 3)

  def bytes_of(state: State) -> int:
    return state.chip - state.parts['activations']

  assert bytes_of(whole) == pytest.approx(16 * whole.count, rel=0.01)
  assert bytes_of(split) == pytest.approx(16 * whole.count / 8, rel=0.1)


def test_more_chips_where_one_is_too_small():
  count = cost.state(TOY, 8, 3).count
  assert cost.least_chips(TOY, count, 1e9) == 1
  assert cost.least_chips(TOY, count, 16 * count * 0.8) == 2
  with pytest.raises(ValueError, match='do not hold the model'):
    cost.least_chips(TOY, count, 1e3)


@pytest.mark.slow
def test_the_tables_of_a_toy(monkeypatch, capsys):
  monkeypatch.setattr(cost, 'MODELS', {'toy': TOY})
  results = cost.main(['--rate', '3'])
  row = results['price']['toy']
  assert row['tokens'] == 20 * row['parameters'] and row['flops'] > 0
  assert row['dollars'] == pytest.approx(3 * row['chip_hours'])
  assert 'MFU of the printed hours' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
def test_what_policies_keep(monkeypatch):
  monkeypatch.setattr(
    train_cpu,
    'config',
    lambda: Config(model=TOY, data=DataConfig(sequence_length=64, batch_size=2)),
  )
  results = checkpointing.main(['--steps', '1'])
  kept = [results[way]['kept'] for way in ('full', 'dots', 'dots + attention', 'none')]
  assert kept == sorted(kept) and kept[0] < kept[-1] / 3
  assert results['full']['flops'] > 1.15 * results['none']['flops'] > 0
  assert all(0 < figures['cpu_seconds'] < float('inf') for figures in results.values())
