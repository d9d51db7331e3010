"""What does generation remember? Keys and values of every layer, in buffers that are allocated once and rewritten.

L layers · B rows · S capacity in tokens · K key/value heads · H head width
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.mask import Mask
from model.config import ModelConfig
from parallel import axes as ax

BUFFER = ('layers', 'batch', 'length', 'kv_heads', 'head_width')


@dataclasses.dataclass(frozen=True)
class Cache:
  """Slot i of a row holds its token at position i; slots from `lengths` on are unused, whatever they hold.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs and placeholders.

  Attributes:
    buffers: keys and values, [L, B, S, K, H] each; of latent attention one buffer, [L, B, S, 1, R + H'].
    lengths: [B] int32, tokens that each row holds.
    memory: keys and values of cross-attention, [L, B, S', K, H] each, or None before the source was read (and without one).
    memory_segments: [B, S'] int32, 0 where the source is padding; or None.
  """
  buffers: Any
  lengths: Any
  memory: Any = None
  memory_segments: Any = None

  @property
  def capacity(self) -> int:
    return self.buffers[0].shape[2]

  def mask(self, T: int) -> Mask:
    """Who T new tokens of every row may see: all before them and themselves."""
    B, S = self.buffers[0].shape[1:3]
    queries = self.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    keys = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (B, S))
    return Mask(causal=True, query_positions=queries, key_positions=keys)


@dataclasses.dataclass(frozen=True)
class Slots:
  """One layer's view of a cache: the buffers of all layers, carried through the scan so that writes stay in place.

  Attributes:
    cache: as it was before this call, but for what the layers wrote. layer: [] int32, the one that is viewed.
  """
  cache: Any
  layer: Any

  def append(self, *new: Float[Array, 'B T _ _'], heads: str | None) -> tuple['Slots', tuple[Float[Array, 'B S _ _'], ...]]:
    """Writes T tokens of each buffer after each row's last one; returns the new slots and this layer's whole buffers.

    heads: logical axis of the third dimension. A token that would pass the capacity is not written: the caller stops rows before
    that (decode.loop does).
    """
    cache, T, S = self.cache, new[0].shape[1], self.cache.capacity
    buffer = (*BUFFER[:3], heads, BUFFER[4])
    write = ax.local(_write, (buffer, buffer[1:], (), ('batch',)), buffer)
    buffers = tuple(write(buffer, tokens, self.layer, cache.lengths) for buffer, tokens in zip(cache.buffers, new, strict=True))
    # An unused slot may hold anything, NaN included, and 0 x NaN is NaN: the mask alone does not keep it out of the sum.
    used = (jnp.arange(S, dtype=jnp.int32)[None] < cache.lengths[:, None] + T)[..., None, None]
    read = tuple(jnp.where(used, self._view(buffer), 0).astype(tokens.dtype) for buffer, tokens in zip(buffers, new))
    return dataclasses.replace(self, cache=dataclasses.replace(cache, buffers=buffers)), read

  def memory(self) -> tuple[Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
    """This layer's keys and values of cross-attention."""
    keys, values = self.cache.memory
    return self._view(keys), self._view(values)

  def next(self) -> 'Slots':
    """The view of the next layer."""
    return dataclasses.replace(self, layer=self.layer + 1)

  def _view(self, buffer):
    return jax.lax.dynamic_index_in_dim(buffer, self.layer, 0, keepdims=False)


def _write(buffer, tokens, layer, lengths):
  """One layer's tokens [B, T, K, H] at each row's length, on a device's own rows: a scatter that moves nothing."""
  B, T = tokens.shape[:2]
  rows = jnp.arange(B, dtype=jnp.int32)[:, None]
  slots = lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
  return buffer.at[layer, rows, slots].set(tokens.astype(buffer.dtype), mode='drop', unique_indices=True)


jax.tree_util.register_dataclass(Cache, data_fields=['buffers', 'lengths', 'memory', 'memory_segments'], meta_fields=[])
jax.tree_util.register_dataclass(Slots, data_fields=['cache', 'layer'], meta_fields=[])


def init_cache(config: ModelConfig, rows: int, capacity: int, dtype: str = '') -> Cache:
  """An empty cache for `rows` sequences of at most `capacity` tokens, in `dtype` (default: the compute dtype).

  Over pipeline stages, layers are split as the model's are.
  Raises ValueError when the capacity passes the model's longest sequence, and for an encoder, which generates nothing;
  NotImplementedError on a mesh that splits rows along their length, and on one with stages for an encoder-decoder or layers of which
  some are on every stage.
  """
  if ax.size('length') > 1:
    raise NotImplementedError(f'a cache is not split along its length: mesh.context={ax.size("length")}; generate with '
                              'mesh.context=1, where tensor splits heads and data splits rows')
  if not config.causal:
    raise ValueError('model.causal=False: an encoder sees all tokens at once and has no use for a cache')
  if config.max_length and capacity > config.max_length:
    raise ValueError(f'a cache of {capacity} tokens passes model.max_length={config.max_length}; ask for fewer tokens')
  if ax.size('layers') > 1 and (len(config.stacks) > 1 or config.encoder_layers):
    scans = f'layers of {len(config.stacks)} scans (model.stacks)'
    what = f'model.encoder_layers={config.encoder_layers}' if config.encoder_layers else scans
    raise NotImplementedError(f'a cache for {what} is not split over mesh.stage={ax.size("layers")}; generate on a mesh without stages')
  zeros = lambda shape, dtype, *axes: ax.place(jnp.zeros(shape, dtype, out_sharding=ax.out(*axes)), *axes)
  latent = config.latent
  shapes = ((1, latent.width + latent.rope_width),) if latent.width else ((config.K, config.H),) * 2
  # One key for all heads, or fewer than the devices that share the queries: on every device.
  axes = (*BUFFER[:3], None if latent.width else ax.whole_or('kv_heads', config.K), *BUFFER[4:])
  buffers = tuple(zeros((config.L, rows, capacity, *shape), dtype or config.dtype, *axes) for shape in shapes)
  return Cache(buffers, zeros((rows,), jnp.int32, 'batch'))
