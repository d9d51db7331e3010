"""How large are the steps of our attention on a TPU, and what do they take? What share of the
matrix unit do experts use, and what does it take to make numbers of codes? Tables, written by
`benchmarks.tpu_schedule --tune`, `benchmarks.grouped_schedule --write` and
`benchmarks.quantised_matmul --write`.

They were made with a compiler, not on a TPU: final instruction bundles of a tile, 1024 x 1024 pairs
of a query and a key, of a chunk of rows, and of a step of a product (analysis.bundles).
"""

import dataclasses
import functools
import json
import pathlib

TILE = 1024
TABLE = pathlib.Path(__file__).with_name('tuning.json')
GROUPED_TABLE = TABLE.with_name('grouped.json')
CODED_TABLE = TABLE.with_name('coded.json')
VMEM = {
  'TPU v4': 16 << 20,
  'TPU v5 lite': 128 << 20,
  'TPU v5': 64 << 20,
  'TPU v6 lite': 128 << 20,
  'TPU7x': 64 << 20,
}  # jax's get_tpu_info


@dataclasses.dataclass(frozen=True)
class Tuning:
  """A step of one kernel, on one generation of TPUs.

  Attributes:
    rows: queries of all stacked heads. keys: of a block. chunk: rows whose scores are computed
      while the chunk before goes through its
    softmax. ones: forward, sums of weights come from the matrix unit, as the product with a column
    of ones, which is free where it is wider than a head. vmem: bytes of a core's vector memory.
    whole, masked: bundles of a tile that the mask leaves whole, and of one that it cuts; 0 where
      they are not known.
  """

  rows: int
  keys: int
  chunk: int
  ones: bool
  vmem: int
  whole: int = 0
  masked: int = 0


def lookup(kind: str, direction: str, width: int) -> Tuning | None:
  """Of the 'forward' or 'backward' kernel with heads this wide; those between two entries take the
  wider one's.

  kind: jax's device_kind. None for an unknown kind, and for heads wider than all entries.
  """
  cells = _read(TABLE)['steps'].get(kind, {}).get(direction, {})
  fitting = [entry for entry in sorted(map(int, cells)) if entry >= width]
  return Tuning(**cells[str(fitting[0])], vmem=VMEM[kind]) if fitting else None


@functools.cache
def _read(path: pathlib.Path) -> dict:
  return json.loads(path.read_text()) if path.exists() else {}


def grouped_share(kind: str, kernel: str) -> float | None:
  """Of the matrix unit's peak, by bundles, that a kernel of kernels.grouped_matmul_tpu reaches;
  None for an unknown kind.
  """
  return _read(GROUPED_TABLE).get('shares', {}).get(kind, {}).get(kernel)


def coded_bundles(kind: str, grid: str) -> float | None:
  """Bundles of a step of kernels.quantised_matmul_tpu for each number that it makes of codes, of a
  few rows; grid: 'int4' or 'int8'. None for an unknown kind.
  """
  return _read(CODED_TABLE).get(kind, {}).get(grid)
