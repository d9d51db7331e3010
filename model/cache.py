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


@dataclasses.dataclass(frozen=True)
class Cache:
  """Slot i of a row holds its token at position i; slots from `lengths` on are unused, whatever they hold.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs and placeholders.

  Attributes:
    k, v: [L, B, S, K, H]. lengths: [B] int32, tokens that each row holds.
  """
  k: Any
  v: Any
  lengths: Any

  @property
  def capacity(self) -> int:
    return self.k.shape[2]

  def mask(self, T: int, window: int) -> Mask:
    """Who T new tokens of every row may see: all before them and themselves, as far as the window reaches."""
    B, S = self.k.shape[1:3]
    queries = self.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    keys = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (B, S))
    return Mask(causal=True, window=window, query_positions=queries, key_positions=keys)


@dataclasses.dataclass(frozen=True)
class Slots:
  """One layer's view of a cache: the buffers of all layers, carried through the scan so that writes stay in place.

  Attributes:
    k, v: [L, B, S, K, H]. layer: [] int32, the one that is viewed. lengths: [B] int32, as in the cache.
  """
  k: Any
  v: Any
  layer: Any
  lengths: Any

  def append(self, k: Float[Array, 'B T K H'],
             v: Float[Array, 'B T K H']) -> tuple['Slots', Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
    """Writes T tokens after each row's last one; returns the new buffers and this layer's keys and values.

    A token that would pass the capacity is not written: the caller stops rows before that (decode.loop does).
    """
    T, S = k.shape[1], self.k.shape[2]
    buffer, tokens = ('layers', 'batch', 'length', 'kv_heads', 'head_width'), ('batch', 'length', 'kv_heads', 'head_width')
    write = ax.local(_write, (buffer, tokens, (), ('batch',)), buffer)
    new = dataclasses.replace(self, k=write(self.k, k, self.layer, self.lengths), v=write(self.v, v, self.layer, self.lengths))
    # An unused slot may hold anything, NaN included, and 0 x NaN is NaN: the mask alone does not keep it out of the sum.
    used = (jnp.arange(S, dtype=jnp.int32)[None] < self.lengths[:, None] + T)[..., None, None]
    read = lambda buffer, like: jnp.where(used, jax.lax.dynamic_index_in_dim(buffer, self.layer, 0, keepdims=False), 0).astype(like.dtype)
    return new, read(new.k, k), read(new.v, v)


def _write(buffer, tokens, layer, lengths):
  """One layer's tokens [B, T, K, H] at each row's length, on a device's own rows: a scatter that moves nothing."""
  B, T = tokens.shape[:2]
  rows = jnp.arange(B, dtype=jnp.int32)[:, None]
  slots = lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
  return buffer.at[layer, rows, slots].set(tokens.astype(buffer.dtype), mode='drop', unique_indices=True)


jax.tree_util.register_dataclass(Cache, data_fields=['k', 'v', 'lengths'], meta_fields=[])
jax.tree_util.register_dataclass(Slots, data_fields=['k', 'v', 'layer', 'lengths'], meta_fields=[])


def init_cache(config: ModelConfig, rows: int, capacity: int, dtype: str = '') -> Cache:
  """An empty cache for `rows` sequences of at most `capacity` tokens, in `dtype` (default: the compute dtype).

  Raises ValueError when the capacity passes the model's longest sequence.
  """
  if config.max_length and capacity > config.max_length:
    raise ValueError(f'a cache of {capacity} tokens passes model.max_length={config.max_length}; ask for fewer tokens')
  shape = (config.L, rows, capacity, config.K, config.H)
  zeros = lambda shape, dtype, *axes: ax.place(jnp.zeros(shape, dtype, out_sharding=ax.out(*axes)), *axes)
  tokens = lambda: zeros(shape, dtype or config.dtype, 'layers', 'batch', 'length', 'kv_heads', 'head_width')
  return Cache(k=tokens(), v=tokens(), lengths=zeros((rows,), jnp.int32, 'batch'))
