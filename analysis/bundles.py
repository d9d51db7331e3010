"""What does a TPU kernel's inner loop cost? Its final instruction bundles,
as libtpu dumps them on a machine without a TPU.

A bundle is what a core issues in a cycle, so that the bundles of a basic block are its cycles but
for stalls: waits for memory, and a matrix unit that takes longer than its instructions.
"""

import dataclasses
import pathlib
import re

DELAY_SLOTS = 5  # bundles from a branch, itself included, to where it takes effect


def dump_flags(directory: str) -> str:
  """LIBTPU_INIT_ARGS for a process, set before it loads libtpu:
  the last pass of every kernel that it compiles goes to `directory`.
  """
  flags = ['dump_to=' + directory, 'dump_llo_text=true', 'dump_llo_pass_label_regex=final.*']
  return ' '.join('--xla_jf_' + flag for flag in flags)


@dataclasses.dataclass(frozen=True)
class Block:
  """A basic block. uses: unit -> share of its slots that are used, 0 to 1;
  'MXU', 'VALU', 'VSTORE', 'VSTORE:SPILL', ...
  """

  bundles: int
  uses: dict[str, float]

  @property
  def matrix(self) -> float:
    """Bundles' worth of the matrix unit."""
    return self.bundles * self.uses.get('MXU', self.uses.get('MATMUL', 0.0))


def kernels(directory: str) -> dict[str, list[Block]]:
  """The basic blocks of every kernel that was dumped, by its name.
  Raises FileNotFoundError where there is none.
  """
  found = {}
  for path in sorted(pathlib.Path(directory).glob('*final_bundles.txt')):
    named = re.fullmatch(r'\d+-(.+?)(?:\.\d+)?-\d+-final_bundles\.txt', path.name)
    tables = [
      *path.parent.glob(
        f'{path.name.rsplit("-", 2)[0]}-*-final_hlo-static-per-bundle-utilization.txt'
      )
    ]
    if named and tables:
      found[named[1]] = _blocks(path, tables[0])
  if not found:
    raise FileNotFoundError(
      f'{directory} holds no final bundles; was LIBTPU_INIT_ARGS set before libtpu was loaded?'
    )
  return found


def bodies(blocks: list[Block]) -> list[Block]:
  """The blocks that do a kernel's products, fewest bundles first."""
  most = max(block.matrix for block in blocks)
  return sorted(
    (block for block in blocks if most and block.matrix > most / 2), key=lambda block: block.bundles
  )


def _blocks(bundles: pathlib.Path, table: pathlib.Path) -> list[Block]:
  lines = [
    line for line in table.read_text().splitlines() if line.strip() and not line.startswith('==')
  ]
  start = next(number for number, line in enumerate(lines) if 'VALU' in line)
  units, capacity = (
    [name.strip() for name in lines[start].split(',')],
    [int(n) for n in lines[start + 1].split()],
  )
  used = [[int(n) for n in line.split()] for line in lines[start + 2 :]]
  cuts, count = {0}, 0
  for line in bundles.read_text().splitlines():
    found = re.match(r'\s*0x[0-9a-f]+\s+([A-Z]{2})?\s*:?\s*', line)
    if found and '{' in line:
      if found[1]:
        cuts.add(count)
      if 'sbr.rel' in line:
        cuts.add(count + DELAY_SLOTS)
      count += 1
  edges = sorted(cut for cut in cuts if cut < count) + [count]
  made = []
  for begin, end in zip(edges, edges[1:]):
    sums = [sum(column) for column in zip(*used[begin:end])] or [0] * len(units)
    made.append(
      Block(
        end - begin,
        {unit: n / (slots * (end - begin)) for unit, n, slots in zip(units, sums, capacity)},
      )
    )
  return made
