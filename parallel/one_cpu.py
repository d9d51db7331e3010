"""How does one CPU multiply tokens and a matrix fastest? As its compiler reads them best."""

import math

import jax
import jax.numpy as jnp

FEW = 64  # tokens: of so many products are as fast in either order


def product(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """jnp.einsum of tokens and a matrix, with all tokens in one dimension: where its gradient sums
  over several, XLA first transposes a copy of all tokens, which took a seventh of a step of
  training.

  y: with what is summed over first, or last; else it is several matrices.
  """
  left, right, result = formula.replace('->', ',').split(',')
  kept = left.rstrip(right)
  summed = left.removeprefix(kept)
  turned = right.endswith(summed)
  new = right.removesuffix(summed) if turned else right.removeprefix(summed)
  of_one = summed and (turned or right.startswith(summed)) and kept + new == result
  if not of_one:  # of several matrices, as of the heads of MLA
    return jnp.einsum(formula, x, y)

  tokens = x.shape[: -len(summed)]
  entries = y.shape[: len(new)] if turned else y.shape[len(summed) :]
  K, M = math.prod(x.shape[-len(summed) :]), math.prod(entries)
  x, y = x.reshape(math.prod(tokens), K), y.reshape((M, K) if turned else (K, M))
  return (of_rows(x, y) if turned else x @ y).reshape(*tokens, *entries)


def of_rows(x: jax.Array, y: jax.Array) -> jax.Array:
  """x [N, K] times every row of y [M, K]: [N, M].

  Of few tokens XLA lays the right side of a product out anew, and reads the left one as it is: the
  rows go first, which is two to four times as fast for 2 to 32 tokens. It would exchange the sides
  of a product that is transposed after it, but for a barrier.
  """
  few = len(x) < FEW and x.dtype == y.dtype == jnp.float32
  return jax.lax.optimization_barrier(y @ x.T).T if few else x @ y.T
