"""Is what an encoder has to guess drawn as BERT's, and never a special token?"""

import functools

import numpy as np
import pytest

from data.chunks import ChunkTokens, uniform
from data.masking import Masking

TEXT = np.arange(4, 50)  # ids 0 to 3 are special
MASK, LENGTH = 50, 4000


def masking(**changes):
  settings = dict(masked=0.15, replaced=0.8, random=0.1) | changes
  return Masking(LENGTH, '', text=TEXT, mask=MASK, **settings)


def example(noise, seed=0, index=0):
  draw = np.random.default_rng(7)
  tokens = draw.integers(0, 50, LENGTH).astype(np.int32)
  chunk = ChunkTokens(tokens, np.arange(LENGTH), 1 + np.arange(LENGTH) // 100)
  batch = noise.empty(1)
  noise.fill(chunk, functools.partial(uniform, 0, seed, index), batch, 0)
  assert (batch.positions == chunk.positions).all() and (batch.segments == chunk.segments).all()
  return tokens, batch.tokens[0], batch.targets[0], batch.weights[0]


def near(count, share, of):
  """Within five standard deviations of a binomial's mean."""
  assert abs(count - share * of) <= 5 * (of * share * (1 - share)) ** 0.5, (count, share, of)


@pytest.mark.parametrize(
  'shares', [{}, {'masked': 0.5, 'replaced': 0.3, 'random': 0.6}, {'replaced': 1.0, 'random': 0.0}]
)
def test_shares_are_those_that_were_asked_for(shares):
  noise = masking(**shares)
  text = scored = masks = others = kept = 0
  drawn = np.zeros(50, int)
  for index in range(20):
    before, after, targets, weights = example(noise, index=index)
    guessed = weights == 1
    text += np.isin(before, TEXT).sum()
    scored += guessed.sum()
    masks += (after[guessed] == MASK).sum()
    same = after[guessed] == before[guessed]
    kept += same.sum()
    replaced = after[guessed][~same & (after[guessed] != MASK)]
    others += len(replaced)
    drawn += np.bincount(replaced, minlength=50)
  near(scored, noise.masked, text)
  near(masks, noise.replaced, scored)
  # A token that is drawn at random may be the one that was there.
  same = noise.random / len(TEXT)
  near(others, noise.random - same, scored)
  near(kept, 1 - noise.replaced - noise.random + same, scored)
  assert not drawn[:4].any()
  if others:
    assert (abs(drawn[4:] - others / len(TEXT)) <= 6 * (others / len(TEXT)) ** 0.5).all()


def test_only_what_is_scored_changes_and_special_tokens_never_are():
  before, after, targets, weights = example(masking(masked=1.0, replaced=0.5, random=0.5))
  assert set(weights.tolist()) == {0, 1}
  assert ((weights == 1) == np.isin(before, TEXT)).all()
  assert (after[weights == 0] == before[weights == 0]).all()
  assert (targets == np.where(weights == 1, before, 0)).all()
  before, after, targets, weights = example(masking())
  assert (after[weights == 0] == before[weights == 0]).all() and (before < 4).any()
  assert (targets[weights == 1] == before[weights == 1]).all()


def test_masks_are_drawn_anew_and_are_a_function_of_seed_and_place():
  first = example(masking(), 1, 2)
  assert all((a == b).all() for a, b in zip(first, example(masking(), 1, 2)))
  for other in (example(masking(), 1, 3), example(masking(), 2, 2)):
    assert (first[0] == other[0]).all() and (first[3] != other[3]).any()


def test_special_tokens_above_all_text_are_none():
  noise = Masking(8, '', 1.0, 0.8, 0.1, np.array([3, 4, 5]), 0)
  tokens = np.array([1, 3, 4, 7, 6, 3, 5, 9], np.int32)
  batch = noise.empty(1)
  chunk = ChunkTokens(tokens, np.arange(8), np.ones(8, np.int32))
  noise.fill(chunk, functools.partial(uniform, 0, 0, 0), batch, 0)
  assert (batch.weights[0] == [0, 1, 1, 0, 0, 1, 1, 0]).all()
  assert (batch.tokens[0][[0, 3, 4, 7]] == [1, 7, 6, 9]).all()
