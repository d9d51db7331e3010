"""How does a piece of an array get from the host to the devices that hold it, and back?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Region = tuple[tuple[int, int], ...]  # start and end in each dimension


class Filling:
  """A parameter that is filled piece by piece:
  each device holds its own shard, and gets nothing else.
  """

  def __init__(self, abstract: jax.ShapeDtypeStruct):
    self._abstract = abstract
    self._places = {
      device: tuple(
        slice_.indices(size)[:2] for slice_, size in zip(index, abstract.shape, strict=True)
      )
      for device, index in abstract.sharding.addressable_devices_indices_map(abstract.shape).items()
    }
    self._shards = {}
    for device, place in self._places.items():
      with jax.default_device(device):  # with device=..., jax 0.12 makes it elsewhere and copies it
        self._shards[device] = jnp.zeros([stop - start for start, stop in place], abstract.dtype)

  def wants(self, region: Region) -> bool:
    """Whether a device of this process holds a part of a region."""
    return any(overlap(region, place) for place in self._places.values())

  def put(self, x: np.ndarray, region: Region) -> None:
    """Writes x, which is the region without the dimensions of layers and experts."""
    x = x.reshape([stop - start for start, stop in region])
    for device, place in self._places.items():
      shared = overlap(region, place)
      if shared:
        piece = x[
          tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(shared, region))
        ]
        at = tuple(np.int32(low - start) for (low, _), (start, _) in zip(shared, place))
        self._shards[device] = _update(
          self._shards[device], jax.device_put(np.ascontiguousarray(piece), device), at
        )
    jax.block_until_ready(list(self._shards.values()))  # pieces must not pile up on the host

  def array(self) -> jax.Array:
    """The whole."""
    return jax.make_array_from_single_device_arrays(
      self._abstract.shape, self._abstract.sharding, list(self._shards.values())
    )


@functools.partial(jax.jit, donate_argnums=0)
def _update(shard, piece, at):
  # As bits: jax 0.10 on a CPU computes with bfloat16 as float32,
  # and would convert the whole shard to and fro.
  bits = jnp.dtype(f'uint{8 * shard.dtype.itemsize}')
  piece, whole = (jax.lax.bitcast_convert_type(x, bits) for x in (piece.astype(shard.dtype), shard))
  return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice(whole, piece, at), shard.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _slice(shard, at, lengths):
  return jax.lax.dynamic_slice(shard, at, lengths)


def fetch(x: jax.Array, region: Region) -> np.ndarray:
  """A region of an array, on the host."""
  values = np.empty([stop - start for start, stop in region], x.dtype)
  for shard in x.addressable_shards:
    place = tuple(
      slice_.indices(size)[:2] for slice_, size in zip(shard.index, x.shape, strict=True)
    )
    shared = overlap(region, place)
    if shared and shard.replica_id == 0:
      at = tuple(np.int32(low - start) for (low, _), (start, _) in zip(shared, place))
      piece = np.asarray(_slice(shard.data, at, tuple(high - low for low, high in shared)))
      values[
        tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(shared, region))
      ] = piece
  return values


def overlap(region: Region, other: Region) -> Region | None:
  """What two regions share, or None."""
  shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(region, other, strict=True))
  return shared if all(low < high for low, high in shared) else None
