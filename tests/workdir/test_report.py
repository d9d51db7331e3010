"""Does the report say what metrics.jsonl says, and is nothing claimed that is not known?"""

import gzip
import json
import lzma
import math
import re

import pytest
from hypothesis import given, settings, strategies as st

import files
from data.compressors import compression_baselines
from data.config import DataConfig, SourceConfig
from training import config as configs
from training.config import Config, TrainConfig
from workdir import curves, report, samples
from workdir.checkpoint import Checkpoints
from workdir.metrics import FILE
from workdir.report import ReportConfig, write_report
from workdir.seals import FACTS


def run(tmp_path, evaluated=True, mfu=True, loss=None):
  with open(tmp_path / FILE, 'w') as file:
    for step in range(0, 101, 10):
      line = dict(
        step=step,
        loss=4 - step / 50 if loss is None else loss,
        tokens=step * 1000,
        train_seconds=step * 18.0,
        wall_seconds=step * 36.0,
        host_bytes=step * 2**30,
      )
      if step:
        line |= dict(step_seconds=0.5 + step / 1000, tokens_per_second=2000.0 - step) | (
          dict(mfu=0.4) if mfu else {}
        )
      else:
        line |= dict(first_step_seconds=7.25)
      if evaluated and step % 50 == 0:
        line |= dict(
          validation_loss=4.1 - step / 50,
          bits_per_byte=2.05 - step / 100,
          gzip_bits_per_byte=2.08,
          xz_bits_per_byte=0.9,
        )
      file.write(json.dumps(line) + '\n')


def rows(path):
  text = path.read_text()
  return dict(re.findall(r'^\| (.+?) \| (.+) \|$', text, re.M)), text


def write(tmp_path, config=ReportConfig(), **changes):
  settings = dict(parameters=10_000, flops_per_token=75_000.0, chips=4, hardware='TPU v5e')
  return rows(write_report(tmp_path, config, **settings | changes))


def test_every_row_against_hand_arithmetic(tmp_path):
  run(tmp_path)
  rates = ReportConfig(
    dollars_per_chip_hour=2.5, watts_per_chip=200, kilograms_co2_per_kwh=0.5, pue=1.1
  )
  table, text = write(tmp_path, rates)
  assert '![Loss curve](loss.png)' in text and (tmp_path / 'loss.png').read_bytes().startswith(
    b'\x89PNG'
  )
  assert table['Steps'] == '100' and table['Tokens'] == '100k' and table['Parameters'] == '10k'
  assert table['Training loss, last'] == '2.0000 nats/token'
  assert table['Validation loss, last (best)'] == '2.1000 (2.1000 at step 100) nats/token'
  assert table['**Held-out bits per byte**'] == '**1.050**'
  assert table['gzip -9 of the same documents'] == '2.080: beaten'
  assert table['xz -9 of the same documents'] == '0.900: not beaten'
  assert (
    table['Hardware'] == '4 x TPU v5e'
    and table['MFU (median; causal attention at half)'] == '40.0%'
  )
  assert (
    table['Tokens/s (median)'] == '1.95k' and table['First step, compilation included'] == '7.2 s'
  )
  assert table['Seconds per step (median, p90 of the lines logged)'] == '0.555, 0.591'
  assert table['Host memory, largest seen'] == '100.00 GiB'
  assert table['Model FLOPs spent'] == '7.5e+09'
  assert table['6ND estimate (arXiv:2001.08361)'] == '6e+09: spent is 1.25x'
  assert table['Tokens per parameter'] == '10'
  assert table['Chinchilla ratio 20 (arXiv:2203.15556)'] == '200k tokens: 50.0% seen'
  assert (
    table['Hours, steps only'] == '0.5' and table['Hours, with evaluation and checkpoints'] == '1'
  )
  assert table['Chip-hours'] == '4' and table['Cost'] == '$10.00'
  assert table['Energy (PUE 1.1)'] == '0.88 kWh' and table['CO2'] == '0.44 kg'


def test_the_largest_is_the_largest_wherever_it_was_and_steps_are_counted(tmp_path):
  """Memory peaks before the end; of 30 steps seven had a number that is not finite, in two lines;
  the report's unit is that of the last evaluation.
  """
  lines = [
    {'step': 10, 'loss': 3.0, 'host_bytes': 2**30, 'nonfinite_steps': 3},
    {'step': 20, 'loss': 2.0, 'host_bytes': 5 * 2**30, 'nonfinite_steps': 4},
    {'step': 30, 'loss': 2.5, 'host_bytes': 3 * 2**30},
  ]
  for line, bits in zip(lines, (2.0, 3.0, 5.0), strict=True):
    line |= {'tokens': 1, 'train_seconds': 1.0, 'wall_seconds': 1.0, 'device_bytes': 2**31}
    line |= {'validation_loss': 4.0, 'bits_per_byte': bits}
  (tmp_path / FILE).write_text(''.join(json.dumps(line) + '\n' for line in lines))
  table, _ = write(tmp_path)
  assert table['Host memory, largest seen'] == '5.00 GiB'
  assert table['Device memory, peak'] == '2.00 GiB'
  assert table['Steps with a non-finite number'] == '7'
  assert table['**Held-out bits per byte**'] == '**5.000**'
  assert report._bits_per_nat(lines) == 5.0 / 4.0


