"""Do the programs that a GPU would be timed with compile, and run our kernels as often as they say?
For an H100 that isn't here.
"""

import dataclasses

import jax
import pytest

from analysis import aot, ptxas
from benchmarks import attention, attention_peers as peers, train_gpu
from benchmarks.attention_cases import DIRECTIONS
from parallel.mesh import MeshConfig, make_mesh


@pytest.fixture
def h100():
  try:
    return make_mesh(MeshConfig(), aot.topology('h100:1x1x1'))
  except ImportError as error:
    pytest.skip(
      f'an H100 cannot be compiled for: {error}; make test-gpu-aot installs what is missing'
    )


@pytest.fixture
def assembled(monkeypatch, tmp_path):
  """What the assembler says of the kernels that a test compiles, asked when it is done."""
  jax.clear_caches()
  for name, value in ptxas.environment(str(tmp_path)).items():
    monkeypatch.setenv(name, value)
  return lambda: ptxas.reports(str(tmp_path))


def check(reports):
  assert reports and not {
    name: report for name, report in reports.items() if report.spilled or report.warnings
  }


# All kinds that --quick asks for.
CASES = {case.name: case for case in attention.cases(True)}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_what_is_timed_of_attention_compiles_and_runs_every_call(name, h100, assembled):
  case = CASES[name]
  attend = peers.tandem(case, attention.OURS)
  with jax.set_mesh(h100):
    lowered = peers.programs(attend, case, 'bfloat16', jax.NamedSharding(h100, jax.P()))
    compiled = {direction: program.compile() for direction, program in lowered.items()}
  assert set(compiled) == {'forward', 'keeping', 'backward'}
  for direction in DIRECTIONS:
    assert peers.check_calls(compiled[direction], case.calls(direction)) == ''
    assert 'flash_' + direction in compiled[direction].as_text()
  check(assembled())
  memory = compiled['backward'].memory_analysis()
  room = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  assert room < 20e9, 'with four arrays of NaN beside it, far from the 80 GB that there are'


@pytest.mark.slow
@pytest.mark.parametrize('length', train_gpu.LENGTHS)
def test_the_step_that_is_timed_compiles_with_our_kernel(length, h100, assembled, monkeypatch):
  """Of two layers, which are one scan as sixteen are: one kernel for all layers,
  forward, and one backward.
  """
  whole = train_gpu.config
  made = whole(length, 'pallas_gpu')
  assert len(made.model.stacks) == 1
  monkeypatch.setattr(
    train_gpu,
    'config',
    lambda *x: dataclasses.replace(whole(*x), model=dataclasses.replace(made.model, layers=2)),
  )
  found = train_gpu.predict('pallas_gpu', length)
  assert found['device_peak_bytes'] < 80e9 and any(
    'our attention kernels at 52% of the peak' in line for line in found['assumptions']
  )
  check(assembled())
