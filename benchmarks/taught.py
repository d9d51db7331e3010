"""How do measured exponents stand beside those that courses teach? A plot with both, and why they
differ where they do.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import numpy as np

APART = 0.15  # exponents further from what is taught than this want a reason
# (way, quantity, axis) -> why what is measured is not what is taught, on a CPU or as compiled for a
# TPU.
_SCORES = (
  'what is taught keeps no scores. XLA for CPU has those of all blocks of a layer alive at once, '
  'T^2 of them, though of one layer only; the kernel for TPUs has none, and stays near 1'
)
_SHORT = (
  'two terms: products with weights grow as T, those of scores as T^2, and the first are not yet '
  'small at these lengths'
)
WHY = {
  (
    'training, all scores held',
    'memory',
    'T',
  ): 'what is taught is of flash attention; whoever holds '
  'the scores of all queries and keys holds T^2 numbers a head and layer',
  ('training, flash attention', 'memory', 'T'): _SCORES,
  ('training, remat full', 'memory', 'T'): _SCORES,
  ('training, remat sqrt', 'memory', 'T'): _SCORES,
  ('generation, no cache', 'memory', 'T'): _SCORES,
  ('training, remat full', 'memory', 'L'): 'what is taught, the square root, is of keeping about '
  '2 sqrt(L) inputs of layers, as remat=sqrt does; full keeps the input of every layer, which is '
  'less for each and grows as L',
  ('generation, no cache', 'flops', 'T'): _SHORT,
  ('training, flash attention', 'flops', 'T'): _SHORT,
  ('training, remat full', 'flops', 'T'): _SHORT,
  ('training, remat sqrt', 'flops', 'T'): _SHORT,
  ('training, all scores held', 'seconds', 'T'): _SHORT,
  ('training, flash attention', 'seconds', 'T'): _SHORT,
  ('training, remat full', 'seconds', 'T'): _SHORT,
  ('training, remat sqrt', 'seconds', 'T'): _SHORT,
  ('generation, no cache', 'seconds', 'T'): _SHORT,
  ('generation, cache', 'seconds', 'T'): 'a token reads the weights whatever the length, and on a '
  'TPU a step has a time of its own; what grows with T joins these late',
}


@dataclasses.dataclass(frozen=True)
class Line:
  """What was measured of one way along one axis.

  Attributes:
    exponent: fitted; None where the line bends. taught: the exponent that courses give it.
  """

  way: str
  sizes: Sequence[float]
  values: Sequence[float]
  exponent: float | None
  taught: float

  @property
  def differs(self) -> bool:
    return self.exponent is not None and abs(self.exponent - self.taught) > APART

  @property
  def label(self) -> str:
    measured = 'bends' if self.exponent is None else f'{self.exponent:.2f}'
    return f'{self.way}: taught {self.taught:g}, measured {measured}' + ' *' * self.differs


@dataclasses.dataclass(frozen=True)
class Panel:
  """One plot of a figure: a quantity along an axis, 'T' or 'L', and what it was compiled for."""

  quantity: str
  unit: str
  axis: str
  where: str
  lines: Sequence[Line]

  @property
  def title(self) -> str:
    what = {'memory': 'Memory', 'flops': 'Operations', 'seconds': 'Time'}[self.quantity]
    of = {'T': 'tokens of the row, T', 'L': 'layers, L'}[self.axis]
    return f'{what} by {of}: {self.where}'


def reasons(panels: Sequence[Panel]) -> Iterator[str]:
  """A line for every exponent that differs from what is taught."""
  for panel in panels:
    for line in panel.lines:
      if line.differs:
        why = WHY.get((line.way, panel.quantity, panel.axis), 'not looked into')
        yield (
          f'{line.way}, {panel.quantity} in {panel.axis}, {panel.where}: {line.exponent:.2f}, '
          f'taught {line.taught:g}: {why}'
        )


def draw(panels: Sequence[Panel], path: str) -> None:
  """Writes the panels, two a row, on logarithmic axes: dots and lines are measured, dashes of the
  same colour have the slope that is taught, through the last point. `path` ends as an image does.
  """
  import matplotlib
  from matplotlib.figure import Figure

  rows = -(-len(panels) // 2)
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'taught'}):
    figure = Figure(figsize=(13, 5 * rows), layout='constrained')
    for panel, axes in zip(panels, figure.subplots(rows, 2, squeeze=False).flat):
      for number, line in enumerate(panel.lines):
        _one(axes, line, f'C{number}')
      axes.set(xscale='log', yscale='log', xlabel=panel.axis, ylabel=panel.unit, title=panel.title)
      sizes = panel.lines[0].sizes
      axes.set_xticks(sizes, [f'{size:g}' for size in sizes])
      axes.minorticks_off()
      axes.grid(alpha=0.25, linewidth=0.6)
      axes.legend(
        fontsize=7,
        columnspacing=1,
        frameon=False,
        ncols=2,
        loc='upper center',
        bbox_to_anchor=(0.5, -0.12),
      )
    temporary = f'{path}.part{os.path.splitext(path)[1]}'
    metadata = {'Date': None} if path.endswith('.svg') else {}
    figure.savefig(temporary, dpi=100, metadata=metadata)
  os.replace(temporary, path)


def _one(axes, line: Line, colour: str) -> None:
  sizes, values = (np.array(numbers, float) for numbers in (line.sizes, line.values))
  axes.plot(sizes, values, color=colour, marker='o', markersize=4, label=line.label)
  known = np.flatnonzero(np.isfinite(values))
  if known.size:
    last = known[-1]
    guide = values[last] * (sizes / sizes[last]) ** line.taught
    axes.plot(sizes, guide, color=colour, linestyle='--', linewidth=1, alpha=0.6)
