"""How does one line of an optimised program read? HLO's text of an instruction, and its shapes.

    ROOT %dot.3 = f32[4,8]{1,0:T(8,128)} dot(%x, %w), lhs_contracting_dims={1}, metadata={...}

A line has a name, a shape (of an array with its layout, or of a tuple in parentheses), an opcode,
operands in parentheses, and attributes, which differ by opcode and by backend. Attributes stay
text: what is wanted of them is searched for when it is asked for.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

# Memory spaces that a layout names: S(5), S(1); none is the device's main memory.
HOST = 5
VMEM = 1
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
# Custom calls that are Pallas kernels: of TPUs, of Mosaic GPU, and two forms of Triton's.
_KERNEL = re.compile(
  r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*|triton_kernel_call|'
  r'__gpu\$xla\.gpu\.triton)"'
)


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
    called = re.findall(
      r'(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)', self.attributes
    )
    for names in re.findall(r'branch_computations=\{([^}]*)\}', self.attributes):
      called += [name.strip().lstrip('%') for name in names.split(',')]
    return tuple(called)

  @property
  def free(self) -> bool:
    """Whether it names or regroups values and does no work."""
    return self.opcode in _FREE

  @property
  def index(self) -> int | None:
    """Of a get-tuple-element its place in the tuple."""
    match = re.search(r'\bindex=(\d+)', self.attributes)
    return int(match[1]) if match else None

  @property
  def rendezvous(self) -> str:
    """Of a send or a recv, the name under which they meet, or ''."""
    match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.attributes)
    return match[1] if match else ''

  @property
  def scope(self) -> str:
    """Where it comes from in the Python program: the op_name of its metadata, or ''."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match[1] if match else ''

  @property
  def cycles(self) -> int | None:
    """Cycles that the TPU compiler estimates for one run, or None:
    it says nothing of collectives, kernels and copies.
    """
    match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
    return int(match[1]) if match and int(match[1]) < UNKNOWN_CYCLES else None

  @property
  def kernel(self) -> bool:
    """Whether it is a Pallas kernel, whose work the program does not show."""
    return (
      self.opcode == 'custom-call'
      and 'ragged-dot-metadata' not in self.name
      and 'metadata(' not in self.attributes
      and bool(_KERNEL.search(self.attributes))
    )


def dims(shape: str) -> tuple[int, ...]:
  """Sizes of an array's shape, 'f32[4,8]{1,0}'; () of anything else."""
  match = re.match(r'\w+\[([\d,]*)\]', shape)
  return tuple(int(n) for n in match[1].split(',') if n) if match else ()


def arrays(shape: str) -> Iterator[tuple[int, int]]:
  """(bytes, memory space) of each array of a shape or tuple of shapes;
  0 is the device's main memory. Padding is not counted.
  """
  for dtype, sizes, layout in re.findall(r'(\w+)\[([\d,]*)\](\{[^}]*\})?', shape):
    # 'f8e4m3' has 8 bits, 's4' has 4; 'token' and 'opaque' have none.
    bits = 8 if dtype == 'pred' else int((re.search(r'\d+', dtype) or [0])[0])
    elements = math.prod(int(n) for n in sizes.split(',') if n)
    space = re.search(r'S\((\d+)\)', layout)
    yield math.ceil(elements * bits / 8), int(space[1]) if space else 0


def nbytes(shape: str) -> int:
  """Bytes of all arrays of a shape, in whatever memory."""
  return sum(size for size, _ in arrays(shape))


def parse(line: str) -> Instruction:
  """Reads 'ROOT %name = shape opcode(operands), attributes'."""
  head, rest = line.strip().split(' = ', 1)
  # Tuples, layouts ({1,0:T(8,128)}) and operands' shapes hold parentheses, so that those that
  # enclose a tuple or the operands are found by counting. An array's shape holds no space.
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
  for parenthesis in re.compile(r'[()]').finditer(text, opening):
    depth += 1 if parenthesis[0] == '(' else -1
    if not depth:
      return parenthesis.end()
  raise ValueError(f'unbalanced parentheses in {text[:200]}')
