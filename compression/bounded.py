"""How much can go within a bound? The largest share, by bisection on rows of calibration, that
keeps it there, and on texts that were held out, too.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import Batch
from model.logprobs import kl, logprobs
from model.vocabulary import TOKENS, Law
from parallel import axes as ax

STEP = 0.01  # shares are multiples of it
HIGHEST = 0.95


@dataclasses.dataclass(frozen=True)
class QualityBound:
  """Attributes:
  name: 'kl', in nats a token, or 'perplexity_increase', a share.
  most: what it may be.
  """

  name: str
  most: float

  @classmethod
  def parse(cls, most_kl: str, most_increase: str) -> 'QualityBound | None':
    """Of --max_kl=0.05 and --max_perplexity_increase=2%; None of neither.

    Raises ValueError for both, and for what is no number above 0.
    """
    if most_kl and most_increase:
      raise ValueError(
        f'--max_kl={most_kl} and --max_perplexity_increase={most_increase} are two bounds; give one'
      )
    flag, text = ('max_kl', most_kl) if most_kl else ('max_perplexity_increase', most_increase)
    if not text:
      return None
    try:
      most = float(text.rstrip('%')) / (100 if text.endswith('%') else 1)
    except ValueError:
      most = math.nan
    if not 0 < most < math.inf:
      raise ValueError(f'--{flag}={text} is a number above 0, as in 0.05 or 2%')
    return cls(flag.removeprefix('max_'), most)

  def said(self, cost: float) -> str:
    """A cost in words, and whether it holds."""
    holds = 'holds' if cost <= self.most else 'too much'
    if self.name == 'kl':
      return f'KL {cost:.4f} of {self.most:g} nats a token: {holds}'
    return f'perplexity {cost:+.2%} of {self.most:+.2%}: {holds}'


def search(
  make: Callable[[float], Any],
  costs: Sequence[Callable[[Any], float]],
  bound: QualityBound,
  log: Callable[[str], Any],
) -> tuple[float, Any]:
  """(share, what was made of it): the largest share of numbers to go whose costs hold.

  costs: of calibration, by which it is searched, and of held-out texts, by which what was found is
    judged; where that is too much, less is searched by both.
  Raises ValueError where no share holds.
  """
  places = 'calibration', 'held-out texts'

  def holds(made, share, which):
    cost = costs[which](made)
    log(f'{share:.2f} of the numbers: {bound.said(cost)}, on {places[which]}')
    return cost <= bound.most

  def largest(below, checks):
    """The largest multiple of STEP below one that holds, 0 for none, and what was made of it."""
    low, best = 0, None
    while below - low > 1:
      middle = (low + below) // 2
      made = make(middle * STEP)
      if all(holds(made, middle * STEP, which) for which in checks):
        low, best = middle, made
      else:
        below = middle
    return low, best

  found, made = largest(round(HIGHEST / STEP) + 1, [0])
  if found and not holds(made, found * STEP, 1):
    found, made = largest(found, [0, 1])
  if not found:
    raise ValueError(
      f'no share of numbers that go, from {STEP:.0%} on, keeps {bound.name} below {bound.most:g}; '
      'allow more, or use a method that costs less (sparsegpt)'
    )
  return found * STEP, made


def cost_on(original, batches: Sequence[Batch], bound: QualityBound, vocabulary: int):
  """A function of a smaller model: what it costs on these rows, by what the bound is of.

  vocabulary: ids below it are the tokenizer's.
  """

  def sums(original, smaller, batch):
    behind = ((0, 0), (0, 1))
    same = (batch.segments[:, :-1] == batch.segments[:, 1:]) & (batch.segments[:, 1:] > 0)
    weights = ax.place(jnp.pad(same, behind).astype(jnp.float32), *TOKENS)
    targets = ax.place(jnp.pad(batch.tokens[:, 1:], behind), *TOKENS)

    def law(model):
      x = model(*map(jnp.asarray, (batch.tokens, batch.positions, batch.segments))).hidden
      x = ax.place(x, *TOKENS, 'width')
      return Law(*model.scored(x), softcap=model.config.logit_softcap, vocabulary=vocabulary)

    laws = law(original), law(smaller)
    if bound.name == 'kl':
      return (kl(*laws, weights) * weights).sum(), weights.sum()
    before, after = (-logprobs(one, targets, weights) for one in laws)
    return ((after - before) * weights).sum(), weights.sum()

  run = jax.jit(sums)

  def cost(smaller) -> float:
    total = np.sum([jax.device_get(run(original, smaller, batch)) for batch in batches], axis=0)
    mean = float(total[0] / total[1])
    return max(0.0, mean) if bound.name == 'kl' else math.expm1(mean)

  return cost


def rows_of(encoded: Sequence[Sequence[int]], rows: int, length: int) -> list[Batch]:
  """Batches of one text a row, of so many tokens at most, as rows of calibration are."""
  made = []
  for first in range(0, len(encoded), rows):
    batch = Batch.empty(rows, length)
    for row, ids in enumerate(encoded[first : first + rows]):
      ids = list(ids)[:length]
      batch.tokens[row, : len(ids)], batch.segments[row, : len(ids)] = ids, 1
      batch.positions[row, : len(ids)] = np.arange(len(ids))
    made.append(batch)
  return made
