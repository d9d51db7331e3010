"""Is a continuation's score that of its tokens in a forward pass over the whole text, whichever
pairs share a context or a batch; and is it told when a greedy model would write it?
"""

import jax
import numpy as np
import pytest

from decode import choices
from decode.choices import PairScore, room, score_pairs
from tests.evaluation.test_label_scores import SIZES, generator

LONG = [*range(10, 50)]
# Contexts that several share, short and long, of one continuation and of many, of 1 to 20 tokens.
PAIRS = [
  ([1, *LONG], [7]),
  ([1, *LONG], [8, 9, 10]),
  ([1], [*range(40, 60)]),
  ([1], [61, 62]),
  ([1, 5, 6], [7, 8]),
  ([1, *LONG[::-1]], [*range(5, 17)]),
  ([1, *LONG], [*range(30, 50)]),
  ([1, *LONG, 3], [4]),
  ([1, *LONG, 3], [5]),
]


def scored(name='llama', pairs=PAIRS, **sizes) -> list[PairScore]:
  return score_pairs(generator(name, **sizes), *zip(*pairs))


def logs(scores) -> np.ndarray:
  return np.array([each.logprob for each in scores])


def check_by_hand() -> None:
  """Generator.score's numbers, which are of the training forward pass."""
  for (context, ids), made in zip(PAIRS, scored(), strict=True):
    (every,) = generator('llama').score([[*context, *ids]])
    np.testing.assert_allclose(made.logprob, every[len(context) - 1 :].sum(), atol=3e-5)
    assert made.tokens == len(ids)


def test_scores_are_those_of_the_whole_text():
  check_by_hand()
  assert np.ptp(logs(scored())) > 1


@pytest.mark.slow
def test_company_and_order_change_rounding_only(monkeypatch):
  expected = logs(scored())
  np.testing.assert_allclose(logs(scored(pairs=PAIRS[::-1]))[::-1], expected, atol=2e-5)
  for i in (1, 5):
    np.testing.assert_allclose(logs(scored(pairs=PAIRS[i : i + 1])), expected[i], atol=2e-5)
  monkeypatch.setattr(choices, 'ROWS', 2)
  np.testing.assert_allclose(logs(scored()), expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('name', ['llama', 't5'])
def test_eight_devices_say_the_same(name):
  np.testing.assert_allclose(logs(scored(name, data=8)), logs(scored(name)), atol=3e-5)


@pytest.mark.slow
def test_three_devices_say_the_same_of_a_few_long_texts(monkeypatch):
  monkeypatch.setattr(choices, 'LONG', 8)
  pairs = [([1, *LONG[i:]], [7, i]) for i in range(5)]
  expected = logs(scored(pairs=pairs))
  np.testing.assert_allclose(logs(scored(pairs=pairs, data=3)), expected, atol=3e-5)


@pytest.mark.slow
def test_what_a_greedy_model_writes_is_told():
  g = generator('llama')
  prompts = [[1, *LONG], [1, *LONG], [1, 5]]
  written = [row.ids for row in g(prompts, max_new_tokens=4, temperature=0.0)]
  other = [*written[1][:2], (written[1][2] + 1) % 200]
  made = score_pairs(g, prompts, [written[0], other, written[2][:1]])
  assert [each.greedy for each in made] == [True, False, True]


@pytest.mark.slow
def test_a_stream_compiles_few_programs():
  """Of any number of pairs, whose lengths are anything up to the context."""
  rng = np.random.default_rng(0)
  contexts = [rng.integers(3, 200, rng.integers(1, 60)).tolist() for _ in range(96)]
  pairs = [(c, rng.integers(3, 200, rng.integers(1, 9)).tolist()) for c in contexts for _ in 'ab']
  before = choices._behind._cache_size() + choices._alone._cache_size()
  for first in range(0, len(pairs), 48):
    scored(pairs=pairs[first : first + 48])
  assert choices._behind._cache_size() + choices._alone._cache_size() - before <= 8


def test_what_has_no_room_or_no_tokens_is_said():
  g, long = generator('llama'), [1] * SIZES['max_length']
  assert room(g, 1) == len(long) and len(score_pairs(g, [long], [[5]])) == 1
  for contexts, continuations, said in (
    ([long], [[5, 6]], 'pair 0: 96 tokens and 2 behind them pass model.max_length=96'),
    ([[1], [1]], [[5], []], 'pair 1 has a continuation of no ids'),
    ([[1], [1]], [[5]], '2 contexts and 1 continuations'),
  ):
    with pytest.raises(ValueError, match=said):
      score_pairs(g, contexts, continuations)
  with pytest.raises(ValueError, match='an encoder writes nothing'):
    score_pairs(generator('bert'), [[1]], [[2]])


@pytest.mark.parametrize('fault', ['begins', 'lengths', 'counts'])
def test_planted_faults_are_found(monkeypatch, fault):
  """A token early, a context that is one shorter, a token that is not counted."""
  if fault == 'begins':
    alone = choices._alone
    early = jax.jit(
      lambda model, tokens, begins, *rest: alone(
        model, tokens, begins - 1, *rest, vocabulary=g.vocabulary
      )
    )
    g = generator('llama')
    monkeypatch.setattr(choices, '_alone', lambda *given, vocabulary: early(*given))
  else:
    laid = choices._laid

    def wrong(*given):
      pairs, tokens, lengths, at, targets, counts = laid(*given)
      shorter = np.maximum(lengths - (fault == 'lengths'), 1)
      return pairs, tokens, shorter, at, targets, np.maximum(counts - (fault == 'counts'), 0)

    monkeypatch.setattr(choices, '_laid', wrong)
  with pytest.raises(AssertionError):
    check_by_hand()
