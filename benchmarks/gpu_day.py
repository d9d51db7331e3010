"""What is there to be measured on a GPU, and what of it in so many seconds?

    python -m benchmarks.gpu_day [--budget 540] [--only masks,attention] [--json gpu_day.json]
    python -m benchmarks.gpu_day --rehearse
    python -m benchmarks.gpu_day --list

Pieces, which --list names: each a benchmark of this folder, one after the other, in the order of
their importance. What they found is written to --json after each (without one, to a new file that
is named). A piece that fails loses itself alone: its error is a line of the file, beside what it
had found before, and the others go on. One that would not be over within the budget, by its
estimate, is left out; one that takes twice its estimate, or all that is left, leaves out what it
has not begun, or is ended. What is left out is said, with the command that runs all of it. Ends
with 1 where a piece failed.

--rehearse runs all of it with toys on this CPU: it tests the harness, measures nothing, and writes
nothing without --json. A machine needs jax, flax, optax and orbax, and what benchmarks.gpu_wheels
lists; a piece that needs more (torch, transformers, trl) says what is missing.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import commands
import files
from benchmarks import train_gpu, train_step
from benchmarks.gpu_environment import LATE, lacking
from parallel import hosts

TOY_SECONDS = 60.0  # what a piece of a rehearsal takes at most
LONGER = 2.0  # times its estimate, after which a piece is ended
LEAVING = 5.0  # seconds for what comes after the last piece, and of one after its last side
FILE = 'gpu_day.json'


@dataclasses.dataclass(frozen=True)
class DayPiece:
  """A benchmark.

  Attributes:
    says: what its figures are.
    seconds: that it takes on an H100 or H200, compiling included, estimated generously.
    command, toy: module and flags, as it is measured and as it is rehearsed.
    keeps: whether it keeps a budget itself (--budget).
  """

  name: str
  says: str
  seconds: float
  command: str
  toy: str
  keeps: bool = False


def _decode(model: str, side: str) -> str:
  return f'benchmarks.decode --model={model} --sides={side} --runs=1 --batches=1,8,64'


_TRAIN = 'benchmarks.train_gpu --quick --sides='
_TOY_TRAIN = 'benchmarks.train_gpu --rehearse --quick --steps=1 --sides='
_TOY_DECODE = 'benchmarks.decode --model=toy --runs=1 --batches=2 --sides='
PIECES = (
  DayPiece(
    'environment',
    'bandwidth, large products, clocks',
    30,
    'benchmarks.gpu_environment',
    'benchmarks.gpu_environment',
  ),
  DayPiece(
    'masks',
    'errors of our attention kernel, values and gradients, of every mask, beside f64',
    90,
    'benchmarks.attention_masks',
    'benchmarks.attention_masks --rehearse',
    keeps=True,
  ),
  DayPiece(
    'attention',
    "attention of ours, cuDNN, jax's Mosaic and torch: TFLOP/s and errors",
    220,
    'benchmarks.attention --quick',
    'benchmarks.attention --rehearse',
    keeps=True,
  ),
  DayPiece(
    'train',
    'a step of 1B with our kernel and with cuDNN: tokens/s, MFU, memory',
    80,
    f'{_TRAIN}pallas_gpu,cudnn',
    f'{_TOY_TRAIN}xla',
    keeps=True,
  ),
  DayPiece(
    'decode_1b',
    '1B in bfloat16, 1, 8 and 64 rows: tokens/s, share of the bandwidth',
    110,
    _decode('bench_1b', 'ours'),
    f'{_TOY_DECODE}ours',
  ),
  DayPiece(
    'grouped_matmul',
    "products of experts' rows: TFLOP/s beside one large product",
    90,
    'benchmarks.grouped_matmul_gpu',
    'benchmarks.grouped_matmul_gpu --rehearse',
    keeps=True,
  ),
  DayPiece(
    'decode_1b_int8',
    'the same in int8',
    110,
    _decode('bench_1b', 'int8'),
    f'{_TOY_DECODE}int8',
  ),
  DayPiece(
    'decode_8b',
    '8B in bfloat16, 1, 8 and 64 rows',
    150,
    _decode('llama3_8b', 'ours'),
    f'{_TOY_DECODE}ours',
  ),
  DayPiece(
    'decode_8b_int8',
    'the same in int8',
    150,
    _decode('llama3_8b', 'int8'),
    f'{_TOY_DECODE}int8',
  ),
  DayPiece(
    'train_torch',
    'a step of 1B with transformers, compiled and not',
    110,
    f'{_TRAIN}"torch compiled",torch',
    f'{_TOY_TRAIN}torch',
    keeps=True,
  ),
  DayPiece(
    'grpo',
    "GRPO of 1B beside TRL's: written tokens/s, phases",
    240,
    'benchmarks.rl --kinds=grpo --model=bench_1b --runs=1 --steps=2 --prompts=8 --new=256',
    'benchmarks.rl --kinds=grpo --model=toy --quick --steps=1 --new=8 --prompt=8',
  ),
  DayPiece(
    'train_xla',
    "a step of 1B with XLA's dense scores and its blocks",
    240,
    f'{_TRAIN}xla,blocked',
    f'{_TOY_TRAIN}blocked',
    keeps=True,
  ),
)


class Day:
  """Pieces, one after the other, and a file that always has what is known.

  Attributes:
    pieces: by name, {'results', 'seconds', 'command'}, with an 'error' where it failed, and 'late',
      how many of its sides had no time; or {'left_out': why}.
  """

  def __init__(self, budget: float, path: str = '', rehearsal: bool = False):
    self.rehearsal = rehearsal
    self.pieces: dict[str, dict] = {}
    self._budget = budget
    self._ends = time.time() + budget
    self._path = path
    self._machine = commands.machine()

  def left(self) -> float:
    """Seconds that a piece may take yet."""
    return self._ends - LEAVING - time.time()

  def take(self, piece: DayPiece) -> None:
    """Runs a piece, or says why not, and writes that down."""
    seconds = TOY_SECONDS if self.rehearsal else piece.seconds
    if seconds > self.left():
      why = f'left out: it takes about {seconds:.0f} s, and {max(0, self.left()):.0f} are left'
      self.pieces[piece.name] = {'left_out': why}
    else:
      self.pieces[piece.name] = self._run(piece, seconds)
    self.save()

  def _run(self, piece: DayPiece, seconds: float) -> dict:
    most = min(LONGER * seconds, self.left())
    command = shlex.split(piece.toy if self.rehearsal else piece.command)
    command += [f'--budget={most - LEAVING:.0f}'] if piece.keeps else []
    began = time.time()
    with tempfile.TemporaryDirectory() as directory:
      path = pathlib.Path(directory) / 'found.json'
      code, printed, said = ended([*command, f'--json={path}'], most)
      results = json.loads(path.read_text())['results'] if path.exists() else {}
    # But for where its own file was, which is a part of ours.
    print(*(line for line in printed.splitlines() if line[:6] != 'wrote '), sep='\n', flush=True)
    taken = {'seconds': round(time.time() - began, 1), 'command': shlex.join(command)}
    if code is None:
      taken['error'] = f'ended after {most:.0f} s'
    elif code:
      taken['error'] = f'code {code}: {reason(printed, said, bool(results))}'
    late = late_in(results)
    return taken | ({'late': late} if late else {}) | {'results': results}

  def save(self) -> None:
    if self._path:
      results = {'rehearsal': self.rehearsal, 'budget': self._budget, 'pieces': self.pieces}
      whole = {'benchmark': 'gpu_day', 'machine': self._machine, 'results': results}
      files.replace(self._path, json.dumps(whole, indent=1))

  def show(self) -> None:
    """What became of each piece, and what to run for those that are missing."""
    rows = []
    for name, taken in self.pieces.items():
      late = taken.get('late', 0)
      measured = 'measured' + (f', but for {late} of its sides: no time was left' if late else '')
      said = taken.get('left_out') or taken.get('error') or measured
      rows.append([name, taken.get('seconds', '-'), said])
    print('\npieces')
    for name, seconds, said in rows:
      print(f'{name:16} {seconds!s:>6}  {said}')
    missing = [name for name, taken in self.pieces.items() if {'left_out', 'late'} & taken.keys()]
    if missing:
      more = f' --json {_beside(self._path)}' if self._path else ''
      print(f'\nnext: python -m benchmarks.gpu_day --only {",".join(missing)}{more}')


def _beside(path: str) -> str:
  """Another file's name: what is there stays."""
  return str(pathlib.Path(path).with_stem(pathlib.Path(path).stem + '_more'))


