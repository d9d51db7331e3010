"""What are our kernels tried with? Rows, documents, positions, and a loss of all that attention
gives.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import attention


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([*shape, seed]).normal(size=shape), jnp.float32)


def integers(high, *shape):
  return np.random.default_rng([high, *shape]).integers(0, high, shape).astype(np.int32)


PACKED = np.sort(integers(5, 2, 300), 1)


def documents(T, S):
  """Segments in order, as packing makes them; of the first row some queries see nothing."""
  queries = PACKED[:, :T].copy()
  queries[0, :3] = 9
  return {'query_segments': queries, 'key_segments': PACKED[:, :S]}


def positions(T, S):
  return {'query_positions': integers(S, 2, T), 'key_positions': integers(S, 2, S)}


def attends(scoring, **settings):
  """(q, k, v, *, sinks) -> kernels.attention.attention of them."""

  def attend(q, k, v, *, sinks, **more):
    own = dataclasses.replace(scoring, sinks=sinks)
    return attention(q, k, v, own, **settings, **more)

  return attend


def values_and_gradients(attend, q, k, v, sinks):
  """(out, lse) and gradients of a projection of both; -inf, of what sees nothing, has none."""
  of_out, of_lse = draw(*q.shape[:3], v.shape[3]), draw(*q.shape[:3])

  def loss(q, k, v, sinks):
    out, lse = attend(q, k, v, sinks=sinks)
    return jnp.sum(out * of_out.astype(out.dtype), dtype=jnp.float32) + jnp.sum(
      jnp.where(jnp.isfinite(lse), lse, 0) * of_lse
    ), (out, lse)

  arguments = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
  (_, values), gradients = jax.jit(jax.value_and_grad(loss, arguments, has_aux=True))(
    q, k, v, sinks
  )
  return values, gradients
