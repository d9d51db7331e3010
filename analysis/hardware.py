"""What can each accelerator do at most? The table of published peaks that percentages are taken of.

Sources. TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; v4's links: arXiv:2304.01433. GPU: NVIDIA's A100
datasheet (June 2021), H100 white paper (dense figures; network: DGX H100's one 400 Gb/s adapter a GPU), H200 datasheet and HGX B200
datasheet. Structured sparsity is never counted. Unknown hardware has no entry, and so no percentage.
"""
import dataclasses

import jax.numpy as jnp

_TERA, _GIGA, _GIB = 1e12, 1e9, 2**30
DTYPES = ('bfloat16', 'float16', 'float32', 'int8')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Published dense peaks of one chip (not of one jax device: see `devices`).

  `bfloat16`, `float16`, `float32` and `int8` are multiply-adds x 2 per second of matrix products with operands of that
  dtype; None where the chip has no unit for it or no figure is published. `float32` is what jax runs at its default
  precision: one bf16 pass on a TPU, TF32 on a GPU. (`jax_default_matmul_precision='highest'` is several times slower
  than this peak.)

  `hbm_bytes` and `hbm_bandwidth` (bytes/s) are of the chip's main memory, `usable` what of it a program can have (of a TPU what its
  compiler says it has; None: all); `interconnect` is bytes/s per chip over
  ICI or NVLink, both directions summed; `watts` is the maximum board power (TPU v4: the measured maximum), None where
  unpublished.

  `clock` is a TPU core's cycles per second, which its bf16 peak implies: of a cycle it does 4 x 128^2 multiply-adds up to v5p,
  4 x 256^2 in v6e and 7x (the compiler's own estimate of a large product comes to 87-97% of the peak at that clock). `torus`
  counts the dimensions of a TPU's links, 0 where they meet in a switch; a side of a topology that is a multiple of `wraps` closes
  into a ring. `network` is bytes/s per chip between slices or nodes, in one direction, None where unpublished.

  `cores` counts TensorCores on a TPU, 1 on a GPU. `devices` is how many jax devices one chip shows up as: a TPU v4 or
  v5p fuses its two cores into one device ("megacore"), a TPU 7x shows each of its two cores as a device.
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


def _tpu(name, kinds, *, bfloat16, int8, hbm, bandwidth, ici, watts=None, cores=1, devices=1, clock, torus, wraps, network=None,
         usable) -> Chip:
  return Chip(name=name, kinds=kinds, bfloat16=bfloat16 * _TERA, float32=bfloat16 * _TERA, hbm_bytes=hbm * _GIB,
              hbm_bandwidth=bandwidth * _GIGA, interconnect=ici * _GIGA, int8=int8 and int8 * _TERA, watts=watts,
              cores=cores, devices=devices, clock=clock * _GIGA, torus=torus, wraps=wraps, network=network and network * _GIGA,
              usable=usable * _GIB)


def _gpu(name, kinds, *, bfloat16, tf32, int8, hbm, bandwidth, nvlink, watts, network=None) -> Chip:
  return Chip(name=name, kinds=kinds, bfloat16=bfloat16 * _TERA, float16=bfloat16 * _TERA, float32=tf32 * _TERA,
              int8=int8 * _TERA, hbm_bytes=hbm * _GIGA, hbm_bandwidth=bandwidth * _GIGA, interconnect=nvlink * _GIGA,
              watts=watts, network=network and network * _GIGA)


CHIPS = (
    _tpu('TPU v4', ('TPU v4',), bfloat16=275, int8=275, hbm=32, bandwidth=1200, ici=600, watts=192, cores=2,
         clock=1.05, torus=3, wraps=4, usable=30.75),
    _tpu('TPU v5e', ('TPU v5 lite', 'TPU v5e'), bfloat16=197, int8=393, hbm=16, bandwidth=819, ici=400,
         clock=1.5, torus=2, wraps=16, network=3.125, usable=15.75),
    _tpu('TPU v5p', ('TPU v5', 'TPU v5p'), bfloat16=459, int8=918, hbm=95, bandwidth=2765, ici=1200, cores=2,
         clock=1.75, torus=3, wraps=4, network=6.25, usable=95.73),
    _tpu('TPU v6e', ('TPU v6 lite', 'TPU v6e'), bfloat16=918, int8=1836, hbm=32, bandwidth=1638, ici=800,
         clock=1.75, torus=2, wraps=16, network=12.5, usable=31.24),
    _tpu('TPU 7x', ('TPU7x',), bfloat16=2307, int8=None, hbm=192, bandwidth=7380, ici=1200, cores=2, devices=2,
         clock=2.2, torus=3, wraps=4, usable=2 * 94.74),
    _gpu('A100 40GB SXM', ('NVIDIA A100-SXM4-40GB',), bfloat16=312, tf32=156, int8=624, hbm=40, bandwidth=1555,
         nvlink=600, watts=400),
    _gpu('A100 40GB PCIe', ('NVIDIA A100-PCIE-40GB',), bfloat16=312, tf32=156, int8=624, hbm=40, bandwidth=1555,
         nvlink=600, watts=250),
    _gpu('A100 80GB SXM', ('NVIDIA A100-SXM4-80GB',), bfloat16=312, tf32=156, int8=624, hbm=80, bandwidth=2039,
         nvlink=600, watts=400),
    _gpu('A100 80GB PCIe', ('NVIDIA A100 80GB PCIe',), bfloat16=312, tf32=156, int8=624, hbm=80, bandwidth=1935,
         nvlink=600, watts=300),
    _gpu('H100 SXM', ('NVIDIA H100 80GB HBM3',), bfloat16=989.4, tf32=494.7, int8=1978.9, hbm=80, bandwidth=3350,
         nvlink=900, watts=700, network=50),
    _gpu('H100 PCIe', ('NVIDIA H100 PCIe',), bfloat16=756, tf32=378, int8=1513, hbm=80, bandwidth=2000, nvlink=600,
         watts=350),
    _gpu('H200 SXM', ('NVIDIA H200',), bfloat16=989.4, tf32=494.7, int8=1978.9, hbm=141, bandwidth=4800, nvlink=900,
         watts=700),
    _gpu('B200', ('NVIDIA B200',), bfloat16=2250, tf32=1100, int8=4500, hbm=180, bandwidth=8000, nvlink=1800,
         watts=1000),
)
_BY_KIND = {kind: chip for chip in CHIPS for kind in chip.kinds}


def lookup(device_kind: str, device_cores: int | None = None) -> Chip | None:
  """The chip behind jax's `device.device_kind`, or None: then no percentage may be printed.

  Names match whole, never by prefix: 'NVIDIA H100 NVL' and 'NVIDIA A100-SXM4-40GB MIG 1g.5gb' are other hardware.
  `device_cores` is jax's `device.num_cores` on a TPU; it tells a v4 or v5p that runs with its cores split into two
  devices. Raises ValueError where it doesn't divide the chip's cores.
  """
  chip = _BY_KIND.get(device_kind)
  if chip is None or device_cores is None:
    return chip
  if device_cores < 1 or chip.cores % device_cores:
    raise ValueError(f'device_cores={device_cores} does not divide the {chip.cores} core(s) of a {chip.name}; '
                     'pass device.num_cores of a TPU device, or nothing')
  return dataclasses.replace(chip, devices=chip.cores // device_cores)


def peak(chip: Chip | None, dtype) -> float | None:
  """FLOP/s of one jax device for matrix products in `dtype` (a numpy dtype or its name), or None where unknown.

  Raises ValueError for a dtype that the table doesn't speak of, TypeError for a name that is no dtype.
  """
  name = jnp.dtype(dtype).name
  if name not in DTYPES:
    raise ValueError(f'no peak is tabled for dtype {name!r}; known: {", ".join(DTYPES)}')
  flops = getattr(chip, name) if chip is not None else None
  return None if flops is None else flops / chip.devices
