"""What does a GGUF file hold? Its keys, and where its tensors lie
(github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The gguf package's own reader believes what a file says of itself: an array of 2**60 entries is read
until memory ends. So the file is read here, every count and length against the bytes that are
left, and nothing of a tensor but its place.
"""

import dataclasses
import functools
import math
import os
import pathlib
import struct
from typing import Any, BinaryIO

import numpy as np

MAGIC = b'GGUF'
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4

# Number -> name, entries and bytes of a block: types that can be read.
TYPES = {
  0: ('F32', 1, 4),
  1: ('F16', 1, 2),
  2: ('Q4_0', 32, 18),
  3: ('Q4_1', 32, 20),
  6: ('Q5_0', 32, 22),
  7: ('Q5_1', 32, 24),
  8: ('Q8_0', 32, 34),
  10: ('Q2_K', 256, 84),
  11: ('Q3_K', 256, 110),
  12: ('Q4_K', 256, 144),
  13: ('Q5_K', 256, 176),
  14: ('Q6_K', 256, 210),
  30: ('BF16', 1, 2),
}

_SCALARS = {  # number -> struct's letter
  0: 'B',
  1: 'b',
  2: 'H',
  3: 'h',
  4: 'I',
  5: 'i',
  6: 'f',
  7: '?',
  10: 'Q',
  11: 'q',
  12: 'd',
}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """Where a tensor lies.

  Attributes:
    kind: name of its type, 'Q4_1'. shape: outermost dimension first (the file has it last).
    offset: of its first byte in the file.
  """

  kind: str
  shape: tuple[int, ...]
  offset: int

  @functools.cached_property
  def row_bytes(self) -> int:
    """Bytes of one row, along the last dimension, which no block crosses."""
    _, entries, size = next(row for row in TYPES.values() if row[0] == self.kind)
    return self.shape[-1] // entries * size

  @property
  def bytes(self) -> int:
    """Bytes of all."""
    return math.prod(self.shape[:-1]) * self.row_bytes