def unused(path: str) -> str:
  """The first of `_beside` names that no file has: a day is not written over another."""
  while pathlib.Path(path).exists():
    path = _beside(path)
  return path


def late_in(results) -> int:
  """How many sides of a benchmark, at any depth of its results, had no time."""
  if not isinstance(results, dict):
    return 0
  return int(results.get('error') == LATE['error']) + sum(map(late_in, results.values()))


def ended(command: list[str], most: float) -> tuple[int | None, str, str]:
  """Code, output and errors of `python -m command`; the code is None where it, and all that it
  started, was ended after so many seconds.
  """
  process = subprocess.Popen(
    [sys.executable, '-m', *command],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    process_group=0,
    env=os.environ | {'GLIBC_TUNABLES': hosts.TUNABLES, 'TF_CPP_MIN_LOG_LEVEL': '2'},
  )
  try:
    printed, said = process.communicate(timeout=most)
    return process.returncode, printed, said
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    return None, *process.communicate()
  finally:
    # Of what it started nothing may hold the GPU's memory any longer, when this is interrupted too.
    try:
      os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass


def reason(printed: str, said: str, measured: bool) -> str:
  """Why a benchmark failed, in a line: what it printed last where it measured, and so judged;
  otherwise the error that ended it.
  """
  lines = [line for line in printed.splitlines() if line.strip() and line[:6] != 'wrote ']
  named = any('Error' in line.split(':')[0] for line in said.splitlines())
  if lines and (measured or not named):
    return lines[-1].strip()[:300]
  return train_step.reason(said)


