"""What does an optimised program run?
Its text (HLO) as instructions, how often each one runs, and the operations of its products.

XLA's own cost analysis counts a loop's body once and sees nothing of what a kernel does;
here a loop counts as often as it runs.
"""

import functools
import re
from collections.abc import Iterator

from analysis import products, trips
from analysis.instruction import Instruction, nbytes, parse
from decode.sampling import FILTER
from kernels.cached import FILLED
from parallel.experts import ROUNDS


class Module:
  """An optimised module.

  Attributes:
    computations: name -> instructions, in the order in which they are scheduled.
      entry: name of the one that runs.

  Raises ValueError for text that holds no entry computation.
  """

  def __init__(self, text: str):
    self.computations, self.entry = _computations(text)
    self._by_name = {name: {i.name: i for i in body} for name, body in self.computations.items()}
    self._callers = {
      called: (name, i)
      for name, body in self.computations.items()
      for i in body
      for called in i.called
    }

  def __getitem__(self, key: tuple[str, str]) -> Instruction:
    """The instruction of (computation, name)."""
    return self._by_name[key[0]][key[1]]

  def parameter(self, computation: str, number: int) -> Instruction:
    """The computation's parameter of this number."""
    return next(
      i
      for i in self.computations[computation]
      if i.opcode == 'parameter' and i.arguments == str(number)
    )

  def root(self, computation: str) -> str:
    """Name of the instruction whose result is the computation's."""
    return next(i.name for i in self.computations[computation] if i.root)

  def caller(self, computation: str) -> tuple[str, Instruction] | tuple[None, None]:
    """(computation, instruction) that runs this one; of several, the last."""
    return self._callers.get(computation, (None, None))

  def users(self, computation: str, name: str) -> list[Instruction]:
    """Instructions of the computation that take this one's result."""
    return [i for i in self.computations[computation] if name in i.operands]

  def walk(self, computation: str = '', times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
    """(computation, instruction, how often it runs) of everything that is scheduled,
    loops and calls unrolled in place.

    A fusion or a kernel is one instruction: what is inside is not walked. Of a conditional its
    dearest branch is. Raises ValueError for a loop whose trip count the program doesn't tell.
    """
    computation = computation or self.entry
    for i in self.computations[computation]:
      yield computation, i, times
      if i.opcode == 'while':
        yield from self.walk(self.body(i), times * self.trips(computation, i))
      elif i.opcode == 'conditional':
        yield from self.walk(self.branch(i), times)
      elif i.opcode in ('call', 'async-start', 'call-start'):
        for name in i.called:
          yield from self.walk(name, times)

  def flops(self, computation: str = '') -> int:
    """Multiply-adds x 2 of the products (dots, convolutions, cuBLAS calls);
    what a kernel computes is not in it.

    A loop counts as often as it runs, a conditional as its dearest branch,
    a convolution where its window meets an input.
    """
    return self._flops(computation or self.entry)

  @functools.cache
  def _flops(self, computation):
    total = 0
    for i in self.computations[computation]:
      total += self.product(computation, i)
      parts = [self._flops(name) for name in i.called]
      if i.opcode == 'conditional':
        total += max(parts)
      elif i.opcode == 'while':
        total += sum(parts) * self.trips(computation, i)
      else:
        total += sum(parts)
    return total

  def body(self, loop: Instruction) -> str:
    """The computation that a `while` repeats."""
    return re.search(r'body=%?([\w.-]+)', loop.attributes)[1]

  def branch(self, conditional: Instruction) -> str:
    """The dearest branch: most products, then most bytes written; of a filter of tokens, the
    cheapest: it is off (decode.sampling).
    """

    def written(name):
      return sum(nbytes(i.shape) for i in self.computations[name] if not i.free)

    pick = min if FILTER in conditional.scope else max
    return pick(conditional.called, key=lambda name: (self.flops(name), written(name)))

  def inside(self, i: Instruction) -> Iterator[tuple[str, Instruction]]:
    """(computation, instruction) of what a fusion or call holds, at any depth."""
    for name in i.called:
      for other in self.computations[name]:
        yield name, other
        yield from self.inside(other)

  def kernels(self) -> int:
    """Kernels that are scheduled, each counted once."""
    return sum(i.kernel for _, i, _ in self.walk())

  def product(self, computation: str, i: Instruction) -> int:
    """Operations of a dot, a convolution or cuBLAS's gemm; 0 of all else."""
    if not products.is_product(i):
      return 0
    return products.operations(i, [self[computation, name].shape for name in i.operands[:2]])

  def routed(self, loop: Instruction) -> bool:
    """Whether a `while` runs for as long as the routing of experts asks for; once, if that is
    balanced (parallel.experts.Rounds).
    """
    return bool(re.search(rf'\b{ROUNDS}\)*/while$', loop.scope))

  def trips(self, computation: str, loop: Instruction) -> int:
    """How often a `while` of `computation` runs its body: as the compiler says,
    or by running its counter; 1 if it is `routed`.

    Over the slots of a cache, as often as a full one needs.

    Raises ValueError where none of these tells.
    """
    if self.routed(loop):
      return 1
    if blocks := re.search(rf'\b{FILLED}(\d+)\)*/while$', loop.scope):
      return int(blocks[1])
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
      return int(known[1])
    return self._count(computation, loop.name)

  @functools.cache
  def _count(self, computation, name):
    return trips.count(self, computation, self[computation, name])


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """name -> instructions of each computation, in order, and the name of the entry.

  A computation begins with a line '%name (parameters) -> result {', that of the entry with ENTRY
  before it; its instructions are indented. What else there is (the module's head, braces, tables
  of files and frames behind) holds neither.
  """
  computations, entry = {}, ''
  lines = []
  for line in text.splitlines():
    if head := re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line):
      lines = computations[head[2]] = []
      entry = head[2] if head[1] else entry
    elif line.startswith('  ') and ' = ' in line:
      lines.append(parse(line))
  if not entry:
    raise ValueError(
      f'no ENTRY computation in a text of {len(text)} characters; pass compiled.as_text()'
    )
  return computations, entry