class GGUF:
  """The keys of a GGUF file, and the places of its tensors.

  Attributes:
    path: of the file. keys: name -> int, float, bool, str, numpy array, or list of str.
    tensors: name -> StoredTensor, in the file's order.

  Raises: OSError; ValueError that names the file and what it says that cannot be so.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    with open(self.path, 'rb') as file:
      reader = _Reader(self.path, file)
      tensors, keys = reader.start()
      self.keys = reader.keys(keys)
      self.tensors = reader.tensors(tensors, self.keys.get('general.alignment', 32))

  def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """The value of a key; ValueError where it is of another type, or has no default and is not
    there.
    """
    value = self.keys.get(name, default)
    if value is None:
      raise ValueError(f'{self.path} has no key {name}, and it cannot be guessed')
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
      raise ValueError(f'{self.path}: {name}={str(value)[:80]!r} is of another type than it has')
    return value


class _Reader:
  """Reads a file from its beginning; nothing that is longer than what is left of it."""

  def __init__(self, path: pathlib.Path, file: BinaryIO):
    self.path, self.file, self.position = path, file, 0
    self.size = os.fstat(file.fileno()).st_size

  def need(self, condition: bool, text: str) -> None:
    if not condition:
      raise ValueError(f'{self.path} is truncated or damaged: {text}; download it again')

  def take(self, count: int, name: str) -> bytes:
    left = self.size - self.position
    self.need(count <= left, f'{name} should have {count} bytes, and the file {left} more')
    content = self.file.read(count)
    self.need(len(content) == count, f'it ended within {name}: it was changed while it was read')
    self.position += count
    return content

  def number(self, letter: str, name: str) -> Any:
    return struct.unpack('<' + letter, self.take(struct.calcsize('<' + letter), name))[0]

  def count(self, name: str, least: int) -> int:
    """How many of something there are, each of at least so many bytes."""
    count, left = self.number('Q', name), self.size - self.position
    self.need(count * least <= left, f'{name} is {count}, and the file has {left} bytes more')
    return count

  def text(self, name: str) -> str:
    content = self.take(self.number('Q', f'the length of {name}'), name)
    try:
      return content.decode()
    except UnicodeDecodeError as error:
      raise ValueError(f'{self.path}: {name} is not UTF-8 ({error})') from error

  def start(self) -> tuple[int, int]:
    """How many tensors and keys there are."""
    magic = self.take(4, 'the beginning')
    if magic != MAGIC:
      raise ValueError(f'{self.path} is no GGUF file: it begins with {magic!r}, not {MAGIC!r}')
    version = self.number('I', 'the version')
    if version not in VERSIONS:
      endian = ' (of a big-endian machine)' if version >> 24 in VERSIONS else ''
      raise ValueError(
        f'{self.path} is of version {version}{endian}; versions '
        f'{" and ".join(map(str, VERSIONS))}, little-endian, are read: convert it again'
      )
    # A tensor has a name, a dimension, a type, an offset; a key a name, a type and a value.
    return self.count('the number of tensors', 32), self.count('the number of keys', 13)

  def keys(self, count: int) -> dict[str, Any]:
    keys = {}
    for i in range(count):
      name = self.text(f'the name of key {i + 1}')
      self.need(name not in keys, f'the key {name!r} is there twice')
      keys[name] = self.value(self.number('I', f'the type of {name}'), name)
    return keys

  def value(self, kind: int, name: str) -> Any:
    if kind in _SCALARS:
      return self.number(_SCALARS[kind], name)
    if kind == _STRING:
      return self.text(name)
    if kind != _ARRAY:
      raise ValueError(f'{self.path}: {name} is of the unknown type {kind}')

    inner = self.number('I', f'the type within {name}')
    if inner == _STRING:
      count = self.count(f'the length of {name}', 8)
      return [self.text(f'{name}[{i}]') for i in range(count)]
    if inner not in _SCALARS:
      raise ValueError(f'{self.path}: {name} is an array of the unknown type {inner}')
    dtype = np.dtype(_SCALARS[inner]).newbyteorder('<')
    count = self.count(f'the length of {name}', dtype.itemsize)
    return np.frombuffer(self.take(count * dtype.itemsize, name), dtype)

  def tensors(self, count: int, alignment: Any) -> dict[str, StoredTensor]:
    """Where they lie, when each lies in the file, on its own, as its type and shape want it."""
    if not (isinstance(alignment, int) and alignment > 0):
      raise ValueError(f'{self.path}: general.alignment={alignment!r} must be at least 1')
    places = {}
    for i in range(count):
      name = self.text(f'the name of tensor {i + 1}')
      self.need(name not in places, f'the tensor {name!r} is there twice')
      places[name] = self.place(name)

    begin = -(-self.position // alignment) * alignment
    end, before = begin, 'the header'
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
      offset = begin + place.offset
      self.need(
        place.offset % alignment == 0, f'{name} lies at {offset}, which no {alignment} divides'
      )
      self.need(offset >= end, f'{name} begins at {offset}, within {before}, which ends at {end}')
      end, before = offset + place.bytes, name
      self.need(end <= self.size, f'{name} ends at {end}, and the file at {self.size}')
      places[name] = dataclasses.replace(place, offset=offset)
    return places

  def place(self, name: str) -> StoredTensor:
    """A tensor's entry in the header; the offset counts from the header's end."""
    rank = self.number('I', f'the number of dimensions of {name}')
    self.need(
      1 <= rank <= MOST_DIMENSIONS, f'{name} has {rank} dimensions; 1 to {MOST_DIMENSIONS} can be'
    )
    shape = tuple(self.number('Q', f'a dimension of {name}') for _ in range(rank))[::-1]
    kind = self.number('I', f'the type of {name}')
    if kind not in TYPES:
      known = ', '.join(row[0] for row in TYPES.values())
      raise NotImplementedError(
        f"{self.path}: {name} is of the type with ggml's number {kind}, which is not read; these "
        f'are: {known}'
      )
    title, entries, _ = TYPES[kind]
    self.need(
      min(shape) > 0 and shape[-1] % entries == 0,
      f'{name} has the shape {list(shape)}, and {title} comes in blocks of {entries}',
    )
    return StoredTensor(title, shape, self.number('Q', f'the offset of {name}'))
