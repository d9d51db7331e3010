"""Do the numbers go that a reference in float64 takes away, and as many as asked?"""

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from compression.prune import Pattern, highest, sparsegpt, stays, wanda

ROW, NORMS = np.float32([4, -1, 2.5, -3]), np.float32([1, 8, 2, 1])


def test_by_hand():
  """A row of four: its two largest, and the two that add most where inputs are not alike."""
  w, pattern = ROW[:, None], Pattern.parse('2:4')
  assert STAYS(np.abs(w), (-2,), pattern).ravel().tolist() == [True, False, False, True]
  scores = wanda(w, NORMS)
  assert scores.ravel().tolist() == [4, 8, 5, 3]
  assert STAYS(scores, (-2,), pattern).ravel().tolist() == [False, True, True, False]
  for method in (Pattern.parse('2:4'), Pattern.parse('0.5'), Pattern.parse('0.5', 'row')):
    np.testing.assert_allclose(GPT(w, np.eye(4), method).ravel(), [4, 0, 0, -3], rtol=1e-6)


GPT = jax.jit(sparsegpt, static_argnums=2)
STAYS = jax.jit(stays, static_argnums=(1, 2))
HIGHEST = jax.jit(highest, static_argnums=2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 24), st.integers(0, 2**32 - 1), st.booleans())
def test_the_highest_are_those_of_a_sort(count, seed, many):
  """As many as asked, and of equal ones the first."""
  x = np.random.default_rng(seed).integers(0, 4, (3, 4, 6)).astype(np.float32)
  x = x if many else x / 7
  order = np.argsort(-x.reshape(3, 24), 1, kind='stable')
  expected = np.zeros((3, 24), bool)
  np.put_along_axis(expected, order[:, :count], True, 1)
  made = np.asarray(HIGHEST(x, count, (1, 2)))
  np.testing.assert_array_equal(made.reshape(3, 24), expected)


def reference(w, hessian, pattern, block):
  """SparseGPT a number at a time, in float64: the inverse of what is left of H at each input, as in
  the paper's first form, and not by a factor.
  """
  w, H = np.array(w, np.float64), np.array(hessian, np.float64)
  (inputs, outputs), mask = w.shape, np.ones(w.shape, bool)
  dead = np.diag(H) == 0
  w[dead] = 0
  mean = np.diag(H)[~dead].mean()
  H[dead, dead] = mean
  H += 0.01 * mean * np.eye(inputs)
  # The k-th inverse is of the inputs from k on.
  inverses = [np.linalg.inv(H[k:, k:]) for k in range(inputs)]
  for k in range(inputs):
    M = pattern.sparse[1] if pattern.sparse else block
    if k % M == 0:
      size = min(M, inputs - k)
      scores = np.array([w[k + i] ** 2 / inverses[k + i][0, 0] for i in range(size)])
      if pattern.sparse:
        goes = np.argsort(scores, 0)[: size - pattern.sparse[0]]
        np.put_along_axis(mask[k : k + size], goes, False, 0)
      else:
        count = round(pattern.share * (k + size) * outputs) - round(pattern.share * k * outputs)
        mask[k : k + size].ravel()[np.argsort(scores.ravel())[:count]] = False
    error = np.where(mask[k], 0, w[k]) / inverses[k][0, 0]
    w[k:] -= np.outer(inverses[k][:, 0], error)
    w[k] *= mask[k]
  return w


@pytest.mark.parametrize(
  'text', ['0.5', '2:4', *(pytest.param(text, marks=pytest.mark.slow) for text in ('0.3', '4:8'))]
)
def test_sparsegpt_is_its_reference(text, monkeypatch):
  """In blocks of 16, whose errors those behind make up for; an input is dead."""
  monkeypatch.setattr('compression.prune.BLOCK', 16)
  draw = np.random.default_rng(0)
  x = draw.normal(size=(400, 40)) @ draw.normal(size=(40, 40))
  x[:, 7] = 0
  w, products, pattern = draw.normal(size=(40, 12)).astype(np.float32), x.T @ x, Pattern.parse(text)
  made, expected = GPT(w, np.float32(products), pattern), reference(w, products, pattern, 16)
  np.testing.assert_array_equal(np.asarray(made) == 0, expected == 0)
  np.testing.assert_allclose(made, expected, atol=1e-3)
  assert (np.asarray(made)[7] == 0).all()
  # What it is for: less is lost than by taking the same share away by size.
  plain = np.where(STAYS(np.abs(w), (-2,), pattern), w, 0)
  lost = [np.square(x @ (w - other)).sum() for other in (np.asarray(made), plain)]
  assert lost[0] < 0.7 * lost[1]


def test_counts_are_exact():
  """Of rows, of the matrix, of groups; of a heads' dimensions, too."""
  w = np.random.default_rng(0).normal(size=(3, 4, 8, 5)).astype(np.float32)  # 3 of [4 x 8, 5]
  scores = np.abs(w)
  row = np.asarray(STAYS(scores, (-3, -2), Pattern.parse('0.3', 'row')))
  assert (row.sum((1, 2)) == 32 - round(0.3 * 32)).all()
  layer = np.asarray(STAYS(scores, (-3, -2), Pattern.parse('0.3')))
  assert (layer.sum((1, 2, 3)) == 160 - round(0.3 * 160)).all()
  groups = np.asarray(STAYS(scores, (-3, -2), Pattern.parse('2:4')))
  assert (groups.reshape(3, 4, 2, 4, 5).sum(3) == 2).all()
  halfway = np.asarray(STAYS(scores, (-3, -2), Pattern.parse('0.5'), np.float32(0.5)))
  assert (halfway.sum((1, 2, 3)) == 120).all() and (halfway | ~layer).mean() > 0.7


@pytest.mark.parametrize(
  'text, words',
  [
    ('1.5', 'above 0 and below 1'),
    ('0', 'above 0 and below 1'),
    ('half', 'no share of numbers'),
    ('4:4', 'keeps fewer numbers'),
  ],
)
def test_patterns_that_mean_nothing(text, words):
  with pytest.raises(ValueError, match=words):
    Pattern.parse(text)
