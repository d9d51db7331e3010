"""Is our attention for GPUs the fastest there is?
Beside cuDNN, jax's own Mosaic GPU kernel and torch's kernels, all in one run.

    python -m benchmarks.attention [--quick] [--budget 540]
                                   [--json benchmarks/results/attention_h100.json]
    python -m benchmarks.attention --rehearse

The first needs a GPU; --rehearse runs the whole harness at toy sizes on this CPU: it tests it and
measures nothing.

bfloat16, 16k tokens a batch (32k for rows of 32k), heads of 64, 128 or 256 that are 2048 wide
together, as many key as query heads: what FlashAttention-3 was measured with (arXiv:2407.08608,
section 4.1). TFLOP/s count the pairs that a mask leaves (half of them under a causal one), two
products forward and five backward, and are a share of what a product of 8192^3 reaches in this run.
Each peer runs in a process of its own, one after the other; one that crashes loses the case that it
was at. Parity comes first: against attention in f64 of fresh random numbers, with memory full of
NaN before, an error beyond PARITY of cuDNN's fails, whatever the speed. What the budget in seconds
leaves no time for is named.
"""

import dataclasses
import json
import os
import pathlib
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import commands
from benchmarks.attention_cases import DIRECTIONS, Case
from benchmarks.gpu_environment import LATE, lacking

OURS = 'pallas_gpu'
PEERS = {
  OURS: 'Tandem',
  'cudnn': 'cuDNN (jax)',
  'torch flash': 'torch flash',
  'torch cudnn': 'torch cuDNN',
  'mosaic': "jax's Mosaic",
  'flex': 'torch flex',
}
STAND_IN = {'blocked': 'Tandem blocked'}  # for ours, in a rehearsal
ON_A_CPU = ('blocked', 'torch flash')
PARITY = 1.1  # times the error of the first of JUDGES that was measured
JUDGES = ('cudnn', 'torch cudnn', 'torch flash')
CRASHES = 3  # of a peer, after which it is given up
# TFLOP/s on an H100, from a length on: what must be reached, and what is aimed at (a share of the
# 798 that a product was seen to reach).
GOALS = {
  ('forward', 'full', 128): (8192, 560, 640),
  ('forward', 'causal', 128): (8192, 500, 590),
  ('forward', 'causal', 64): (16384, 360, 450),
  ('forward', 'causal', 256): (16384, 480, 600),
  ('backward', 'causal', 128): (8192, 380, 500),
}
# How many times faster than our own causal attention of as long rows,
# forward and backward: at least, and aimed at.
FASTER = {'window': (4.0, 6.0), 'packed': (4.0, 5.5)}


def cases(quick: bool) -> list[Case]:
  """What matters most first: the budget may end early."""
  special = [Case(mask, 16384, 128) for mask in ('causal', 'full', 'window', 'packed')]
  lengths = (4096,) if quick else (8192, 4096, 2048, 32768, 1024)
  rest = [Case(mask, length, 128) for length in lengths for mask in ('causal', 'full')]
  widths = [Case('causal', 16384, width) for width in (64, 256)]
  if not quick:
    widths += [
      Case(mask, length, width)
      for length in (16384, 4096, 1024, 8192, 2048, 32768)
      for width in (64, 256)
      for mask in ('causal', 'full')
      if (mask, length) != ('causal', 16384)
    ]
  return special + widths[:2] + rest + widths[2:]


def toys() -> list[Case]:
  return [
    Case(mask, 64, 16, tokens=128, hidden=32) for mask in ('causal', 'full', 'window', 'packed')
  ]


