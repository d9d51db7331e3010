"""What does a file of codes say of one matrix, and how are its codes packed?

A matrix there has names as transformers has it, [outputs, inputs] of a linear layer; whatever the
format, a row of it is codes, scales and perhaps zero points: (code - zero) * scale.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import numpy as np

from model.tensorfiles import Tensor, TensorFiles

Rows = Callable[[int, int], np.ndarray]  # from, to -> those of a first dimension
FLOATS = ('F32', 'F16', 'BF16')


@dataclasses.dataclass(frozen=True)
class Piece:
  """Some rows of a matrix: arrays of one shape; zero: None for 0; levels: see Coded."""

  codes: np.ndarray
  scale: np.ndarray
  zero: np.ndarray | None
  levels: np.ndarray | None

  def numbers(self) -> np.ndarray:
    """What they stand for, f32."""
    x = self.codes.astype(np.float32) if self.levels is None else self.levels[self.codes]
    if self.zero is not None:
      x = x - self.zero
    return x * self.scale


@dataclasses.dataclass(frozen=True)
class Coded:
  """A matrix in codes, in a file.

  Attributes:
    tensor: where its codes lie. shape: of its numbers.
    grid: the one of model.weights.grids whose codes these are; '' for none.
    blocks: how many numbers share a scale, in each dimension.
    codes, scales, zeros: rows of them; of codes as of the numbers, of the others of blocks. zeros:
      None where all are 0.
    levels: what codes stand for that are no whole numbers, f32.
    why: what keeps a weight of ours from holding these codes; ''.
    close: whether it could but for the last digits of f32.
  """

  tensor: Tensor
  shape: tuple[int, ...]
  grid: str
  blocks: tuple[int, ...]
  codes: Rows
  scales: Rows
  zeros: Rows | None = None
  levels: np.ndarray | None = None
  why: str = ''
  close: bool = False

  def piece(self, start: int, stop: int) -> Piece:
    """Rows of the first dimension."""
    zero = None if self.zeros is None else self._spread(self.zeros, start, stop)
    scale = self._spread(self.scales, start, stop)
    return Piece(self.codes(start, stop), scale, zero, self.levels)

  def _spread(self, table: Rows, start: int, stop: int) -> np.ndarray:
    """A number for each entry, of a table with one for each block."""
    block = self.blocks[0]
    x = table(start // block, -(-stop // block)).astype(np.float32)
    if block > 1:
      x = x[np.arange(start, stop) // block - start // block]
    for axis, (size, block) in enumerate(zip(self.shape[1:], self.blocks[1:]), 1):
      if block > 1:
        x = x.take(np.arange(size) // block, axis)
    return x


class Found:
  """The tensors of a checkpoint's files, asked for by formats; what they describe is taken out.

  Attributes:
    files: of the checkpoint. coded: name in transformers -> Coded. used: names of tensors that are
      parts of those. notes: lines about what is not as the checkpoint has it.
  """

  def __init__(self, files: TensorFiles):
    self.files, self.coded, self.used, self.notes = files, {}, set(), []
    self._whole, self._module = {}, ''

  def ending(self, *endings: str) -> Iterable[tuple[str, str]]:
    """(module, ending) of the tensors that are called so."""
    for name in self.files.tensors:
      for ending in endings:
        if name.endswith('.' + ending):
          yield name.removesuffix('.' + ending), ending

  def place(self, name: str, kinds: Iterable[str], of: str = '') -> Tensor:
    """Where a tensor lies. of: the one that needs it.

    Raises ValueError where it is missing, or of another kind.
    """
    if name not in self.files.tensors:
      raise ValueError(f'{self.files.directory}: {of or name} lies in codes, and has no {name}')
    tensor = self.files.tensors[name]
    if tensor.kind not in kinds:
      raise ValueError(
        f'{self.files.directory}: {name} is {tensor.kind}, and should be {" or ".join(kinds)}'
      )
    return tensor

  def shaped(self, name: str, kinds: Iterable[str], *shapes: tuple[int, ...], of: str = '') -> Rows:
    """Rows of a tensor as if it had the first of these shapes; it may have any of them.

    Raises ValueError as `place`, and where it has another shape.
    """
    tensor = self.place(name, kinds, of)
    if tensor.shape not in shapes:
      raise ValueError(
        f'{self.files.directory}: {name} is {list(tensor.shape)}, and {of or "it"} makes it '
        f'{list(shapes[0])}'
      )
    self.used.add(name)
    if tensor.shape == shapes[0]:
      return functools.partial(self.files.read, name)
    return lambda start, stop: self.whole(name).reshape(shapes[0])[start:stop]

  def take(self, name: str, coded: Coded, *used: str) -> None:
    """name: in transformers. used: tensors of the files that it is made of."""
    if name in self.coded:
      raise ValueError(f'{self.files.directory}: {name} is there twice, in codes')
    self.coded[name] = coded
    self.used |= {*used}

  def note(self, line: str) -> None:
    if line not in self.notes:
      self.notes.append(line)

  def whole(self, name: str) -> np.ndarray:
    """A tensor that does not lie row by row, whose pieces are asked for one after the other: so
    what was read last of one module stays, and nothing else.
    """
    module = name.rpartition('.')[0]
    if module != self._module:
      self._whole.clear()
      self._module = module
    if name not in self._whole:
      shape = self.files.tensors[name].shape
      self._whole[name] = self.files.read(name, 0, shape[0] if shape else 1).reshape(shape)
    return self._whole[name]


def blocked(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
  """How many blocks there are in each dimension; the last may be smaller."""
  return tuple(-(-size // block) for size, block in zip(shape, blocks, strict=True))


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
  """Codes of some bits out of int32, along the last dimension, the lowest bits first; uint8.

  Where bits do not divide 32, a code may lie in two words.
  """
  words = np.ascontiguousarray(words).view(np.uint32)
  if 32 % bits == 0:
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts & np.uint32(2**bits - 1)).astype(np.uint8)
    return codes.reshape(*words.shape[:-1], -1)
  each = np.unpackbits(words.astype('<u4').view(np.uint8), axis=-1, bitorder='little')
  count = each.shape[-1] // bits
  each = each[..., : count * bits].reshape(*words.shape[:-1], count, bits)
  return np.packbits(each, axis=-1, bitorder='little')[..., 0]


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
  """The inverse of `unpacked`, of uint8 codes; what is left of the last word is 0."""
  each = np.unpackbits(codes[..., None], axis=-1, bitorder='little')[..., :bits]
  each = each.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
  short = -each.shape[-1] % 32
  each = np.pad(each, [(0, 0)] * (each.ndim - 1) + [(0, short)])
  return np.packbits(each, axis=-1, bitorder='little').view('<i4').astype(np.int32)


def grid_of(bits: int) -> str:
  """Whose codes whole numbers of some bits are."""
  return 'int4' if bits <= 4 else 'int8'


def known(name: str, value, allowed: Iterable) -> None:
  """Raises NotImplementedError for a setting of another value."""
  allowed = [*allowed]
  if value not in allowed:
    raise NotImplementedError(
      f'quantization_config in config.json has {name}={value!r}, which is not read; these are: '
      f'{", ".join(map(repr, allowed))}'
    )


def whole_number(name: str, value, least: int = 1) -> int:
  """Raises ValueError for a setting that is none."""
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise ValueError(
      f'quantization_config in config.json: {name}={value!r} must be a whole number from {least} on'
    )
  return value
