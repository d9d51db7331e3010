"""Which codes make the least error of what a matrix gives out, rather than of its numbers? GPTQ
(Frantar et al., arXiv:2210.17323): inputs are rounded one after another, and those that are not yet
make up for the error, as far as they move together.

    H = X^T X + damping mean(diag) I    H = R R^T, R upper triangular; U = R^-1, so H^-1 = U^T U
    q_j = nearest(w_j)    e_j = (w_j - q_j) / U_jj    w_k -= U_jk e_j for all k > j

Scales and zero points are those of the matrix as it was, and stay: codes have no list of which
input belongs to which group, so that inputs can be taken in another order (`act_order`: those that
weigh most first) only where groups do not depend on it.

A number that is 0 stays 0, whatever the others want it to make up for, and they make up for that: a
matrix that was pruned stays pruned.

I inputs · O outputs, all that is not summed over
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from compression.calibration import InputStatistics
from model.weights.activated import Activated
from model.weights.codes import Codes
from model.weights.doubled import Doubled
from model.weights.grids import GRIDS, spread
from model.weights.int8 import Int8
from model.weights.scheme import Scheme
from model.weights.weight import Weight

COLUMNS = 128  # inputs that are rounded before all others hear of it
DAMPING = 0.01


@dataclasses.dataclass(frozen=True)
class Gptq:
  """GPTQ of one matrix, by statistics with X^T X.

  Attributes:
    scales: a method of compression.quantise, whose scales are taken.
    act_order: inputs in the order of the diagonal of H. damping: see above.
  """

  scales: Callable
  act_order: bool = False
  damping: float = DAMPING

  def __call__(
    self, scheme: Scheme, x, summed, axes, name: str, statistics: InputStatistics
  ) -> Weight:
    """The codes; with scales of NaN where the statistics do not tell inputs apart. Traced."""
    if scheme.activations:
      alone = dataclasses.replace(scheme, activations=False)
      return Activated(self(alone, x, summed, axes, name, statistics))
    weight = self.scales(scheme, x, summed, axes, name)
    scale, zero = wide_scales(weight)
    lead = x.shape[: 'experts' in axes]
    inputs = math.prod(x.shape[n] for n in summed)

    def flat(y):
      return jnp.broadcast_to(y, x.shape).astype(jnp.float32).reshape(*lead, inputs, -1)

    grid = GRIDS[scheme.grid]
    run = functools.partial(rounded, grid=grid, damping=self.damping, act_order=self.act_order)
    arguments = flat(x), flat(scale), None if zero is None else flat(zero), statistics.products
    numbers = jax.lax.map(lambda a: run(*a), arguments) if lead else run(*arguments)
    weight = with_numbers(weight, numbers.reshape(x.shape))
    # No code is NaN: of numbers that are, the scales say it.
    sound = jnp.isfinite(numbers).all()

    def or_nan(y):
      floats = jnp.issubdtype(y.dtype, jnp.floating)
      return jnp.where(sound, y, jnp.asarray(jnp.nan, y.dtype)) if floats else y

    return jax.tree.map(or_nan, weight)


def wide_scales(weight: Weight):
  """Scale and zero point, or None, that can be multiplied with the matrix."""
  if isinstance(weight, Int8):
    return weight.scale, None
  weight = weight.single() if isinstance(weight, Doubled) else weight
  zero = None if weight.zero is None else spread(weight.zero, weight.blocks)
  return spread(weight.scale, weight.blocks), zero


def with_numbers(weight: Weight, x) -> Weight:
  """The nearest codes of other numbers, by the scales of a weight."""
  if isinstance(weight, Int8):
    values = jnp.round(x / jnp.where(weight.scale > 0, weight.scale, 1))
    return dataclasses.replace(weight, values=jnp.clip(values, -127, 127).astype(jnp.int8))
  if isinstance(weight, Doubled):
    return weight.with_numbers(x)
  return Codes.with_scales(
    x, weight.scale, weight.zero, weight.grid, weight.blocks, weight.packs, weight.axes
  )


def rounded(w, scale, zero, products, *, grid, damping: float, act_order: bool):
  """Numbers of the grid, [I, O], for w [I, O] with a scale and a zero point (or None) each.

  products: [I, I], X^T X. Numbers of 0 stay that, and inputs that are always 0 get such; where
    others are too much alike for f32 to factorise H, all are NaN.
  """
  inputs = len(w)
  diagonal = jnp.diagonal(products)
  dead = diagonal <= 0
  w = jnp.where(dead[:, None], 0, w)
  order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(inputs)
  H = products + jnp.diag(jnp.where(dead, 1, 0) + damping * diagonal.mean())
  U = _factor(H[order][:, order])

  # Filled up to whole blocks by inputs that nothing depends on.
  more = -inputs % COLUMNS
  U = jnp.pad(U, ((0, more), (0, more))) + jnp.diag(
    (jnp.arange(inputs + more) >= inputs).astype(U.dtype)
  )
  w, scale = (jnp.pad(x[order], ((0, more), (0, 0))) for x in (w, scale))
  gone = w == 0
  zero = jnp.zeros_like(scale) if zero is None else jnp.pad(zero[order], ((0, more), (0, 0)))

  def nearest(w, scale, zero):
    codes = grid.nearest(w / jnp.where(scale > 0, scale, 1) + zero)
    return (grid.stands_for(codes) - zero) * scale

  def block(w, first):
    """Rounds COLUMNS inputs; `w` of those behind them makes up for it."""

    def here(x, rows=COLUMNS):
      return jax.lax.dynamic_slice_in_dim(x, first, rows)

    within = jax.lax.dynamic_slice(U, (first, first), (COLUMNS, COLUMNS))
    scales, zeros, gone_here = here(scale), here(zero), here(gone)

    def one(j, carry):
      w, chosen, errors = carry
      q = jnp.where(gone_here[j], 0, nearest(w[j], scales[j], zeros[j]))
      error = (w[j] - q) / within[j, j]
      behind = jnp.where(jnp.arange(COLUMNS) > j, within[j], 0)
      w = w - behind[:, None] * error[None]
      return w, chosen.at[j].set(q), errors.at[j].set(error)

    _, chosen, errors = jax.lax.fori_loop(
      0, COLUMNS, one, (here(w), *(jnp.zeros_like(scales),) * 2)
    )
    behind = jnp.where(jnp.arange(len(w)) >= first + COLUMNS, here(U), 0)
    with jax.default_matmul_precision('highest'):
      return w - behind.T @ errors, chosen

  _, chosen = jax.lax.scan(block, w, jnp.arange(0, inputs + more, COLUMNS))
  # What is nearest to NaN is some number of the grid like any other.
  chosen = jnp.where(jnp.isfinite(U).all(), chosen, jnp.nan)
  chosen = chosen.reshape(inputs + more, -1)[:inputs]
  return jnp.zeros_like(chosen).at[order].set(chosen)


def _factor(H):
  """U, upper triangular, with U^T U = H^-1."""
  with jax.default_matmul_precision('highest'):
    # From the last input to the first, Cholesky's factor is upper triangular.
    R = jnp.linalg.cholesky(H[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(R, jnp.eye(len(H)), lower=False)
