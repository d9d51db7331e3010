"""Which rows of a cache go where? Copies of them, for all that go on from what one has read.

B rows · J of them that a call is about · P groups of W rows
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels import cached
from model.cache import Cache
from parallel import axes as ax


def repeated(cache: Cache, times: int) -> Cache:
  """Every row so often, copies side by side."""

  def each(lengths):
    return jnp.repeat(jnp.arange(lengths.shape[0], dtype=jnp.int32), times)

  return taken(cache, ax.local(each, (('batch',),), ('batch',))(cache.lengths))


def taken(cache: Cache, rows: Int[Array, 'J']) -> Cache:
  """A cache of these rows, each device's of its own (see Slots.rows), some of them more than once:
  what was read of a row is there for all that go on from it.
  """

  def one(x, axes):
    def take(x, rows):
      return jnp.take(x, rows, axes.index('batch'), mode='clip')

    return ax.local(take, (axes, ('batch',)), axes)(ax.place(x, *axes), rows)

  return _each(cache, one)


def copied(cache: Cache, sources: Int[Array, 'J'], rows: Int[Array, 'J']) -> Cache:
  """With what rows `sources` hold in these rows, too, each device's of its own (see Slots.rows)."""

  def one(x, axes):
    index = (slice(None),) * axes.index('batch')

    def put(x, sources, rows):
      return x.at[*index, rows].set(x.at[*index, sources].get(mode='clip'), mode='drop')

    return ax.local(put, (axes, ('batch',), ('batch',)), axes)(x, sources, rows)

  return _each(cache, one)


def _each(cache: Cache, one) -> Cache:
  """With one(x, axes) in the place of every array x of its rows."""

  def of_places(places):
    # Pages are shared by the table that names them.
    return tuple(held if held.paged else jax.tree.map(one, held, held.axes()) for held in places)

  lengths = one(cache.lengths, ('batch',))
  cache = dataclasses.replace(cache, held=of_places(cache.held), lengths=lengths)
  if cache.memory is None:
    return cache
  sources = one(cache.memory_lengths, ('batch',))
  return dataclasses.replace(cache, memory=of_places(cache.memory), memory_lengths=sources)


def reordered(cache: Cache, sources: Int[Array, 'P W'], shared: Int[Array, 'P']) -> Cache:
  """Rows as P groups of W: row w of group p gets the tokens of row sources[p, w] of its group, all
  of which hold equally many.

  shared: how many first tokens are those of all rows of a group anyway: blocks of slots with no
  others stay untouched, as do unused ones. Only a block is ever there twice. Memories are taken for
  shared, too.
  """

  def one(held):
    axes, parts = held.axes(), () if held.ring else ax.mesh_axes('slots')
    run = functools.partial(_reorder, parts=parts)
    return ax.local(run, (axes, ('batch', None), ('batch',), ('batch',)), axes)(
      held, sources, shared, cache.lengths
    )

  return dataclasses.replace(cache, held=tuple(map(one, cache.held)))


def _reorder(held, sources, shared, lengths, parts):
  """On one device's rows and slots. parts: mesh axes that split the slots."""
  (P, W), S = sources.shape, held.slots
  block, offset = min(S, cached.BLOCK), jax.lax.axis_index(parts) * S if parts else 0
  themselves = jnp.arange(W, dtype=jnp.int32)[None]
  rows = (jnp.arange(P, dtype=jnp.int32)[:, None] * W + sources).reshape(-1)
  moves = (sources != themselves).any(1)
  end = jnp.clip(jnp.where(moves, lengths[::W], 0).max() - offset, 0, S)
  begin = (
    0
    if held.ring
    else jnp.clip(jnp.where(moves, shared, lengths[::W]).min() - offset, 0, S) // block
  )

  def step(index, held):
    def move(buffer):
      before = jax.lax.dynamic_slice_in_dim(buffer, index * block, block, 3)
      return jax.lax.dynamic_update_slice_in_dim(buffer, before[:, rows], index * block, 3)

    return jax.tree.map(move, held)

  return jax.lax.fori_loop(begin, -(-end // block), step, held)
