"""What is drawn for a number of a batch, whichever device, microbatch or stage asks? Threefry of
the row's key at the number's own place in its row, and nothing that is drawn one after another.

The key of a row is of (seed, step, row), and folded with what the numbers are of (a layer, a site
in it): so the same places get the same bits however a batch is cut, laid out or computed again.
The hash is jax.random's (Salmon et al., SC 2011): `folded` with a high word of 0 is fold_in, and
bits at (0, n) are jax.random.bits, as jax_threefry_partitionable draws them.

B batch · T length · S keys of attention · K key heads · G query heads of one
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, UInt32

from kernels.mask import zigzag
from parallel import axes as ax

WORDS = 2**32


def keys_of_rows(key: UInt32[Array, '2'], rows: int) -> UInt32[Array, 'B 2']:
  """A key for each row of a batch, split as the batch is: jax.random.fold_in(key, row)."""
  index = ax.place(jnp.arange(rows, dtype=jnp.uint32), 'batch')
  zeros = jnp.zeros_like(index)
  return jnp.stack(threefry2x32_p.bind(zeros | key[0], zeros | key[1], zeros, index), -1)


def folded(keys: UInt32[Array, 'B 2'], high: int | Array, low: int | Array) -> UInt32[Array, 'B 2']:
  """Other keys, of the same rows, for each pair of numbers."""
  first, second = keys[:, 0], keys[:, 1]
  words = (jnp.zeros_like(first) | jnp.asarray(word, jnp.uint32) for word in (high, low))
  return jnp.stack(threefry2x32_p.bind(first, second, *words), -1)


def bits(
  keys: UInt32[Array, 'B 2'], high: UInt32[Array, 'B *S'], low: UInt32[Array, 'B *S']
) -> UInt32[Array, 'B *S']:
  """32 bits for each place (high, low) of each row, laid out as the places are."""
  zeros, behind = jnp.zeros_like(low), range(1, low.ndim)
  # The hash takes arrays of one shape; nothing of this is ever in memory.
  words = (zeros | jnp.expand_dims(keys[:, i], behind) for i in range(2))
  first, second = threefry2x32_p.bind(*words, high, low)
  return first ^ second


def by_token(keys: UInt32[Array, 'B 2'], x: Float[Array, 'B T *S'], parts: int = 1):
  """Bits for each number of the tokens, laid out as x is.

  parts: n, where the tokens lie as zigzag(T, n) says: each draws as it would in order.
  """
  low, stride = jnp.zeros_like(x, jnp.uint32), 1
  for axis in reversed(range(2, x.ndim)):
    low = low + _count(x, axis) * jnp.uint32(stride)
    stride *= x.shape[axis]
  high = _count(x, 1)
  if parts > 1:
    order = jnp.asarray(zigzag(x.shape[1], parts), jnp.uint32)
    if ax.explicit():
      order = jax.sharding.reshard(order, PartitionSpec(_entries(x)[1]))
    high = jnp.zeros_like(high) | jnp.expand_dims(order, (0, *range(2, x.ndim)))
  return bits(keys, high, low)


def uniform(words: UInt32[Array, '*S']) -> Float[Array, '*S']:
  """From -1 up to 1 of 32 bits, f32."""
  return (words >> 8).astype(jnp.float32) * jnp.float32(2.0**-23) - 1


def _count(x: Array, axis: int) -> UInt32[Array, '...']:
  """The index along an axis, at each place of x, and laid out as x is."""
  split = {'out_sharding': PartitionSpec(*_entries(x))} if ax.explicit() else {}
  return jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, **split)


def _entries(x: Array) -> tuple:
  spec = tuple(jax.typeof(x).sharding.spec)
  return spec + (None,) * (x.ndim - len(spec))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout:
  """Sets a share of numbers to 0, and divides the others by what is left (Srivastava et al., JMLR
  15, 2014).

  Attributes:
    keys: [B, 2] uint32, of the rows and of what the numbers are of. Any: see kernels.mask.Mask.
    rate: the share, from 0 up to 1.
    parts: n, where tokens lie as zigzag(T, n) says.
    query, key: the first ones of a block of scores.
  """

  keys: Any
  rate: float = dataclasses.field(metadata={'static': True})
  parts: int = dataclasses.field(default=1, metadata={'static': True})
  query: int = dataclasses.field(default=0, metadata={'static': True})
  key: int = dataclasses.field(default=0, metadata={'static': True})

  def of_tokens(self, x: Float[Array, 'B T *S']) -> Float[Array, 'B T *S']:
    """Of what tokens have, in any number of dimensions."""
    return self._dropped(x, by_token(self.keys, x, self.parts))

  def of_weights(self, weights: Float[Array, 'B K G T S']) -> Float[Array, 'B K G T S']:
    """Of the weights of values."""
    _, K, G, _, _ = weights.shape
    head = _count(weights, 1) * jnp.uint32(G) + _count(weights, 2)
    query = _count(weights, 3) + jnp.uint32(self.query)
    drawn = bits(
      self.keys, query * jnp.uint32(K * G) + head, _count(weights, 4) + jnp.uint32(self.key)
    )
    return self._dropped(weights, drawn)

  def block(self, queries: slice, keys: slice) -> 'Dropout':
    """The same for a block of queries and of keys."""
    return dataclasses.replace(self, query=queries.start, key=keys.start)

  def _dropped(self, x, drawn):
    below = min(math.floor(self.rate * WORDS), WORDS - 1)
    kept = drawn >= jnp.uint32(below)
    return jnp.where(kept, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros((), x.dtype))
