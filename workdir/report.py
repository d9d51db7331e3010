"""What did the run achieve, and what did it cost? report.md, loss.png and, of rewards and the like,
curves.png, from metrics.jsonl and samples.jsonl.

    python -m workdir.report runs/tiny     makes them anew

Training writes them at its end, and when it is interrupted.
"""

import argparse
import io
import math
import os
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import commands
import files
from model import flops
from training import config as configs
from training.config import Config
from training.costs import ReportConfig
from workdir import curves, samples
from workdir.checkpoint import Checkpoints
from workdir.metrics import FILE, lowest, read_metrics
from workdir.seals import FACTS, metrics_problem
from workdir.watch import short

CHINCHILLA_TOKENS_PER_PARAMETER = 20
ASKED = re.compile(r'[^/]+-\d+/')  # the beginning of a score's key: TASK-SHOTS/METRIC


def write_report(
  directory: str | os.PathLike,
  config: ReportConfig,
  *,
  parameters: int,
  flops_per_token: float,
  chips: int,
  hardware: str,
  settings: Config | None = None,
) -> pathlib.Path:
  """Writes report.md and its pictures into the run's directory, each atomically, and returns the
  path of report.md.

  Everything measured comes from metrics.jsonl, and what the run wrote on its way from
  samples.jsonl, so a resumed run is covered whole.

  Args:
    parameters: of the main model, trained or not. flops_per_token: of training
      (model.flops.train_flops_per_token).
    chips: how many the run held. hardware: their name, as the reader should see it.
    settings: of the run; None leaves them out.
  Raises ValueError when metrics.jsonl has no training step.
  """
  directory = files.place(directory)
  lines = read_metrics(directory / FILE)
  if not any('loss' in line for line in lines):
    raise ValueError(f'{directory / FILE} has no training step to report; train first')
  name = directory.resolve().name
  title = f'{name}: {short(parameters)} parameters, {short(lines[-1]["tokens"])} tokens'
  unit = 'nats/token' if settings is None else settings.objective.loss_unit
  files.replace(directory / 'loss.png', plot(lines, title, unit))
  best = kept_best(Checkpoints(directory), lines)
  rows = achieved(lines, unit, best, parameters, flops_per_token, chips, hardware)
  rows += cost(lines, config, chips)
  table = '\n'.join(f'| {name} | {value} |' for name, value in rows)
  pictures = ['![Loss curve](loss.png)', curves.write(directory, lines, title)]
  parts = [f'# {name}', *filter(None, pictures), f'| | |\n| --- | ---: |\n{table}']
  if written := samples.markdown(samples.read(directory)):
    parts += ['## Samples', written]
  if settings is not None:
    parts += ['## Config', described(settings)]
  files.replace(directory / 'report.md', '\n\n'.join(parts) + '\n')
  return directory / 'report.md'


def kept_best(checkpoints: Checkpoints, lines: Sequence[Mapping[str, float]]) -> int | None:
  """The step whose checkpoint is the best one, by whatever it was judged; without checkpoints the
  one with the lowest validation loss. Step 0 is what was begun with, and never judged.
  """
  if checkpoints.steps():
    return checkpoints.best()
  steps, losses = _points(lines, 'validation_loss')
  return lowest({step: loss for step, loss in zip(steps, losses, strict=True) if step})


def achieved(
  lines: Sequence[Mapping[str, float]],
  unit: str,
  best: int | None,
  parameters: int,
  flops_per_token: float,
  chips: int,
  hardware: str,
) -> list[tuple[str, str]]:
  """(what, how much) of a run; unit: of its loss; best: see kept_best. The others are as
  write_report has them.
  """
  rows = _progress(lines, unit, best) + _speed(lines, chips, hardware)
  return rows + _compute(lines, parameters, flops_per_token)


def conclude(
  directory: pathlib.Path, config: Config, facts: Mapping, record: Mapping | None, interrupted: bool
) -> str:
  """Writes the report of a run when a process ends; returns what to say.

  record: of the last checkpoint, where this process has done nothing: metrics.jsonl may then not be
    what that was written with, and there is no report of it.
  """
  problem = '' if record is None else metrics_problem(record, directory)
  if problem:
    return f'WARNING: {problem}: there is no report of it'
  if record is not None and (directory / FACTS).exists():
    # Of the machine that did it, not of the one that looks.
    with commands.mendable():
      facts = kept_facts(directory)
  report = write_report(directory, config.report, settings=config, **facts)
  table, *_ = report.read_text().partition('\n## ')
  return (table if not interrupted else '') + f'\nwrote {report}'


