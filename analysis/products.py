"""How many operations has a matrix product of a compiled program? Multiply-adds x 2 of dots,
convolutions and cuBLAS calls.
"""

import json
import math
import re
from collections.abc import Sequence

from analysis.instruction import Instruction, dims


def is_product(i: Instruction) -> bool:
  """Whether it is a dot, a convolution or cuBLAS's gemm."""
  cublas = i.opcode == 'custom-call' and '__cublas' in i.attributes
  return cublas or i.opcode in ('dot', 'convolution')


def operations(i: Instruction, shapes: Sequence[str]) -> int:
  """Multiply-adds x 2 of a product, of operands of these shapes; of a convolution, those in which
  its window meets an input.
  """
  left, right = (dims(shape) for shape in shapes[:2])
  if i.opcode == 'convolution':
    return _convolution(i, left, right)

  # Every entry of the result is a sum over the dimensions that both operands are contracted in.
  if i.opcode == 'dot':
    listed = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.attributes)[1]
    summed, result = [n for n in listed.split(',') if n], i.shape
  else:
    config = json.loads(re.search(r'backend_config=(\{.*\})', i.attributes)[1])
    numbers = config['gemm_backend_config']['dot_dimension_numbers']
    # cuBLAS returns a tuple: the result, and its workspace.
    summed, result = numbers['lhs_contracting_dimensions'], i.shape.lstrip('(')
  return 2 * math.prod(dims(result)) * math.prod(left[int(n)] for n in summed)


def _convolution(i, left, right):
  # dim_labels: b01f_01io->b01f, what each dimension of input, kernel and output is: b batch, f
  # features (of the kernel i and o), digits the dimensions that the window moves along.
  labels = re.match(r'(\w+)_(\w+)->(\w+)', re.search(r'dim_labels=([\w>-]+)', i.attributes)[1])
  of_input, of_kernel, of_output = labels.groups()
  out = dict(zip(of_output, dims(i.shape)))
  # TPU programs write dots as convolutions too, without a window to move.
  window = re.search(r'window=\{([^}]*)\}', i.attributes)
  window = dict(re.findall(r'(\w+)=(\S+)', window[1])) if window else {}
  taps = math.prod(
    _taps(window, int(axis), left[of_input.index(axis)], out[axis])
    for axis in of_output
    if axis.isdigit()
  )
  return 2 * out['b'] * out['f'] * right[of_kernel.index('i')] * taps


def _taps(window, axis, inputs, outputs):
  """Pairs of an output and a place of the window that meet an input rather than padding or the
  holes of a dilation.

  window: 'size', 'stride', 'pad', 'lhs_dilate' and 'rhs_dilate', of all axes: '3x3', '0_0x1_1'.
  """

  def of(field, default):
    return int(window[field].split('x')[axis]) if field in window else default

  stride = of('stride', 1)
  holes, spread = of('lhs_dilate', 1), of('rhs_dilate', 1)
  low = int(window['pad'].split('x')[axis].split('_')[0]) if 'pad' in window else 0
  # Places are counted along the input with its holes: input n is at n * holes.
  places = (
    out * stride + tap * spread - low for out in range(outputs) for tap in range(of('size', 1))
  )
  return sum(0 <= place <= (inputs - 1) * holes and place % holes == 0 for place in places)
