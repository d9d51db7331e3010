"""What can each accelerator do at most? The table of published peaks that percentages are taken of.

Sources. TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; v4's links: arXiv:2304.01433.
GPU: NVIDIA's A100 datasheet (June 2021), H100 white paper (dense figures; network: DGX H100's one
400 Gb/s adapter a GPU), H200 datasheet and HGX B200 datasheet. Structured sparsity is never
counted. Unknown hardware has no entry, and so no percentage.
"""

import ast
import dataclasses

import jax.numpy as jnp

_TERA = 1e12
_GIGA = 1e9
_GIB = 2**30
DTYPES = ('bfloat16', 'float16', 'float32', 'int8')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Published dense peaks of one chip (not of one jax device: see `devices`).

  `bfloat16`, `float16`, `float32` and `int8` are multiply-adds x 2 per second of matrix products
  with operands of that dtype; None where the chip has no unit for it or no figure is published.
  `float32` is what jax runs at its default precision: one bf16 pass on a TPU, TF32 on a GPU.
  (`jax_default_matmul_precision='highest'` is several times slower than this peak.)

  `hbm_bytes` and `hbm_bandwidth` (bytes/s) are of the chip's main memory, `usable` what of it a
  program can have (of a TPU what its compiler says it has; None: all); `interconnect` is bytes/s
  per chip over ICI or NVLink, both directions summed; `watts` is the maximum board power (TPU v4:
  the measured maximum), None where unpublished.

  `clock` is a TPU core's cycles per second, which its bf16 peak implies: of a cycle it does 4 x
  128^2 multiply-adds up to v5p, 4 x 256^2 in v6e and 7x (the compiler's own estimate of a large
  product comes to 87-97% of the peak at that clock). `torus` counts the dimensions of a TPU's
  links, 0 where they meet in a switch; a side of a topology that is a multiple of `wraps` closes
  into a ring. `network` is bytes/s per chip between slices or nodes, in one direction, None where
  unpublished.

  `cores` counts TensorCores on a TPU, 1 on a GPU. `devices` is how many jax devices one chip shows
  up as: a TPU v4 or v5p fuses its two cores into one device ("megacore"), a TPU 7x shows each of
  its two cores as a device.
  """

  name: str
  kinds: tuple[str, ...]
  bfloat16: float
  float32: float
  hbm_bytes: float
  hbm_bandwidth: float
  interconnect: float
  float16: float | None = None
  int8: float | None = None
  watts: float | None = None
  cores: int = 1
  devices: int = 1
  clock: float | None = None
  torus: int = 0
  wraps: int = 0
  network: float | None = None
  usable: float | None = None

  @property
  def available(self) -> float:
    """Bytes of main memory that a program can have of one jax device."""
    return (self.usable or self.hbm_bytes) / self.devices


# A chip a row: its name, jax's names for its kind, and a value a column; -: none, or not published.
_TPUS = """
        | kinds                | bf16 int8 hbm usable hbm/s ici/s   net clock dim wrap core dev   W
TPU v4  | TPU v4               |  275  275  32  30.75  1200   600     -  1.05   3    4    2   1 192
TPU v5e | TPU v5 lite, TPU v5e |  197  393  16  15.75   819   400 3.125   1.5   2   16    1   1   -
TPU v5p | TPU v5, TPU v5p      |  459  918  95  95.73  2765  1200  6.25  1.75   3    4    2   1   -
TPU v6e | TPU v6 lite, TPU v6e |  918 1836  32  31.24  1638   800  12.5  1.75   2   16    1   1   -
TPU 7x  | TPU7x                | 2307    - 192 189.48  7380  1200     -   2.2   3    4    2   2   -
"""
_GPUS = """
               | kinds                 |  bf16  tf32   int8  hbm hbm/s nvlink/s     net     W