def kept_facts(directory: pathlib.Path) -> dict:
  """What a run's last start that trained knew for its report. Raises ValueError where it was
  changed since.
  """
  path = directory / FACTS
  values = files.json_object(path.read_bytes(), path)
  return files.unsealed(values, path, 'it is written when the run goes on')


def main(arguments: Sequence[str] | None = None) -> None:
  """The command line; what its user can mend ends it with a message."""
  parser = argparse.ArgumentParser(prog='python -m workdir.report', description=__doc__)
  parser.add_argument('run', metavar='RUN', help='directory of a run, also of an interrupted one')
  directory = files.place(parser.parse_args(arguments).run)
  with commands.mendable():
    config, path = configs.load(directory), directory / FACTS
    if not path.exists():
      raise FileNotFoundError(
        f'{path} does not exist: the run is of an older version; when it goes on, it is written'
      )
    report = write_report(directory, config.report, settings=config, **kept_facts(directory))
  print(report.read_text() + f'\nwrote {report}')


def described(config: Config) -> str:
  """What of a config differs from the defaults, as the flags that say so, in Markdown."""
  default = Config(objective=type(config.objective)())
  values, defaults = (configs.flat(configs.to_dict(c)) for c in (config, default))
  flags = {re.sub(r'\.(\d+)(?=\.)', r'[\1]', path): path for path in values}
  lines = [
    f'--config.{flag}={values[path]!r}'
    for flag, path in flags.items()
    if values[path] != defaults.get(path) or path == 'objective.kind'
  ]
  return samples.fenced('\n'.join(lines))


def plot(lines: Sequence[dict[str, float]], title: str, unit: str = 'nats/token') -> bytes:
  """The loss curve as PNG: training (raw and smoothed) and validation in their unit, on a
  logarithmic axis. Validation of several sources has a line for each: where one rises while
  another falls, the model forgets.

  Where evaluations gave bits per byte, the right axis shows the same heights in that unit (nats per
  token x the ratio of the two at the last evaluation). gzip and xz, if measured, are lines for
  validation to get under, in its colour and where it was measured: they are of its documents, and
  say nothing of the training loss.
  """
  from matplotlib import ticker
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 4.5), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  steps, losses = _points(lines, 'loss')
  axes.plot(steps, losses, color='tab:blue', alpha=0.25, linewidth=0.8)
  axes.plot(steps, _smooth(losses), color='tab:blue', linewidth=1.8, label='training')
  evaluated, validation = _points(lines, 'validation_loss')
  if validation:
    axes.plot(
      evaluated,
      validation,
      color='tab:red',
      marker='o',
      markersize=4.5,
      linestyle='none',
      label='validation',
    )
  seen, end = losses + validation, max(1, *steps, *evaluated) * 1.01
  for name, (at, values) in _by_source(lines).items():
    axes.plot(at, values, marker='.', linewidth=1, linestyle='-.', label=f'validation: {name}')
    seen = seen + values
  bits_per_nat = _bits_per_nat(lines)
  if bits_per_nat:
    for (name, value), style in zip(_baselines(lines).items(), ('--', ':'), strict=False):
      label = f'{name}: {value:.2f} bits/byte'
      axes.plot(
        (evaluated[0], end),
        [value / bits_per_nat] * 2,
        color='tab:red',
        linestyle=style,
        linewidth=1,
        label=label,
      )
      seen.append(value / bits_per_nat)
  axes.set(title=title, xlabel='step', ylabel=f'loss ({unit})' if unit else 'loss', xlim=(0, end))
  axes.xaxis.set_major_locator(ticker.MaxNLocator(8, steps=(1, 2, 2.5, 5, 10), integer=True))
  axes.xaxis.set_major_formatter('{x:,.0f}')
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False)
  seen = [value for value in seen if math.isfinite(value)]
  if seen and min(seen) > 0:
    low, high = min(seen) / 1.04, max(seen) * 1.04
    _log_scale(axes, low, high)
    if bits_per_nat:
      right = axes.twinx()
      right.set_ylabel('held-out bits per byte')
      right.spines[['top', 'left']].set_visible(False)
      _log_scale(right, low * bits_per_nat, high * bits_per_nat)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png')
  return buffer.getvalue()


