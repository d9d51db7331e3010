"""How are a checkpoint's arrays written to a bucket, and read from there? By TensorStore's drivers,
in orbax's form of a file for each chunk.

The service keeps a tag of each object, which changes with its content: by those the record knows
its files, and one listing tells whether they are what was written.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np
import tensorstore as ts

import files
from remote import local
from remote.address import Address
from remote.system import answering

READ_BYTES = 2**30  # asked for at once, by a process
WAITS = {'max_retries': 8, 'initial_delay': '500ms', 'max_delay': '15s'}


@functools.cache
def context() -> ts.Context:
  """With bounded retries: TensorStore's own are 32."""
  return ts.Context({'s3_request_retries': WAITS, 'gcs_request_retries': WAITS})


class BucketWriter:
  """Writes arrays in the background, as workdir.writer.Writer does on a disk."""

  def __init__(self, chunk_bytes: int):
    self._chunk_bytes, self._context = chunk_bytes, context()
    self._writing: list[ts.Future] = []
    self._path: Address | None = None

  def begin(self, path: Address, leaves: dict) -> None:
    """Returns once the arrays may be donated. Raises OSError for what the bucket refuses."""
    self._path, self._writing = path, []
    opened = {
      name: ts.open(self._spec(path / name, x), context=self._context, open=True, create=True)
      for name, x in leaves.items()
    }
    with answering(path):
      for name, x in leaves.items():
        array = opened[name].result()
        for shard in x.addressable_shards:
          if shard.replica_id == 0:
            written = array[shard.index].write(np.asarray(shard.data))
            written.copy.result()
            self._writing.append(written.commit)

  def finish(self, path: Address) -> None:
    """Returns when all is written. Raises as `begin`."""
    writing, self._writing = self._writing, []
    with answering(path):
      for written in writing:
        written.result()

  def files(self) -> dict:
    """Size and tag of each object that lies there, by one listing."""
    return described(self._path)

  def _spec(self, place: Address, x: jax.Array) -> dict:
    shape = x.sharding.shard_shape(x.shape)
    return spec(place) | {
      'metadata': {
        'shape': [*x.shape],
        'chunks': chunks(shape, x.dtype.itemsize, self._chunk_bytes),
        'dtype': np.dtype(x.dtype).str if x.dtype.kind != 'V' else x.dtype.name,
        'compressor': {'id': 'zstd', 'level': 1},
      },
      'store_data_equal_to_fill_value': True,
    }


def spec(place: Address) -> dict:
  """Of an array. A chunk that is missing is an error: zarr would take it for zeros."""
  return {
    'driver': 'zarr',
    'kvstore': local.kvstore(place),
    'fill_missing_data_reads': False,
    'recheck_cached_data': False,
  }


def chunks(shape: tuple[int, ...], itemsize: int, limit: int) -> list[int]:
  """The largest even cuts of a shard, along the first dimensions, of at most `limit` bytes each, as
  far as dimensions can be cut.
  """
  cut = [max(1, n) for n in shape]
  for axis, n in enumerate(cut):
    for parts in range(1, n + 1):
      if n % parts == 0:
        cut[axis] = n // parts
        if math.prod(cut) * itemsize <= limit:
          return cut
  return cut


def read(path: Address, wanted: Mapping, saved: Iterable[str]) -> dict:
  """The arrays of a checkpoint by name, of which each process reads what its devices hold."""
  del saved
  # On a disk: a copy of a bucket's checkpoint.
  with answering(path) if files.remote(path) else contextlib.nullcontext():
    opened = {name: ts.open(spec(path / name), context=context()) for name in wanted}
    arrays, waiting, size = {}, {}, 0
    for name, like in wanted.items():
      array = opened[name].result()
      if array.shape != tuple(like.shape) or array.dtype.numpy_dtype != like.dtype:
        raise OSError(f'{path / name} holds {array.dtype.name} {array.shape}: it was changed')
      indices = like.sharding.addressable_devices_indices_map(like.shape).values()
      waiting[name] = {str(index): array[index].read() for index in indices}
      size += math.prod(like.sharding.shard_shape(like.shape)) * like.dtype.itemsize
      if size >= READ_BYTES:
        arrays |= _arrived(waiting, wanted)
        waiting, size = {}, 0
    return arrays | _arrived(waiting, wanted)


def _arrived(waiting: Mapping, wanted: Mapping) -> dict:
  pieces = {
    name: {index: piece.result() for index, piece in of.items()} for name, of in waiting.items()
  }
  return {
    name: jax.make_array_from_callback(
      wanted[name].shape, wanted[name].sharding, lambda index, name=name: pieces[name][str(index)]
    )
    for name in pieces
  }


def described(path: Address) -> dict:
  """Size and tag of every object of a checkpoint."""
  return {
    str(each.relative_to(path)): [stat.st_size, f'tag:{stat.tag}']
    for each, stat in path.found().items()
  }


def problems(path: Address, recorded: Mapping[str, list]) -> list[str]:
  """What is wrong with the objects of a checkpoint by its record."""
  there, wrong = described(path), []
  for name, (size, tag) in recorded.items():
    if name not in there:
      wrong.append(f'{path / name} is missing')
    elif there[name][0] != size:
      wrong.append(f'{path / name} has {there[name][0]} bytes, {size} were written')
    elif there[name][1] != tag and (tag.startswith('tag:') or _digest(path / name) != tag):
      wrong.append(f'{path / name} was changed: its tag is not the one recorded')
  return wrong


def _digest(place: Address) -> str:
  """Of an object that was written as a file, and copied to the bucket."""
  with place.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
