"""How does the time that a person waits grow with what a server writes? A picture, of loops of so
many clients each.
"""

import os
from collections.abc import Mapping

WAITS = {
  'first_p50': 'to the first token, ms (median)',
  'token_p50': 'between two tokens, ms (median)',
  'cpu_ms_per_token': 'CPU-milliseconds of a token',
}


def draw(sides: Mapping[str, Mapping[int, dict]], path: str) -> None:
  """Writes the picture. sides: of each its measurements (serving_load.summary) by clients. `path`
  ends as an image does.
  """
  import matplotlib
  from matplotlib import ticker
  from matplotlib.figure import Figure

  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'serving'}):
    figure = Figure(figsize=(13, 4.5), layout='constrained')
    for axes, (name, title) in zip(figure.subplots(1, len(WAITS)), WAITS.items()):
      by = 1 if name == 'cpu_ms_per_token' else 1e3
      for number, (side, found) in enumerate(sides.items()):
        points = sorted((int(clients), each) for clients, each in found.items())
        x = [each['tokens_per_second'] for _, each in points]
        y = [each[name] * by for _, each in points]
        axes.plot(x, y, color=f'C{number}', marker='o', markersize=4, label=side)
        for at, wait, (clients, _) in zip(x, y, points):
          axes.annotate(f'{clients}', (at, wait), (3, 4), textcoords='offset points', fontsize=7)
      axes.set(xlabel='tokens/s of all answers', ylabel=title, xscale='log', yscale='log')
      for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:,g}'))
        axis.set_minor_formatter(ticker.NullFormatter())
      axes.grid(alpha=0.25, linewidth=0.6, which='both')
    figure.legend(
      *axes.get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False
    )
    figure.suptitle('Numbers: clients, each of which asks again when it has its answer', fontsize=9)
    temporary = f'{path}.part{os.path.splitext(path)[1]}'
    metadata = {'Date': None} if path.endswith('.svg') else {}
    figure.savefig(temporary, dpi=100, metadata=metadata)
  os.replace(temporary, path)
