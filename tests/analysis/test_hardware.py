"""Do the tabled peaks agree with what the chips are made of, and is unknown hardware left alone?"""

import jax.numpy as jnp
import numpy as np
import pytest

from analysis import hardware
from kernels import grouped_matmul_tpu, tuning
from parallel import compiler

# units x FLOPs per unit and clock x clock: TPU cores x matrix units x 128^2 x 2,
# GPU SMs x dense bf16 FLOPs per clock.
BUILT = {
  'TPU v4': 2 * 4 * 128**2 * 2 * 1.05e9,
  'TPU v5 lite': 4 * 128**2 * 2 * 1.5e9,
  'TPU v5p': 2 * 4 * 128**2 * 2 * 1.75e9,
  'NVIDIA A100-SXM4-40GB': 108 * 2048 * 1.41e9,
  'NVIDIA A100 80GB PCIe': 108 * 2048 * 1.41e9,
  'NVIDIA H100 80GB HBM3': 132 * 4096 * 1.83e9,
  'NVIDIA H100 PCIe': 114 * 4096 * 1.62e9,
  'NVIDIA H200': 132 * 4096 * 1.83e9,
  'NVIDIA B200': 148 * 8192 * 1.86e9,
}
# Published for whole pods: v6e 234.9 PFLOPs of 256 chips,
# 7x 42.5 EFLOPs in fp8 (twice bf16) of 9,216 chips.
BUILT |= {'TPU v6 lite': 234.9e15 / 256, 'TPU7x': 42.5e18 / 2 / 9216}


@pytest.mark.parametrize('kind', BUILT)
def test_bf16_peak_is_what_the_chip_is_built_for(kind):
  assert hardware.lookup(kind).bfloat16 == pytest.approx(BUILT[kind], rel=0.01)


@pytest.mark.parametrize(
  'chip', [chip for chip in hardware.CHIPS if chip.torus], ids=lambda chip: chip.name
)
def test_a_tpus_peak_is_its_clock_times_its_matrix_units(chip):
  units = 4 * (256 if chip.name in ('TPU v6e', 'TPU 7x') else 128) ** 2
  assert chip.bfloat16 == pytest.approx(chip.cores * units * 2 * chip.clock, rel=0.01)
  assert (
    chip.torus in (2, 3) and chip.wraps in (4, 16) and 0.95 < chip.usable / chip.hbm_bytes < 1.01
  )


@pytest.mark.parametrize('chip', hardware.CHIPS, ids=lambda chip: chip.name)
def test_entries_are_coherent(chip):
  assert chip.float32 == (
    chip.bfloat16 if chip.name.startswith('TPU') else pytest.approx(chip.bfloat16 / 2, rel=0.03)
  )
  assert chip.int8 is None or chip.int8 / chip.bfloat16 == pytest.approx(
    1 if chip.name == 'TPU v4' else 2, rel=0.01
  )
  assert 15e9 < chip.hbm_bytes < 300e9 and 50e-3 > chip.hbm_bytes / chip.hbm_bandwidth > 10e-3
  assert chip.interconnect < chip.hbm_bandwidth < chip.bfloat16
  assert chip.watts is None or 0.3e12 < chip.bfloat16 / chip.watts < 3e12
  assert chip.cores % chip.devices == 0
  assert all(hardware.lookup(kind) is chip for kind in chip.kinds)


def test_no_kind_is_tabled_twice():
  kinds = [kind for chip in hardware.CHIPS for kind in chip.kinds]
  assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(
  'kind',
  [
    '',
    'cpu',
    'TPU v3',
    'TPU v5 lite ',
    'NVIDIA H100 NVL',
    'NVIDIA GB200',
    'NVIDIA H200 NVL',
    'NVIDIA A100-SXM4-40GB MIG 1g.5gb',
    'NVIDIA GeForce RTX 4090',
  ],
)
def test_unknown_hardware_has_no_peak(kind):
  assert hardware.lookup(kind) is None
  assert hardware.peak(hardware.lookup(kind), 'bfloat16') is None


def test_tables_below_this_one_know_the_same_chips():
  """Kernels and compiler options, which cannot ask this one, have some of its facts themselves."""
  tpus = {kind: chip for chip in hardware.CHIPS if chip.torus for kind in chip.kinds}
  assert tpus.keys() == compiler.GENERATIONS.keys()
  for kind, generation in compiler.GENERATIONS.items():
    assert tpus[kind].name == f'TPU {generation.removeprefix("tpu")}'
  for kind in tuning.VMEM:
    chip = tpus[kind]
    assert (kind in grouped_matmul_tpu.TWO_CORES) == (chip.cores // chip.devices == 2)
  assert {tpus[kind] for kind in tuning.VMEM} == set(tpus.values())


def test_the_chip_of_a_device_is_known_by_its_cores():
  def device(**fields):
    return type('Device', (), fields)()

  split = device(platform='tpu', device_kind='TPU v5', num_cores=1)
  assert hardware.of_device(split) == hardware.lookup('TPU v5', 1) != hardware.lookup('TPU v5')
  gpu = device(platform='gpu', device_kind='NVIDIA H200')
  assert hardware.of_device(gpu) is hardware.lookup('NVIDIA H200')
  assert hardware.of_device(device(platform='cpu', device_kind='cpu')) is None


def test_peak_is_per_jax_device():
  assert hardware.peak(hardware.lookup('TPU v4'), 'bfloat16') == 275e12
  assert hardware.peak(hardware.lookup('TPU7x'), 'bfloat16') == 2307e12 / 2
  # A v5p whose cores run split shows two devices of half the rate.
  assert hardware.peak(hardware.lookup('TPU v5p', 1), 'bfloat16') == 459e12 / 2
  assert hardware.peak(hardware.lookup('TPU v5p', 2), 'bfloat16') == 459e12
  assert hardware.peak(hardware.lookup('TPU7x', 1), 'bfloat16') == 2307e12 / 2
  with pytest.raises(ValueError, match='device_cores=3 does not divide the 2 core'):
    hardware.lookup('TPU v4', 3)


@pytest.mark.parametrize(
  'dtype', [jnp.bfloat16, np.dtype('float32'), jnp.zeros(1, jnp.int8).dtype, 'float16']
)
def test_dtypes_come_in_any_spelling(dtype):
  chip = hardware.lookup('NVIDIA A100-SXM4-80GB')
  assert hardware.peak(chip, dtype) == getattr(chip, jnp.dtype(dtype).name)


def test_dtypes_without_a_unit_have_no_peak():
  assert hardware.peak(hardware.lookup('TPU v5 lite'), 'float16') is None
  with pytest.raises(ValueError, match='float64.*known: bfloat16'):
    hardware.peak(hardware.lookup('TPU v5 lite'), 'float64')
