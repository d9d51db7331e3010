"""How do files hold a matrix row by row, in bytes or floats of 8 bits, with scales beside it?

compressed-tensors in all its formats, and the fp8 of DeepSeek, Qwen and others.
"""

import math
import re

import numpy as np

from model.quantised_files.coded import (
  FLOATS,
  Coded,
  Found,
  blocked,
  grid_of,
  known,
  unpacked,
  whole_number,
)

FORMATS = ('pack-quantized', 'int-quantized', 'float-quantized', 'naive-quantized')
STRATEGIES = ('tensor', 'channel', 'group', 'block')


def fp8(settings: dict, found: Found) -> None:
  """Matrices of F8_E4M3 called .weight, with .weight_scale_inv or .weight_scale."""
  known('fmt', settings.get('fmt', 'e4m3'), ('e4m3', 'float8_e4m3fn'))
  block = settings.get('weight_block_size')
  if block is not None:
    block = _pair('weight_block_size', block)
  for name, tensor in found.files.tensors.items():
    if not tensor.kind.startswith('F8_E') or not name.endswith('.weight'):
      continue
    module = name.removesuffix('.weight')
    shape = _matrix(name, found.place(name, ('F8_E4M3',)).shape, found)
    scale = f'{module}.weight_scale_inv'
    if scale not in found.files.tensors:
      scale = f'{module}.weight_scale'
    found.used |= {f'{module}.input_scale', f'{module}.activation_scale'} & {*found.files.tensors}
    scales = found.place(scale, FLOATS, name).shape
    size = math.prod(scales)
    # By their shape: there may be as many squares as outputs, and files that say a block may have
    # some matrices with a scale for each output.
    squares = block and (scales == blocked(shape, block) or size != shape[0])
    if size == 1:
      blocks = shape
    else:
      blocks = block if squares else (1, shape[1])
    _take(name, name, shape, 'fp8', blocks, scale, found)
  if settings.get('activation_scheme'):
    found.note(_activations('fp8'))


def compressed_tensors(settings: dict, found: Found) -> None:
  """Matrices called .weight_packed or .weight, with .weight_scale."""
  _refuse(settings)
  groups = settings.get('config_groups')
  if not isinstance(groups, dict) or not groups:
    raise ValueError('quantization_config in config.json has no config_groups')
  for module, ending in found.ending('weight_packed', 'weight_scale'):
    if ending == 'weight_scale' and f'{module}.weight_packed' in found.files.tensors:
      continue
    group = _group(module, groups)
    weights = group.get('weights')
    if not isinstance(weights, dict):
      raise ValueError(f'quantization_config in config.json: no weights in the group of {module}')
    form = group.get('format') or settings.get('format')
    known('format', form, FORMATS)
    if activations := group.get('input_activations'):
      kind = activations.get('type', 'int') if isinstance(activations, dict) else 'int'
      found.note(_activations({'float': 'fp8'}.get(kind, 'int8')))
    _take_module(module, weights, found)
  for module, ending in found.ending('weight_packed', 'weight_scale', 'input_scale'):
    found.used |= {f'{module}.input_scale', f'{module}.output_scale', f'{module}.input_zero_point'}
  if settings.get('kv_cache_scheme'):
    found.note('NOTE: keys and values in the cache stay numbers: its scales of them are not read')
    found.used |= {f'{m}.{e}' for m, e in found.ending('k_scale', 'v_scale', 'q_scale')}
  found.used &= {*found.files.tensors}


ASIDE = ('sparsity_config', 'transform_config')


def _refuse(settings: dict) -> None:
  """Raises NotImplementedError for what changes the numbers otherwise."""
  status = settings.get('quantization_status', 'compressed')
  known('quantization_status', status, ('compressed', 'frozen'))
  sparsity, transforms = (
    {} if (x := settings.get(name)) in (None, [], {}) else x for name in ASIDE
  )
  for name, x in zip(ASIDE, (sparsity, transforms)):
    if not isinstance(x, dict):
      raise ValueError(f'quantization_config.{name}={x!r} is no object of JSON')
  known('sparsity_config.format', sparsity.get('format', 'dense'), ('dense',))
  transforms = transforms.get('config_groups') or {}
  known('transform_config.config_groups', transforms, ({},))


