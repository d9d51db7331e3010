"""What do our kernels for TPUs take, by the cost that they declare, and by their bundles?

Bundles are of tables (kernels.tuning), made with the compiler: they bound what a kernel takes from
below, as the roofline of what it declares does.
"""

import math
import re
from typing import NamedTuple

from analysis.hardware import Chip
from analysis.hlo import Module
from analysis.instruction import Instruction, dims
from kernels import tuning
from kernels.tuning import TILE

# Kernels of kernels.flash_tpu, by name.
ATTENTION = {'flash_forward': 'forward', 'flash_backward': 'backward'}
GROUPED = 'grouped_(forward|rows|matrices)'  # kernels of kernels.grouped_matmul_tpu
CODED = 'quantised_matmul'  # the one of kernels.quantised_matmul_tpu
GRIDS = {'u8': 'int4', 's8': 'int8'}  # by the type of its codes, two or one of which are in a byte


class Cost(NamedTuple):
  flops: float
  moved: float  # bytes
  transcendentals: float


def declared(i: Instruction) -> Cost | None:
  """A kernel's own cost estimate, or None where it declares none; on GPUs it is in the name of its
  scope (kernels.mosaic_gpu_compat).
  """
  cost = re.search(
    r'"cost_estimate":\{([^}]*)\}|op_name="[^"]*?(flash_\w+ flops=.*?) end', i.attributes
  )
  if not cost:
    return None
  parts = {
    name: float(value)
    for name, value in re.findall(r'(\w+)"?[:=]"?([\d.e+]+)"?', cost[1] or cost[2])
  }
  return Cost(
    parts.get('flops', 0.0), parts.get('bytes_accessed', 0.0), parts.get('transcendentals', 0.0)
  )


def attention_seconds(module: Module, computation: str, i: Instruction, chip: Chip) -> float | None:
  """What the matrix unit and the softmax of one of our attention kernels take,
  by the bundles that its tiles have (kernels.tuning).

  It declares an exponential for each pair of a query and a key. None for another kernel. Raises
  LookupError for one without an entry.
  """
  direction = next(
    (direction for name, direction in ATTENTION.items() if i.name.startswith(name)), None
  )
  if direction is None:
    return None

  if chosen := re.match(r'flash_[a-z]+_(\d+x\d+)', i.name):
    raise LookupError(
      f'{direction} attention in chosen steps of {chosen[1]}: no bundles are tabled for them, so '
      'its FLOPs at the peak'
    )

  # Queries, keys and values are the first operands of four dimensions, [B, heads, tokens, width].
  shapes = [dims(module[computation, name].shape) for name in i.operands]
  queries, keys, values = [shape for shape in shapes if len(shape) > 3][:3]
  width = max(keys[-1], values[-1])
  step = next(filter(None, (tuning.lookup(kind, direction, width) for kind in chip.kinds)), None)
  if step is None or not step.whole:
    raise LookupError(
      f'{direction} attention with heads {width} wide: no bundles are tabled for a {chip.name}, so '
      'its FLOPs at the peak'
    )
  cores = min(chip.cores // chip.devices, queries[1])  # cores share the heads
  # The mask cuts an unknown share of the tiles: they count as half whole and half masked.
  tiles = declared(i).transcendentals / TILE**2
  return tiles * (step.whole + step.masked) / 2 / (chip.clock * cores)


def grouped_seconds(module: Module, computation: str, i: Instruction, chip: Chip) -> float | None:
  """What the matrix unit takes for the rows that one of the experts' kernels declares, by the
  bundles of its chunks (kernels.tuning), and where matrices are bytes, to make numbers of them
  before; None for another kernel. Raises LookupError for one without an entry.
  """
  kernel = re.search(GROUPED, i.name)  # behind which derivative it is
  if kernel is None:
    return None
  shares = (tuning.grouped_share(kind, kernel[0]) for kind in chip.kinds)
  share = next(filter(None, shares), None)
  if share is None:
    raise LookupError(
      f'experts: no bundles are tabled for a {chip.name}, so their FLOPs at the peak'
    )
  shapes = [module[computation, name].shape for name in i.operands]
  # Rows in f32 are multiplied in six passes of bfloat16.
  passes = 6 if any(shape.startswith('f32[') and len(dims(shape)) == 2 for shape in shapes) else 1
  seconds = passes * declared(i).flops / (chip.bfloat16 / chip.devices * share)
  for shape in shapes:
    if shape.startswith('s8['):
      # Of each matrix once, before its first rows: nothing is multiplied meanwhile.
      cores = chip.cores // chip.devices  # which share the outputs
      seconds += math.prod(dims(shape)) * _bundles_of('int8', chip) / (chip.clock * cores)
  return seconds


def coded_seconds(module: Module, computation: str, i: Instruction, chip: Chip) -> float | None:
  """What it takes to make numbers of the codes that the kernel for them multiplies, for each block
  of rows, by the bundles of a few rows' step (kernels.tuning); None for another kernel. Raises
  LookupError for a chip without an entry.
  """
  if not re.match(CODED, i.name):
    return None
  shapes = [module[computation, name].shape for name in i.operands]
  codes = next(shape for shape in shapes if shape.partition('[')[0] in GRIDS)
  grid, (_, stored, outputs) = GRIDS[codes.partition('[')[0]], dims(codes)
  bundles = _bundles_of(grid, chip)
  blocks, numbers = dims(i.shape)[0], stored * outputs * (2 if grid == 'int4' else 1)
  cores = chip.cores // chip.devices  # which share the outputs
  return blocks * numbers * bundles / (chip.clock * cores)


def _bundles_of(grid: str, chip: Chip) -> float:
  """Bundles that a number takes which is made of a code."""
  bundles = next(filter(None, (tuning.coded_bundles(kind, grid) for kind in chip.kinds)), None)
  if bundles is None:
    raise LookupError(
      f'products of {grid}: no bundles are tabled for a {chip.name}, so their bytes at the peak'
    )
  return bundles
