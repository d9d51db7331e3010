"""What does a TPU kernel's inner loop cost? Its final instruction bundles,
as libtpu dumps them on a machine without a TPU.

A bundle is what a core issues in a cycle, so that the bundles of a basic block are its cycles but
for stalls: waits for memory, and a matrix unit that takes longer than its instructions.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from analysis import aot

DELAY_SLOTS = 5  # bundles from a branch, itself included, to where it takes effect


def dump_flags(directory: str) -> str:
  """LIBTPU_INIT_ARGS for a process, set before it loads libtpu:
  the last pass of every kernel that it compiles goes to `directory`.
  """
  flags = ['dump_to=' + directory, 'dump_llo_text=true', 'dump_llo_pass_label_regex=final.*']
  return ' '.join('--xla_jf_' + flag for flag in flags)


def dumped(module: str, jobs: list[dict]) -> list[dict]:
  """What `python -m module --child DIRECTORY` prints of jobs, a line of JSON each, in a process
  that loads libtpu anew and dumps kernels into that directory. Raises RuntimeError where it fails.
  """
  with tempfile.TemporaryDirectory() as directory:
    done = subprocess.run(
      [sys.executable, '-m', module, '--child', directory],
      env=os.environ | aot.LIBTPU | {'LIBTPU_INIT_ARGS': dump_flags(directory)},
      text=True,
      capture_output=True,
      input=''.join(json.dumps(job) + '\n' for job in jobs),
    )
  if done.returncode:
    raise RuntimeError(f'libtpu fails:\n{done.stderr[-2000:]}')
  return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]


@dataclasses.dataclass(frozen=True)
class BasicBlock:
  """A basic block. uses: unit -> share of its slots that are used, 0 to 1;
  'MXU', 'VALU', 'VSTORE', 'VSTORE:SPILL', ...
  """

  bundles: int
  uses: dict[str, float]

  @property
  def matrix(self) -> float:
    """Bundles' worth of the matrix unit."""
    return self.bundles * self.uses.get('MXU', self.uses.get('MATMUL', 0.0))


def kernels(directory: str) -> dict[str, list[BasicBlock]]:
  """The basic blocks of every kernel that was dumped, by its name.
  Raises FileNotFoundError where there is none.
  """
  blocks = {}
  for path in sorted(pathlib.Path(directory).glob('*final_bundles.txt')):
    # NUMBER-KERNEL[.COPY]-PASS-final_bundles.txt, and a table of another pass of the same kernel.
    named = re.fullmatch(r'\d+-(.+?)(?:\.\d+)?-\d+-final_bundles\.txt', path.name)
    kernel = path.name.rsplit('-', 2)[0]
    tables = [*path.parent.glob(f'{kernel}-*-final_hlo-static-per-bundle-utilization.txt')]
    if named and tables:
      blocks[named[1]] = _blocks(path, tables[0])
  if not blocks:
    raise FileNotFoundError(
      f'{directory} holds no final bundles; was LIBTPU_INIT_ARGS set before libtpu was loaded?'
    )
  return blocks


def bodies(blocks: list[BasicBlock]) -> list[BasicBlock]:
  """The blocks that do a kernel's products, fewest bundles first."""
  most = max(block.matrix for block in blocks)
  return sorted(
    (block for block in blocks if most and block.matrix > most / 2), key=lambda block: block.bundles
  )


def _blocks(bundles: pathlib.Path, table: pathlib.Path) -> list[BasicBlock]:
  lines = [
    line for line in table.read_text().splitlines() if line.strip() and not line.startswith('==')
  ]
  # The table: names of units, how many slots a bundle has of each, then what each bundle uses.
  start = next(number for number, line in enumerate(lines) if 'VALU' in line)
  units = [name.strip() for name in lines[start].split(',')]
  capacity = [int(n) for n in lines[start + 1].split()]
  used = [[int(n) for n in line.split()] for line in lines[start + 2 :]]

  # A block begins at a bundle with a mark (of what jumps there: LB, LH, ...) behind its address,
  # and where a branch has taken effect.
  cuts, count = {0}, 0
  for line in bundles.read_text().splitlines():
    bundle = re.match(r'\s*0x[0-9a-f]+\s+([A-Z]{2})?\s*:?\s*', line)
    if bundle and '{' in line:
      if bundle[1]:
        cuts.add(count)
      if 'sbr.rel' in line:
        cuts.add(count + DELAY_SLOTS)
      count += 1
  edges = sorted(cut for cut in cuts if cut < count) + [count]

  blocks = []
  for begin, end in zip(edges, edges[1:]):
    sums = [sum(column) for column in zip(*used[begin:end])] or [0] * len(units)
    size = end - begin
    uses = {unit: n / (slots * size) for unit, n, slots in zip(units, sums, capacity)}
    blocks.append(BasicBlock(size, uses))
  return blocks
