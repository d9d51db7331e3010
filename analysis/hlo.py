"""What does an optimised program run? Its text (HLO) as instructions,
how often each one runs, and the operations of its products.

XLA's own cost analysis counts a loop's body once and sees nothing of what a kernel does;
here a loop counts as often as it runs.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

from decode.sampling import FILTER
from kernels.cached import FILLED
from parallel.experts import ROUNDS

HOST, VMEM = 5, 1  # memory spaces that a layout names: S(5), S(1); none is the device's main memory
UNKNOWN_CYCLES = 2**62  # the compiler writes the largest integer where it has no estimate
_FREE = {
  'parameter',
  'constant',
  'get-tuple-element',
  'tuple',
  'bitcast',
  'after-all',
  'partition-id',
  'replica-id',
  'optimization-barrier',
  'recv',
}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: name = shape opcode(operands), attributes.
  `attributes` is the text behind the operands.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  arguments: str
  attributes: str
  root: bool

  @property
  def called(self) -> tuple[str, ...]:
    """Computations that it runs: of a loop its body (not the condition),
    of a conditional every branch.
    """
    found = re.findall(
      r'(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)', self.attributes
    )
    for names in re.findall(r'branch_computations=\{([^}]*)\}', self.attributes):
      found += [name.strip().lstrip('%') for name in names.split(',')]
    return tuple(found)

  @property
  def free(self) -> bool:
    """Whether it names or regroups values and does no work."""
    return self.opcode in _FREE

  @property
  def index(self) -> int | None:
    """Of a get-tuple-element its place in the tuple."""
    found = re.search(r'\bindex=(\d+)', self.attributes)
    return int(found[1]) if found else None

  @property
  def rendezvous(self) -> str:
    """Of a send or a recv, the name under which they meet, or ''."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.attributes)
    return found[1] if found else ''

  @property
  def scope(self) -> str:
    """Where it comes from in the Python program: the op_name of its metadata, or ''."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ''

  @property
  def cycles(self) -> int | None:
    """Cycles that the TPU compiler estimates for one run, or None:
    it says nothing of collectives, kernels and copies.
    """
    found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
    return int(found[1]) if found and int(found[1]) < UNKNOWN_CYCLES else None

  @property
  def kernel(self) -> bool:
    """Whether it is a Pallas kernel, whose work the program does not show."""
    return (
      self.opcode == 'custom-call'
      and 'ragged-dot-metadata' not in self.name
      and 'metadata(' not in self.attributes
      and bool(
        re.search(
          r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*|triton_kernel_call|__gpu\$xla\.gpu\.triton)"',
          self.attributes,
        )
      )
    )


def dims(shape: str) -> tuple[int, ...]:
  """Sizes of an array's shape, 'f32[4,8]{1,0}'; () of anything else."""
  found = re.match(r'\w+\[([\d,]*)\]', shape)
  return tuple(int(n) for n in found[1].split(',') if n) if found else ()


def arrays(shape: str) -> Iterator[tuple[int, int]]:
  """(bytes, memory space) of each array of a shape or tuple of shapes;
  0 is the device's main memory. Padding is not counted.
  """
  for dtype, sizes, layout in re.findall(r'(\w+)\[([\d,]*)\](\{[^}]*\})?', shape):
    bits = 8 if dtype == 'pred' else int((re.search(r'\d+', dtype) or [0])[0])
    space = re.search(r'S\((\d+)\)', layout)
    yield (
      math.ceil(math.prod(int(n) for n in sizes.split(',') if n) * bits / 8),
      int(space[1]) if space else 0,
    )


def nbytes(shape: str) -> int:
  """Bytes of all arrays of a shape, in whatever memory."""
  return sum(size for size, _ in arrays(shape))


