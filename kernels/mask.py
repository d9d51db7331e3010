"""Which key may a query see, and how far away is it? Small specs, the same for every attention
backend, never a dense array.

B batch · T query length · S key length · N query heads
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from parallel import axes as ax

SKIP, PARTIAL, FULL = range(3)  # what a kernel has to do for a block of scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
  """A query sees a key when every part of the spec that is set allows it.

  Attributes:
    causal: the key's position is not after the query's.
    window: the key's position is less than `window` away from the query's: before it, and without
      causal also after it; 0: no limit.
    prefix: [B] keys at positions below this are seen by every query of the row whatever causal says
      (prefix LM, T5 paper arXiv:1910.10683, figure 4); segments still hold.
    query_segments [B, T], key_segments [B, S]: both or neither; a query sees keys of its own
      segment only.
    query_positions [B, T], key_positions [B, S]: both or neither; default: the index in the row,
      for which T == S.
    zigzag: n, where rows are laid out as zigzag(T, n) says and positions that are not given follow;
      1: in order.
    branches: G, where a row is a trunk, of `trunk` tokens, and G parts of equal length behind it,
      each of which goes on from the trunk and sees no other (kernels/branches.py); positions that
      are not given follow. 1: it is one text.

  Arrays are int32; they are annotated Any because JAX rebuilds registered dataclasses with tracers,
  specs and placeholders.

  Raises ValueError for contradictory parts.
  """

  causal: bool = True
  window: int = 0
  zigzag: int = 1
  branches: int = 1
  trunk: int = 0
  prefix: Any = None
  query_segments: Any = None
  key_segments: Any = None
  query_positions: Any = None
  key_positions: Any = None

  def __post_init__(self):
    if self.window < 0:
      raise ValueError(
        f'window={self.window} must be 0 (no limit) or the number of keys that a query sees'
      )
    for a, b in (('query_segments', 'key_segments'), ('query_positions', 'key_positions')):
      if (getattr(self, a) is None) != (getattr(self, b) is None):
        raise ValueError(f'{a} and {b} come together; one of them is missing')
    if self.prefix is not None and not self.causal:
      raise ValueError(
        'prefix loosens causal: without causal every key is seen already; '
        'drop prefix or set causal=True'
      )
    if self.trunk and self.branches == 1:
      raise ValueError(f'trunk={self.trunk} is what branches go on from: give branches, too')
    others = self.fields() - {'window', 'segments'}
    if self.branches > 1 and others != {'causal', 'branches'}:
      raise ValueError(
        f'branches={self.branches} go on from a trunk in order, and causal; this mask is of '
        f'{sorted(others)}'
      )

  @property
  def positioned(self) -> bool:
    """Whether positions decide anything."""
    return self.causal or self.window > 0

  def fields(self) -> set[str]:
    """The parts that are set: what a backend must honour."""
    named = {
      'causal': self.causal,
      'window': self.window,
      'prefix': self.prefix is not None,
      'segments': self.query_segments is not None,
      'positions': self.query_positions is not None,
      'zigzag': self.zigzag != 1 and self.positioned and self.query_positions is None,
      'branches': self.branches > 1,
    }
    return {name for name, is_set in named.items() if is_set}

  def positions(self, T: int, S: int) -> tuple[Int[Array, '#B T'], Int[Array, '#B S']]:
    """Of queries and keys: as given, or their indices.

    Raises ValueError where indices do not align.
    """
    if self.query_positions is not None:
      return self.query_positions, self.key_positions
    if T != S and self.positioned:
      raise ValueError(
        f'{T} queries and {S} keys need explicit positions: their indices do not align'
      )

    def index(length):
      if self.branches > 1:
        return jnp.asarray(self.branched(length)[1], jnp.int32)[None]
      return jnp.asarray(zigzag(length, self.zigzag if T == S else 1), jnp.int32)[None]

    return index(T), index(S)

  def branched(self, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Which branch each of a row's tokens is of, the trunk's -1, and where in its text it stands.

    Raises ValueError where what is behind the trunk does not split.
    """
    if (T - self.trunk) % self.branches or T <= self.trunk:
      raise ValueError(
        f'{T} tokens, {self.trunk} of them the trunk, do not split into {self.branches} branches'
      )
    place = np.arange(T) - self.trunk
    length = (T - self.trunk) // self.branches
    return np.maximum(place // length, -1), self.trunk + np.where(place < 0, place, place % length)

  def allowed(self, T: int, S: int) -> Bool[Array, '#B T S']:
    """The dense mask that the spec stands for (True: seen).

    The oracle's view; fast backends never build it whole.
    """
    q, k = self.positions(T, S)
    q, k = q[:, :, None], k[:, None, :]
    seen = jnp.ones((1, T, S), bool)
    if self.causal:
      seen = k <= q
    if self.prefix is not None:
      seen = seen | (k < self.prefix[:, None, None])
    if self.window:
      seen = seen & (q - k < self.window)
      if not self.causal:
        seen = seen & (k - q < self.window)
    if self.query_segments is not None:
      seen = seen & (self.query_segments[:, :, None] == self.key_segments[:, None, :])
    if self.branches > 1:
      of = self.branched(T)[0]
      seen = seen & ((of == -1) | (of[:, None] == of))[None]
    return seen

  def blocks(self, T: int, S: int, rows: int, columns: int):
    """What a kernel has to do for each block of `rows` queries and `columns` keys: SKIP it, mask a
    PARTIAL one, or see a FULL one whole.

    Returns [B or 1, blocks of T, blocks of S] int32: a NumPy array where the spec has no arrays,
    else a jax one. Bounds of positions and segments decide: no block with a key that is seen is
    skipped, and a FULL one has no key that is not; the last block of keys is at most PARTIAL where
    S does not fill it. Raises ValueError as positions() does.
    """
    assert self.branches == 1, 'rows that branch are two calls (kernels/branches.py)'
    given = any(x is not None for x in (self.query_positions, self.query_segments, self.prefix))
    np_ = jnp if given else np

    def bounds(x, length, block):
      parts = np_.pad(x, ((0, 0), (0, -length % block)), mode='edge').reshape(x.shape[0], -1, block)
      return parts.min(-1), parts.max(-1)

    def pair(q, k):
      (q_min, q_max), (k_min, k_max) = bounds(q, T, rows), bounds(k, S, columns)
      return q_min[:, :, None], q_max[:, :, None], k_min[:, None], k_max[:, None]

    if self.query_positions is not None:
      positions = self.query_positions, self.key_positions
    else:
      if T != S and self.positioned:
        raise ValueError(
          f'{T} queries and {S} keys need explicit positions: their indices do not align'
        )
      positions = tuple(zigzag(length, self.zigzag if T == S else 1)[None] for length in (T, S))

    # some: may any pair of the block be seen; every: are all. Each part of the spec narrows both by
    # the bounds of its numbers.
    q_min, q_max, k_min, k_max = pair(*positions)
    if self.causal:
      some, every = k_min <= q_max, k_max <= q_min
    else:
      some = every = np_.ones(np_.broadcast_shapes(q_min.shape, k_min.shape), bool)
    if self.prefix is not None:
      some, every = (
        some | (k_min < self.prefix[:, None, None]),
        every | (k_max < self.prefix[:, None, None]),
      )
    if self.window:
      some, every = some & (q_min - k_max < self.window), every & (q_max - k_min < self.window)
      if not self.causal:
        some, every = some & (k_min - q_max < self.window), every & (k_max - q_min < self.window)
    if self.query_segments is not None:
      q_min, q_max, k_min, k_max = pair(self.query_segments, self.key_segments)
      some, every = (
        some & (q_min <= k_max) & (k_min <= q_max),
        every & (q_min == k_max) & (k_min == q_max) & (q_min == q_max),
      )
    # Keys that only fill the last block up must be masked.
    if S % columns:
      every = every & (np_.arange(every.shape[2]) < every.shape[2] - 1)[None, None]
    return np_.where(every, FULL, np_.where(some, PARTIAL, SKIP)).astype(np.int32)

  def of_segments(self, segments: Int[Array, 'B T'] | None) -> 'Mask':
    """With those of tokens that look at each other."""
    return dataclasses.replace(self, query_segments=segments, key_segments=segments)

  def block(self, queries: slice, keys: slice) -> 'Mask':
    """The same mask for a block of queries and of keys, of rows in order."""

    def index(s):
      return jnp.arange(s.start, s.stop, dtype=jnp.int32)[None]

    def cut(x, s):
      return None if x is None else x[:, s]

    def place(x, s):
      return index(s) if x is None else x[:, s]

    return dataclasses.replace(
      self,
      query_segments=cut(self.query_segments, queries),
      key_segments=cut(self.key_segments, keys),
      query_positions=place(self.query_positions, queries),
      key_positions=place(self.key_positions, keys),
    )

  def cut(self, queries, keys) -> 'Mask':
    """The mask of the tokens that two functions take of arrays [B, T] and [B, S], as of segments
    and positions: `queries` of those of queries, `keys` of those of keys.
    """

    def of(take, x):
      return None if x is None else take(x)

    return dataclasses.replace(
      self,
      query_segments=of(queries, self.query_segments),
      key_segments=of(keys, self.key_segments),
      query_positions=of(queries, self.query_positions),
      key_positions=of(keys, self.key_positions),
    )


jax.tree_util.register_dataclass(
  Mask,
  data_fields=['prefix', 'query_segments', 'key_segments', 'query_positions', 'key_positions'],
  meta_fields=['causal', 'window', 'zigzag', 'branches', 'trunk'],
)


def zigzag(T: int, n: int) -> np.ndarray:
  """Which token of a row stands where when 2n chunks are laid out as 0, 2n-1, 1, 2n-2, ... n-1, n.

  The queries of such a pair of chunks see as many keys under a causal mask as those of any other
  (Llama 3, arXiv:2407.21783, section 3.3.2). Raises ValueError where T does not split.
  """
  if n > 1 and T % (2 * n):
    raise ValueError(
      f'{T} tokens do not split into {2 * n} chunks, two for each of {n} parts; '
      'make the length a multiple'
    )
  index = np.arange(T, dtype=np.int32)
  if n == 1:
    return index
  chunks = index.reshape(2 * n, -1)
  return np.stack([chunks[:n], chunks[: n - 1 : -1]], 1).reshape(T)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relative:
  """A score that depends on how far the key is from the query (T5, arXiv:1910.10683, section 2.1;
  its code has the buckets).

  Attributes:
    table: [buckets, N], what is added to a scaled score (a backend may split N). Any: see Mask.
    bidirectional: half of the buckets are for keys after the query; otherwise those share the
      bucket of distance 0.
    max_distance: from here on all distances share the last bucket. Half of the buckets (of a
      direction) are for single distances, the others grow with their logarithm.
  """

  table: Any
  bidirectional: bool
  max_distance: int

  def bucket(self, distance: Int[Array, '#B T S']) -> Int[Array, '#B T S']:
    """The row of the table for key position - query position."""
    buckets, offset = self.table.shape[0], 0
    if self.bidirectional:
      buckets //= 2
      offset = jnp.where(distance > 0, buckets, 0)
      distance = jnp.abs(distance)
    else:
      distance = jnp.maximum(-distance, 0)
    single = buckets // 2
    # In f32 and truncated, as the models were trained: f64 would move a few edges.
    far = (
      jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / single)
      / math.log(self.max_distance / single)
      * (buckets - single)
    )
    far = jnp.minimum(single + far.astype(jnp.int32), buckets - 1)
    return offset + jnp.where(distance < single, distance, far)

  def scores(self, q: Int[Array, '#B T'], k: Int[Array, '#B S']) -> Float[Array, '#B T S ...']:
    """What is added to the scores of queries and keys at these positions: rows of the table."""
    buckets = self.bucket(k[:, None, :] - q[:, :, None])
    return self.table.at[buckets].get(out_sharding=ax.out_like(buckets, self.table, skip=1))


jax.tree_util.register_dataclass(
  Relative, data_fields=['table'], meta_fields=['bidirectional', 'max_distance']
)
