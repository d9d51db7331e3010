"""Are basic blocks cut where a core branches, and are their slots counted? On a dump written by hand, in libtpu's form."""
import pytest

from analysis import bundles

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
TABLE = """== CAPACTIY:
MXU, VALU, VSTORE, VSTORE:SPILL
    4     2     1     1
== UTILIZATION:
""" + '\n'.join(['0 0 0 0'] * 2 + ['4 0 0 0', '4 2 1 1', *['0 2 0 0'] * 5, '0 0 1 0']) + '\n'


def test_blocks_and_their_slots(tmp_path):
  (tmp_path / '17-flash_forward.1-70-final_hlo-static-per-bundle-utilization.txt').write_text(TABLE)
  (tmp_path / '17-flash_forward.1-72-final_bundles.txt').write_text(BUNDLES)
  (tmp_path / '17-flash_forward.1-71-schedule-analysis_final_bundles.txt').write_text('no bundles')
  blocks = bundles.kernels(str(tmp_path))['flash_forward']
  assert [block.bundles for block in blocks] == [2, 7, 1]
  assert blocks[1].uses == {'MXU': 2 / 7, 'VALU': pytest.approx(12 / 14), 'VSTORE': pytest.approx(1 / 7), 'VSTORE:SPILL': pytest.approx(1 / 7)}
  assert bundles.bodies(blocks) == [blocks[1]] and blocks[1].matrix == pytest.approx(2)


def test_a_dump_without_bundles_says_why(tmp_path):
  with pytest.raises(FileNotFoundError, match='was LIBTPU_INIT_ARGS set before'):
    bundles.kernels(str(tmp_path))


@pytest.mark.slow
def test_our_kernels_are_scheduled_no_worse_than_jaxs(topology):
  from benchmarks import tpu_schedule
  topology('v5e:1x1')
  ours, theirs = (tpu_schedule.measure('v5e:1x1', backend, 128, 2048) for backend in ('pallas_tpu', 'splash'))
  for direction in tpu_schedule.PRODUCTS:
    assert ours[direction]['masked'] <= theirs[direction]['masked'] and ours[direction]['whole'] <= theirs[direction]['whole']
  assert ours['forward']['whole'] <= 4150
