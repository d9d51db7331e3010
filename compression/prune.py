"""Which numbers of a matrix can go? Those that score lowest, by how large they are (magnitude), or
how much they add where they are used (Wanda, Sun et al., arXiv:2306.11695); or the others make up
for what goes (SparseGPT, Frantar & Alistarh, arXiv:2301.00774).

Matrices here are [K, R], f32: K inputs, R outputs. A row, in the words of the papers, is an output.

    magnitude   |W_ij|
    wanda       |W_ij| |X_i|      |X_i|: the norm of an input over tokens
    sparsegpt   W_ij^2 / U_ii^2   H^-1 = U^T U, U upper, H = X^T X + 1% of its mean diagonal
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

import names
from model.weights.sparse import MOST

METHODS = ('magnitude', 'wanda', 'sparsegpt')
SCOPES = ('global', 'layer', 'row')
BLOCK = 128  # inputs whose numbers SparseGPT chooses among at a time
DAMP = 0.01
INFINITE = 0x7F800000  # the bits of f32's infinity, which those of no number are above


@dataclasses.dataclass(frozen=True)
class Pattern:
  """How much of a matrix goes, and among what it is chosen.

  Attributes:
    share: of all numbers; 0 where `sparse` says it.
    sparse: (N, M): N of every M inputs of an output stay.
    scope: a share is of each 'row', of each matrix ('layer'), or of all matrices together
      ('global').
  """

  share: float = 0.0
  sparse: tuple[int, ...] = ()
  scope: str = 'layer'

  def __post_init__(self):
    names.check('--scope', self.scope, SCOPES)
    if not self.sparse and not 0 < self.share < 1:
      raise ValueError(
        f'--scheme={self.share:g}: the share of numbers that go is above 0 and below 1; use 0.5'
      )
    if self.sparse and not 0 < self.sparse[0] < self.sparse[1] <= MOST:
      raise ValueError(
        f'--scheme={self.sparse[0]}:{self.sparse[1]} keeps fewer numbers of each group than its '
        f'size, at most {MOST}, and at least one; use 2:4'
      )

  @classmethod
  def parse(cls, text: str, scope: str = 'layer') -> 'Pattern':
    """Of '2:4' or '0.5'. Raises ValueError for another text."""
    if pair := re.fullmatch(r'(\d+):(\d+)', text):
      return cls(sparse=(int(pair[1]), int(pair[2])), scope=scope)
    try:
      return cls(share=float(text), scope=scope)
    except ValueError as error:
      if re.fullmatch(r'[-+.\deE]+', text):
        raise
      raise ValueError(
        f'--scheme={text} is no N:M, as 2:4, and no share of numbers that go, as 0.5'
      ) from error

  def goes(self, count: int) -> int:
    """Of so many numbers that are chosen among."""
    return round(self.share * count)


def stays(
  scores: Array, inputs: tuple[int, ...], pattern: Pattern, share: Array | float | None = None
) -> Bool[Array, '...']:
  """Which numbers of matrices [.., inputs, outputs] stay: the highest scores; of equal ones the
  first. Traced.

  inputs: which dimensions a product sums over, counted from the last; the others behind the first
    of them are outputs, and those before it count matrices. share: of what a pattern takes away, so
    much goes now; a number that may be traced. Default: all.
  Raises ValueError where groups do not fill the inputs.
  """
  if pattern.sparse:
    N, M = pattern.sparse
    at = scores.ndim + max(inputs)
    if scores.shape[at] % M:
      raise ValueError(
        f'groups of {M} do not fill {scores.shape[at]} inputs; leave the matrix out by a pattern'
      )
    shape = (*scores.shape[:at], scores.shape[at] // M, M, *scores.shape[at + 1 :])
    keep = N if share is None else M - jnp.floor(share * (M - N) + 1e-3).astype(jnp.int32)
    return highest(scores.reshape(shape), keep, (at + 1,)).reshape(scores.shape)
  axes = inputs if pattern.scope == 'row' else tuple(range(min(inputs), 0))
  axes = tuple(scores.ndim + axis for axis in axes)
  count = math.prod(scores.shape[axis] for axis in axes)
  goes = pattern.goes(count)
  if share is not None:
    # f32 does not count so far that a large matrix would be right to the last one.
    goes = jnp.where(share < 1, jnp.round(goes * share).astype(jnp.int32), goes)
  return highest(scores, count - goes, axes)


def highest(scores: Array, count, axes: tuple[int, ...]) -> Bool[Array, '...']:
  """Whether a score, at least 0, is among the `count` highest along axes; of equal ones the first.

  By halving the range of f32's bits until so many are above, and of the places of equal ones: only
  counts leave a device, and nothing is sorted. count: a number, or an array that goes with the
  scores. Traced.
  """
  bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
  place = jnp.zeros((), jnp.int32)
  for axis in axes:
    where = jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    place = place * scores.shape[axis] + where
  size = math.prod(scores.shape[axis] for axis in axes)
  like = bits.max(axes, keepdims=True)

  def least(enough, low, high):
    """The smallest number of (low, high] of which `enough` is true."""

    def halve(_, ends):
      low, high = ends
      middle = low + (high - low) // 2
      met = enough(middle)
      return jnp.where(met, low, middle), jnp.where(met, middle, high)

    ends = jnp.full_like(like, low), jnp.full_like(like, high)
    return jax.lax.fori_loop(0, int(high - low).bit_length(), halve, ends)[1]

  # The least bits that fewer than `count` are above: those of the last one that stays.
  above = least(lambda t: (bits > t).sum(axes, keepdims=True) < count, -1, INFINITE)
  more = bits > above
  rest = count - more.sum(axes, keepdims=True)
  equal = bits == above
  until = least(lambda i: (equal & (place < i)).sum(axes, keepdims=True) >= rest, -1, size)
  return more | (equal & (place < until))


def wanda(w: Float[Array, 'K R'], norms: Float[Array, 'K']) -> Float[Array, '_ _']:
  """Scores by how much a number adds to its output. norms: of inputs over tokens."""
  return jnp.abs(w) * norms[:, None]


def sparsegpt(
  w: Float[Array, 'K R'], products: Float[Array, 'K K'], pattern: Pattern
) -> Float[Array, 'K R']:
  """What is left, with the error of what goes spread over inputs behind it. Traced.

  products: X^T X over tokens. Inputs that never are anything but 0 have numbers of 0.
  """
  size = BLOCK
  if pattern.sparse:
    size = max(1, BLOCK // pattern.sparse[1]) * pattern.sparse[1]
    jax.eval_shape(lambda: stays(w, (-2,), pattern))  # raises where groups do not fill it
  (inputs, outputs), done = w.shape, []
  # So that as many go of all blocks as of the whole.
  many = outputs if pattern.scope == 'layer' else 1
  with jax.default_matmul_precision('highest'):
    factor = inverse_factor(products)
    w = jnp.where(jnp.diagonal(products)[:, None] == 0, 0, w.astype(jnp.float32))
    for first in range(0, inputs, size):
      last = min(first + size, inputs)
      goes = pattern.goes(last * many) - pattern.goes(first * many)
      count = last - first
      block, errors = _block(
        w[:count], factor[first:last, first:last], count * many - goes, pattern
      )
      done.append(block)
      w = w[count:] - factor[first:last, last:].T @ errors
  return jnp.concatenate(done)


def inverse_factor(products: Float[Array, 'K K']) -> Float[Array, 'K K']:
  """U, upper, of (H + damping)^-1 = U^T U; of inputs that are always 0 H has the mean diagonal.

  H = R R^T with R upper, which is Cholesky's factor from the other end: U is R^-1, and no inverse
  of H is formed, which f32 might not hold.
  """
  diagonal = jnp.diagonal(products).astype(jnp.float32)
  live = diagonal > 0
  mean = diagonal.sum() / jnp.maximum(live.sum(), 1)
  mean = jnp.where(mean > 0, mean, 1)
  whole = products.astype(jnp.float32) + jnp.diag(jnp.where(live, 0, mean) + DAMP * mean)
  root = jnp.linalg.cholesky(whole[::-1, ::-1])[::-1, ::-1]
  return jax.scipy.linalg.solve_triangular(root, jnp.eye(len(root)), lower=False)


def _block(w, factor, keep, pattern: Pattern):
  """Of a block of inputs what is left, and the errors that those behind them make up for."""
  diagonal = jnp.diagonal(factor)[:, None]
  if pattern.sparse:
    chosen = jnp.ones(w.shape, bool)
  else:
    axes = (0,) if pattern.scope == 'row' else (0, 1)
    chosen = highest(jnp.square(w / diagonal), keep, axes)

  def of_group(i, w, chosen):
    M = pattern.sparse[1]
    group, scale = (jax.lax.dynamic_slice_in_dim(x, i, M, 0) for x in (w, diagonal))
    made = stays(jnp.square(group / scale), (-2,), pattern)
    return jax.lax.dynamic_update_slice_in_dim(chosen, made, i, 0)

  def one(i, carry):
    w, errors, chosen = carry
    if pattern.sparse:
      begins = i % pattern.sparse[1] == 0
      chosen = jax.lax.cond(begins, lambda: of_group(i, w, chosen), lambda: chosen)
    kept = jnp.where(chosen[i], w[i], 0)
    error = (w[i] - kept) / factor[i, i]
    w = (w - factor[i][:, None] * error[None]).at[i].set(kept)
    return w, errors.at[i].set(error), chosen

  w, errors, _ = jax.lax.fori_loop(0, len(w), one, (w, jnp.zeros_like(w), chosen))
  return w, errors


def shared_out(scores: Mapping[str, Array], inputs: Mapping[str, tuple[int, ...]], share: float):
  """How many of each matrix stay, {name: [..]}, where a share of all of them together goes: of
  equal scores those of the first.

  scores: of stacks of matrices. inputs: as `stays` has them.
  """
  ranks = {name: -min(inputs[name]) for name in scores}

  def above(bits: int) -> dict[str, np.ndarray]:
    return {
      name: np.asarray(_above(x, np.int32(bits), ranks[name]), np.int64)
      for name, x in scores.items()
    }

  total = sum(x.size for x in scores.values())
  keep = total - round(share * total)
  low, high = -1, INFINITE
  while high - low > 1:
    middle = (low + high) // 2
    if sum(x.sum() for x in above(middle).values()) < keep:
      high = middle
    else:
      low = middle
  certain, possible = above(high), above(high - 1)
  rest = keep - sum(x.sum() for x in certain.values())
  for name, x in certain.items():
    flat, equal = x.reshape(-1), (possible[name] - x).reshape(-1)
    ahead = np.cumsum(equal) - equal
    flat += np.clip(rest - ahead, 0, equal)
    rest = max(0, rest - equal.sum())
  return certain


@functools.partial(jax.jit, static_argnums=2)
def _above(scores, bits, rank: int):
  ours = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
  return (ours > bits).sum(tuple(range(scores.ndim - rank, scores.ndim)), dtype=jnp.int32)