def _log_scale(axes, low: float, high: float):
  from matplotlib import ticker

  axes.set(yscale='log', ylim=(low, high))
  # Evenly spaced numbers where they are of one size, 1, 2 and 5 of each power of ten elsewhere; the
  # default labels powers of ten only.
  if high <= 10 * low:
    locator = ticker.MaxNLocator(8, steps=(1, 2, 2.5, 5, 10))
  else:
    locator = ticker.LogLocator(subs=(1, 2, 5), numticks=99)
  axes.yaxis.set_major_locator(locator)
  axes.yaxis.set_major_formatter('{x:g}')
  axes.yaxis.set_minor_locator(ticker.NullLocator())


def _bits_per_nat(lines) -> float | None:
  # Where the loss is of more than the text, no bits of it belong beside.
  ratios = [
    line['bits_per_byte'] / line['validation_loss']
    for line in lines
    if line.get('bits_per_byte')
    and line.get('validation_loss')
    and 'validation_cross_entropy' not in line
  ]
  return next((ratio for ratio in reversed(ratios) if 0 < ratio < math.inf), None)


def _points(lines, name):
  found = [(line['step'], line[name]) for line in lines if name in line]
  return [step for step, _ in found], [value for _, value in found]


def _by_source(lines) -> dict[str, tuple[list[float], list[float]]]:
  """Validation losses by source, where there are several: (steps, values) of each."""
  prefix = 'validation_loss/'
  keys = dict.fromkeys(key for line in lines for key in line if key.startswith(prefix))
  return {key.removeprefix(prefix): _points(lines, key) for key in keys}


def _by_task(lines) -> dict[str, list[float]]:
  """Scores of tasks that the run was asked (workdir/tasks.py), of each in its order."""
  keys = dict.fromkeys(key for line in lines for key in line if ASKED.match(key))
  return {key: _points(lines, key)[1] for key in keys}


