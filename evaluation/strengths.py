"""Which of several systems do people prefer, and how sure is that? By Bradley and Terry's law, with
ties as Davidson has them (1970): of systems with strengths s the first is preferred with
probability exp(s_i) / z, the second with exp(s_j) / z, and neither with t exp((s_i + s_j) / 2) / z.

M systems · C comparisons
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from evaluation.intervals import RESAMPLES, Estimate, percentiles

FIRST, SECOND, TIE = range(3)
PRIOR = 0.5  # of a win, that either side of every pair is given: so that no strength is infinite
STEPS = 100


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One judgement. document: what was judged; those of one are drawn together."""

  document: str
  first: str
  second: str
  outcome: int  # FIRST, SECOND or TIE


def counted(comparisons: Sequence[Comparison], systems: Sequence[str]) -> np.ndarray:
  """[M, M, 2]: how often which won against which, and was its equal (once in each half)."""
  place = {name: i for i, name in enumerate(systems)}
  counts = np.zeros((len(systems), len(systems), 2))
  for each in comparisons:
    i, j = place[each.first], place[each.second]
    if i == j:
      raise ValueError(f'{each.first} is compared with itself in {each.document}')
    if each.outcome == TIE:
      counts[i, j, 1] += 0.5
      counts[j, i, 1] += 0.5
    else:
      i, j = (i, j) if each.outcome == FIRST else (j, i)
      counts[i, j, 0] += 1
  return counts


def fitted(counts: Float[np.ndarray, 'M M 2'], prior: float = PRIOR) -> np.ndarray:
  """Strengths [M], natural logarithms with mean 0: the most likely ones, found by Newton's method
  of a likelihood that is concave.

  Raises ValueError where there is no finite maximum: with prior=0, for systems that always win, or
  that nothing compares.
  """
  M = len(counts)
  pairs = [(i, j) for i in range(M) for j in range(i) if counts[i, j].any() or counts[j, i].any()]
  ties = counts[..., 1].sum() > 0
  # Of each pair: what its three outcomes say of the strengths and of the logarithm of t.
  features, seen = np.zeros((len(pairs), 3, M + 1)), np.zeros((len(pairs), 3))
  for p, (i, j) in enumerate(pairs):
    features[p, FIRST, i] = features[p, SECOND, j] = 1
    features[p, TIE, [i, j, M]] = 0.5, 0.5, 1
    tied = counts[i, j, 1] + counts[j, i, 1]
    seen[p] = counts[i, j, 0] + prior, counts[j, i, 0] + prior, tied
  if not ties:
    features, seen = features[:, :2, :M], seen[:, :2]

  def likelihood(x):
    logits = features @ x
    law = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    return (seen * law).sum(), np.exp(law)

  # The mean of the strengths is free: held at 0 by what costs nothing there.
  gauge = np.zeros(features.shape[-1])
  gauge[:M] = 1
  x = np.zeros(features.shape[-1])
  value, law = likelihood(x)
  for _ in range(STEPS):
    total = seen.sum(1)
    mean = np.einsum('po,pof->pf', law, features)
    gradient = np.einsum('po,pof->f', seen - total[:, None] * law, features)
    centred = features - mean[:, None]
    curvature = np.einsum('p,po,pof,pog->fg', total, law, centred, centred) + np.outer(gauge, gauge)
    try:
      step = np.linalg.solve(curvature, gradient)
    except np.linalg.LinAlgError as error:
      raise ValueError(_endless(prior)) from error
    if np.abs(step).max() < 1e-10:
      return x[:M] - x[:M].mean()
    while True:
      moved, law_there = likelihood(x + step)
      if moved >= value - 1e-12 * abs(value):
        break
      step = step / 2
    x, value, law = x + step, moved, law_there
    if np.abs(x[:M]).max() > 30:
      break
  raise ValueError(_endless(prior))


def _endless(prior) -> str:
  return (
    f'these comparisons have no finite strengths (prior={prior}): a system wins or loses always, '
    'or nothing compares two parts of them; compare more, or give a prior of 0.5'
  )


def strengths(
  comparisons: Sequence[Comparison], seed: int = 0, resamples: int = RESAMPLES, prior: float = PRIOR
) -> dict[str, Estimate]:
  """Of each system by name, with the percentile interval of a bootstrap over documents.

  Raises ValueError for no comparisons, and as `fitted`.
  """
  if not comparisons:
    raise ValueError('there are no comparisons; rate some pairs')
  systems = sorted({name for each in comparisons for name in (each.first, each.second)})
  documents: dict[str, list[Comparison]] = {}
  for each in comparisons:
    documents.setdefault(each.document, []).append(each)
  each = np.stack([counted(of, systems) for of in documents.values()])
  said = fitted(each.sum(0), prior)
  draw = np.random.Generator(np.random.Philox(seed))
  n = len(each)
  # A pair that a resample has none of is told apart by nothing: the prior stands for it.
  drawn = np.stack(
    [fitted(_known(each[draw.integers(0, n, n)].sum(0), each), prior) for _ in range(resamples)]
  )
  return {
    name: Estimate(float(said[i]), *percentiles(drawn[:, i], n), n, 'bootstrap')
    for i, name in enumerate(systems)
  }


def _known(counts, each):
  """Counts with a trace of every pair that was compared at all."""
  counts = counts.copy()
  counts[..., 0] += 1e-9 * each.sum(0).any(-1)
  return counts