def chosen(only: str) -> list[DayPiece]:
  """Pieces by name, with commas between, in their own order; all for ''. Raises ValueError for one
  that is not there.
  """
  asked = [name for name in only.split(',') if name]
  known = [piece.name for piece in PIECES]
  for name in asked:
    if name not in known:
      raise ValueError(f'--only={only}: {name!r} is no piece; there are {", ".join(known)}')
  return [piece for piece in PIECES if piece.name in asked or not asked]


def main() -> int:
  parser = commands.parser(__doc__)
  parser.add_argument('--budget', type=float, default=540, help='seconds for everything')
  parser.add_argument('--only', default='', help='pieces, with commas between')
  parser.add_argument('--list', action='store_true', help='name the pieces, and end')
  parser.add_argument(
    '--rehearse', action='store_true', help='toys on this CPU, to test the harness'
  )
  options = parser.parse_args()
  with commands.mendable():
    pieces = chosen(options.only)
  if options.list:
    rows = [[f'{piece.name}: {piece.says}', f'{piece.seconds:.0f}'] for piece in pieces]
    commands.table('Pieces', ['', 'about, s'], rows)
    return 0
  if options.rehearse:
    os.environ['JAX_PLATFORMS'] = 'cpu'
  platform, kind = train_gpu.device()
  if lacking(kind, platform, options.rehearse):
    return 1
  path = options.json or ('' if options.rehearse else unused(FILE))
  day = Day(options.budget, path, options.rehearse)
  print(f'after each piece written: {path or "nothing"}')
  # As an interruption, so that what runs is ended, too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  for piece in pieces:
    toys = ' (a toy, rehearsed)' if options.rehearse else ''
    print(f'--- {piece.name}{toys}: {piece.says}', flush=True)
    day.take(piece)
    if 'left_out' in day.pieces[piece.name]:
      print(day.pieces[piece.name]['left_out'])
  day.show()
  if options.rehearse:
    print('\na rehearsal: nothing here is a measurement')
  return int(any('error' in taken for taken in day.pieces.values()))


if __name__ == '__main__':
  sys.exit(main())
