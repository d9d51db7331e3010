"""How are rows multiplied by the matrix of their group without a kernel? The oracle, and a loop
over blocks of rows of one group each.

M rows · E groups · D width of a row · F width of a product · b rows of a block
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

# Rows a block: what a vector register holds, and what feeds a matrix unit from memory without
# waiting.
LEAST, MOST = 8, 512


def reference(x, w, sizes):
  """Same contract as kernels.grouped_matmul, obviously right: each row has its own matrix."""
  ends = jnp.cumsum(sizes)
  row = jnp.arange(x.shape[0], dtype=sizes.dtype)
  group = (row[:, None] >= ends[None]).sum(1)
  used = row < ends[-1]
  mine = w.astype(_wide(x))[jnp.minimum(group, len(w) - 1)]
  y = jnp.einsum('MD,MDF->MF', _keep(x, used).astype(mine.dtype), mine)
  return _keep(y, used).astype(x.dtype)  # kept here too, so that no gradient comes back from there


@jax.custom_vjp
def blocked(x, w, sizes):
  """Same contract as kernels.grouped_matmul: block by block, the backward pass too; matrices of
  bytes become numbers block by block.
  """
  return _products(x, w, sizes, 'MD,DF->MF')


def _forward(x, w, sizes):
  return blocked(x, w, sizes), (x, w, sizes)


def _backward(residuals, dy):
  x, w, sizes = residuals
  return _products(dy, w, sizes, 'MF,DF->MD'), _outer_products(x, dy, w, sizes), None


blocked.defvjp(_forward, _backward)


def block_rows(M: int, E: int) -> int:
  """Rows of a block: the largest power of two that pads by at most a quarter, between LEAST and
  MOST (and no more than M).

  Every group may leave its last block all but empty, which is E * (b - 1) rows at worst and half of
  that on average.
  """
  return min(M, MOST, max(LEAST, 1 << max(0, (M // (4 * E)).bit_length() - 1)))


def _products(x, w, sizes, formula):
  """Rows times the matrix of their group; each block writes its own rows and leaves the others as
  they are.
  """
  M, F = x.shape[0], w.shape['EDF'.index(formula[-1])]
  b = block_rows(M, w.shape[0])

  def product(y, group, start, mine):
    part = jnp.einsum(
      formula, _cut(x, start, mine), w[group], preferred_element_type=_wide(x)
    ).astype(x.dtype)
    kept = jax.lax.dynamic_slice_in_dim(y, start, b, 0)
    return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(mine[:, None], part, kept), start, 0)

  return _scan(product, jnp.zeros((M, F), x.dtype), sizes, M, b)


def _outer_products(x, dy, w, sizes):
  """The gradient of the matrices: summed in place, in f32."""
  M = x.shape[0]

  def add(dw, group, start, mine):
    part = jnp.einsum(
      'MD,MF->DF', _cut(x, start, mine), _cut(dy, start, mine), preferred_element_type=dw.dtype
    )
    return dw.at[group].add(part)

  dw = _scan(add, jnp.zeros(w.shape, _wide(x)), sizes, M, block_rows(M, w.shape[0]))
  # Else what scatters it to shards decides about its layout in the loop, where XLA for TPU then
  # transposes a matrix for every block.
  return with_layout_constraint(dw, Layout(major_to_minor=(0, 1, 2))).astype(w.dtype)


def _scan(update, carry, sizes, M, b):
  """`update(carry, group, start, mine)` block by block: b rows from `start` on, of which `mine` [b]
  are the group's.

  Blocks left over have no row and change nothing. They are computed all the same: a lax.cond around
  the update saved no time on a CPU, and makes XLA for GPU copy the whole carry in every step (jax
  0.10.2).
  """
  E = len(sizes)
  blocks = -(-sizes // b)
  last = jnp.cumsum(blocks)
  # No division of M rows among the groups needs more blocks, so their number is static.
  index = jnp.arange((M + min(E, M) * (b - 1)) // b, dtype=sizes.dtype)
  group = jnp.minimum((index[:, None] >= last[None]).sum(1), E - 1)
  within = (index - (last - blocks)[group]) * b
  first = (jnp.cumsum(sizes) - sizes)[group] + within
  rows = jnp.clip(sizes[group] - within, 0, b)

  def block(carry, found):
    group, first, rows = found
    start = jnp.minimum(first, M - b)  # the last block would reach over the end
    row = start + jnp.arange(b, dtype=start.dtype)
    mine = (row >= first) & (row < first + rows)
    return update(carry, group, start, mine), None

  return jax.lax.scan(block, carry, (group, first, rows))[0]


def _cut(x, start, mine):
  """A block of rows, zeros where they are another group's or nobody's."""
  return _keep(jax.lax.dynamic_slice_in_dim(x, start, mine.size, 0), mine)


def _keep(x, rows):
  return jnp.where(rows[:, None], x, jnp.zeros((), x.dtype))


def _wide(x):
  return jnp.promote_types(x.dtype, jnp.float32)