A100 40GB SXM  | NVIDIA A100-SXM4-40GB |   312   156    624   40  1555      600       -   400
A100 40GB PCIe | NVIDIA A100-PCIE-40GB |   312   156    624   40  1555      600       -   250
A100 80GB SXM  | NVIDIA A100-SXM4-80GB |   312   156    624   80  2039      600       -   400
A100 80GB PCIe | NVIDIA A100 80GB PCIe |   312   156    624   80  1935      600       -   300
H100 SXM       | NVIDIA H100 80GB HBM3 | 989.4 494.7 1978.9   80  3350      900      50   700
H100 PCIe      | NVIDIA H100 PCIe      |   756   378   1513   80  2000      600       -   350
H200 SXM       | NVIDIA H200           | 989.4 494.7 1978.9  141  4800      900       -   700
B200           | NVIDIA B200           |  2250  1100   4500  180  8000     1800       -  1000
"""
# The columns' fields, and their units but for a TPU's memory, which the compiler gives in GiB.
_COLUMNS = {
  'bf16': ('bfloat16', _TERA),
  'tf32': ('float32', _TERA),
  'int8': ('int8', _TERA),
  'hbm': ('hbm_bytes', _GIGA),
  'usable': ('usable', _GIB),
  'hbm/s': ('hbm_bandwidth', _GIGA),
  'ici/s': ('interconnect', _GIGA),
  'nvlink/s': ('interconnect', _GIGA),
  'net': ('network', _GIGA),
  'clock': ('clock', _GIGA),
  'dim': ('torus', 1),
  'wrap': ('wraps', 1),
  'core': ('cores', 1),
  'dev': ('devices', 1),
  'W': ('watts', 1),
}


def _chips(table: str, same: dict[str, str], **columns: tuple[str, float]) -> tuple[Chip, ...]:
  """A chip of each row. same: fields that are as another one is. columns: as in _COLUMNS."""
  head, *rows = [
    [cell.strip() for cell in line.split('|')] for line in table.strip('\n').split('\n')
  ]
  fields = [(_COLUMNS | columns)[name] for name in head[-1].split()]
  chips = []
  for name, kinds, texts in rows:
    cells = zip(fields, texts.split(), strict=True)
    values = {
      field: None if text == '-' else ast.literal_eval(text) * unit for (field, unit), text in cells
    }
    values |= {field: values[other] for field, other in same.items()}
    chips.append(Chip(name=name, kinds=tuple(kinds.split(', ')), **values))
  return tuple(chips)


CHIPS = (
  *_chips(_TPUS, {'float32': 'bfloat16'}, hbm=('hbm_bytes', _GIB)),
  *_chips(_GPUS, {'float16': 'bfloat16'}),
)
_BY_KIND = {kind: chip for chip in CHIPS for kind in chip.kinds}


def lookup(device_kind: str, device_cores: int | None = None) -> Chip | None:
  """The chip behind jax's `device.device_kind`, or None: then no percentage may be printed.

  Names match whole, never by prefix: 'NVIDIA H100 NVL' and 'NVIDIA A100-SXM4-40GB MIG 1g.5gb' are
  other hardware. `device_cores` is jax's `device.num_cores` on a TPU; it tells a v4 or v5p that
  runs with its cores split into two devices.
  Raises ValueError where it doesn't divide the chip's cores.
  """
  chip = _BY_KIND.get(device_kind)
  if chip is None or device_cores is None:
    return chip
  if device_cores < 1 or chip.cores % device_cores:
    raise ValueError(
      f'device_cores={device_cores} does not divide the {chip.cores} core(s) of a {chip.name}; '
      'pass device.num_cores of a TPU device, or nothing'
    )
  return dataclasses.replace(chip, devices=chip.cores // device_cores)


def of_device(device) -> Chip | None:
  """The chip that a jax device is of, one of a topology too; None for one that is not tabled."""
  cores = getattr(device, 'num_cores', None) if device.platform == 'tpu' else None
  return lookup(device.device_kind, cores)


def peak(chip: Chip | None, dtype) -> float | None:
  """FLOP/s of one jax device for matrix products in `dtype` (a numpy dtype or its name),
  or None where unknown.

  Raises ValueError for a dtype that the table doesn't speak of,
  TypeError for a name that is no dtype.
  """
  name = jnp.dtype(dtype).name
  if name not in DTYPES:
    raise ValueError(f'no peak is tabled for dtype {name!r}; known: {", ".join(DTYPES)}')
  flops = getattr(chip, name) if chip is not None else None
  return None if flops is None else flops / chip.devices