def _smooth(values: Sequence[float]) -> list[float]:
  # A centred mean whose width grows with the step: a trailing one would lag behind the steep start.
  # Gaps stay gaps.
  smooth = []
  for i, value in enumerate(values):
    half = min(i // 8, len(values) // 40)
    near = [near for near in values[i - half : i + half + 1] if math.isfinite(near)]
    smooth.append(statistics.fmean(near) if math.isfinite(value) else math.nan)
  return smooth


def _last(lines, name):
  return next((line[name] for line in reversed(lines) if name in line), None)


def amount(value: float, digits: int) -> str:
  """With so many decimals, but three digits of what they would make 0: 8e-09."""
  return f'{value:.3g}' if 0 < value < 10**-digits else f'{value:,.{digits}f}'


def _baselines(lines) -> dict[str, float]:
  found = {'gzip -9': _last(lines, 'gzip_bits_per_byte'), 'xz -9': _last(lines, 'xz_bits_per_byte')}
  return {name: value for name, value in found.items() if value is not None}


def _progress(lines, unit='nats/token', best=None):
  rows = [
    ('Steps', f'{lines[-1]["step"]:,}'),
    ('Tokens', short(lines[-1]['tokens'])),
    ('Training loss, last', f'{amount(_last(lines, "loss"), 4)} {unit}'.strip()),
  ]
  steps, validation = _points(lines, 'validation_loss')
  if validation:
    losses = dict(zip(steps, validation, strict=True))
    of = 'none' if lowest(losses) is not None else 'none is finite'
    if best is not None:
      # A task may have judged it, at a step of its own.
      loss = f'{amount(losses[best], 4)} at ' if best in losses else ''
      of = f'{loss}step {best:,}'
    last = amount(validation[-1], 4)
    rows.append(('Validation loss, last (best)', f'{last} ({of}) {unit}'.strip()))
  for name, (_, values) in _by_source(lines).items():
    rows.append(
      (
        f'Validation loss of {name}, first, last',
        f'{values[0]:.4f}, {values[-1]:.4f} {unit}'.strip(),
      )
    )
  for name, values in _by_task(lines).items():
    rows.append((f'{name}, first, last', f'{amount(values[0], 4)}, {amount(values[-1], 4)}'))
  steps, rewards = _points(lines, 'validation_reward')
  if rewards:
    rows.append(('Reward of held-out prompts, first, last', f'{rewards[0]:.4f}, {rewards[-1]:.4f}'))
  bits = _last(lines, 'bits_per_byte')
  if bits is not None:
    rows.append(('**Held-out bits per byte**', f'**{bits:.3f}**'))
    for name, value in _baselines(lines).items():
      rows.append(
        (
          f'{name} of the same documents',
          f'{value:.3f}: {"beaten" if bits < value else "not beaten"}',
        )
      )
  if skipped := sum(line.get('nonfinite_steps', 0) for line in lines):
    rows.append(('Steps with a non-finite number', f'{skipped:,}'))
  return rows


def _speed(lines, chips, hardware):
  seconds = [line['step_seconds'] for line in lines if 'step_seconds' in line]
  rates = [line['tokens_per_second'] for line in lines if 'tokens_per_second' in line]
  utilisation = [line['mfu'] for line in lines if 'mfu' in line]
  rows = [('Hardware', f'{chips} x {hardware}')]
  if seconds:
    ninety = (
      statistics.quantiles(seconds, n=10, method='inclusive')[-1]
      if len(seconds) > 1
      else seconds[0]
    )
    rows.append(('Tokens/s (median)', short(statistics.median(rates))))
    rows.append(
      (
        'Seconds per step (median, p90 of the lines logged)',
        f'{short(statistics.median(seconds))}, {short(ninety)}',
      )
    )
  if utilisation:
    rows.append(('MFU (median; causal attention at half)', f'{statistics.median(utilisation):.1%}'))
  if (first := _last(lines, 'first_step_seconds')) is not None:
    rows.append(('First step, compilation included', f'{first:.1f} s'))
  for name, label in (
    ('device_bytes', 'Device memory, peak'),
    ('host_bytes', 'Host memory, largest seen'),
  ):
    if used := max((line.get(name, 0) for line in lines), default=0):
      rows.append((label, f'{used / 2**30:.2f} GiB'))
  return rows


def _compute(lines, parameters, flops_per_token):
  tokens = lines[-1]['tokens']
  spent, estimate = flops_per_token * tokens, flops.six_nd(parameters, tokens)
  ratio = tokens / parameters
  return [
    ('Parameters', short(parameters)),
    ('Model FLOPs spent', f'{spent:.3g}'),
    ('6ND estimate (arXiv:2001.08361)', f'{estimate:.3g}: spent is {spent / estimate:.2f}x'),
    ('Tokens per parameter', f'{ratio:.3g}'),
    (
      f'Chinchilla ratio {CHINCHILLA_TOKENS_PER_PARAMETER} (arXiv:2203.15556)',
      f'{short(CHINCHILLA_TOKENS_PER_PARAMETER * parameters)} tokens: '
      f'{ratio / CHINCHILLA_TOKENS_PER_PARAMETER:.1%} seen',
    ),
  ]


class Spent(NamedTuple):
  """What a run took."""

  hours: float
  chip_hours: float
  kwh: float
  kilograms_co2: float


def spent(lines: Sequence[Mapping[str, float]], config: ReportConfig, chips: int) -> Spent:
  """By the hours of a run, evaluation and checkpoints included; 0 of what has no rate.

  chips: of lines that do not say by how many they were done.
  """
  hours = lines[-1]['wall_seconds'] / 3600
  chip_hours = lines[-1].get('chip_seconds', 3600 * hours * chips) / 3600
  kwh = chip_hours * config.watts_per_chip / 1000 * config.pue
  return Spent(hours, chip_hours, kwh, kwh * config.kilograms_co2_per_kwh)


def cost(
  lines: Sequence[Mapping[str, float]], config: ReportConfig, chips: int
) -> list[tuple[str, str]]:
  """(what, how much) of hours, and of what follows from them by the rates that are known."""
  hours, chip_hours, energy, carbon = spent(lines, config, chips)
  dollars = chip_hours * config.dollars_per_chip_hour
  rows = [
    ('Hours, steps only', f'{lines[-1]["train_seconds"] / 3600:.3g}'),
    ('Hours, with evaluation and checkpoints', f'{hours:.3g}'),
    ('Chip-hours', f'{chip_hours:.3g}'),
  ]
  if config.dollars_per_chip_hour:
    rows.append(('Cost', f'${amount(dollars, 2)}'))
  if config.watts_per_chip:
    rows.append((f'Energy (PUE {config.pue:g})', f'{energy:.3g} kWh'))
    if config.kilograms_co2_per_kwh:
      rows.append(('CO2', f'{carbon:.3g} kg'))
  return rows


if __name__ == '__main__':
  main()
