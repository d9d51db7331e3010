"""Does the benchmark of attention count, compare and survive as it says?
All of it at toy sizes on this CPU; no timing is looked at.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis import aot
from benchmarks import attention, attention_peers as peers
from benchmarks.attention_cases import Case, Job
from kernels import attention as kernels, cudnn


def run(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'benchmarks.attention', *flags],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.long
def test_a_rehearsal_runs_all_of_it(tmp_path):
  done = run('--rehearse', f'--json={tmp_path / "found.json"}')
  assert done.returncode == 0, done.stdout + done.stderr
  found = json.loads((tmp_path / 'found.json').read_text())['results']
  assert found['rehearsal'] and 'a rehearsal: nothing here is a measurement' in done.stdout
  ours = found['seconds']['blocked']
  assert set(ours) == {case.name for case in attention.toys()}
  for case in ours.values():  # in f32, beside f64
    assert (
      case['forward'] > 0
      and case['backward'] > 0
      and set(case['errors']) == {'out', 'dq', 'dk', 'dv'}
    )
    assert max(case['errors'].values()) < 1e-5
  for peer in ('cudnn', 'mosaic', 'flex', 'pallas_gpu', 'torch cudnn'):
    assert (
      f'not measured: {peer}: it does not run on a CPU' in done.stdout and found['missing'][peer]
    )


def test_without_a_gpu_it_says_so():
  done = run()
  assert done.returncode == 1 and done.stdout.startswith(
    "not measured: no GPU at hand, jax sees 'cpu' (cpu); --rehearse"
  )


@pytest.mark.parametrize('mask', ['causal', 'full', 'window', 'packed'])
def test_the_pairs_that_are_counted_are_those_that_are_seen(mask):
  """By the mask that exact values have, and by that which our kernels are given."""
  case = Case(mask, 64, 16, tokens=128, hidden=32)
  index = np.arange(64)
  seen = case.visible(index[:, None], index[None])
  assert case.flops('forward') == 2 * 2 * 2 * 2 * 16 * seen.sum() and case.flops(
    'backward'
  ) == 2.5 * case.flops('forward')
  given = []
  attend = peers.tandem(case, 'blocked')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      kernels,
      'attention',
      lambda q, k, v, scoring, backend: given.append(scoring.mask) or (q, None),
    )
    attend(*[jnp.zeros(case.shape)] * 3)
  np.testing.assert_array_equal(
    np.broadcast_to(given[0].allowed(64, 64), (2, 64, 64)), np.broadcast_to(seen, (2, 64, 64))
  )


def test_every_kind_that_matters_is_there_and_first():
  full, quick = attention.cases(False), attention.cases(True)
  assert (
    len(set(full)) == len(full) == 38
    and set(quick) <= set(full)
    and [c.mask for c in quick[:4]] == ['causal', 'full', 'window', 'packed']
  )
  assert {(c.mask, c.length, c.width) for c in full} >= {
    (mask, 2**n, width)
    for mask in ('causal', 'full')
    for n in range(10, 16)
    for width in (64, 128, 256)
  }
  window, packed = full[2:4]
  assert (
    window.window == 1024
    and packed.document == 2048
    and all(c.rows * c.length >= 16384 for c in full)
  )


def test_calls_of_a_kernel_are_neither_merged_nor_taken_out():
  """In the program that a GPU would run; one that lets them be is found out."""
  try:
    device = aot.topology('h100:1x1x1')[0]
  except ImportError as error:
    pytest.skip(f'an H100 cannot be compiled for: {error}')
  cudnn._answer(*next(iter(cudnn.ELSEWHERE.values())))
  case = Case('causal', 1024, 64, tokens=1024, hidden=64)
  attend, x = (
    peers.cudnn(case),
    jax.ShapeDtypeStruct(
      case.shape, 'bfloat16', sharding=jax.sharding.SingleDeviceSharding(device)
    ),
  )
  with jax.default_matmul_precision('default'):
    peers.check_calls(jax.jit(peers.repeated(attend, 5)).lower(x, x, x).compile(), 5)

    def careless(*x):
      return [attend(*x) for _ in range(5)]

    with pytest.raises(RuntimeError, match='not 5: nothing to be timed'):
      peers.check_calls(jax.jit(careless).lower(x, x, x).compile(), 5)


def test_a_process_with_fewer_cases_draws_the_same_numbers(tmp_path):
  small, large = attention.toys()[0], Case('full', 128, 16, tokens=512, hidden=32)
  drawn = []
  for n, cases in enumerate(([small, large], [small])):
    path = tmp_path / f'{n}.json'
    path.write_text(
      json.dumps(
        {
          'peer': 'blocked',
          'cases': [dataclasses.asdict(case) for case in cases],
          'seed': 7,
          'deadline': 0,
          'rehearsal': True,
          'peak_size': 1,
        }
      )
    )
    drawn.append(Job(str(path)).arrays(small))
  for a, b in zip(*drawn, strict=True):
    np.testing.assert_array_equal(a, b)
  assert not np.array_equal(*drawn[0][:2])


def test_a_program_that_cannot_be_read_is_said_to_be_unchecked():
  class Strange:
    def as_text(self):
      return 'no module'

  assert 'calls were not counted: ValueError' in peers.check_calls(Strange(), 3)


def errors(**of):
  return {'errors': {'out': 1.0, 'dq': 1.0} | of}


@pytest.mark.parametrize(
  'ours, theirs, good, said',
  [
    (errors(), {'cudnn': errors()}, True, '1.00x of cudnn'),
    (errors(dq=1.2), {'cudnn': errors()}, False, 'dq 1.20x of cudnn FAILS'),
    (errors(dq=float('nan')), {'cudnn': errors()}, False, 'dq nanx of cudnn FAILS'),
    (
      errors(dq=1.2),
      {'torch flash': errors(dq=1.2), 'torch cudnn': errors(dq=0.5)},
      False,
      'dq 2.40x of torch cudnn FAILS',
    ),
    (errors(), {'cudnn': {'error': 'no plan'}}, None, 'not compared'),
    ({'error': 'crashed'}, {'cudnn': errors()}, None, 'not compared'),
  ],
)
def test_parity_is_judged_by_cudnn_or_by_torch(ours, theirs, good, said):
  text, found = attention.parity_of({'pallas_gpu': ours} | theirs, 'pallas_gpu')
  assert found is good and said in text


def test_goals_are_of_the_lengths_that_they_were_set_for():
  def case(length):
    return Case('causal', length, 128)

  assert attention.goal_of(case(4096), 'forward', 9e14) == ''
  assert [
    attention.goal_of(case(8192), 'forward', rate) for rate in (4e14, 5.1e14, 6e14, None)
  ] == ['500 / 590: below', '500 / 590: above the floor', '500 / 590: reached', '500 / 590']


class Scripted(attention.Timings):
  """A run whose processes end as told: (cases that are reported, last words)."""

  def __init__(self, script):
    super().__init__(attention.toys(), 60, True)
    self.script, self.asked = script, []

  def _process(self, peer, waiting, ends, directory):
    self.asked.append([case.mask for case in waiting])
    done, said = self.script.pop(0)
    return [{'case': case.name, 'forward': 1.0} for case in waiting[:done]], said


def test_a_crash_costs_the_case_that_it_was_at():
  run_ = Scripted([(1, 'code -6, illegal address'), (2, None)])
  found = {result['case'].split()[0]: result for result in run_.ask('pallas_gpu', 1.0, '')}
  assert run_.asked == [['causal', 'full', 'window', 'packed'], ['window', 'packed']]
  assert found['full']['error'] == 'the process ended: code -6, illegal address' and all(
    'forward' in found[m] for m in ('causal', 'window', 'packed')
  )


def test_a_peer_that_always_crashes_is_given_up_and_time_that_is_over_is_said():
  lost = Scripted([(0, 'code 1, no')] * 3)
  assert [r['error'] for r in lost.ask('mosaic', 1.0, '')] == [
    'the process ended: code 1, no'
  ] * 3 + ['given up: code 1, no']
  late = Scripted([(3, None)])
  assert [r.get('error') for r in late.ask('flex', 1.0, '')] == [None] * 3 + [
    'skipped: no time left'
  ]


def test_what_a_peer_found_is_kept_before_the_next_one_is_asked():
  run_, kept = Scripted([(4, None), (4, None)]), []
  run_.all_of(['cudnn', 'flex'], '', lambda: kept.append([*run_.found]))
  assert kept == [['cudnn'], ['cudnn', 'flex']]


def test_what_skipping_is_worth():
  run_ = Scripted([])
  seconds = {
    case.name: {'forward': 1.0, 'backward': {'causal': 9.0, 'window': 1.0}.get(case.mask, 4.0)}
    for case in run_.wanted
  }
  run_.found = {'pallas_gpu': seconds}
  assert [
    text.split(': ')[1].split(' ')[0] for text in attention.faster_of(run_, 'pallas_gpu')
  ] == ['5.0', '2.0']
  assert dataclasses.replace(run_.wanted[2], mask='causal') == run_.wanted[0]
