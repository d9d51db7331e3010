"""What is an array that lies in a file? Its shards on this process's devices, one behind the other,
read and written by layers.

The file has no name: it is gone with the process, however that ends. What should last is copied
(`export`) to files with names, one for each shard, so that no two hosts write to the same one;
`parts` says which has what, so that any mesh can read them.
"""

import functools
import itertools
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np

COPIED = (
  2**26
)  # bytes of a shard that export and import hold at once, as far as layers are not larger


class OnDisk:
  """An array in a file; a leaf of a pytree, as jax.ShapeDtypeStruct is one. The file is made when
  it is first written to.

  Args:
    shape, dtype, sharding: of the array. directory: on the disk that is to hold it.
  """

  def __init__(
    self,
    shape: tuple[int, ...],
    dtype,
    sharding: jax.sharding.Sharding,
    directory: str | os.PathLike,
  ):
    self.shape, self.dtype, self.sharding, self.ndim = (
      tuple(shape),
      np.dtype(dtype),
      sharding,
      len(shape),
    )
    self.directory = pathlib.Path(directory)

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  @functools.cached_property
  def shard_shape(self) -> tuple[int, ...]:
    return self.sharding.shard_shape(self.shape)

  @functools.cached_property
  def shards(self) -> dict[jax.Device, int]:
    """The place in the file of what each device of this process holds; devices with the same share
    it.
    """
    places: dict = {}
    indices = self.sharding.addressable_devices_indices_map(self.shape)
    return {device: places.setdefault(str(index), len(places)) for device, index in indices.items()}

  @functools.cached_property
  def _file(self):
    self.directory.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=self.directory, buffering=0)

  def _offset(self, shard: int, first: int) -> int:
    return (
      (shard * self.shard_shape[0] + first) * math.prod(self.shard_shape[1:]) * self.dtype.itemsize
    )

  def read(self, first: int = 0, layers: int | None = None) -> jax.Array:
    """Rows `first` to first + layers of its first dimension (all), on the devices."""
    rows = self.shape[0] if layers is None else layers
    local = (self.shard_shape[0] if layers is None else layers, *self.shard_shape[1:])
    read = [self._read(shard, first, local) for shard in range(len({*self.shards.values()}))]
    pieces = [jax.device_put(read[shard], device) for device, shard in self.shards.items()]
    return jax.make_array_from_single_device_arrays((rows, *self.shape[1:]), self.sharding, pieces)

  def write(self, x: jax.Array, first: int = 0) -> None:
    """Replaces rows of its first dimension, from `first` on; x is sharded as it is. Waits for x.

    Raises ValueError for rows of another kind.
    """
    if x.dtype != self.dtype or x.shape[1:] != self.shape[1:]:
      raise ValueError(
        f'{x.dtype} {x.shape} cannot be written to rows of a file of {self.dtype} {self.shape}'
      )
    written = set()
    for piece in x.addressable_shards:
      shard = self.shards[piece.device]
      if shard not in written:
        written.add(shard)
        _write(self._file, np.asarray(piece.data), self._offset(shard, first))

  @property
  def parts(self) -> tuple[int, ...]:
    """How many shards each dimension is split into; `export` makes a file of each."""
    return tuple(n // max(1, of_shard) for n, of_shard in zip(self.shape, self.shard_shape))

  def export(self, path: pathlib.Path) -> None:
    """Copies the shards that this process is the first to hold into their files at `path`, which
    `reserve` made. They are on the disk when it returns, whoever reads them from where.
    """
    for device, shard in self._distinct(owned=True):
      with open(_file_of(path, self._position(device)), 'r+b', buffering=0) as file:
        for first, layers in self._steps():
          rows = self._read(shard, first, (layers, *self.shard_shape[1:]))
          _write(file, rows, self._offset(0, first))
        os.fsync(file.fileno())

  def filled(self, x: jax.Array) -> 'OnDisk':
    """This, holding what x holds, which is sharded as it is."""
    self.write(x)
    return self

  def load(self, path: pathlib.Path, parts: Sequence[int] | None) -> 'OnDisk':
    """This, with the shards of this process from files that `export` filled, see `stored`."""
    indices = self.sharding.devices_indices_map(self.shape)
    for device, shard in self._distinct(owned=False):
      begin, rest = indices[device][0].start or 0, indices[device][1:]
      for first, layers in self._steps():
        index = slice(begin + first, begin + first + layers), *rest
        _write(self._file, _gathered(path, self, parts, index), self._offset(shard, first))
    return self

  def _distinct(self, owned: bool) -> Iterator[tuple[jax.Device, int]]:
    """The shards of this process, each with a device that has it. owned: only those that no
    process before it has.
    """
    indices = self.sharding.devices_indices_map(self.shape)
    owners: dict = {}
    for device in sorted(indices, key=lambda device: device.id):
      owners.setdefault(str(indices[device]), device)
    done = set()
    for device, shard in self.shards.items():
      if shard not in done and (not owned or owners[str(indices[device])] == device):
        done.add(shard)
        yield device, shard

  def _steps(self) -> Iterator[tuple[int, int]]:
    """(first layer, layers) of a shard, a few at a time."""
    step = max(1, COPIED // max(1, self._offset(0, 1)))
    for first in range(0, self.shard_shape[0], step):
      yield first, min(step, self.shard_shape[0] - first)

  def _position(self, device: jax.Device) -> tuple[int, ...]:
    """Of a device's shard among `parts`."""
    index = self.sharding.devices_indices_map(self.shape)[device]
    return tuple((at.start or 0) // max(1, n) for at, n in zip(index, self.shard_shape))

  def _read(self, shard, first, shape):
    x = np.empty(shape, self.dtype)
    left, offset = memoryview(x.reshape(-1).view(np.uint8)), self._offset(shard, first)
    while left:
      n = os.preadv(self._file.fileno(), [left[: 2**30]], offset)
      if not n:
        raise OSError(
          f'a file in {self.directory} ends at {offset} bytes, before what was written to it; is '
          'the disk full?'
        )
      left, offset = left[n:], offset + n
    return x


def _write(file, x: np.ndarray, offset: int) -> None:
  left = memoryview(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
  while left:
    n = os.pwrite(file.fileno(), left[: 2**30], offset)
    left, offset = left[n:], offset + n


def reserve(path: pathlib.Path, like: OnDisk) -> None:
  """Makes the files that `export` fills, at their size: a host that looked before others wrote
  remembers it.
  """
  path.parent.mkdir(exist_ok=True)
  for position in itertools.product(*map(range, like.parts)):
    with open(_file_of(path, position), 'wb') as file:
      file.truncate(math.prod(like.shard_shape) * like.dtype.itemsize)


def stored(
  path: pathlib.Path, like: jax.ShapeDtypeStruct, parts: Sequence[int] | None
) -> jax.Array:
  """The array of files that `export` filled, in the shape and sharding of `like`.

  parts: of what was exported; None where one file holds the whole array, as NumPy does.
  """
  return jax.make_array_from_callback(
    like.shape, like.sharding, lambda index: _gathered(path, like, parts, index)
  )


def _gathered(path, like, parts, index: tuple[slice, ...]) -> np.ndarray:
  """Elements of an array from the files at `path`; see `stored`."""
  of_file = [n // count for n, count in zip(like.shape, parts or [1] * like.ndim)]
  ranges = [at.indices(n)[:2] for at, n in zip(index, like.shape)]
  gathered = np.empty([stop - start for start, stop in ranges], like.dtype)
  reached = [range(start // n, -(-stop // n)) for (start, stop), n in zip(ranges, of_file)]

  for position in itertools.product(*reached):
    file = path if parts is None else _file_of(path, position)
    part = np.memmap(file, like.dtype, 'r', shape=tuple(of_file))
    into, taken = [], []
    for (start, stop), at, n in zip(ranges, position, of_file):
      first, last = max(start, at * n), min(stop, (at + 1) * n)
      into.append(slice(first - start, last - start))
      taken.append(slice(first - at * n, last - at * n))
    gathered[tuple(into)] = part[tuple(taken)]
  return gathered


def _file_of(path: pathlib.Path, position: tuple[int, ...]) -> pathlib.Path:
  return path.with_name(f'{path.name}.{"_".join(map(str, position))}')
