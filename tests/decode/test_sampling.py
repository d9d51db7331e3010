"""Are tokens drawn by the law that the options state, and by nothing else?"""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st

from decode.sampling import Sampling, law, make_sampling, sample

V = 12
DTYPES = (jnp.float32, jnp.int32, jnp.float32, jnp.uint32)
jitted_law, jitted_sample = jax.jit(law), jax.jit(sample)


def law64(logits, temperature, top_k, top_p):
  """Probabilities [V] by the definition: temperature, then top-k, then top-p, each renormalised; ties stay together."""
  logits = np.asarray(logits, np.float64)
  if temperature == 0:
    return np.eye(len(logits))[logits.argmax()]
  p = np.exp((logits - logits.max()) / temperature)
  p /= p.sum()
  if top_k:
    p = np.where(p >= np.sort(p)[-min(top_k, len(p))], p, 0)
    p /= p.sum()
  if top_p < 1:
    order = np.argsort(-p)
    kept = order[:1 + np.searchsorted(np.cumsum(p[order]), top_p)]
    p = np.where(p >= p[kept].min(), p, 0)
  return p / p.sum()


def options(rows):
  """Sampling of rows of (temperature, top_k, top_p, seed)."""
  return Sampling(*(jnp.asarray(column, dtype) for column, dtype in zip(zip(*rows), DTYPES)))


GRID = list(itertools.product((0.0, 0.3, 1.0, 2.5), (0, 1, 3, 11, 40), (0.05, 0.5, 0.77, 1.0), (0,)))


def test_law_over_a_grid_of_options():
  logits = np.random.default_rng(0).normal(0, 2, (len(GRID), V)).astype(np.float32)
  found = np.exp(np.asarray(jitted_law(jnp.asarray(logits), options(GRID))))
  for row, (temperature, top_k, top_p, _) in enumerate(GRID):
    expected = law64(logits[row], temperature, top_k, top_p)
    np.testing.assert_allclose(found[row], expected, atol=1e-6, err_msg=str(GRID[row]))


@given(st.integers(0, 2**31), st.floats(0.1, 3), st.integers(0, 15), st.floats(0.01, 1), st.floats(0.1, 8))
@settings(max_examples=60)
def test_law_as_a_property(seed, temperature, top_k, top_p, scale):
  logits = np.random.default_rng(seed).normal(0, scale, (1, V)).astype(np.float32)
  expected = law64(logits[0], np.float32(temperature), top_k, np.float32(top_p))
  border = np.cumsum(-np.sort(-law64(logits[0], np.float32(temperature), top_k, 1.0)))
  if np.abs(border - np.float32(top_p)).min() < 1e-5:
    return  # on the border the last bit of a sum decides
  found = np.exp(np.asarray(jitted_law(jnp.asarray(logits), options([(temperature, top_k, top_p, 0)]))))[0]
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ties_at_a_border_stay_together():
  logits = jnp.asarray([[1.0, 3.0, 2.0, 2.0, 2.0, -1.0]])
  for top_k, top_p in ((2, 1.0), (0, 0.5)):
    found = np.exp(np.asarray(jitted_law(logits, options([(1.0, top_k, top_p, 0)]))))[0]
    assert (found > 0).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize('temperature', [1e-6, 2e-38, 1e-40, 1e30])
def test_extreme_temperatures_give_a_law(temperature):
  logits = np.asarray([[30.0, -2.0, 29.0, 1.0]], np.float32)
  found = np.exp(np.asarray(jitted_law(jnp.asarray(logits), options([(temperature, 0, 1.0, 0)]))))[0]
  np.testing.assert_allclose(found, [1, 0, 0, 0] if temperature < 1 else [0.25] * 4, atol=1e-6)


def test_greedy_takes_the_first_best():
  logits = jnp.asarray([[0.0, 5.0, 5.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
  for seed in range(5):
    positions = jnp.asarray([seed, 7], jnp.int32)
    assert jitted_sample(logits, options([(0.0, 2, 0.5, seed)] * 2), positions).tolist() == [1, 0]


@pytest.mark.parametrize('case', [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.8), (1.0, 6, 0.9)], ids=str)
@pytest.mark.parametrize('over', ['seeds', 'positions'])
def test_draws_follow_the_law(case, over):
  rows = 4000
  logits = np.random.default_rng(1).normal(0, 1.5, V).astype(np.float32)
  numbers = np.arange(rows)
  same = np.full(rows, 3)
  seeds, positions = (numbers, same) if over == 'seeds' else (same, numbers)
  sampling = options([(*case, seed) for seed in seeds])
  drawn = jitted_sample(jnp.broadcast_to(jnp.asarray(logits), (rows, V)), sampling, jnp.asarray(positions, jnp.int32))
  counts, p = np.bincount(drawn, minlength=V), law64(logits, *case)
  assert (counts[p == 0] == 0).all(), 'a token that is ruled out was drawn'
  assert scipy.stats.chisquare(counts[p > 0], rows * p[p > 0]).pvalue > 1e-4


def test_a_draw_depends_on_its_own_row_only():
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(5, V)), jnp.float32)
  rows = [(1.0, 0, 1.0, 7), (0.8, 4, 0.9, 8), (0.0, 0, 1.0, 9), (2.0, 0, 0.5, 10), (1.0, 3, 1.0, 11)]
  positions = jnp.asarray([4, 9, 2, 7, 1], jnp.int32)
  together = jitted_sample(logits, options(rows), positions)
  for i in range(5):
    assert jitted_sample(logits[i:i + 1], options(rows[i:i + 1]), positions[i:i + 1])[0] == together[i]


@pytest.mark.parametrize('arguments, words', [
    ((-0.1, 0, 1.0, 0), r'temperature=-0.1 must be 0 \(greedy\) or positive'),
    ((float('nan'), 0, 1.0, 0), 'temperature=nan'),
    ((float('inf'), 0, 1.0, 0), 'temperature=inf'),
    ((1.0, -1, 1.0, 0), r'top_k=-1 must be 0'),
    ((1.0, 0, 0.0, 0), r'top_p=0.0 must be above 0 and at most 1'),
    ((1.0, 0, 1.5, 0), r'top_p=1.5'),
    ((1.0, 0, 1.0, -1), r'seed=-1 must be in \[0, 2\*\*32\)'),
    ((1.0, 0, 1.0, 2**32), r'seed=4294967296'),
])
def test_options_that_make_no_sense_raise(arguments, words):
  with pytest.raises(ValueError, match=words):
    make_sampling(2, *arguments)


def test_rows_have_seeds_of_their_own():
  assert make_sampling(3, 1.0, 0, 1.0, 2**32 - 2).seed.tolist() == [2**32 - 2, 2**32 - 1, 0]
