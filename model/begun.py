"""How does a row of a cache begin with what another has read?

B rows · J rows that a call is about · S slots
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels import cached
from model.cache import Cache, with_rows
from parallel import axes as ax


def begun(
  cache: Cache,
  sources: Int[Array, 'J'],
  rows: Int[Array, 'J'],
  counts: Int[Array, 'J'],
  windows: Sequence[int],
) -> Cache:
  """With the first `counts` tokens of rows `sources`, and no others, in these rows: what `sources`
  held when they had no more, each device's of its own (see Slots.rows); of no memory.

  A ring has to have them still, as far as a window that comes next sees them. Of what is in pages
  nothing is moved: a table names them. windows: of every place.
  """

  def one(held, window):
    def put(held, sources, rows, counts):
      if not held.ring:
        return _moved(held, sources, rows, counts)
      # It has later tokens in the place of those that no window sees, and they may be NaN.
      where = cached.positions(held, jnp.arange(held.slots, dtype=jnp.int32), counts)
      seen = (where >= 0) & (where > counts[:, None] - window)
      return _moved(held, sources, rows, jnp.full_like(counts, held.slots), seen)

    axes = held.axes()
    if held.paged:
      return held
    return ax.local(put, (axes, ('batch',), ('batch',), ('batch',)), axes)(
      held, sources, rows, counts
    )

  held = tuple(map(one, cache.held, windows))
  return dataclasses.replace(cache, held=held, lengths=with_rows(cache.lengths, rows, counts))


def _moved(held, sources, rows, counts, seen=None):
  """With what is in the first `counts` slots of rows `sources`, and 0 where it is not `seen`, in
  these rows; on one device. Whole blocks are moved, and no others are touched.
  """
  block, S = min(held.slots, cached.BLOCK), held.slots

  def move(index, held):
    def one(x):
      for j in range(rows.shape[0]):
        at, rest = index * block, (0,) * (x.ndim - 4)
        size = (x.shape[0], 1, x.shape[2], block, *x.shape[4:])
        row = jnp.minimum(rows[j], x.shape[1] - 1)
        new = jax.lax.dynamic_slice(x, (0, sources[j], 0, at, *rest), size)
        if seen is not None:
          kept = jax.lax.dynamic_slice(seen[j], (at,), (block,))
          new = jnp.where(kept.reshape(1, 1, 1, block, *(1,) * len(rest)), new, 0)
        old = jax.lax.dynamic_slice(x, (0, row, 0, at, *rest), size)
        new = jnp.where(rows[j] < x.shape[1], new, old)
        x = jax.lax.dynamic_update_slice(x, new, (0, row, 0, at, *rest))
      return x

    return jax.tree.map(one, held)

  last = jnp.minimum(-(-counts.max() // block), S // block)
  return jax.lax.fori_loop(0, last, move, held)
