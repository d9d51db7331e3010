"""What do the pictures of docs/meshes.md show? Drawn from the code that they are of: the table of
logical axes, the schedules of pipelines, the order of rows in a ring.

    python docs/pictures.py     writes docs/pictures/*.svg anew

tests/test_docs_site.py fails where a picture is not what this draws.
"""

import itertools
import pathlib
from collections.abc import Iterator
from xml.sax.saxutils import escape

import numpy as np
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from kernels.mask import zigzag
from parallel import axes as ax
from parallel.mesh import AXES
from parallel.pipeline import PipelineConfig, schedule, schedule_1f1b

HERE = pathlib.Path(__file__).parent / 'pictures'
DEVICES = 4
COLOURS = ('#4c78a8', '#f58518', '#54a24b', '#b279a2')
WHOLE, LINE, INK, PALE = '#dddddd', '#ffffff', '#222222', '#666666'


class Drawing:
  """An SVG on white, which both a dark and a light page show."""

  def __init__(self, width: float, height: float, title: str):
    self.size, self.title, self.parts = (width, height), title, []

  def box(self, x, y, width, height, fill, stroke=LINE):
    self.parts.append(
      f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
      f'stroke="{stroke}" stroke-width="0.7"/>'
    )

  def text(self, x, y, text, size=12, anchor='start', fill=INK, bold=False):
    weight = ' font-weight="bold"' if bold else ''
    self.parts.append(
      f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}>'
      f'{escape(text)}</text>'
    )

  def lines(self, x, y, *texts, **how):
    """One below the other."""
    for number, text in enumerate(texts):
      self.text(x, y + 14 * number, text, **how)

  def line(self, x1, y1, x2, y2, stroke=PALE):
    self.parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{stroke}"/>')

  def legend(self, x, y, *more: tuple[str, str]):
    """The colours of the devices, and others with their meaning."""
    entries = [(colour, f'device {n}') for n, colour in enumerate(COLOURS)]
    for colour, meaning in (*entries, *more):
      self.box(x, y - 10, 12, 12, colour)
      self.text(x + 17, y, meaning)
      x += 34 + 6.6 * len(meaning)

  def svg(self) -> str:
    width, height = self.size
    body = '\n'.join(self.parts)
    return (
      f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
      f'width="{width:g}" height="{height:g}" font-family="sans-serif">\n'
      f'<title>{escape(self.title)}</title>\n'
      f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


# Which axis splits what.

# The arrays of a column: (what it is, letters, logical axes of [stack or '', rows, columns]).
ARRAYS = (
  (('tokens', 'of a batch'), 'B x T', ('', 'batch', 'length')),
  (('residual stream', 'between products'), 'B x T', ('', 'batch', 'sequence')),
  (('matrices of all', 'layers, stored'), 'L: D x F', ('layers', 'embed', 'feed_forward')),
  (('the same while', 'a layer computes'), 'L: D x F', ('layers', None, 'feed_forward')),
  (('experts of', 'a layer, stored'), 'E: D x F', ('experts', 'expert_embed', 'feed_forward')),
  (('embedding', 'and head'), 'V x D', ('', 'vocab', 'embed')),
)
SAYS = {
  'data': ('rows; nothing else:', 'copies of all state'),
  'fsdp': ('rows, and all state', '(with ZeRO-3, drawn)'),
  'tensor': ('heads, feed-forward,', 'vocabulary'),
  'context': ('rows along their', 'length; state as fsdp'),
  'expert': ('experts, and rows;', 'other state as fsdp'),
  'stage': ('layers;', 'vocabulary'),
}


def splits(axis: str) -> Iterator[tuple[int | None, ...]]:
  """For each of ARRAYS on a mesh of four devices along `axis`: whether its stack, rows and columns
  are split, as parallel/axes.py says.
  """
  sizes = tuple(DEVICES if name == axis else 1 for name in AXES)
  mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
  with use_abstract_mesh(mesh):
    for _, _, names in ARRAYS:
      entries = ax.spec(*(name or None for name in names))
      yield tuple(axis in ax.of_entry(entry) for entry in entries)


def axes() -> Drawing:
  """The six axes, each alone over four devices, and what each splits."""
  left, top, cell, side = 185, 76, 138, 76
  drawing = Drawing(
    left + cell * len(ARRAYS) + 8, top + 98 * len(SAYS) + 40, 'What each axis splits'
  )
  for column, (what, letters, _) in enumerate(ARRAYS):
    x = left + cell * column
    drawing.lines(x, 22, *what, bold=True)
    drawing.text(x, 54, letters, fill=PALE)

  for row, (axis, says) in enumerate(SAYS.items()):
    y = top + 98 * row
    drawing.line(10, y - 12, left + cell * len(ARRAYS), y - 12, '#eeeeee')
    drawing.text(12, y + 20, f'mesh.{axis}={DEVICES}', size=14, bold=True)
    drawing.lines(12, y + 40, *says, fill=PALE)
    for column, split in enumerate(splits(axis)):
      if axis == 'stage' and ARRAYS[column][2][0] == 'experts':
        drawing.text(left + cell * column, y + 42, 'with its layer', fill=PALE)
        continue
      _array(drawing, left + cell * column, y, side, bool(ARRAYS[column][2][0]), split)

  drawing.legend(left, drawing.size[1] - 20, (WHOLE, 'on every device'))
  return drawing


def _array(drawing, x, y, side, stacked, split):
  """An array, or four small ones where it is a stack, in pieces coloured by device."""
  in_stack, in_rows, in_columns = split
  for member in range(DEVICES if stacked else 1):
    size = side / 2 - 3 if stacked else side
    across, down = (member % 2) * (size + 6), (member // 2) * (size + 6)
    if not (in_rows or in_columns):
      drawing.box(x + across, y + down, size, size, COLOURS[member] if in_stack else WHOLE)
      continue
    piece = size / DEVICES
    for device in range(DEVICES):
      if in_rows:
        drawing.box(x + across, y + down + device * piece, size, piece, COLOURS[device])
      else:
        drawing.box(x + across + device * piece, y + down, piece, size, COLOURS[device])


# What ZeRO holds.

# (name, bytes a parameter, colour); the last two are in the compute dtype, bfloat16.
HELD = (
  ('parameters, f32', 4, '#4c78a8'),
  ("AdamW's two moments, f32", 8, '#72b7b2'),
  ('gradients, f32', 4, '#f58518'),
  ('whole weights, bf16', 2, '#e45756'),
  ('whole gradients, bf16', 2, '#ff9da6'),
)


def held(way: str) -> list[float]:
  """Bytes a parameter on each of DEVICES devices while a step computes, in the order of HELD.
  way: 'data' for copies, or a number as mesh.zero has it. Tables of embeddings are left out.
  """
  split = 1 if way == 'data' else DEVICES
  state = [size / split for _, size, _ in HELD[:3]]
  return [*state, 2 if way in ('1', '2') else 0, 2 if way == '1' else 0]


def zero() -> Drawing:
  """Bytes a parameter on each of four devices, by stage."""
  drawing = Drawing(820, 316, 'What each device holds, by stage of ZeRO')
  scale, x = 34, 185
  for row, way in enumerate(('data', '1', '2', '3')):
    y, at = 46 + 52 * row, x
    name = 'mesh.data=4' if way == 'data' else f'mesh.fsdp=4, zero={way}'
    drawing.text(x - 10, y + 22, name, anchor='end', size=13, bold=True)
    for (_, _, colour), size in zip(HELD, held(way)):
      if size:
        drawing.box(at, y, size * scale, 32, colour)
        drawing.text(at + size * scale / 2, y + 21, f'{size:g}', anchor='middle', fill='#ffffff')
        at += size * scale
    drawing.text(at + 8, y + 21, f'{sum(held(way)):g} bytes', bold=True)
  drawing.text(x, 28, 'bytes a parameter on each of 4 devices, while a step computes', fill=PALE)
  for number, (name, _, colour) in enumerate(HELD):
    across, down = x + 200 * (number % 3), 276 + 24 * (number // 3)
    drawing.box(across, down - 10, 12, 12, colour)
    drawing.text(across + 18, down, name)
  return drawing


# Who works on what, when.


def pipeline() -> Drawing:
  """Three schedules of four stages and eight microbatches, tick by tick."""
  M, tick = 8, 30
  drawing = Drawing(800, 520, 'Pipeline schedules')
  plain, circular = (
    PipelineConfig(microbatches=M),
    PipelineConfig(schedule='circular', microbatches=M, repeats=2),
  )
  y = 40
  for config in (plain, circular):
    table = schedule(DEVICES, M, config.repeats)
    idle = f'idle {config.bubble(DEVICES):.0%} of the ticks'
    runs = (
      '' if config.repeats == 1 else f', {config.repeats} runs of layers a stage, half a tick each'
    )
    drawing.text(20, y - 14, f'{config.schedule}{runs}: {idle}', size=14, bold=True)
    forward = list(zip(table.microbatch, table.repeat))
    for column, (batches, repeats) in enumerate(forward + forward[::-1]):
      _tick(
        drawing,
        90 + column * tick / config.repeats,
        y,
        tick / config.repeats,
        batches,
        repeats,
        column >= len(forward),
      )
    _stages(drawing, y)
    y += 160

  drawing.text(
    20,
    y - 14,
    '1f1b: a tick holds a forward (above) and a backward pass (below)',
    size=14,
    bold=True,
  )
  for column, (down, up) in enumerate(zip(*schedule_1f1b(DEVICES, M))):
    _tick(drawing, 90 + column * tick, y, tick, down, 0 * down, False, half=0)
    _tick(drawing, 90 + column * tick, y, tick, up, 0 * up, True, half=1)
  _stages(drawing, y)
  drawing.box(90, 490, 12, 12, COLOURS[0])
  drawing.text(108, 500, 'forward')
  drawing.box(180, 490, 12, 12, '#9ecae9')
  drawing.text(198, 500, 'forward, second run')
  drawing.box(340, 490, 12, 12, COLOURS[1])
  drawing.text(358, 500, 'backward (its ticks last longer)')
  drawing.text(590, 500, 'numbers: microbatches', fill=PALE)
  return drawing


def _stages(drawing, y):
  for stage in range(DEVICES):
    drawing.text(82, y + 20 + 30 * stage, f'stage {stage}', anchor='end')


def _tick(drawing, x, y, width, batches, repeats, backward, half=None):
  """What each stage does in one tick; half: 0 the upper one of a row, 1 the lower."""
  height = 30 if half is None else 15
  for stage, (batch, repeat) in enumerate(zip(batches, repeats)):
    top = y + 30 * stage + (half or 0) * 15
    light, dark = ('#ffbf79', COLOURS[1]) if backward else ('#9ecae9', COLOURS[0])
    colour = '#f2f2f2' if batch < 0 else (light if repeat else dark)
    drawing.box(x, top, width, height, colour)
    if batch >= 0:
      size = 12 if width > 20 else 9
      size = size if half is None else 10
      drawing.text(x + width / 2, top + height / 2 + 4, str(batch), size, 'middle', '#ffffff')


# Who sees what in a ring.


def work(order: np.ndarray) -> list[float]:
  """Blocks of scores that a causal mask leaves to each device, whose queries are two chunks of
  `order`; a block on the diagonal is half a block.
  """
  return [sum(int(chunk) + 0.5 for chunk in pair) for pair in order.reshape(DEVICES, 2)]


def context() -> Drawing:
  """A row's eight chunks on four devices, in order and zig-zag, and the scores each computes."""
  drawing = Drawing(760, 330, 'Rows split over context, in order and zig-zag')
  n, cell = 2 * DEVICES, 26
  orders = {'in order': np.arange(n), 'zig-zag (ring)': zigzag(n, DEVICES)}
  for number, (name, order) in enumerate(orders.items()):
    x, y = 60 + 370 * number, 70
    owner = {int(chunk): at // 2 for at, chunk in enumerate(order)}
    drawing.text(x, 24, name, size=14, bold=True)
    drawing.text(x, 44, f'chunks on devices 0 to 3: {order.reshape(DEVICES, 2).tolist()}')
    drawing.text(x - 8, y + cell * n / 2, 'queries', anchor='end', size=11, fill=PALE)
    drawing.text(x + cell * n / 2, y + cell * n + 16, 'keys', anchor='middle', size=11, fill=PALE)
    for q, k in itertools.product(range(n), repeat=2):
      if k <= q:
        drawing.box(x + k * cell, y + q * cell, cell, cell, COLOURS[owner[q]])
      if k == q:
        corner = f'{x + k * cell:g},{y + q * cell:g}'
        drawing.parts.append(f'<path d="M{corner} h{cell} v{cell} z" fill="#ffffff"/>')
    for device, blocks in enumerate(work(order)):
      drawing.text(
        x + cell * n + 12,
        y + 40 + 20 * device,
        f'{blocks:g} blocks',
        fill=COLOURS[device],
        bold=True,
      )
  drawing.legend(60, 316)
  return drawing


# How tokens reach their experts.

EXPERTS = 8
CHOICES = ((0, 5, 3, 6), (2, 7, 1, 4), (6, 0, 3, 5), (1, 4, 7, 2))  # of four tokens a device


def experts() -> Drawing:
  """Four tokens a device travel to the devices that hold their experts, and back."""
  drawing = Drawing(760, 262, 'Tokens travel to the devices of their experts')
  owner = EXPERTS // DEVICES
  titles = ('1. each routes its rows', '2. all-to-all: at their experts', '3. all-to-all back')
  for column, title in enumerate(titles):
    drawing.text(90 + 225 * column, 24, title, size=13, bold=True)
  arrived = {device: [] for device in range(DEVICES)}
  for source, chosen in enumerate(CHOICES):
    for expert in chosen:
      arrived[expert // owner].append((source, expert))
  for device in range(DEVICES):
    y = 50 + 46 * device
    drawing.text(82, y + 20, f'device {device}', anchor='end', fill=COLOURS[device], bold=True)
    home = [(device, expert) for expert in CHOICES[device]]
    for column, tokens in enumerate((home, arrived[device], home)):
      for n, (source, expert) in enumerate(tokens):
        x = 90 + 225 * column + 42 * n
        drawing.box(x, y, 38, 30, COLOURS[source])
        drawing.text(x + 19, y + 20, f'e{expert}', anchor='middle', fill='#ffffff')
    drawing.text(90 + 225 + 174, y + 20, f'e{2 * device}, e{2 * device + 1}', fill=PALE)
  drawing.text(
    90, 250, 'colour: whose row a token is of; e5: the expert that the router chose', fill=PALE
  )
  return drawing


PICTURES = {
  'axes': axes,
  'zero': zero,
  'pipeline': pipeline,
  'context': context,
  'experts': experts,
}


def main() -> None:
  HERE.mkdir(exist_ok=True)
  for name, draw in PICTURES.items():
    (HERE / f'{name}.svg').write_text(draw().svg())


if __name__ == '__main__':
  main()
