"""How do numbers look beside each other, each with its interval? A panel for those of a kind."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

ROWS = 60  # of a panel


def picture(panels: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]], title: str) -> bytes:
  """A PNG. panels: {what is measured: (of what, value with low and high)}, where None is no number:
  of these there is no point, and no bar of what has no interval.
  """
  from matplotlib.figure import Figure

  drawn = {name: _drawn(rows) for name, rows in panels.items()}
  drawn = {name: rows for name, rows in drawn.items() if rows}
  heights = [0.7 + 0.22 * min(len(rows), ROWS) for rows in drawn.values()] or [1.0]
  figure = Figure(figsize=(8, 0.6 + sum(heights)), layout='constrained')
  axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
  for ax, (name, rows) in zip(axes, drawn.items()):
    left_out = f' (the first {ROWS} of {len(rows)})' if len(rows) > ROWS else ''
    ax.set_title(_plain(f'{name}{left_out}'), fontsize=8)
    rows = rows[:ROWS]
    for y, (_, value, below, above) in enumerate(rows):
      ax.errorbar(
        [value], [y], xerr=[[below], [above]], fmt='o', color='C0', capsize=3, markersize=4
      )
    ax.set_yticks(range(len(rows)), [_plain(label) for label, *_ in rows], fontsize=7)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis='x', alpha=0.3)
    ax.tick_params(axis='x', labelsize=7)
  figure.suptitle(_plain(title), fontsize=9)
  file = io.BytesIO()
  figure.savefig(file, dpi=110, format='png')
  return file.getvalue()


def _plain(text: str) -> str:
  """As matplotlib shows it, which takes what is between two $ for a formula."""
  return text.replace('$', '\\$')


def _drawn(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, float, float, float]]:
  """(label, value, how far its interval reaches below it, and above) of what has a number."""
  made = []
  for label, of in rows:
    value, low, high = (
      math.nan if of[key] is None else of[key] for key in ('value', 'low', 'high')
    )
    if math.isfinite(value):
      ends = [max(x, 0.0) if math.isfinite(x) else 0.0 for x in (value - low, high - value)]
      made.append((label, value, *ends))
  return made
