"""Is every row multiplied by its group's matrix? The backends against a loop in numpy, values and
gradients.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from kernels import grouped_matmul as gm

SHAPES = [(1, 1), (3, 8), (90, 4), (300, 6), (600, 3)]  # rows, groups
D, F = 5, 7


def loop(x, w, dy, sizes):
  """The product and both gradients, group by group, in float64."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
  ends = np.cumsum(sizes)
  for e, (first, last) in enumerate(zip(ends - sizes, ends)):
    y[first:last], dx[first:last], dw[e] = (
      x[first:last] @ w[e],
      dy[first:last] @ w[e].T,
      x[first:last].T @ dy[first:last],
    )
  return y, dx, dw


@functools.partial(jax.jit, static_argnames='backend')
def run(x, w, dy, sizes, backend):
  y, pull = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, sizes, backend=backend), x, w)
  return y, *pull(dy)


def operands(M, E, dtype=jnp.float32, seed=0):
  draw = np.random.default_rng(seed).normal
  return [jnp.asarray(draw(size=shape), dtype) for shape in ((M, D), (E, D, F), (M, F))]


def check(M, E, sizes, backend):
  x, w, dy = operands(M, E)
  wanted = loop(x, w, dy, sizes)
  # Rows behind the last group may hold anything.
  unused = jnp.arange(M)[:, None] >= sizes.sum()
  x, dy = jnp.where(unused, jnp.nan, x), jnp.where(unused, jnp.nan, dy)
  for name, a, b in zip(
    ('y', 'dx', 'dw'), run(x, w, dy, jnp.asarray(sizes, jnp.int32), backend), wanted
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4, err_msg=f'{name} of sizes {sizes}')


@pytest.mark.parametrize('backend', gm.BACKENDS)
@given(st.data(), st.sampled_from(SHAPES))
@settings(max_examples=40)
def test_the_loop_over_groups(backend, data, shape):
  M, E = shape
  cuts = data.draw(st.lists(st.integers(0, M), min_size=E, max_size=E))
  check(M, E, np.diff(sorted(cuts), prepend=0), backend)


@pytest.mark.parametrize('backend', gm.BACKENDS)
@pytest.mark.parametrize(
  'sizes',
  [[0, 0, 0, 0], [90, 0, 0, 0], [0, 0, 0, 90], [0, 7, 0, 8], [8, 16, 24, 42], [1, 1, 1, 87]],
  ids=str,
)
def test_empty_groups_one_group_whole_blocks_and_a_ragged_tail(sizes, backend):
  check(90, 4, np.array(sizes), backend)


def test_the_matrix_of_a_group_without_rows_changes_nothing():
  """Not even NaN: no block is its own, and those left over, which fall to the last group, write
  nothing.
  """
  x, w, dy = operands(90, 4)
  sizes = np.array([0, 50, 30, 0])
  poisoned = jnp.where(jnp.asarray(sizes == 0)[:, None, None], jnp.nan, w)
  for a, b in zip(
    run(x, poisoned, dy, jnp.asarray(sizes, jnp.int32), 'blocked'), loop(x, w, dy, sizes)
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('backend', gm.BACKENDS)
def test_half_precision_is_summed_in_f32(backend):
  """All terms positive, so that one rounding is all that may separate the result from the exact
  one.
  """
  M, sizes = 4000, np.array([3000, 900])
  x, w, dy = (abs(a) for a in operands(M, 2, jnp.bfloat16))
  for name, a, b in zip(
    ('y', 'dx', 'dw'), run(x, w, dy, jnp.asarray(sizes, jnp.int32), backend), loop(x, w, dy, sizes)
  ):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, err_msg=name)


@pytest.mark.parametrize(
  'M, E', [(16384, 8), (16384, 64), (16384, 128), (131072, 128), (4000, 60), (256, 8)]
)
def test_padding_stays_within_a_quarter(M, E):
  """Whatever the sizes: the number of blocks is static."""
  b = gm.block_rows(M, E)
  abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((M, D), (E, D, F))]
  jaxpr = jax.make_jaxpr(lambda x, w, s: gm.blocked(x, w, s))(
    *abstract, jax.ShapeDtypeStruct((E,), jnp.int32)
  )
  lengths = [int(found) for found in re.findall(r'length=(\d+)', str(jaxpr))]
  assert len(lengths) == 1 and M <= lengths[0] * b <= 1.25 * M


@pytest.mark.parametrize(
  'M, E, rows', [(1, 64, 1), (6, 2, 6), (100, 64, 8), (16384, 64, 64), (10**6, 8, gm.MOST)]
)
def test_blocks_are_neither_tiny_nor_huge(M, E, rows):
  assert gm.block_rows(M, E) == rows


def test_what_is_not_honoured_raises():
  x, w, _ = operands(4, 2)
  sizes = jnp.array([1, 2], jnp.int32)
  with pytest.raises(ValueError, match="did you mean 'blocked'.*reference"):
    gm.grouped_matmul(x, w, sizes, backend='block')
  with pytest.raises(ValueError, match='bfloat16 and matrices float32'):
    gm.grouped_matmul(x.astype(jnp.bfloat16), w, sizes)