def _group(module: str, groups: dict) -> dict:
  """The group whose targets name a module: by name, else by a pattern, else by its class."""

  def rank(target) -> int:
    if target == module:
      return 0
    if isinstance(target, str) and target.startswith('re:'):
      try:
        return 1 if re.match(target.removeprefix('re:'), module) else 9
      except re.error as error:
        raise ValueError(
          f'quantization_config.config_groups has the target {target!r}, which is no regular '
          f'expression: {error}'
        ) from error
    return 2 if target == 'Linear' else 9

  for group in groups.values():
    targets = group.get('targets') if isinstance(group, dict) else None
    if not isinstance(targets, list | None):
      raise ValueError(f'quantization_config.config_groups has targets={targets!r}, no list')
  ranked = [
    (min(map(rank, group.get('targets') or ['Linear']), default=9), i, group)
    for i, group in enumerate(groups.values())
    if isinstance(group, dict)
  ]
  best = min(ranked, default=(9, 0, {}), key=lambda entry: entry[:2])
  if best[0] == 9:
    raise ValueError(
      f'{module} lies in codes, and no config_groups of quantization_config has a target that is '
      'its name, matches it, or is Linear'
    )
  return best[2]


def _take_module(module: str, weights: dict, found: Found) -> None:
  files, kind = found.files, weights.get('type', 'int')
  bits = weights.get('num_bits', 8)
  known('weights.type', kind, ('int', 'float'))
  known('weights.num_bits', bits, (8,) if kind == 'float' else (2, 3, 4, 8))
  packed = f'{module}.weight_packed'
  if packed in files.tensors:
    name, shape = packed, _packed_shape(module, bits, found)
  else:
    name = f'{module}.weight'
    shape = _matrix(name, found.place(name, ('F8_E4M3' if kind == 'float' else 'I8',)).shape, found)
  blocks = _blocks(weights, shape)
  zero = f'{module}.weight_zero_point'
  wanted = not weights.get('symmetric', True)
  if not wanted and zero in files.tensors:
    _check_zeros(zero, bits, blocked(shape, blocks)[0], found)
  order = f'{module}.weight_g_idx'
  index = None
  if order in files.tensors:
    index = found.shaped(order, ('I32', 'I64'), (shape[1],), of=name)(0, shape[1])
    # -1 is what compressed-tensors begins with: no order was found.
    if (index == -1).all() or np.array_equal(index, np.arange(shape[1]) // blocks[1]):
      index = None
  _take(
    f'{module}.weight',
    name,
    shape,
    'fp8' if kind == 'float' else grid_of(bits),
    blocks,
    f'{module}.weight_scale',
    found,
    bits=bits if name == packed else 0,
    zero=zero if wanted else '',
    index=index,
  )


def _check_zeros(name: str, bits: int, rows: int, found: Found) -> None:
  """Zero points of a group that is symmetric, as some writers keep them, in words or not.

  Raises ValueError where one is not 0.
  """
  shape = found.files.tensors[name].shape
  x = found.files.read(name, 0, shape[0] if shape else 1)
  middle = 2 ** (bits - 1)
  in_words = x.dtype == np.int32 and x.ndim == 2 and (unpacked(x.T, bits)[:, :rows] == middle).all()
  if x.any() and not in_words:
    raise ValueError(
      f'{found.files.directory}: {name} has zero points that are not 0, and config.json says '
      'symmetric=true of its group; make that false where they are meant, or leave the tensor out'
    )
  found.used.add(name)


def _packed_shape(module: str, bits: int, found: Found) -> tuple[int, int]:
  name, told = f'{module}.weight_packed', f'{module}.weight_shape'
  tensor = found.place(name, ('I32',))
  found.shaped(told, ('I64', 'I32'), (2,), of=name)
  shape = tuple(int(n) for n in found.whole(told))
  words = -(-shape[1] * bits // 32)
  if min(shape) < 1 or tensor.shape != (shape[0], words):
    raise ValueError(
      f'{found.files.directory}: {name} is {list(tensor.shape)}, and {told}={list(shape)} in '
      f'{bits} bits makes it {[shape[0], words]}'
    )
  return shape


def _blocks(weights: dict, shape: tuple[int, int]) -> tuple[int, int]:
  """How many numbers share a scale."""
  size, square = weights.get('group_size'), weights.get('block_structure')
  default = 'block' if square else 'group' if size and size > 0 else 'tensor'
  strategy = weights.get('strategy') or ('channel' if size == -1 else default)
  known('weights.strategy', strategy, STRATEGIES)
  if strategy == 'block':
    return _pair('weights.block_structure', square)
  if strategy == 'group':
    return 1, whole_number('weights.group_size', size)
  return shape if strategy == 'tensor' else (1, shape[1])


def _take(name, stored, shape, grid, blocks, scale, found, bits=0, zero='', index=None) -> None:
  """A matrix of `stored`, its scales in a table of blocks. bits: of codes in int32. zero: the name
  of zero points, '' for none. index: the group of each input.
  """
  counts = blocked(shape, blocks)
  # A number for each row, or for all, may lie as a vector, or as none.
  flat = (math.prod(counts),)
  others = [flat, (*counts, 1)] if min(counts) == 1 else []
  scales = found.shaped(scale, FLOATS, counts, *others, *([()] if flat == (1,) else []), of=stored)
  middle = 2 ** (bits - 1) if bits else 0

  def codes(start, stop):
    x = found.files.read(stored, start, stop)
    if not bits:
      return x
    return (unpacked(x, bits)[:, : shape[1]].astype(np.int16) - middle).astype(np.int8)

  zeros = None
  if zero and bits and blocks[0] == 1:  # packed along the outputs
    words = (-(-counts[0] * bits // 32), counts[1])
    packed = found.shaped(zero, ('I32',), words, of=stored)

    def zeros(start, stop):
      every = unpacked(packed(0, words[0]).T, bits)[:, : counts[0]].T
      return (every[start:stop].astype(np.int16) - middle).astype(np.int16)

  elif zero:
    zeros = found.shaped(zero, ('I8', 'I32', *FLOATS), counts, *others, of=stored)

  def ordered(table):
    return None if table is None else lambda start, stop: table(start, stop)[:, index]

  why = ''
  if index is not None:
    if index.min() < 0 or index.max() >= counts[1]:
      raise ValueError(f'{found.files.directory}: weight_g_idx of {name} names groups it has not')
    scales, zeros, blocks = ordered(scales), ordered(zeros), (1, 1)
    why = 'weight_g_idx puts its inputs in groups out of order (actorder)'
  if zeros is not None and not np.any(zeros(0, counts[0])):
    zeros = None
  tensor = found.files.tensors[stored]
  found.take(name, Coded(tensor, shape, grid, blocks, codes, scales, zeros, why=why), stored)


def _pair(name: str, value) -> tuple[int, int]:
  if isinstance(value, str) and re.fullmatch(r'\d+x\d+', value):
    value = [int(size) for size in value.split('x')]
  if not isinstance(value, list) or len(value) != 2:
    raise ValueError(f'quantization_config in config.json: {name}={value!r} must be two sizes')
  return whole_number(name, value[0]), whole_number(name, value[1])


def _matrix(name: str, shape: tuple[int, ...], found: Found) -> tuple[int, int]:
  if len(shape) != 2 or not min(shape):
    raise ValueError(f'{found.files.directory}: {name} is {list(shape)}, which is no matrix')
  return shape


def _activations(kind: str) -> str:
  return (
    f'NOTE: activations, which the checkpoint rounds to {kind} as it runs, stay numbers: results '
    'are those of its weights, and nearer to the model before'
  )
