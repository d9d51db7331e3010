"""How do GPTQ's and AWQ's files hold a matrix? Both lie [inputs, outputs], codes in int32, groups
along the inputs.

GPTQ packs along the inputs, AWQ along the outputs, eight of them in the order 0, 2, 4, 6, 1, 3, 5,
7. GPTQ's zero points are one less than meant in its first version and not in the second, and both
are called "gptq": so they are judged by their values. Those of a symmetric file are all one number;
others have the version by which codes are nearer to their zero points.

The first version takes 1 from all codes of a word at once, as one number: of a zero point of 0 it
borrows from the code after it. What was taken is therefore added to the word, before it is
unpacked. In 3 bits GPTQModel takes other numbers, and files before it each code by itself.
"""

import numpy as np

from model.quantised_files.coded import (
  FLOATS,
  Coded,
  Found,
  grid_of,
  known,
  unpacked,
  whole_number,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of AWQ: which of eight columns each nibble holds, lowest first
SAMPLED = 4  # matrices whose mean decides about the version
CERTAIN = 4  # standard errors
V2, V1, V1_WORDS = range(3)  # how zero points are stored; V1_WORDS: of 3 bits, as GPTQModel does
# Taken from words of v1: of 3 bits from the first, second and third of every three.
TAKEN = {
  2: (0x55555555,),
  3: (0x24924924, 0x92492492, 0x49249249),
  4: (0x11111111,),
  8: (0x01010101,),
}


def gptq(settings: dict, found: Found) -> None:
  """Matrices called .qweight, with .scales, .qzeros and perhaps .g_idx."""
  known('checkpoint_format', settings.get('checkpoint_format') or '', ('', 'gptq', 'gptq_v2'))
  known('bits', settings.get('bits'), (2, 3, 4, 8))
  matrices = [_Packed(module, settings, found) for module, _ in found.ending('qweight')]
  if not matrices:
    return
  version = _version(matrices, settings, found)
  for matrix in matrices:
    matrix.take(version)


class _Packed:
  """One matrix of GPTQ: what its tensors say before its codes are read."""

  def __init__(self, module: str, settings: dict, found: Found):
    self.module, self.found, bits = module, found, settings['bits']
    name = f'{module}.qweight'
    self.tensor = found.place(name, ('I32',))
    words, outputs = _two(self.tensor.shape, name, found)
    index = f'{module}.g_idx'
    if index in found.files.tensors:  # tells of a matrix's own bits, where settings are of most
      shape = found.place(index, ('I32',)).shape
      inputs = shape[0] if len(shape) == 1 else 0
      bits = words * 32 // inputs if inputs else 0
      if bits not in (2, 3, 4, 8) or bits * inputs != words * 32:
        raise ValueError(
          f'{found.files.directory}: {name} is {list(self.tensor.shape)}, which are no codes of '
          f'the {inputs} inputs that {index} has'
        )
    self.bits, self.shape = bits, (outputs, words * 32 // bits)
    scales = found.place(f'{module}.scales', FLOATS, name)
    groups = scales.shape[0] if scales.shape else 0
    if not groups or scales.shape != (groups, outputs):
      raise ValueError(
        f'{found.files.directory}: {module}.scales is {list(scales.shape)}, no groups of the '
        f'{self.shape[1]} inputs and {outputs} outputs of {name}'
      )
    self.groups, self.size = groups, self.shape[1] // groups
    size = settings.get('group_size') or self.shape[1]
    if index not in found.files.tensors:
      whole_number('group_size', abs(size) if isinstance(size, int) else size)
      self.size = size if size > 0 else self.shape[1]
      if groups != -(-self.shape[1] // self.size):
        raise ValueError(
          f'{found.files.directory}: {module}.scales is {list(scales.shape)}, and {self.shape[1]} '
          f'inputs in groups of {self.size} (quantization_config.group_size) are '
          f'{-(-self.shape[1] // self.size)}'
        )
    self.zeros = found.shaped(
      f'{module}.qzeros', ('I32',), (groups, -(-outputs * bits // 32)), of=name
    )
    found.used |= {name, f'{module}.scales', index}

  def zeros_as(self, version: int) -> np.ndarray:
    """Zero points [groups, outputs] that a version means, less the middle of the codes."""
    words = np.ascontiguousarray(self.zeros(0, self.groups)).view(np.uint32)
    if version == V1_WORDS or (version == V1 and self.bits != 3):
      words = words + np.resize(np.uint32(TAKEN[self.bits]), words.shape[1])
    codes = unpacked(words, self.bits)[:, : self.shape[0]].astype(np.int32)
    if version == V1 and self.bits == 3:
      codes = (codes + 1) % 8
    return codes - 2 ** (self.bits - 1)

  def codes(self, start: int, stop: int) -> np.ndarray:
    words = self.found.whole(f'{self.module}.qweight')[:, start:stop].T
    codes = unpacked(words, self.bits)
    return (codes.astype(np.int16) - 2 ** (self.bits - 1)).astype(np.int8)

  def index(self) -> np.ndarray:
    """The group of each input."""
    plain = np.arange(self.shape[1]) // self.size
    name = f'{self.module}.g_idx'
    if name not in self.found.files.tensors:
      return plain
    index = self.found.whole(name)
    if index.min() < 0 or index.max() >= self.groups:
      raise ValueError(
        f'{self.found.files.directory}: {name} has groups {index.min()} to {index.max()}, and '
        f'there are scales of {self.groups}'
      )
    return index

  def above(self, version: int) -> np.ndarray:
    """Codes of some rows less zero points as a version means them."""
    rows = min(self.shape[0], 256)
    codes = self.codes(0, rows).astype(np.float32)
    return (codes - self.zeros_as(version)[self.index(), :rows].T).ravel()

  def take(self, version: int) -> None:
    """version: of all zero points of the file."""
    index, groups, found = self.index(), self.groups, self.found
    size = self.shape[1] // groups
    plain = np.array_equal(index, np.arange(self.shape[1]) // size)

    def table(whole, start, stop):
      x = whole()[:, start:stop].T
      return x if plain else x[:, index]

    def scales(start, stop):
      return table(lambda: found.whole(f'{self.module}.scales'), start, stop)

    def zeros(start, stop):
      return table(lambda: self.zeros_as(version), start, stop)

    found.take(
      f'{self.module}.weight',
      Coded(
        self.tensor,
        self.shape,
        grid_of(self.bits),
        (1, size if plain else 1),
        self.codes,
        scales,
        zeros if self.zeros_as(version).any() else None,
        why='' if plain else 'g_idx puts its inputs in groups out of order (desc_act)',
      ),
    )


def _version(matrices: list[_Packed], settings: dict, found: Found) -> int:
  """As which version zero points are stored."""
  said = settings.get('checkpoint_format') or 'gptq'
  possible = [V2, V1, V1_WORDS] if any(matrix.bits == 3 for matrix in matrices) else [V2, V1]
  symmetric = [
    version
    for version in possible
    if not any(matrix.zeros_as(version).any() for matrix in matrices)
  ]
  version = symmetric[0] if symmetric else _nearest(matrices, possible, said, found)
  if version == V1_WORDS:
    found.note('NOTE: zero points of 3 bits are read as GPTQModel stores them, word by word')
  if (said == 'gptq_v2') == (version != V2):
    found.note(
      f'NOTE: config.json calls zero points those of {said}, and by their values they are stored '
      f'{"as they are (v2)" if version == V2 else "less 1 (v1)"}: so they are read'
    )
  return version


def _nearest(matrices: list[_Packed], possible: list[int], said: str, found: Found) -> int:
  """The version by which codes of some matrices are nearest to their zero points, in squares, where
  they lie around them in the mean.

  Squares, because a zero point of 0 that is read as the highest code takes as much from the mean as
  many that are read one too low add to it.
  """
  squares, away = {}, {}
  for version in possible:
    above = np.concatenate([matrix.above(version) for matrix in matrices[:SAMPLED]])
    squares[version] = np.square(above).mean()
    away[version] = above.mean(), above.std() / len(above) ** 0.5
  version = min(possible, key=squares.get)
  mean, error = away[version]
  if abs(mean) + CERTAIN * error <= 0.5:
    return version
  mean, error = away[V2]
  found.note(
    f'NOTE: zero points are read as those of {said}, as config.json says: by the values they could '
    f'be of either version (codes lie {mean:.2f} steps above them in the mean, give or take '
    f'{error:.2f}; 0 is v2, 1 is v1)'
  )
  return V2 if said == 'gptq_v2' else V1


def awq(settings: dict, found: Found) -> None:
  """Matrices called .qweight, with .scales and .qzeros."""
  known('version', str(settings.get('version', 'gemm')).lower(), ('gemm',))
  known('bits', settings.get('bits', settings.get('w_bit')), (4,))
  size = settings.get('group_size', settings.get('q_group_size', 128))
  if size != -1:
    whole_number('group_size', size)
  for module, _ in found.ending('qweight'):
    _take_awq(module, size, found)


def _take_awq(module: str, size: int, found: Found) -> None:
  name = f'{module}.qweight'
  tensor = found.place(name, ('I32',))
  inputs, words = _two(tensor.shape, name, found)
  outputs, size = words * 8, inputs if size == -1 else size
  if inputs % size:
    raise ValueError(
      f'{found.files.directory}: {name} has {inputs} inputs, which groups of {size} '
      '(quantization_config.group_size) do not fill'
    )
  groups = inputs // size
  found.shaped(f'{module}.scales', FLOATS, (groups, outputs), of=name)
  found.shaped(f'{module}.qzeros', ('I32',), (groups, words), of=name)

  def columns(tensor, start, stop):
    first = start // 8
    codes = unpacked(found.whole(tensor)[:, first : -(-stop // 8)], 4)
    each = codes.reshape(len(codes), -1, 8)
    plain = np.empty(each.shape, np.int8)
    plain[..., list(ORDER)] = each.astype(np.int8) - 8
    return plain.reshape(len(codes), -1)[:, start - 8 * first : stop - 8 * first].T

  def scales(start, stop):
    return found.whole(f'{module}.scales')[:, start:stop].T

  def codes(start, stop):
    return columns(name, start, stop)

  def zeros(start, stop):
    return columns(f'{module}.qzeros', start, stop)

  some = zeros if zeros(0, outputs).any() else None
  found.take(
    f'{module}.weight',
    Coded(tensor, (outputs, inputs), 'int4', (1, size), codes, scales, some),
    name,
  )


def _two(shape: tuple[int, ...], name: str, found: Found) -> tuple[int, int]:
  if len(shape) != 2 or not min(shape):
    raise ValueError(f'{found.files.directory}: {name} is {list(shape)}, which is no matrix')
  return shape
