"""What is an array that lies in a file? Its shards on this process's devices, one behind the other,
read and written by layers.

The file has no name: it is gone with the process, however that ends. What should last is copied
(`export`) to another file, which holds the whole array as NumPy does, whatever devices it was split
over, so that any mesh can read it.
"""

import functools
import math
import os
import pathlib
import tempfile

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

  def export(self, path: pathlib.Path) -> None:
    """Copies the shards that this process is the first to hold into the file at `path`, which has
    the size of the array.
    """
    for whole, shard, first, layers in self._slices(path, owned=True):
      whole[...] = self._read(shard, first, (layers, *self.shard_shape[1:]))

  def filled(self, x: jax.Array) -> 'OnDisk':
    """This, holding what x holds, which is sharded as it is."""
    self.write(x)
    return self

  def load(self, path: pathlib.Path) -> 'OnDisk':
    """This, with the shards of this process from a file that `export` filled."""
    for whole, shard, first, _ in self._slices(path, owned=False):
      _write(self._file, whole, self._offset(shard, first))
    return self

  def _slices(self, path, owned):
    """(part of the file at `path`, the shard that it is of, first layer, layers), a few layers at a
    time.
    """
    indices = self.sharding.devices_indices_map(self.shape)
    owners: dict = {}
    for device in sorted(indices, key=lambda device: device.id):
      owners.setdefault(str(indices[device]), device)
    done = set()
    for device, shard in self.shards.items():
      if shard in done or (owned and owners[str(indices[device])] != device):
        continue
      done.add(shard)
      begin, rest = indices[device][0].start or 0, indices[device][1:]
      step = max(1, COPIED // max(1, self._offset(0, 1)))
      for first in range(0, self.shard_shape[0], step):
        layers = min(step, self.shard_shape[0] - first)
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        whole = np.memmap(
          path,
          self.dtype,
          'r+' if owned else 'r',
          (begin + first) * size,
          (layers, *self.shape[1:]),
        )
        yield whole[(slice(None), *rest)], shard, first, layers

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
  """Makes the file that `export` fills."""
  path.parent.mkdir(exist_ok=True)
  with open(path, 'wb') as file:
    file.truncate(like.nbytes)


def stored(path: pathlib.Path, like: jax.ShapeDtypeStruct) -> jax.Array:
  """The array of a file that `export` filled, in the shape and sharding of `like`."""
  whole = np.memmap(path, like.dtype, 'r', shape=like.shape)
  return jax.make_array_from_callback(
    like.shape, like.sharding, lambda index: np.ascontiguousarray(whole[index])
  )