def test_nothing_is_claimed_without_a_rate_a_peak_or_an_evaluation(tmp_path):
  run(tmp_path, evaluated=False, mfu=False)
  table, text = write(tmp_path)
  rates = {'Cost', 'Energy (PUE 1)', 'CO2'}
  assert not rates & table.keys()
  assert (
    'MFU' not in text
    and 'bits per byte' not in text
    and 'gzip' not in text
    and 'Validation' not in text
  )
  table, _ = write(tmp_path, ReportConfig(kilograms_co2_per_kwh=0.5))
  assert not rates & table.keys()
  table, _ = write(tmp_path, ReportConfig(watts_per_chip=500))
  assert table['Energy (PUE 1)'] == '2 kWh' and rates & table.keys() == {'Energy (PUE 1)'}


# But what the collector of garbage says of files that an earlier test left open.
@pytest.mark.filterwarnings('error', 'ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('loss', ['nan', -1.0, 0.0])
def test_odd_losses_still_make_a_report(tmp_path, loss):
  run(tmp_path, evaluated=False, loss=loss)
  table, _ = write(tmp_path)
  assert table['Training loss, last'] == f'{float(loss):.4f} nats/token'


def test_best_validation_is_the_smallest_finite(tmp_path):
  with open(tmp_path / FILE, 'w') as file:
    for step, loss in enumerate(['nan', 3.0, 2.0, 2.5]):
      line = dict(
        step=step, loss=3.0, validation_loss=loss, tokens=1, train_seconds=1.0, wall_seconds=1.0
      )
      file.write(json.dumps(line) + '\n')
  assert (
    write(tmp_path)[0]['Validation loss, last (best)'] == '2.5000 (2.0000 at step 2) nats/token'
  )


def test_losses_that_are_not_finite_are_not_the_best(tmp_path):
  with open(tmp_path / FILE, 'w') as file:
    for step, loss in enumerate(['nan', '-inf']):
      line = dict(
        step=step, loss=1.0, validation_loss=loss, tokens=1, train_seconds=1, wall_seconds=1
      )
      file.write(json.dumps(line) + '\n')
  assert write(tmp_path)[0]['Validation loss, last (best)'] == '-inf (none is finite) nats/token'


def test_the_best_is_the_checkpoint_that_is_kept_as_best(tmp_path):
  """Not what it began with, nor a last evaluation of all batches, nor what train.best does not ask
  for.
  """
  losses = {0: 1.0, 10: 2.0, 20: 3.0, 30: 1.5}
  lines = [{'step': step, 'validation_loss': loss, 'loss': 3.0} for step, loss in losses.items()]
  for line in lines:
    line |= {'tokens': 1, 'train_seconds': 1.0, 'wall_seconds': 1.0}
  (tmp_path / FILE).write_text(''.join(json.dumps(line) + '\n' for line in lines))
  row = 'Validation loss, last (best)'
  assert write(tmp_path)[0][row] == '1.5000 (1.5000 at step 30) nats/token'
  checkpoints = Checkpoints(tmp_path)
  checkpoints.directory.mkdir()
  for step, cost in ((10, 2.0), (20, 1.75), (30, None)):
    checkpoints._write_record(step, {'step': step, 'cost': cost, 'progress': {}})
  assert write(tmp_path)[0][row] == '1.5000 (3.0000 at step 20) nats/token'
  checkpoints._write_record(25, {'step': 25, 'cost': 0.5, 'progress': {}})
  assert write(tmp_path)[0][row] == '1.5000 (step 25) nats/token'


def test_an_empty_run_is_refused_and_nothing_is_written(tmp_path):
  with pytest.raises(ValueError, match='no training step'):
    write(tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_failed_plot_leaves_the_last_report_whole(tmp_path, monkeypatch):
  run(tmp_path)
  write(tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

  def fail(*_):
    raise RuntimeError('no fonts')

  monkeypatch.setattr(report, 'plot', fail)
  with pytest.raises(RuntimeError):
    write(tmp_path)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_right_axis_is_the_left_one_in_bits_per_byte(tmp_path, monkeypatch):
  from matplotlib.figure import Figure

  seen = []
  monkeypatch.setattr(Figure, 'savefig', lambda figure, *args, **kwargs: seen.append(figure))
  nats, ratio = [8.0, 4.0, 2.0], 0.5
  report.plot(
    [
      dict(
        step=step,
        loss=loss,
        validation_loss=loss,
        bits_per_byte=loss * ratio,
        gzip_bits_per_byte=3.0,
      )
      for step, loss in enumerate(nats)
    ],
    'a run',
  )
  left, right = seen[0].axes
  assert right.get_ylim() == pytest.approx([limit * ratio for limit in left.get_ylim()])
  lines = {line.get_label(): line for line in left.get_lines()}
  assert list(lines['validation'].get_ydata()) == nats
  assert lines['gzip -9: 3.00 bits/byte'].get_ydata()[0] == pytest.approx(6.0)
  # To be beaten by validation: drawn as that is, from where it begins.
  assert lines['gzip -9: 3.00 bits/byte'].get_color() == lines['validation'].get_color()
  assert left.get_title() == 'a run' and left.get_ylabel() == 'loss (nats/token)'
  assert left.get_ylim()[0] < min(nats) and left.get_ylim()[1] > max(nats)


def test_each_source_has_a_line_and_a_row(monkeypatch):
  from matplotlib.figure import Figure

  seen = []
  monkeypatch.setattr(Figure, 'savefig', lambda figure, *args, **kwargs: seen.append(figure))
  lines = [
    {'step': 1, 'loss': 3.0, 'validation_loss': 2.5, 'validation_loss/law': 3.0},
    {'step': 2, 'loss': 2.0, 'validation_loss': 2.0, 'validation_loss/law': 1.5},
  ]
  report.plot(lines, 'a run')
  drawn = {line.get_label(): list(line.get_ydata()) for line in seen[0].axes[0].get_lines()}
  assert drawn['validation: law'] == [3.0, 1.5] and drawn['validation'] == [2.5, 2.0]
  rows = dict(report._progress([line | {'tokens': 1} for line in lines]))
  assert rows['Validation loss of law, first, last'] == '3.0000, 1.5000 nats/token'


@settings(deadline=None)
@given(st.lists(st.floats(0, 10) | st.just(math.nan), min_size=1, max_size=200))
def test_smoothing_stays_within_the_values_and_keeps_gaps(values):
  smooth = report._smooth(values)
  finite = [value for value in values if not math.isnan(value)]
  assert [math.isnan(value) for value in smooth] == [math.isnan(value) for value in values]
  assert all(
    min(finite) - 1e-9 <= value <= max(finite) + 1e-9 for value in smooth if not math.isnan(value)
  )


def test_smoothing_does_not_lag_behind_a_steep_start():
  values = [10 * math.exp(-i / 20) for i in range(400)]
  assert max(abs(a - b) for a, b in zip(report._smooth(values), values, strict=True)) < 0.1


TEXTS = st.lists(st.text(max_size=300) | st.text('ab \n', max_size=3000), min_size=1, max_size=5)


@settings(max_examples=5, deadline=None)
@given(TEXTS.filter(any))
def test_baselines_are_the_command_lines_at_level_9(documents):
  data = [document.encode() for document in documents]
  bits = {
    'gzip': sum(len(gzip.compress(d, 9)) for d in data),
    'xz': sum(len(lzma.compress(d, preset=9)) for d in data),
  }
  assert compression_baselines(documents) == {
    name: 8 * size / sum(map(len, data)) for name, size in bits.items()
  }


def test_baselines_on_source_code_match_the_slow_way():
  documents = [open(module.__file__).read() for module in (gzip, lzma, json, re, report)]
  raw = sum(len(document.encode()) for document in documents)
  slow = sum(len(lzma.compress(document.encode(), preset=9)) for document in documents)
  found = compression_baselines(iter(documents))
  assert found['xz'] == 8 * slow / raw and 1.5 < found['xz'] < found['gzip'] < 3.5
  with pytest.raises(ValueError, match='no bytes'):
    compression_baselines(['', ''])


@pytest.mark.parametrize(
  'bad',
  [
    dict(watts_per_chip=-1.0),
    dict(dollars_per_chip_hour=math.nan),
    dict(pue=0.9),
    dict(kilograms_co2_per_kwh=math.inf),
  ],
)
def test_impossible_rates_are_refused(bad):
  (name,) = bad
  with pytest.raises(ValueError, match=f'report.{name}='):
    ReportConfig(**bad)


def test_a_run_that_was_interrupted_is_reported_anew_by_its_own_files(tmp_path, capsys):
  run(tmp_path)
  configs.save(Config(report=ReportConfig(dollars_per_chip_hour=2.5)), tmp_path)
  with pytest.raises(SystemExit, match='run.json does not exist'):
    report.main([str(tmp_path)])
  facts = {'parameters': 10_000, 'flops_per_token': 75_000.0, 'chips': 4, 'hardware': 'TPU v5e'}
  (tmp_path / FACTS).write_text(json.dumps(files.sealed(facts)))
  report.main([str(tmp_path)])
  table, text = rows(tmp_path / 'report.md')
  assert table['Cost'] == '$10.00' and table['Hardware'] == '4 x TPU v5e'
  assert text in capsys.readouterr().out
  (tmp_path / FACTS).write_text(json.dumps(files.sealed(facts) | {'chips': 8}))
  with pytest.raises(SystemExit, match='run.json was changed'):
    report.main([str(tmp_path)])


@pytest.mark.parametrize('low, high', [(3.4, 6.8), (3.9, 4.1), (0.02, 11.0), (1.0, 9.5)])
def test_a_few_round_numbers_stand_at_the_axis(low, high):
  from matplotlib.figure import Figure

  axes = Figure().subplots()
  report._log_scale(axes, low, high)
  ticks = [x for x in axes.yaxis.get_major_locator()() if low <= x <= high]
  assert 4 <= len(ticks) <= 9 and all(len(f'{x:g}') <= 5 for x in ticks)


def test_the_report_holds_config_and_samples_over_time(tmp_path):
  run(tmp_path)
  kept = [
    samples.Sample(step, prompt, f' ``` at {step}')
    for step in range(10, 101, 10)
    for prompt in ('def', 'class')
  ]
  (tmp_path / samples.FILE).write_text(''.join(map(samples._line, kept)) + '{"step": 11')
  source = SourceConfig(kind='text', path='*.txt')
  config = Config(data=DataConfig(sources=(source,)), train=TrainConfig(steps=300))
  _, text = write(tmp_path, settings=config)
  assert '--config.train.steps=300\n' in text and "--config.data.sources[0].path='*.txt'" in text
  assert '--config.train.seed' not in text
  steps = [int(step) for step in re.findall(r'^Step (\d+):', text, re.M)]
  assert len(steps) <= samples.SHOWN and steps[-1] == 100 and steps == sorted(steps)
  assert '````text\nclass ``` at 100\n````' in text


def test_curves_are_of_what_a_run_says(tmp_path, capsys):
  """Panels by the numbers that there are; none for a loss alone, nor for accuracies of tokens."""
  lines = [
    {'step': step, 'loss': 1.0, 'tokens': step + 1, 'train_seconds': 1.0, 'wall_seconds': 1.0}
    | {'reward': step / 10, 'kl': math.nan if step == 2 else 0.1, 'accuracy': 0.5}
    | ({'validation_reward': 0.5, 'validation_accuracy': 0.7} if step == 3 else {})
    for step in range(5)
  ]
  drawn = {what: found for what, _, found in curves.panels(lines)}
  assert drawn == {
    'reward': {
      'reward': ([0, 1, 2, 3, 4], [0, 0.1, 0.2, 0.3, 0.4]),
      'validation_reward': ([3], [0.5]),
    },
    'nats a token': {'kl': ([0, 1, 3, 4], [0.1] * 4)},
  }
  pairs = [{'step': 0, 'reward_accuracy': 0.5, 'rewards_chosen': 1.0, 'validation_accuracy': 0.7}]
  names = [name for *_, found in curves.panels(pairs) for name in found]
  assert names == ['rewards_chosen', 'reward_accuracy', 'validation_accuracy']

  for name in ('one', 'other'):
    (tmp_path / name).mkdir()
    (tmp_path / name / FILE).write_text(''.join(json.dumps(line) + '\n' for line in lines))
  _, text = write(tmp_path / 'one')
  assert f'({curves.PICTURE})' in text and (tmp_path / 'one' / curves.PICTURE).exists()
  both = [str(tmp_path / name) for name in ('one', 'other')]
  curves.main([*both, f'--output={tmp_path}/both.png'])
  assert (tmp_path / 'both.png').read_bytes().startswith(b'\x89PNG')
  run(tmp_path)
  _, text = write(tmp_path)
  assert curves.PICTURE not in text and not (tmp_path / curves.PICTURE).exists()
  with pytest.raises(SystemExit, match='has no rewards, divergences or accuracies of pairs'):
    curves.main([str(tmp_path)])
  with pytest.raises(SystemExit, match='2 runs are drawn into a file that --output names'):
    curves.main(both)
