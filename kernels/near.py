"""How does attention stay in the caches of a CPU? One key head of one row at a time: scores of a
block of queries are a megabyte then, where those of all rows and heads go through memory, once for
each product, maximum, exponential and sum.

B batch · T query length · S key length · N query heads · K key/value heads · G = N/K · H head width
"""

import dataclasses
import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.scoring import Scoring
from parallel import mesh, target

BLOCK = 2**21  # bytes of scores, up to which those of all rows and heads are near enough


def wanted(q: jax.Array, k: jax.Array, scoring: Scoring, queries: int) -> bool:
  """Whether it is quicker so: on a CPU, whose one device has all, with so many scores of blocks of
  these queries. (What is left out of weights is drawn by the number of a head among all.)
  """
  whole = mesh.platform() == 'cpu' and target.alone() and scoring.dropout is None
  (B, T, N, _), S = q.shape, k.shape[1]
  return whole and 4 * B * N * min(queries, T) * S > BLOCK


def attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  scoring: Scoring,
  attend: Callable,
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """kernels.reference.attention, by `attend` of a few pairs of a row and a key head at a time: of
  one on two cores, of as many more as there are cores for.
  """
  (B, T, N, H), K = q.shape, k.shape[2]
  G = N // K

  def pairs(x):
    """[B, K, ..] of each pair, a row of its own."""
    return x.reshape(B * K, 1, *x.shape[2:])

  def of_rows(x):
    return pairs(jnp.broadcast_to(x[:, None], (B, K, *x.shape[1:])))

  def of_heads(x):
    """[.., N] as [B, K, .., G]."""
    heads = jnp.moveaxis(x.reshape(*x.shape[:-1], K, G), -2, 0)
    return jnp.broadcast_to(heads[None], (B, *heads.shape)).reshape(B * K, *heads.shape[1:])

  def of_pair(pair):
    q, k, v, mask, sinks, relative = pair
    return attend(q, k, v, dataclasses.replace(scoring, mask=mask, sinks=sinks, relative=relative))

  operands = (
    pairs(jnp.moveaxis(q.reshape(B, T, K, G, H), 2, 1)),
    *(pairs(jnp.moveaxis(x, 2, 1)[:, :, :, None]) for x in (k, v)),
    jax.tree.map(of_rows, scoring.mask),
    *(jax.tree.map(of_heads, x) for x in (scoring.sinks, scoring.relative)),
  )
  together = (os.cpu_count() or 1) // 2
  out, lse = jax.lax.map(of_pair, operands, batch_size=together if together > 1 else None)
  return _joined(out, B, K), _joined(lse, B, K)


def _joined(x, B, K):
  """[B K, 1, T, G, ..] as [B, T, N, ..]."""
  x = jnp.moveaxis(x.reshape(B, K, *x.shape[2:]), 1, 2)
  return x.reshape(*x.shape[:2], math.prod(x.shape[2:4]), *x.shape[4:])
