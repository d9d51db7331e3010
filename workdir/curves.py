"""How did a model come to prefer, to be rewarded, or to be like its teacher? curves.png, from
metrics.jsonl: rewards, accuracies, divergences and what moves with them, in panels of their own.

    python -m workdir.curves runs/grpo                        draws a run's anew
    python -m workdir.curves runs/0 runs/1 --output=both.png  several runs, one on the other

Of what has no such numbers (next_token and its like) the loss curve is all.
"""

import argparse
import io
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import commands
import files
from workdir.metrics import FILE, read_metrics

PICTURE = 'curves.png'
ACCURACY = 'accuracy'
REWARDS = {'reward_chosen', 'rewards_wanted'}  # of a reward model, of KTO
# (what, its limits, keys of metrics.jsonl). A key beside validation_KEY is drawn as a line, and
# that as dots.
PANELS: tuple[tuple[str, tuple[float, float] | None, tuple[str, ...]], ...] = (
  ('reward', None, ('reward',)),
  ('reward of an answer', None, ('rewards_chosen', 'rewards_rejected')),
  ('reward of an answer', None, ('reward_chosen', 'reward_rejected')),
  ('reward of an answer', None, ('rewards_wanted', 'rewards_unwanted')),
  ('share of pairs told right', (0, 1), ('reward_accuracy',)),
  ('share told right', (0, 1), (ACCURACY,)),
  ('nats a token', None, ('kl', 'policy_kl')),
  ('nats a token', None, ('divergence', 'cross_entropy')),
  ('entropy, nats a token', None, ('entropy',)),
  ('tokens of an answer', None, ('answer_length',)),
  ('share', (0, 1), ('ended', 'clip_fraction', 'equal_groups', 'explained')),
)
# What an evaluation calls otherwise than a step does.
EVALUATED = {'reward_accuracy': 'validation_accuracy'}
WIDE = 3  # panels beside each other

Points = tuple[list[float], list[float]]  # steps, values


def panels(lines: Sequence[Mapping[str, float]]) -> list[tuple[str, tuple | None, dict]]:
  """(what, limits, {key: its points}) of the panels for which there is something to draw."""
  drawn = []
  for what, limits, keys in PANELS:
    names = [name for key in keys for name in (key, EVALUATED.get(key, f'validation_{key}'))]
    found = {name: points(lines, name) for name in names}
    found = {name: of for name, of in found.items() if of[0]}
    # An accuracy is of tokens, but for what compares answers, which have rewards.
    if keys == (ACCURACY,) and not any(line.keys() & REWARDS for line in lines):
      continue
    if found.keys() - EVALUATED.values():
      drawn.append((what, limits, found))
  return drawn


def points(lines: Sequence[Mapping[str, float]], name: str) -> Points:
  """Of finite numbers."""
  found = [(line['step'], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
  return [step for step, _ in found], [value for _, value in found]


def plot(runs: Mapping[str, Sequence[Mapping[str, float]]], title: str) -> bytes | None:
  """A PNG of runs by name, lines of the same colour being of the same number; None where no run has
  anything to draw.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  # A panel is the same one in all runs by the first number that it shows.
  kinds: dict[tuple[str, str], tuple[tuple | None, list[dict[str, Points]]]] = {}
  for lines in runs.values():
    for what, limits, found in panels(lines):
      kinds.setdefault((what, next(iter(found))), (limits, []))[1].append(found)
  if not kinds:
    return None
  columns = min(WIDE, len(kinds))
  rows = -(-len(kinds) // columns)
  figure = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.3), dpi=110, layout='constrained')
  FigureCanvasAgg(figure)
  every = figure.subplots(rows, columns, squeeze=False).ravel()
  for axes, ((what, _), (limits, each)) in zip(every, kinds.items()):
    _panel(axes, what, limits, each)
  for axes in every[len(kinds) :]:
    axes.set_axis_off()
  figure.suptitle(title, fontsize=10)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png')
  return buffer.getvalue()


def _panel(axes, what: str, limits, runs: Sequence[Mapping[str, Points]]) -> None:
  from matplotlib import ticker

  colours: dict[str, str] = {}
  for number, found in enumerate(runs):
    for name, (steps, values) in found.items():
      evaluated = name.startswith('validation_')
      colour = colours.setdefault(name, f'C{len(colours)}')
      how = {'marker': 'o', 'markersize': 4, 'linewidth': 0.8} if evaluated else {'linewidth': 1.2}
      label = name.replace('validation_', 'held out: ').replace('_', ' ')
      axes.plot(steps, values, color=colour, label='' if number else label, alpha=0.85, **how)
  axes.set(xlabel='step', ylabel=what)
  if limits:
    low, high = limits
    axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False, fontsize=7)


def write(directory: str | os.PathLike, lines: Sequence[Mapping[str, float]], title: str) -> str:
  """Draws a run's curves into its directory; Markdown that shows them, '' where there are none."""
  picture = plot({'': lines}, title)
  if picture is None:
    return ''
  files.replace(files.place(directory) / PICTURE, picture)
  return f'![Rewards, divergences and accuracies]({PICTURE})'


def main(arguments: Sequence[str] | None = None) -> None:
  """The command line; what its user can mend ends it with a message."""
  parser = argparse.ArgumentParser(
    prog='python -m workdir.curves',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('runs', metavar='RUN', nargs='+', help='directories of runs')
  parser.add_argument('--output', default='', help=f'a PNG; of one run default {PICTURE} in it')
  parser.add_argument('--title', default='', help='over the picture; default: names of the runs')
  options = parser.parse_args(arguments)
  with commands.mendable():
    if len(options.runs) > 1 and not options.output:
      raise ValueError(f'{len(options.runs)} runs are drawn into a file that --output names')
    output = pathlib.Path(options.output or pathlib.Path(options.runs[0]) / PICTURE)
    runs = {}
    for run in options.runs:
      runs[run] = read_metrics(pathlib.Path(run) / FILE)
      if not panels(runs[run]):
        raise ValueError(
          f'{pathlib.Path(run) / FILE} has no rewards, divergences or accuracies of pairs: they '
          'are of preferences, rewards and distillation; loss.png shows its loss'
        )
    title = options.title or ', '.join(pathlib.Path(run).resolve().name for run in runs)
    files.replace(output, plot(runs, title))
  print(f'wrote {output}')


if __name__ == '__main__':
  main()
