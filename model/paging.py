"""How do pages of a cache go to the host, come back, and get copies?

A part of the mesh has its own pages. Every call is about J of them, as many on each part; a number
beyond a part's pages is none.

R layers · J pages · K key/value heads · S slots of a page
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int

from model.cache import Cache
from parallel import axes as ax


def contents(cache: Cache, places: Int[Array, 'J']) -> list[Any]:
  """What is in these pages: arrays [R, J, K, S, ...] of all that is paged."""

  def one(x, axes):
    def take(x, places):
      return x.at[:, places].get(mode='clip')

    return ax.local(take, (axes, ('batch',)), axes)(x, places)

  return [jax.tree.map(one, held, held.axes()) for held in cache.held if held.paged]


def with_contents(cache: Cache, places: Int[Array, 'J'], contents: list[Any]) -> Cache:
  """With these contents in these pages."""

  def one(x, axes, new):
    def put(x, places, new):
      return x.at[:, places].set(new, mode='drop')

    return ax.local(put, (axes, ('batch',), axes), axes)(x, places, new)

  left = iter(contents)
  held = [
    jax.tree.map(one, held, held.axes(), next(left)) if held.paged else held for held in cache.held
  ]
  return dataclasses.replace(cache, held=tuple(held))


def with_copies(cache: Cache, sources: Int[Array, 'J'], places: Int[Array, 'J']) -> Cache:
  """With what is in pages `sources` in these, too."""
  return with_contents(cache, places, contents(cache, sources))
