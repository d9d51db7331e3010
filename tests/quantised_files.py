"""How are small checkpoints in codes written, one code after the other, as their formats say?

Each writer is given a matrix [outputs, inputs] and gives the tensors of its module, and the numbers
that they stand for, in float64.
"""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np

from model import tensorfiles
from tests.goldens import ours

KINDS = {
  'float32': 'F32',
  'float16': 'F16',
  'bfloat16': 'BF16',
  'int64': 'I64',
  'int32': 'I32',
  'int8': 'I8',
  'uint8': 'U8',
  'float8_e4m3fn': 'F8_E4M3',
}
NF4 = [  # of bitsandbytes/functional.py, get_4bit_type
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
]
FP4 = [x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
FP4 += [-x for x in FP4]


def words(codes: list[int], bits: int) -> list[int]:
  """Codes, 0 to 2**bits - 1, in int32, the lowest bits first; a code may lie in two."""
  number = sum(code << bits * i for i, code in enumerate(codes))
  count = -(-len(codes) * bits // 32)
  made = [number >> 32 * i & 0xFFFFFFFF for i in range(count)]
  return [word - (word >> 31 << 32) for word in made]


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
  """The same of each row of a matrix."""
  return np.int32([words([int(code) for code in row], bits) for row in codes])


def rounded(x, bits: int, group: int, symmetric: bool, dtype='float16'):
  """Codes [out, in], scales [out, groups], zero points [out, groups], numbers [out, in]."""
  each = x.astype(np.float64).reshape(len(x), -1, group or x.shape[1])
  top = 2**bits - 1
  if symmetric:
    scale = np.abs(each).max(-1) / (top // 2)
    zero = np.full(scale.shape, 2 ** (bits - 1))
  else:
    low, high = np.minimum(each.min(-1), 0), np.maximum(each.max(-1), 0)
    scale = (high - low) / top
    zero = np.clip(np.rint(-low / scale), 0, top).astype(int)
  scale = scale.astype(dtype)
  wide = scale.astype(np.float64)[..., None]
  codes = np.clip(np.rint(each / wide) + zero[..., None], 0, top).astype(int)
  numbers = (codes - zero[..., None]) * wide
  return codes.reshape(x.shape), scale, zero, numbers.reshape(x.shape)


# compressed-tensors.


def pack_quantized(bits=4, group=32, symmetric=True):
  def write(module, x):
    codes, scale, zero, numbers = rounded(x, bits, group, symmetric, ml_dtypes.bfloat16)
    made = {
      f'{module}.weight_packed': packed(codes, bits),
      f'{module}.weight_scale': scale,
      f'{module}.weight_shape': np.int64(x.shape),
    }
    if not symmetric:
      made[f'{module}.weight_zero_point'] = packed(zero.T, bits).T
    return made, numbers

  settings = {'num_bits': bits, 'type': 'int', 'symmetric': symmetric}
  settings |= {'strategy': 'group', 'group_size': group} if group else {'strategy': 'channel'}
  return write, compressed('pack-quantized', settings)


def int_quantized(strategy='channel', symmetric=True, form='int-quantized'):
  def write(module, x):
    whole = x.reshape(1, -1) if strategy == 'tensor' else x
    codes, scale, zero, numbers = rounded(whole, 8, 0, symmetric, 'float32')
    made = {
      f'{module}.weight': np.int8(codes - 128).reshape(x.shape),
      f'{module}.weight_scale': scale.reshape(-1) if strategy == 'tensor' else scale,
    }
    if not symmetric:
      made[f'{module}.weight_zero_point'] = np.int8(zero - 128)
    return made, numbers.reshape(x.shape)

  settings = {'num_bits': 8, 'type': 'int', 'symmetric': symmetric, 'strategy': strategy}
  activations = {'num_bits': 8, 'type': 'int', 'strategy': 'token', 'dynamic': True}
  return write, compressed(form, settings, activations)


def squares(x, block):
  """Codes of fp8, the scale of each square (the last ones may be smaller), and the numbers."""
  counts = [-(-size // side) for size, side in zip(x.shape, block)]
  codes, scales = np.zeros(x.shape, ml_dtypes.float8_e4m3fn), np.zeros(counts, np.float32)
  numbers = np.zeros(x.shape)
  for i, j in np.ndindex(*counts):
    at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
    scales[i, j] = np.abs(x[at]).max() / 448
    codes[at] = (x[at] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
    numbers[at] = codes[at].astype(np.float64) * np.float64(scales[i, j])
  return codes, scales, numbers


def float_quantized(strategy='channel', block=None):
  def write(module, x):
    size = {'channel': (1, x.shape[1]), 'tensor': x.shape}.get(strategy, block)
    codes, scales, numbers = squares(x, size)
    scales = scales.reshape(-1) if strategy == 'tensor' else scales
    return {f'{module}.weight': codes, f'{module}.weight_scale': scales}, numbers

  settings = {'num_bits': 8, 'type': 'float', 'symmetric': True, 'strategy': strategy}
  settings |= {'block_structure': list(block)} if block else {}
  activations = {'num_bits': 8, 'type': 'float', 'strategy': 'token', 'dynamic': True}
  return write, compressed('float-quantized', settings, activations)


def compressed(form, weights, activations=None):
  group = {'targets': ['Linear'], 'weights': weights, 'input_activations': activations}
  return {
    'quant_method': 'compressed-tensors',
    'format': form,
    'quantization_status': 'compressed',
    'config_groups': {'group_0': group},
    'ignore': ['lm_head'],
    'kv_cache_scheme': None,
  }


# Of a method each.


def gptq(bits=4, group=32, symmetric=True, version=1, order=None, label='gptq'):
  """order: of the inputs, as act-order takes them; the i-th of it is in group i / group.

  version: 1 takes 1 from each zero point, of all in a word at once, so that one of 0 borrows.
  """

  def stored(zero):
    if version == 2:
      return packed(zero, bits)
    ones = packed(np.ones_like(zero), bits).view(np.uint32)
    return (packed(zero, bits).view(np.uint32) - ones).view(np.int32)

  def write(module, x):
    order_ = np.arange(x.shape[1]) if order is None else order(x.shape[1])
    codes, scale, zero, numbers = rounded(x[:, order_], bits, group, symmetric)
    back = np.argsort(order_)
    size = group or x.shape[1]
    return {
      f'{module}.qweight': packed(codes[:, back], bits).T,
      f'{module}.qzeros': stored(zero.T),
      f'{module}.scales': scale.T,
      f'{module}.g_idx': np.int32(back // size),
    }, numbers[:, back]

  settings = {'quant_method': 'gptq', 'bits': bits, 'group_size': group or -1, 'sym': symmetric}
  return write, settings | {'desc_act': order is not None, 'checkpoint_format': label}


def awq(group=32):
  def interleaved(codes):  # [rows, outputs]
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    eights = codes.reshape(len(codes), -1, 8)[..., order]
    return packed(eights.reshape(len(codes), -1), 4)

  def write(module, x):
    codes, scale, zero, numbers = rounded(x, 4, group, False)
    return {
      f'{module}.qweight': interleaved(codes.T),
      f'{module}.qzeros': interleaved(zero.T),
      f'{module}.scales': scale.T,
    }, numbers

  settings = {'quant_method': 'awq', 'bits': 4, 'group_size': group, 'zero_point': True}
  return write, settings | {'version': 'gemm', 'modules_to_not_convert': None}


def bnb4(kind='nf4', size=32, nested=False):
  levels = np.float32(NF4 if kind == 'nf4' else FP4)

  def write(module, x):
    flat = x.astype(np.float64).reshape(-1, size)
    largest = np.abs(flat).max(-1).astype(np.float32)
    made = {f'{module}.weight.quant_map': levels}
    told = {'quant_type': kind, 'blocksize': size, 'dtype': 'float32', 'shape': list(x.shape)}
    if nested:
      offset = float(np.float32(largest.mean()))
      table = np.linspace(-1, 1, 256, dtype=np.float32)
      outer = np.abs(largest - np.float32(offset)).reshape(-1, 8).max(-1)
      near = (largest.reshape(-1, 8) - np.float32(offset)) / outer[:, None]
      codes = np.abs(near[..., None] - table).argmin(-1).astype(np.uint8).reshape(-1)
      largest = table[codes] * np.repeat(outer, 8) + np.float32(offset)
      made |= {
        f'{module}.weight.absmax': codes,
        f'{module}.weight.nested_absmax': outer,
        f'{module}.weight.nested_quant_map': table,
      }
      told |= {'nested_blocksize': 8, 'nested_offset': offset, 'nested_dtype': 'float32'}
    else:
      made[f'{module}.weight.absmax'] = largest
    codes = np.abs(flat[..., None] / largest[:, None, None] - levels).argmin(-1)
    numbers = levels[codes].astype(np.float64) * largest[:, None]
    codes = codes.reshape(-1)
    made[f'{module}.weight'] = np.uint8(codes[::2] << 4 | codes[1::2])[:, None]
    state = f'{module}.weight.quant_state.bitsandbytes__{kind}'
    made[state] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    return made, numbers.reshape(x.shape)

  return write, {'load_in_4bit': True, 'bnb_4bit_quant_type': kind, 'quant_method': 'bitsandbytes'}


def int8():
  def write(module, x):
    largest = np.abs(x).max(-1)
    codes = np.rint(x * 127 / largest[:, None]).astype(np.int8)
    scale = largest / np.float32(127)
    made = {f'{module}.weight': codes, f'{module}.SCB': largest}
    made[f'{module}.weight_format'] = np.uint8([0])
    return made, codes * scale.astype(np.float64)[:, None]

  return write, {'load_in_8bit': True, 'quant_method': 'bitsandbytes'}


def fp8(block=32):
  def write(module, x):
    codes, scales, numbers = squares(x, (block, block))
    return {f'{module}.weight': codes, f'{module}.weight_scale_inv': scales}, numbers

  settings = {'quant_method': 'fp8', 'fmt': 'e4m3', 'activation_scheme': 'dynamic'}
  return write, settings | {'weight_block_size': [block, block]}


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4():
  return _experts, {'quant_method': 'mxfp4', 'modules_to_not_convert': ['lm_head']}


def _experts(name, x):
  """x [E, inputs, outputs], as transformers has it -> blocks [E, outputs, inputs / 32, 16]."""
  each = x.swapaxes(1, 2).astype(np.float64)
  each = each.reshape(*each.shape[:2], -1, 32)
  exponent = np.floor(np.log2(np.abs(each).max(-1))).astype(int) - 2
  near = each / 2.0 ** exponent[..., None]
  codes = np.abs(near[..., None] - E2M1).argmin(-1)
  numbers = (E2M1[codes] * 2.0 ** exponent[..., None]).reshape(x.swapaxes(1, 2).shape)
  return {
    f'{name}_blocks': np.uint8(codes[..., ::2] | codes[..., 1::2] << 4),
    f'{name}_scales': np.uint8(exponent + 127),
  }, numbers.swapaxes(1, 2)


# Whole checkpoints.


def build(hf: dict, directory: pathlib.Path, form, chosen=lambda name: True) -> None:
  """Writes `codes` and `plain`, a checkpoint in codes and the one of their numbers, of weights that
  are drawn from their names; see in_codes.
  """
  ours.build(hf, directory / 'plain')
  in_codes(directory / 'plain', directory / 'codes', form, chosen)


def in_codes(plain: pathlib.Path, codes: pathlib.Path, form, chosen=lambda name: True) -> None:
  """Writes a checkpoint in codes beside one of numbers, which become those of the codes.

  form: (writer, quantization_config). chosen: whether a matrix of this name lies in codes.
  """
  writer, settings = form
  made, numbers = {}, {}
  for name, x in ours.tensors(plain).items():
    module, linear, _ = name.rpartition('.weight')
    tensors, numbers[name] = {name: x}, x
    if settings['quant_method'] == 'mxfp4':
      if name.endswith(('experts.gate_up_proj', 'experts.down_proj')):
        tensors, numbers[name] = writer(name, x)
    elif linear and x.ndim == 2 and is_linear(name) and chosen(name):
      tensors, numbers[name] = writer(module, x)
    made |= tensors
  shutil.copytree(plain, codes)
  for directory, tensors in ((plain, numbers), (codes, made)):
    (directory / 'model.safetensors').unlink()
    write(directory, {key: as_stored(x) for key, x in tensors.items()})
  hf = json.loads((plain / 'config.json').read_text())
  (codes / 'config.json').write_text(json.dumps(hf | {'quantization_config': settings}))


def as_stored(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float32) if x.dtype == np.float64 else x


def is_linear(name: str) -> bool:
  """Whether a matrix is a linear layer's that formats quantise."""
  words_ = ('embed', 'lm_head', 'shared.', 'relative', 'mlp.gate.', 'router', 'pooler', 'cls.')
  return not any(word in name for word in words_)


def write(directory: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  tensorfiles.write(
    directory,
    {name: x.shape for name, x in tensors.items()},
    {name: KINDS[str(x.dtype)] for name, x in tensors.items()},
    lambda name: [tensors[name]],
    2**30,
  )
