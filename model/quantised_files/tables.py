"""How do files hold a matrix of 4-bit codes that stand for entries of a table?

bitsandbytes' NF4 and FP4, and its bytes of LLM.int8; gpt-oss's MXFP4.

bitsandbytes lays a matrix out flat, two codes in a byte with the first in the high bits, in blocks
that may cross rows; absolute maxima of blocks may be bytes themselves, by a table, a scale of 256
of them, and their mean. MXFP4 has blocks of 32 along the inputs, the first code in the low bits,
and a byte for each that is the exponent of its scale, plus 127.
"""

import json
import math

import numpy as np

from model.quantised_files.coded import Coded, Found, known, whole_number
from model.weights.grids import E2M1, NF4

STATE = 'quant_state.bitsandbytes__'
MX = 32  # numbers in a block of MXFP4


def bitsandbytes(settings: dict, found: Found) -> None:
  """Matrices called .weight: U8 with .absmax, .quant_map and .quant_state, or I8 with .SCB."""
  for name in [*found.files.tensors]:
    module, mark, kind = name.rpartition(f'.weight.{STATE}')
    if mark:
      _take_blocks(f'{module}.weight', name, kind, found)
    elif name.endswith('.SCB'):
      _take_bytes(name.removesuffix('.SCB'), found)
  if settings.get('load_in_8bit') and any(name.endswith('.SCB') for name in found.used):
    found.note(
      'NOTE: activations, which LLM.int8 rounds to int8 but for outliers, stay numbers: results '
      'are those of its weights'
    )


def _take_bytes(module: str, found: Found) -> None:
  name = f'{module}.weight'
  tensor = found.place(name, ('I8',), f'{module}.SCB')
  if len(tensor.shape) != 2:
    raise ValueError(f'{found.files.directory}: {name} is {list(tensor.shape)}, no matrix')
  order = f'{module}.weight_format'
  if order in found.files.tensors and found.whole(order).any():
    raise NotImplementedError(
      f'{found.files.directory}: {order} is {found.whole(order)}: only rows (0) are read; save the '
      'model anew by bitsandbytes 0.45 or later'
    )
  largest = found.shaped(
    f'{module}.SCB', ('F32', 'F16'), (tensor.shape[0], 1), tensor.shape[:1], of=name
  )

  def codes(start, stop):
    return found.files.read(name, start, stop)

  def scales(start, stop):
    return largest(start, stop).astype(np.float32) / np.float32(127)

  coded = Coded(tensor, tensor.shape, 'int8', (1, tensor.shape[1]), codes, scales)
  found.take(name, coded, name, *({order} & {*found.files.tensors}))


def _take_blocks(name: str, state: str, kind: str, found: Found) -> None:
  """A matrix of NF4 or FP4; state: the tensor that holds JSON about it."""
  known('bnb_4bit_quant_type', kind, ('nf4', 'fp4'))
  found.place(state, ('U8',))
  try:
    told = json.loads(found.whole(state).tobytes())
    shape = tuple(whole_number('shape', n) for n in told['shape'])
    size = whole_number('blocksize', told['blocksize'], 2)
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(
      f'{found.files.directory}: {state} does not tell shape and blocksize of {name} ({error})'
    ) from error
  count = math.prod(shape)
  if len(shape) != 2:
    raise ValueError(f'{found.files.directory}: {state} has the shape {list(shape)}, no matrix')
  tensor, flat = found.place(name, ('U8',)), (-(-count // 2), 1)
  packed = found.shaped(name, ('U8',), flat, flat[:1], flat[::-1])
  table = found.shaped(f'{name}.quant_map', ('F32', 'F16', 'BF16'), (16,), of=name)
  levels = table(0, 16).astype(np.float32)
  if not np.isfinite(levels).all():
    raise ValueError(f'{found.files.directory}: {name}.quant_map has entries that are no numbers')
  largest = _maxima(name, told, -(-count // size), found)

  inputs = shape[1]
  if inputs % size == 0:
    blocks, why = (1, size), ''
  elif size % inputs == 0 and shape[0] % (size // inputs) == 0:
    blocks, why = (size // inputs, inputs), ''
  else:
    blocks, why = (1, 1), f'blocks of {size} cross its rows of {inputs}'

  def codes(start, stop):
    first, last = start * inputs, stop * inputs
    each = packed(first // 2, -(-last // 2)).reshape(-1, 1)
    each = np.concatenate([each >> 4, each & 15], 1).reshape(-1)
    return each[first % 2 :][: last - first].reshape(-1, inputs).astype(np.int8)

  def scales(start, stop):
    if why:
      return largest()[np.arange(start * inputs, stop * inputs) // size].reshape(-1, inputs)
    return largest().reshape(shape[0] // blocks[0], -1)[start:stop]

  grid = 'nf4' if np.array_equal(levels, np.float32(NF4)) else ''
  found.take(
    name,
    Coded(tensor, shape, grid, blocks, codes, scales, levels=levels, why=why),
    state,
  )


def _maxima(name: str, told: dict, count: int, found: Found):
  """() -> the largest number of each block."""
  at = f'{name}.absmax'
  if 'nested_blocksize' not in told:
    plain = found.shaped(at, ('F32',), (count,), of=name)
    return lambda: plain(0, count)
  size = whole_number('nested_blocksize', told['nested_blocksize'])
  offset = np.float32(told.get('nested_offset', 0))
  codes = found.shaped(at, ('U8',), (count,), of=name)
  outer = -(-count // size)
  table = found.shaped(f'{name}.nested_quant_map', ('F32',), (256,), of=name)
  scales = found.shaped(f'{name}.nested_absmax', ('F32',), (outer,), of=name)

  def maxima():
    each = table(0, 256)[codes(0, count)]
    return each * np.repeat(scales(0, outer), size)[:count] + offset

  return maxima


def mxfp4(settings: dict, found: Found) -> None:
  """Experts' matrices _blocks [E, outputs, inputs / 32, 16] with _scales, which transformers has as
  [E, inputs, outputs].
  """
  del settings
  for name, tensor in [*found.files.tensors.items()]:
    if not name.endswith('_blocks'):
      continue
    if len(tensor.shape) != 4 or tensor.shape[3] * 2 != MX or not min(tensor.shape):
      raise ValueError(
        f'{found.files.directory}: {name} is {list(tensor.shape)}, and should be [experts, '
        f'outputs, inputs / {MX}, {MX // 2}]'
      )
    _take_experts(name.removesuffix('_blocks'), found.place(name, ('U8',)), found)


def _take_experts(module: str, tensor, found: Found) -> None:
  name, (experts, outputs, groups, _) = f'{module}_blocks', tensor.shape
  exponents = found.shaped(f'{module}_scales', ('U8',), (experts, outputs, groups), of=name)

  def codes(start, stop):
    each = found.files.read(name, start, stop)
    each = np.stack([each & 15, each >> 4], -1).view(np.int8)
    return each.reshape(stop - start, outputs, -1).swapaxes(1, 2)

  def scales(start, stop):
    powers = exponents(start, stop).astype(np.int32) - 127
    return np.ldexp(np.float32(1), powers).swapaxes(1, 2)

  shape = (experts, groups * MX, outputs)
  levels = np.float32(E2M1)
  coded = Coded(tensor, shape, 'mxfp4', (1, MX, 1), codes, scales, levels=levels)
  found.take(module, coded, name)
