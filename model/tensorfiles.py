"""How are tensors read from and written to safetensors files, a piece at a time?

The format is a length, a JSON header and the tensors one after the other
(github.com/huggingface/safetensors). The library of that name maps whole files into memory, whose
pages then count as the process's, and writes only what it holds whole: so the file is read and
written here, and nothing is held but the rows asked for.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np

import files

DTYPES = {
  'F64': np.dtype('float64'),
  'F32': np.dtype('float32'),
  'F16': np.dtype('float16'),
  'BF16': np.dtype(jnp.bfloat16),
}
# Of codes, and of what describes them: read as they are, and no parameters by themselves.
CODES = {
  'I64': np.dtype('int64'),
  'I32': np.dtype('int32'),
  'I16': np.dtype('int16'),
  'I8': np.dtype('int8'),
  'U8': np.dtype('uint8'),
  'F8_E4M3': np.dtype(jnp.float8_e4m3fn),
  'F8_E8M0': np.dtype(jnp.float8_e8m0fnu),
}
WIDTHS = {
  'F64': 8,
  'F32': 4,
  'F16': 2,
  'BF16': 2,
  'I64': 8,
  'I32': 4,
  'I16': 2,
  'I8': 1,
  'U64': 8,
  'U32': 4,
  'U16': 2,
  'U8': 1,
  'BOOL': 1,
  'F8_E4M3': 1,
  'F8_E5M2': 1,
  'F8_E8M0': 1,
  'C64': 8,
}
INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
LONGEST_HEADER = 100_000_000  # bytes; the library's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies: file, kind as the file calls it ('BF16'), shape,
  and offset of its first byte.
  """

  path: pathlib.Path
  kind: str
  shape: tuple[int, ...]
  offset: int


