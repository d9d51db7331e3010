"""Does Mask say who sees whom? Held to the words of its docstring, written out query by query and
key by key.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings, strategies as st

from kernels.mask import FULL, PARTIAL, SKIP, Mask, zigzag


@st.composite
def masks(draw, positions=True):
  """(Mask's keywords with numpy arrays, B, T, S), every part set or not."""
  B, T = 2, 4
  has_positions = positions and draw(st.booleans())
  S = 6 if has_positions else T  # few shapes: each one compiles

  def ids(high, *shape):
    size = int(np.prod(shape))
    return np.array(
      draw(st.lists(st.integers(0, high), min_size=size, max_size=size)), np.int32
    ).reshape(shape)

  causal = draw(st.booleans())
  parts = {'causal': causal, 'window': draw(st.integers(0, 7))}
  if causal and draw(st.booleans()):
    parts['prefix'] = ids(7, B)
  if draw(st.booleans()):
    parts |= {'query_segments': ids(2, B, T), 'key_segments': ids(2, B, S)}
  if has_positions:
    parts |= {'query_positions': ids(7, B, T), 'key_positions': ids(7, B, S)}
  return parts, B, T, S


def dense(parts, B, T, S) -> np.ndarray:
  return np.array(
    [[[oracle.visible(parts, b, t, s) for s in range(S)] for t in range(T)] for b in range(B)]
  )


@given(masks())
@settings(max_examples=120)
def test_allowed_is_the_definition(case):
  parts, B, T, S = case
  allowed = np.asarray(oracle.mask(parts).allowed(T, S))
  np.testing.assert_array_equal(np.broadcast_to(allowed, (B, T, S)), dense(parts, B, T, S))


@given(
  masks(positions=False),
  *[st.sampled_from([slice(0, 2), slice(1, 4), slice(2, 4), slice(0, 4)])] * 2,
)
@settings(max_examples=60)
def test_block_is_a_slice_of_the_whole(case, queries, keys):
  parts, B, T, S = case
  whole = dense(parts, B, T, S)[:, queries, keys]
  block = oracle.mask(parts).block(queries, keys).allowed(*whole.shape[1:])
  np.testing.assert_array_equal(np.broadcast_to(block, whole.shape), whole)


@given(masks(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3]))
@settings(max_examples=150)
def test_blocks_skip_nothing_that_is_seen_and_mask_all_that_is_not(case, rows, columns):
  parts, B, T, S = case
  seen, kinds = dense(parts, B, T, S), oracle.mask(parts).blocks(T, S, rows, columns)
  kinds = np.broadcast_to(kinds, (B, *kinds.shape[1:]))
  assert kinds.shape == (B, -(-T // rows), -(-S // columns))
  for b, i, j in np.ndindex(kinds.shape):
    block = seen[b, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
    assert not (kinds[b, i, j] == SKIP and block.any())
    assert not (kinds[b, i, j] == FULL and not (block.all() and block.shape[1] == columns))


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('window', [0, 3, 7])
@pytest.mark.parametrize('n', [1, 4])
def test_blocks_of_rows_in_order_are_as_good_as_can_be(causal, window, n):
  """NumPy's, so that a kernel's grid is known when it is compiled."""
  mask = Mask(causal=causal, window=window, zigzag=n)
  kinds, seen = mask.blocks(16, 16, 2, 2), np.asarray(mask.allowed(16, 16))
  parts = seen.reshape(1, 8, 2, 8, 2).swapaxes(2, 3)
  assert isinstance(kinds, np.ndarray)
  np.testing.assert_array_equal(
    kinds, np.where(parts.all((3, 4)), FULL, np.where(parts.any((3, 4)), PARTIAL, SKIP))
  )


@given(masks())
@settings(max_examples=50)
def test_fields_name_what_is_set_and_the_mask_is_a_pytree(case):
  parts, _, T, S = case
  mask = oracle.mask(parts)
  expected = {name for name in ('causal', 'window') if parts[name]} | (
    {'prefix'} if 'prefix' in parts else set()
  )
  assert mask.fields() == expected | {
    part for part in ('segments', 'positions') if f'query_{part}' in parts
  }
  leaves, structure = jax.tree.flatten(mask)
  assert len(leaves) == len(parts) - 2
  again = jax.tree.unflatten(structure, leaves)
  assert (again.causal, again.window) == (mask.causal, mask.window)
  np.testing.assert_array_equal(again.allowed(T, S), mask.allowed(T, S))


ids = jnp.zeros((1, 3), jnp.int32)


@pytest.mark.parametrize(
  'parts, words',
  [
    ({'window': -1}, r'window=-1 must be 0'),
    ({'prefix': ids[:, 0], 'causal': False}, r'prefix loosens causal'),
    ({'query_segments': ids}, r'query_segments and key_segments come together'),
    ({'key_segments': ids}, r'query_segments and key_segments come together'),
    ({'query_positions': ids}, r'query_positions and key_positions come together'),
  ],
)
def test_contradictions_raise(parts, words):
  with pytest.raises(ValueError, match=words):
    Mask(**parts)


@pytest.mark.parametrize('n', [1, 2, 3])
def test_zigzag_rows_are_rows_in_another_order(n):
  order = zigzag(12, n)
  assert sorted(order) == list(range(12)) and (n > 1 or (order == np.arange(12)).all())
  size = 12 // (2 * n)
  assert (
    order.reshape(n, 2, size)[:, :, 0] // size == [[i, 2 * n - 1 - i] for i in range(n)]
  ).all() and order[:size].tolist() == list(range(size))
  for mask in (Mask(), Mask(window=5), Mask(prefix=jnp.array([4], jnp.int32))):
    laid_out = dataclasses.replace(mask, zigzag=n)
    assert ('zigzag' in laid_out.fields()) == (n > 1)
    np.testing.assert_array_equal(
      laid_out.allowed(12, 12)[0], np.asarray(mask.allowed(12, 12))[0][np.ix_(order, order)]
    )
  with pytest.raises(
    ValueError, match='10 tokens do not split into 4 chunks, two for each of 2 parts'
  ):
    zigzag(10, 2)


def test_indices_of_unequal_lengths_do_not_align():
  with pytest.raises(ValueError, match='3 queries and 4 keys need explicit positions'):
    Mask().allowed(3, 4)
  positions = jnp.arange(4, dtype=jnp.int32)[None]
  assert Mask(query_positions=positions[:, :3], key_positions=positions).allowed(3, 4).shape == (
    1,
    3,
    4,
  )
