"""What does a person see of a judgement? A page of what a run lost by becoming smaller, and
pictures: how the loss is spread over tokens, and over layers and kinds of matrices.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from compression.sensitivity import MatrixPlace

PAGE, PICTURE = 'judged.md', 'judged.png'
# Fewer tokens than this decide nothing: the page says so instead of calling a model fine.
ENOUGH = 10_000


def page(values: Mapping, rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
  """Markdown. values: of judged.json. rows: (what, figure). notes: what is to be known besides."""
  n = values['n']
  stored = ', '.join(f'`{entry}`' for entry in values['stored']) or 'numbers'
  lines = [
    f'# {values["smaller"]}, which was {values["original"]}',
    f'Matrices by {stored}. Both read {n["tokens"]:,} tokens of {n["documents"]} documents; '
    'intervals are of 95%, over documents.',
    '\n'.join(['| | |', '| --- | ---: |', *(f'| {name} | {figure} |' for name, figure in rows)]),
    f'![where it is lost]({PICTURE})',
    '\n'.join(f'- {note}' for note in notes),
  ]
  return '\n\n'.join(line for line in lines if line) + '\n'


def notes(values: Mapping, width: float) -> list[str]:
  """width: of the interval of KL, over KL."""
  tokens, said = values['n']['tokens'], []
  if tokens < ENOUGH:
    said.append(
      f'{tokens:,} tokens are few: of fewer than {ENOUGH:,} this page does not say whether the '
      'smaller model will do; judge it by more (--limit=0, --text)'
    )
  elif width > 0.5:
    said.append('the interval of KL is wider than half of it: more documents would tell more')
  return said


def picture(
  each: np.ndarray, grids: Sequence[tuple[str, Mapping[MatrixPlace, float]]], title: str
) -> bytes:
  """A PNG. each: KL of every token. grids: (what, value of each place), one heat map of each."""
  from matplotlib.colors import LogNorm
  from matplotlib.figure import Figure

  grids = [(name, values) for name, values in grids if values]
  layers = max((len({place.layer for place in values}) for _, values in grids), default=0)
  height = max(3.2, 1.6 + 0.16 * layers)
  figure = Figure(figsize=(4.2 + 4.2 * len(grids), height), layout='constrained')
  spread, *maps = np.atleast_1d(figure.subplots(1, 1 + len(grids)))
  figure.suptitle(title, fontsize=9)

  shares = np.linspace(0, 1, 201)
  spread.semilogy(shares, np.maximum(np.quantile(each, shares), 1e-8))
  spread.axvline(0.99, color='grey', linewidth=0.8, linestyle=':')
  spread.set(xlabel='share of tokens with less', ylabel='KL, nats', title='KL by token')
  spread.title.set_fontsize(9)
  spread.grid(alpha=0.3)

  for axes, (name, values) in zip(maps, grids):
    kinds = sorted({place.kind for place in values})
    rows = sorted({place.layer for place in values})
    matrix = np.full((len(rows), len(kinds)), np.nan)
    for place, value in values.items():
      matrix[rows.index(place.layer), kinds.index(place.kind)] = max(value, 1e-8)
    low, high = np.nanmin(matrix), np.nanmax(matrix)
    image = axes.imshow(
      matrix, aspect='auto', cmap='viridis', norm=LogNorm(low, max(high, low * 1.01))
    )
    axes.set_xticks(
      range(len(kinds)), kinds, rotation=45, ha='right', rotation_mode='anchor', fontsize=7
    )
    step = 1 + len(rows) // 16
    names = ['none' if row < 0 else str(row) for row in rows]
    axes.set_yticks(range(0, len(rows), step), names[::step], fontsize=7)
    axes.set(ylabel='layer', title=name)
    axes.title.set_fontsize(9)
    figure.colorbar(image, ax=axes, shrink=0.8)

  file = io.BytesIO()
  figure.savefig(file, dpi=120, format='png')
  return file.getvalue()