class Timings:
  """Processes of peers, one after the other, on the same numbers;
  what they found, and what was left out and why.
  """

  def __init__(self, wanted: list[Case], budget: float, rehearsal: bool):
    self.wanted = wanted
    self.ends = time.time() + budget
    self.rehearsal = rehearsal
    self.seed = secrets.randbits(32)
    self.found: dict[str, dict[str, dict]] = {}
    self.missing: dict[str, str] = {}

  def ask(self, peer: str, share: float, directory: str, cases_=None) -> list[dict]:
    """Lets a peer work on all cases for this share of the time that is left,
    again after a crash; what it reported.
    """
    waiting = list(self.wanted if cases_ is None else cases_)
    results, crashes = [], 0
    ends = time.time() + share * (self.ends - time.time())
    while True:
      reports, said = self._process(peer, waiting, ends, directory)
      results += reports
      done = {r.get('case') for r in reports}
      waiting = [case for case in waiting if case.name not in done]
      if said is None or not waiting:
        break
      crashes += 1
      results.append({'case': waiting[0].name, 'error': f'the process ended: {said}'})
      waiting = waiting[1:]
      if crashes == CRASHES or time.time() > ends or not waiting:
        break
    why = LATE if said is None else {'error': f'given up: {said}'}
    return results + [{'case': case.name} | why for case in waiting]

  def _process(self, peer, waiting, ends, directory):
    """What one process reported, and its last words where it failed (None where it did not)."""
    job = pathlib.Path(directory) / 'job.json'
    job.write_text(
      json.dumps(
        {
          'peer': peer,
          'cases': [dataclasses.asdict(case) for case in waiting],
          'seed': self.seed,
          'deadline': ends,
          'rehearsal': self.rehearsal,
          'peak_size': 256 if self.rehearsal else 8192,
        }
      )
    )

    environment = os.environ | {
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
      'TF_CPP_MIN_LOG_LEVEL': '2',
    }
    with open(job.with_suffix('.log'), 'w+') as log:
      process = subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.attention_peers', str(job)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
      )
      # It looks at the clock between cases.
      alarm = threading.Timer(max(1.0, ends + 20 - time.time()), process.kill)
      alarm.start()
      lines = list(process.stdout)
      failed = process.wait()
      alarm.cancel()
      log.seek(0)
      said = [line.strip() for line in log if line.strip()]

    reports = [
      json.loads(line.removeprefix('RESULT ')) for line in lines if line.startswith('RESULT ')
    ]
    if not failed:
      return reports, None
    return reports, f'code {failed}, {said[-1][:200] if said else "no word"}'

  def all_of(self, peers, directory: str, keep: Callable[[], None]) -> None:
    """Asks each for all cases; `keep` is called after each."""
    for n, peer in enumerate(peers):
      began = time.time()
      answers = self.ask(peer, 1 / (len(peers) - n), directory)
      self.found[peer] = {result.pop('case'): result for result in answers}
      measured = sum('forward' in result for result in self.found[peer].values())
      print(
        f'{peer}: {measured} of {len(self.wanted)} cases in {time.time() - began:.0f} s', flush=True
      )
      if not measured:
        self.missing[peer] = next(result['error'] for result in self.found[peer].values())
      keep()


def rows_of(run: Timings, names: dict[str, str], peak: float, direction: str) -> list[list[str]]:
  """Of the cases that anyone measured: TFLOP/s and share of the peak by peer,
  ours over cuDNN's, goals, and errors.
  """
  ours, rows = next(iter(names)), []
  for case in run.wanted:
    results = {peer: run.found[peer].get(case.name, {}) for peer in names}
    rates = {
      peer: case.flops(direction) / result[direction]
      for peer, result in results.items()
      if direction in result
    }
    if not rates:
      continue

    cells = [
      f'{rates[peer] / 1e12:.0f} ({rates[peer] / peak:.0%})' if peer in rates else '-'
      for peer in names
    ]
    ratio = f'{rates[ours] / rates["cudnn"]:.2f}' if ours in rates and 'cudnn' in rates else '-'
    goal = goal_of(case, direction, rates.get(ours))
    outputs = ('out',) if direction == 'forward' else ('dq', 'dk', 'dv')
    worst, _ = parity_of(results, ours, outputs)
    rows.append([case.name, *cells, ratio, goal, worst])
  return rows


def goal_of(case: Case, direction: str, rate: float | None) -> str:
  least, floor, aim = GOALS.get((direction, case.mask, case.width), (1e9, 0, 0))
  if case.length < least:
    return ''
  if rate is None:
    return f'{floor} / {aim}'
  if rate < floor * 1e12:
    return f'{floor} / {aim}: below'
  return f'{floor} / {aim}: ' + ('above the floor' if rate < aim * 1e12 else 'reached')


def parity_of(
  results: dict[str, dict], ours: str, names=('out', 'dq', 'dk', 'dv')
) -> tuple[str, bool | None]:
  """The largest ratio of our errors, of these arrays, to the judge's, in words;
  and whether it is within PARITY (None: not known).
  """
  judge = next((peer for peer in JUDGES if 'errors' in results.get(peer, {})), None)
  if 'errors' not in results.get(ours, {}) or judge is None:
    return 'not compared', None
  theirs = results[judge]['errors']
  ratios = {
    name: error / max(theirs[name], 1e-30)
    for name, error in results[ours]['errors'].items()
    if name in theirs and name in names
  }
  if not ratios:
    return 'not compared', None
  worst = max(
    ratios, key=lambda name: ratios[name] if ratios[name] == ratios[name] else float('inf')
  )
  good = all(ratio <= PARITY for ratio in ratios.values())
  return f'{worst} {ratios[worst]:.2f}x of {judge}' + ('' if good else ' FAILS'), good


