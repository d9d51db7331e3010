"""Are basic blocks cut where a core branches, and are their slots counted?
On a dump written by hand, in libtpu's form.
"""

import itertools

import pytest

from analysis import bundles, hardware
from benchmarks import tpu_schedule
from kernels import tuning

BUNDLES = """
     0x0   :  { %s1 = simm.s32 0 }
     0x1   :  { %s2 = smov 1 }
     0x2 LB: > { %v1 = vmatmul }
     0x3   : > { %v2 = vadd }
     0x4   : > { %4 = sbr.rel (!%p) target = $region1, lane }
     0x5   : > { %v3 = vadd }
     0x6   : > { %v4 = vadd }
     0x7   : > { %v5 = vadd }
     0x8   : > { %v6 = vadd }
     0x9   :  { %s3 = sst }
"""
TABLE = (
  """== CAPACTIY:
MXU, VALU, VSTORE, VSTORE:SPILL
    4     2     1     1
== UTILIZATION:
"""
  + '\n'.join(['0 0 0 0'] * 2 + ['4 0 0 0', '4 2 1 1', *['0 2 0 0'] * 5, '0 0 1 0'])
  + '\n'
)


def test_blocks_and_their_slots(tmp_path):
  (tmp_path / '17-flash_forward.1-70-final_hlo-static-per-bundle-utilization.txt').write_text(TABLE)
  (tmp_path / '17-flash_forward.1-72-final_bundles.txt').write_text(BUNDLES)
  (tmp_path / '17-flash_forward.1-71-schedule-analysis_final_bundles.txt').write_text('no bundles')
  blocks = bundles.kernels(str(tmp_path))['flash_forward']
  assert [block.bundles for block in blocks] == [2, 7, 1]
  assert blocks[1].uses == {
    'MXU': 2 / 7,
    'VALU': pytest.approx(12 / 14),
    'VSTORE': pytest.approx(1 / 7),
    'VSTORE:SPILL': pytest.approx(1 / 7),
  }
  assert bundles.bodies(blocks) == [blocks[1]] and blocks[1].matrix == pytest.approx(2)


def test_a_dump_without_bundles_says_why(tmp_path):
  with pytest.raises(FileNotFoundError, match='was LIBTPU_INIT_ARGS set before'):
    bundles.kernels(str(tmp_path))


@pytest.mark.parametrize(
  'what, length, skips, whole, masked',
  [
    # 36 of 64 blocks of 1024 x 1024, of which the diagonal is masked
    ('causal', 8192, True, 28, 8),
    # Of 1024 keys: the diagonal, and what is left of the block before
    ('window', 16384, True, 0, 31),
    ('packed', 16384, True, 8, 16),  # eight documents of two blocks
    ('packed', 16384, False, 120, 16),
  ],
)
def test_cycles_are_those_of_the_blocks_that_are_left(what, length, skips, whole, masked):
  found = {'step': {'rows': 1024, 'keys': 1024}, 'whole': 4_000, 'masked': 5_000, 'beside': 100}
  chip = hardware.lookup('TPU v5', 2)
  assert (
    tpu_schedule.cycles(found, 'forward', 64, chip, what, length, skips)
    == whole * 4_000 + masked * 5_000
  )
  assert (
    tpu_schedule.cycles(found, 'forward', 64, chip, what, length, skips, beside=True)
    == whole * 4_100 + masked * 5_100
  )
  # Products of a core with four units of 128 x 128: 4,096 cycles, but for the peak's digits
  floor = 2 * 2 * 1024**2 * 128 / (4 * 128**2 * 2)
  assert tpu_schedule.cycles(found, 'forward', 128, chip, what, length, skips) == pytest.approx(
    whole * floor + masked * 5_000, rel=1e-2
  )
  half = found | {'step': {'rows': 512, 'keys': 1024}}
  if what == 'causal':  # half the rows: as many blocks are cut, of half the size
    assert (
      tpu_schedule.cycles(half, 'forward', 64, chip, what, length, skips) == 28 * 4_000 + 8 * 5_000
    )


def test_the_table_has_every_chip_that_is_known():
  """And what is between two entries takes the wider one's step;
  none is wider than a block may be, or than the next chunk.
  """
  assert {kind for chip in hardware.CHIPS for kind in chip.kinds if chip.clock} >= set(tuning.VMEM)
  for kind, direction, width in itertools.product(
    tuning.VMEM, tpu_schedule.PRODUCTS, (64, 128, 256)
  ):
    found = tuning.lookup(kind, direction, width)
    assert found == tuning.lookup(kind, direction, width - 1) and 0 < found.whole <= found.masked
    assert found.chunk <= found.rows <= 1024 and found.keys <= 1024
  assert (
    tuning.lookup('TPU v5', 'forward', 257) is None
    and tuning.lookup('TPU v9', 'forward', 64) is None
  )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'name, forward, backward', [('v5e:1x1', 4150, 9000), ('v6e:1x1', 2400, 4800)]
)
def test_our_kernels_are_scheduled_no_worse_than_jaxs(topology, name, forward, backward):
  topology(name)
  kind, chip = tpu_schedule.chip_of(name)
  found = tpu_schedule.compare(name, 128)
  for (what, length), direction in itertools.product(
    tpu_schedule.WORKLOADS.values(), tpu_schedule.PRODUCTS
  ):
    ours, theirs = (
      tpu_schedule.seconds(
        found[backend][what][direction], direction, 128, chip, what, length, backend == 'pallas_tpu'
      )
      for backend in ('pallas_tpu', 'splash')
    )
    assert ours <= theirs * 1.0001, (what, length, direction)
  ours = found['pallas_tpu']['causal']
  assert ours['forward']['whole'] <= forward and ours['backward']['whole'] <= backward
  for (
    direction
  ) in tpu_schedule.PRODUCTS:  # else the table is of another kernel or another libtpu: --tune
    step = tuning.lookup(kind, direction, 128)
    assert (ours[direction]['whole'], ours[direction]['masked']) == pytest.approx(
      (step.whole, step.masked), rel=0.02
    )