class TensorFiles:
  """The tensors of a checkpoint's directory by name; their values are read when asked for.

  Attributes: tensors: name -> Tensor, in the order in which they lie in the files.

  Raises: FileNotFoundError where there are no safetensors;
    ValueError for a file that is truncated, damaged, or does not hold what the index says.
  """

  def __init__(self, directory: str | os.PathLike, file: str = ''):
    """file: the only one to read; default: those that a checkpoint has."""
    self.directory = pathlib.Path(directory)
    self.tensors: dict[str, Tensor] = {}
    if file and not (self.directory / file).is_file():
      raise FileNotFoundError(f'{self.directory / file} does not exist')
    paths, promised = ([self.directory / file], {}) if file else _paths(self.directory)
    for path in paths:
      for name, tensor in _header(path).items():
        if name in self.tensors:
          raise ValueError(f'{name} is in both {self.tensors[name].path} and {path}')
        self.tensors[name] = tensor
    wrong = [
      f'{name} (said to be in {file})'
      for name, file in promised.items()
      if name not in self.tensors or self.tensors[name].path.name != file
    ]
    if wrong:
      raise ValueError(
        f'{self.directory / INDEX} promises tensors that are not there: {", ".join(wrong)}'
      )

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` of a tensor's first dimension."""
    tensor = self.tensors[name]
    if tensor.kind not in (known := DTYPES | CODES):
      raise ValueError(f'{tensor.path}: {name} is of {tensor.kind}; known: {", ".join(known)}')
    dtype, row = known[tensor.kind], math.prod(tensor.shape[1:])
    rows = np.empty((stop - start, *tensor.shape[1:]), dtype)
    read_into(tensor.path, tensor.offset + start * row * dtype.itemsize, rows, name)
    return rows

  @property
  def kinds(self) -> list[str]:
    """Dtypes in the files, as they call them."""
    return sorted({tensor.kind for tensor in self.tensors.values()})


def read_into(path: pathlib.Path, offset: int, rows: np.ndarray, name: str) -> None:
  """Fills an array with a file's bytes from `offset` on, which are the tensor `name`'s."""
  view = memoryview(rows.reshape(-1).view(np.uint8))
  with open(path, 'rb', buffering=0) as file:
    file.seek(offset)
    while len(view):
      count = file.readinto(view)
      if not count:
        raise ValueError(f'{path} ended within {name}: it was changed while it was read')
      view = view[count:]


def _paths(directory: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
  """The files of a checkpoint, and name -> file as its index has it."""
  if not directory.is_dir():
    raise FileNotFoundError(f'{directory} is not a directory')
  if (directory / INDEX).is_file():
    promised = files.json_object((directory / INDEX).read_bytes(), directory / INDEX).get(
      'weight_map'
    )
    if not isinstance(promised, dict) or not all(isinstance(f, str) for f in promised.values()):
      raise ValueError(
        f'{directory / INDEX} is not an index of safetensors files: its weight_map must give a '
        'file for each tensor'
      )
    for file in promised.values():
      # What an index names is opened: no path leads out of the directory.
      if file in ('', '.', '..') or set(file) & {'/', '\\', '\0'}:
        raise ValueError(
          f'{directory / INDEX} names the file {file!r}; only names of files in its own directory '
          'are read'
        )
    paths = [directory / file for file in sorted(set(promised.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
      raise FileNotFoundError(
        f'{directory} lacks {", ".join(missing)}, which {INDEX} names; download them again'
      )
    return paths, promised
  paths = (
    [directory / SINGLE]
    if (directory / SINGLE).is_file()
    else sorted(directory.glob('*.safetensors'))
  )
  if len(paths) == 1:
    return paths, {}
  if paths:
    raise ValueError(
      f'{directory} holds {len(paths)} safetensors files and no {INDEX}, which tells what belongs '
      'together'
    )
  pickles = sorted(
    path.name
    for pattern in ('*.bin', '*.pt', '*.pth', '*.ckpt')
    for path in directory.glob(pattern)
  )
  if pickles:
    raise ValueError(
      f'{directory} holds {pickles[0]} and no safetensors: a pickle can run any code when it is '
      'loaded, so it is never loaded here; where you trust it, convert it with transformers: '
      "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
    )
  raise FileNotFoundError(f'{directory} holds no *.safetensors')


def _header(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a file. Raises ValueError where the file is not whole."""
  size = path.stat().st_size

  def need(condition, what):
    if not condition:
      raise ValueError(f'{path} is truncated or damaged: {what}; download it again')

  with open(path, 'rb') as file:
    start = file.read(8)
    need(len(start) == 8, f'it has {size} bytes')
    length = struct.unpack('<Q', start)[0]
    need(
      length <= min(size - 8, LONGEST_HEADER),
      f'its header should have {length} bytes, the file has {size}',
    )
    try:
      entries = files.json_object(file.read(length), 'its header')
      entries.pop('__metadata__', None)
      for name, entry in entries.items():
        _check_entry(name, entry)
      tensors = {
        name: Tensor(
          path, entry['dtype'], tuple(entry['shape']), 8 + length + entry['data_offsets'][0]
        )
        for name, entry in sorted(entries.items(), key=lambda item: item[1]['data_offsets'][0])
      }
      ends = {name: 8 + length + entry['data_offsets'][1] for name, entry in entries.items()}
    except ValueError as error:
      raise ValueError(
        f'{path} is truncated or damaged: its header cannot be read ({error}); download it again'
      ) from error
  position = 8 + length
  for name, tensor in tensors.items():
    need(tensor.kind in WIDTHS, f'{name} has the unknown dtype {tensor.kind!r}')
    need(
      tensor.offset == position
      and ends[name] - position == math.prod(tensor.shape) * WIDTHS[tensor.kind],
      f'{name} does not lie where it should',
    )
    position = ends[name]
  need(position == size, f'its tensors end at byte {position}, the file at {size}')
  return tensors


def _check_entry(name: str, entry) -> None:
  """Raises ValueError for an entry of a header that is not one of a tensor."""

  def whole(numbers, count=None):
    return (
      isinstance(numbers, list)
      and count in (None, len(numbers))
      and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
    )

  if not (
    isinstance(entry, dict)
    and isinstance(entry.get('dtype'), str)
    and whole(entry.get('shape'))
    and whole(entry.get('data_offsets'), 2)
  ):
    raise ValueError(f'{name!r} has {str(entry)[:80]} for dtype, shape and data_offsets')


def write(
  directory: pathlib.Path,
  shapes: dict[str, tuple[int, ...]],
  kind: str | dict[str, str],
  produce: Callable[[str], Iterable[np.ndarray]],
  shard_bytes: int,
  single: str = SINGLE,
) -> None:
  """Writes tensors into files of about `shard_bytes`, and their index where there is more than one.

  Args:
    shapes: name -> shape, in the order to write. kind: dtype of all, or name -> dtype, as the file
      calls it.
    produce: name -> the tensor's entries in pieces, in order. single: name of the only file.
  """
  dtypes = DTYPES | CODES
  kinds = dict.fromkeys(shapes, kind) if isinstance(kind, str) else kind
  sizes = {name: math.prod(shape) * WIDTHS[kinds[name]] for name, shape in shapes.items()}
  shards, room = [[]], shard_bytes
  for name, size in sizes.items():
    if size > room and shards[-1]:
      shards.append([])
      room = shard_bytes
    shards[-1].append(name)
    room -= size
  titles = (
    [single]
    if len(shards) == 1
    else [f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors' for i in range(len(shards))]
  )
  for title, shard in zip(titles, shards, strict=True):
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name in shard:
      begin, end = end, end + sizes[name]
      header[name] = {
        'dtype': kinds[name],
        'shape': list(shapes[name]),
        'data_offsets': [begin, end],
      }
    encoded = json.dumps(header, separators=(',', ':')).encode()
    encoded += b' ' * (-len(encoded) % 8)
    with open(directory / title, 'wb') as file:
      file.write(struct.pack('<Q', len(encoded)) + encoded)
      for name in shard:
        for piece in produce(name):
          file.write(
            np.ascontiguousarray(piece, dtypes[kinds[name]]).reshape(-1).view(np.uint8).data
          )
        if file.tell() != 8 + len(encoded) + header[name]['data_offsets'][1]:
          raise RuntimeError(f'{name}: {file.tell()} bytes in {title} are not what its header says')
      file.flush()
      os.fsync(file.fileno())
  if len(shards) > 1:
    index = {
      'metadata': {'total_size': sum(sizes.values())},
      'weight_map': {name: title for title, shard in zip(titles, shards) for name in shard},
    }
    files.replace(directory / INDEX, json.dumps(index, indent=2) + '\n')