def faster_of(run: Timings, ours: str) -> list[str]:
  """What skipping is worth: our windows and documents against our own causal attention
  of as long rows.
  """
  measured = run.found.get(ours, {})

  def seconds(name):
    return sum(measured.get(name, {}).get(direction, float('nan')) for direction in DIRECTIONS)

  said = []
  for case in run.wanted:
    if case.mask not in FASTER:
      continue
    ratio = seconds(dataclasses.replace(case, mask='causal').name) / seconds(case.name)
    if ratio == ratio:
      floor, aim = FASTER[case.mask]
      said.append(
        f'{case.name}, forward and backward: {ratio:.1f} times faster than causal (at least '
        f'{floor}, aim {aim})'
      )
  return said


def show(run: Timings, names: dict[str, str], peak: float, device: str) -> None:
  for direction in DIRECTIONS:
    commands.table(
      f'{direction}, {device}: TFLOP/s (share of the {peak / 1e12:.3g} of a large product)',
      ['case', *names.values(), 'ours / cuDNN', 'floor / aim', 'worst error'],
      rows_of(run, names, peak, direction),
    )
  print('', *faster_of(run, next(iter(names))), sep='\n')
  for peer, why in run.missing.items():
    print(f'not measured: {peer}: {why}')
  for peer in names:
    if peer not in run.missing:
      for case, result in run.found[peer].items():
        for why in (
          result.get('error'),
          result.get('no_backward') and f'backward: {result["no_backward"]}',
        ):
          if why:
            print(f'not measured: {peer}, {case}: {why}')
        if result.get('unchecked'):
          print(f'not checked: {peer}, {case}: {result["unchecked"]}')


def main() -> int:
  parser = commands.parser(__doc__)
  parser.add_argument('--quick', action='store_true', help='one length of most kinds')
  parser.add_argument('--budget', type=float, default=540, help='seconds for everything')
  parser.add_argument(
    '--rehearse', action='store_true', help='toy sizes on this CPU, to test the harness'
  )
  options = parser.parse_args()
  if options.rehearse:
    os.environ['JAX_PLATFORMS'] = 'cpu'

  run = Timings(
    toys() if options.rehearse else cases(options.quick), options.budget, options.rehearse
  )
  names = (STAND_IN if options.rehearse else {}) | PEERS
  with tempfile.TemporaryDirectory() as directory:
    peak = next((r for r in run.ask('peak', 0.2, directory, []) if 'peak' in r), None)
    if peak is None:
      print(
        'error: a large product in bfloat16 did not run; '
        'python -m benchmarks.attention_peers says why'
      )
      return 1
    if lacking(peak['kind'], peak['platform'], options.rehearse):
      return 1
    print(f'{peak["kind"]}: {peak["peak"] / 1e12:.3g} TFLOP/s of a large product in bfloat16')

    lost = {r['case']: r['error'] for r in run.ask('oracle', 0.3, directory) if 'error' in r}
    for case, why in lost.items():
      print(f'not measured: {case}: no exact values, so nothing can be compared: {why}')
    run.wanted = [case for case in run.wanted if case.name not in lost]
    if not run.wanted:
      return 1

    order = ['cudnn', OURS, 'torch flash', 'torch cudnn', 'mosaic', 'flex']
    if options.rehearse:
      run.missing |= dict.fromkeys(
        [peer for peer in order if peer not in ON_A_CPU], 'it does not run on a CPU'
      )
      order = list(ON_A_CPU)
    run.found |= dict.fromkeys(PEERS, {})

    def keep(**more):
      whole = {'rehearsal': options.rehearse, 'device': peak, 'seed': run.seed}
      whole['cases'] = {case.name: dataclasses.asdict(case) for case in run.wanted}
      whole |= {'seconds': run.found, 'missing': run.missing} | more
      commands.write_json(options.json, 'attention', whole, partial=not more)

    run.all_of(order, directory, keep)
  show(run, names, peak['peak'], peak['kind'])

  def of(case):
    return {peer: run.found[peer].get(case.name, {}) for peer in names}

  # Errors of a rehearsal are those of toys in f32: a ratio of a few numbers, which nothing hangs
  # on.
  failed = [
    case.name
    for case in run.wanted
    if not options.rehearse and parity_of(of(case), next(iter(names)))[1] is False
  ]
  if failed:
    print(f'\nPARITY FAILS: {", ".join(failed)}')
  if options.rehearse:
    print('\na rehearsal: nothing here is a measurement')
  keep(**{'parity fails': failed})
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
