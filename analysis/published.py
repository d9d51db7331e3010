"""How near do predictions come? Step times that others measured and published, beside ours.

Each run is one of MaxText's; a plan of ours is of the same model, mesh, batch and length, with the
remat policy that comes closest. Its program is ours, not theirs: what differs is the code, the
compiler's version and its options, besides what a prediction leaves out.

Seconds of a step stand in the logs of AI-Hypercomputer/tpu-recipes (c8cfe2f, August 2026,
training/trillium/*/README.md). Where MaxText's README (AI-Hypercomputer/maxtext, e7829012d^, and
src/MaxText/configs) has a rate instead, they are the FLOPs that it counted for a step (all pairs of
attention, causal or not) by that rate.
"""

import dataclasses
import functools

from analysis.hardware import Chip

_LENGTH = 'data.sequence_length=2048 model.max_length=2048 model.vocabulary=32000'
_OFFLOADED = 'model.execution.remat_offload=block,query,key,value,attention_out'
_QKV = 'model.execution.remat_offload=block,query,key,value'
_WIDE = 'model.heads=64 model.kv_heads=64 model.head_width=128 model.feed_forward=28672'
# Flags of plan.py, behind --config.
_FLAGS = {
  'llama3.1-8b': f'llama3_8b {_OFFLOADED}',
  'mistral-7b': f'llama3_8b {_OFFLOADED} model.vocabulary=32000',
  'llama3.1-70b': f'llama3_70b {_QKV}',
  '16b': f'llama3_8b {_LENGTH} {_WIDE}',
  '32b': f'llama3_8b {_LENGTH} {_WIDE} model.width=8192',
  '64b': f'llama3_8b {_LENGTH} {_WIDE} model.width=8192 model.layers=64',
  '64b dots': f'llama3_8b {_LENGTH} {_WIDE} model.width=8192 model.layers=64 '
  'model.execution.remat=dots',
}
# What `predicted` is not known of was not compiled yet: python -m benchmarks.published does it. One
# in brackets is of a plan that reserves more than the chip has: it is a prediction as the others,
# and leaving it out would choose those that came near.
_TABLE = """
chip    | model        | topology  | rows | mesh              | published | predicted
TPU v6e | llama3.1-8b  | v6e:2x4   |   24 | fsdp=8            |     3.443 | -
TPU v6e | llama3.1-8b  | v6e:4x4   |   48 | fsdp=16           |     3.393 | 4.356
TPU v6e | llama3.1-8b  | v6e:4x8   |   96 | fsdp=32           |     3.495 | -
TPU v6e | llama3.1-8b  | v6e:8x8   |  320 | fsdp=64           |     5.652 | -
TPU v6e | llama3.1-8b  | v6e:16x16 | 1024 | fsdp=256          |     4.546 | -
TPU v6e | mistral-7b   | v6e:2x4   |   48 | fsdp=8            |     6.320 | -
TPU v6e | llama3.1-70b | v6e:8x16  |  512 | fsdp=128          |    34.786 | -
TPU v6e | llama3.1-70b | v6e:16x16 | 1280 | fsdp=256          |    42.656 | -
TPU v5p | 64b dots     | v5p:4x4x4 |  192 | fsdp=16 tensor=4  |     7.383 | (8.264)
TPU v5e | 16b          | v5e:16x16 | 1536 | fsdp=256          |    10.305 | 10.606
TPU v5e | 32b          | v5e:16x16 | 1024 | fsdp=256          |    12.092 | (14.969)
TPU v5e | 64b          | v5e:16x16 |  512 | fsdp=256          |    13.472 | (14.546)
"""


@dataclasses.dataclass(frozen=True)
class PublishedRun:
  """One that was published.

  Attributes:
    chip: name in analysis.hardware. model: as the source calls it. rows: of a batch.
    mesh: sizes of axes. published, predicted: seconds of a step, theirs measured, ours planned;
      None: not yet. fits: whether the plan does; None: not planned yet.
  """

  chip: str
  model: str
  topology: str
  rows: int
  mesh: str
  published: float
  predicted: float | None
  fits: bool | None

  @property
  def name(self) -> str:
    return f'{self.model} {self.topology}'

  @property
  def flags(self) -> list[str]:
    """Of plan.py, besides --topology."""
    config, *fields = _FLAGS[self.model].split()
    fields += [f'data.batch_size={self.rows}', *(f'mesh.{size}' for size in self.mesh.split())]
    return [f'--config=models/{config}', *(f'--config.{field}' for field in fields)]

  @property
  def ratio(self) -> float:
    """Predicted by published: below 1 where the plan is too hopeful."""
    return self.predicted / self.published


@functools.cache
def runs() -> tuple[PublishedRun, ...]:
  """Every one of the table."""
  made = []
  for line in _TABLE.strip().splitlines()[1:]:
    chip, model, topology, rows, mesh, *times = [cell.strip() for cell in line.split('|')]
    published, predicted = (None if time == '-' else float(time.strip('()')) for time in times)
    fits = None if predicted is None else not times[1].startswith('(')
    made.append(PublishedRun(chip, model, topology, int(rows), mesh, published, predicted, fits))
  return tuple(made)


def band(chip: Chip) -> str:
  """What predictions for a chip are worth, by the runs of its generation."""
  ratios = [run.ratio for run in runs() if run.chip == chip.name and run.predicted]
  if not ratios:
    return (
      f'no step time that was published for a {chip.name} stands beside ours (docs/plans.md): '
      'expect 10% on products and forward kernels, more where memory stalls; it ranks, it does not '
      'certify'
    )
  if len(ratios) == 1:
    of, said = 'the one step time', f'a plan of the same model, mesh and batch said {ratios[0]:.0%}'
  else:
    of = f'{len(ratios)} step times'
    said = f'plans of the same model, mesh and batch said {min(ratios):.0%} to {max(ratios):.0%}'
  return f'of {of} published for a {chip.name}, {said} (docs/plans.md)'


def table() -> list[str]:
  """Rows of the table in docs/plans.md."""
  lines = []
  for run in runs():
    ours = '-' if run.predicted is None else f'{run.predicted:.2f} s'
    if run.fits is False:
      ours += ', does not fit'
    ratio = '-' if run.predicted is None else f'{run.ratio:.2f}'
    cells = run.chip, run.model, run.topology, run.rows, run.mesh, f'{run.published:.2f} s'
    lines.append('| ' + ' | '.join(map(str, (*cells, ours, ratio))) + ' |')
  return lines