class Module:
  """An optimised module.

  Attributes:
    computations: name -> instructions, in the order in which they are scheduled.
      entry: name of the one that runs.

  Raises ValueError for text that holds no entry computation.
  """

  def __init__(self, text: str):
    self.computations, self.entry = {}, ''
    lines = []
    for line in text.splitlines():
      if found := re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line):
        lines = self.computations[found[2]] = []
        self.entry = found[2] if found[1] else self.entry
      elif line.startswith('  ') and ' = ' in line:
        lines.append(_instruction(line))
    if not self.entry:
      raise ValueError(
        f'no ENTRY computation in a text of {len(text)} characters; pass compiled.as_text()'
      )
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
      parts = [self._flops(name) for name in i.called]
      total += self.product(computation, i)
      total += (
        max(parts)
        if i.opcode == 'conditional'
        else sum(parts) * (self.trips(computation, i) if i.opcode == 'while' else 1)
      )
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

    return (min if FILTER in conditional.scope else max)(
      conditional.called, key=lambda name: (self.flops(name), written(name))
    )

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
    if i.opcode not in ('dot', 'convolution') and not (
      i.opcode == 'custom-call' and '__cublas' in i.attributes
    ):
      return 0
    left, right = (dims(self[computation, name].shape) for name in i.operands[:2])
    if i.opcode == 'dot':
      summed = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.attributes)[1]
      return 2 * math.prod(dims(i.shape)) * math.prod(left[int(n)] for n in summed.split(',') if n)
    if i.opcode == 'custom-call':
      config = json.loads(re.search(r'backend_config=(\{.*\})', i.attributes)[1])
      numbers = config['gemm_backend_config']['dot_dimension_numbers']
      return (
        2
        * math.prod(dims(i.shape.lstrip('(')))
        * math.prod(left[int(n)] for n in numbers['lhs_contracting_dimensions'])
      )
    labels = re.match(r'(\w+)_(\w+)->(\w+)', re.search(r'dim_labels=([\w>-]+)', i.attributes)[1])
    out = dict(zip(labels[3], dims(i.shape)))
    taps = math.prod(
      _taps(i.attributes, int(axis), left[labels[1].index(axis)], out[axis])
      for axis in labels[3]
      if axis.isdigit()
    )
    return 2 * out['b'] * out['f'] * right[labels[2].index('i')] * taps

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
    loop = self[computation, name]
    condition, body = re.search(r'condition=%?([\w.-]+)', loop.attributes)[1], self.body(loop)
    value = functools.cache(lambda index: self._scalar(computation, loop.operands[0], (index,)))
    for trips in range(1_000_000):
      proceed = self._scalar(
        condition, self._root(condition), (), lambda index, value=value: value(index)
      )
      if proceed is None:
        break
      if not proceed:
        return trips
      value = functools.cache(
        lambda index, before=value: self._scalar(body, self._root(body), (index,), before)
      )
    raise ValueError(
      f'no trip count is to be found of {name} in {computation} ({loop.scope or "no metadata"}): '
      'its condition depends on more than a counter that starts at a constant'
    )

  def _root(self, computation):
    return next(i.name for i in self.computations[computation] if i.root)

  def _scalar(self, computation, name, path=(), element=None, parameters=None):
    """Value of a scalar (its place in a tuple: `path`), None where unknown.
    element: index -> value of the loop's state.
    """
    i = self[computation, name]

    def ask(operand, path=()):
      return self._scalar(computation, operand, path, element, parameters)

    if i.opcode == 'constant':
      text = i.arguments.strip()
      return {'true': 1, 'false': 0}.get(text, int(text) if re.fullmatch(r'-?\d+', text) else None)
    if i.opcode == 'get-tuple-element':
      return ask(i.operands[0], (i.index, *path))
    if i.opcode == 'tuple':
      return ask(i.operands[path[0]], path[1:]) if path else None
    if i.opcode == 'parameter':
      if parameters is not None:
        return parameters(int(i.arguments), path)
      if element is not None:
        return element(path[0]) if len(path) == 1 else None
      return self._invariant(computation, path)
    if i.opcode in ('bitcast', 'copy', 'convert', 'reshape', 'copy-done', 'optimization-barrier'):
      return ask(i.operands[0], path)
    if i.opcode == 'copy-start':
      return ask(i.operands[0])
    if i.opcode in ('fusion', 'call'):
      return self._scalar(
        i.called[0], self._root(i.called[0]), path, None, lambda n, path: ask(i.operands[n], path)
      )
    if i.opcode in ('add', 'subtract', 'compare', 'and') and dims(i.shape) == ():
      left, right = ask(i.operands[0]), ask(i.operands[1])
      return None if left is None or right is None else _compute(i, left, right)
    return None

  def _invariant(self, computation, path):
    """A constant that a loop hands unchanged to each of its rounds."""
    caller, loop = self._callers.get(computation, (None, None))
    if len(path) != 1 or loop is None or loop.opcode != 'while':
      return None
    root = self[computation, self._root(computation)]
    handed = self[computation, root.operands[path[0]]] if root.opcode == 'tuple' else None
    unchanged = (
      handed is not None
      and handed.opcode == 'get-tuple-element'
      and re.match(rf', index={path[0]}\b', handed.attributes)
    )
    return self._scalar(caller, loop.operands[0], path) if unchanged else None


def _compute(i, left, right):
  if i.opcode == 'compare':
    direction = re.search(r'direction=(\w+)', i.attributes)[1]
    return int(
      {
        'LT': left < right,
        'LE': left <= right,
        'GT': left > right,
        'GE': left >= right,
        'EQ': left == right,
        'NE': left != right,
      }[direction]
    )
  return {'add': left + right, 'subtract': left - right, 'and': left & right}[i.opcode]


def _instruction(line: str) -> Instruction:
  """Reads 'ROOT %name = shape opcode(operands), attributes';
  shapes and operands may hold parentheses.
  """
  head, rest = line.strip().split(' = ', 1)
  end = _closing(rest, 0) if rest[0] == '(' else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index('(')
  close = _closing(rest, opening)
  arguments = rest[opening + 1 : close - 1]
  operands = tuple(re.findall(r'%([\w.-]+)', arguments))
  return Instruction(
    head.removeprefix('ROOT ').lstrip('%'),
    shape,
    rest[:opening],
    operands,
    arguments,
    rest[close:],
    head.startswith('ROOT '),
  )


def _closing(text: str, opening: int) -> int:
  """Index behind the parenthesis that closes the one at `opening`."""
  depth = 0
  for found in re.compile(r'[()]').finditer(text, opening):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return found.end()
  raise ValueError(f'unbalanced parentheses in {text[:200]}')


def _taps(attributes, axis, inputs, outputs):
  """Pairs of an output and a place of the window that meet an input rather
  than padding or the holes of a dilation.
  """
  window = dict(re.findall(r'(\w+)=(\S+)', re.search(r'window=\{([^}]*)\}', attributes)[1]))

  def of(field, default):
    return int(window[field].split('x')[axis]) if field in window else default

  stride, left, right = of('stride', 1), of('lhs_dilate', 1), of('rhs_dilate', 1)
  low = int(window['pad'].split('x')[axis].split('_')[0]) if 'pad' in window else 0
  places = (
    out * stride + tap * right - low for out in range(outputs) for tap in range(of('size', 1))
  )
  return sum(0 <= place <= (inputs - 1) * left and place % left == 0 for place in places)
