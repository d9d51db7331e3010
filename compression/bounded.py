"""How much smaller can a model be within a bound? As much, by bisection on rows of calibration, as
keeps it there, and on texts that were held out, too.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compression.judge import divergence
from data.batch import Batch
from model.config import ModelConfig
from model.logprobs import logprobs
from model.vocabulary import TOKENS, Law
from parallel import axes as ax


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
    """A cost in words, and whether it holds; one that is no number never does."""
    if math.isnan(cost):
      return f'{self.name} is NaN, no number: too much'
    holds = 'holds' if cost <= self.most else 'too much'
    if self.name == 'kl':
      return f'KL {cost:.4f} of {self.most:g} nats a token: {holds}'
    return f'perplexity {cost:+.2%} of {self.most:+.2%}: {holds}'


def take_options(made: argparse.ArgumentParser, what: str) -> None:
  """What a command takes that searches within a bound; what: is searched."""
  made.add_argument(
    '--max_kl',
    default='',
    help=f'in the place of --scheme: {what} is searched, the most that keeps KL to the original '
    'within this, in nats a token',
  )
  made.add_argument(
    '--max_perplexity_increase', default='', help='the same of the perplexity, as 2%%'
  )


def from_options(options) -> QualityBound | None:
  """Of a command line's options."""
  return QualityBound.parse(options.max_kl, options.max_perplexity_increase)


def check(config: ModelConfig) -> None:
  """Raises NotImplementedError for a model whose cost is not that of the next token."""
  if config.encoder_layers or not config.causal:
    raise NotImplementedError(
      f'--max_kl and --max_perplexity_increase with model.encoder_layers={config.encoder_layers}, '
      f'model.causal={config.causal}: a bound is met on texts that are read from left to right, as '
      'by a decoder; give --scheme'
    )


def search(
  make: Callable[[int], Any],
  costs: Sequence[Callable[[Any], float]],
  bound: QualityBound,
  count: int,
  said: Callable[[int], str],
  log: Callable[[str], Any],
) -> tuple[int, Any]:
  """(number, what was made of it): the largest number, of 1 to `count`, whose costs hold; larger
  ones cost more. said: of a number, what is made of it.

  costs: of calibration, by which it is searched, and of held-out texts, by which what was found is
    judged; where that is too much, less is searched by both.
  Raises ValueError where none holds; it says where a cost was no number.
  """
  not_numbers: list[int] = []  # numbers whose cost was none
  places = 'calibration', 'held-out texts'

  def holds(made, number, which):
    cost = costs[which](made)
    log(f'{said(number)}: {bound.said(cost)}, on {places[which]}')
    if math.isnan(cost):
      not_numbers.append(number)
    return cost <= bound.most

  def largest(below, checks):
    """The largest number below one that holds, 0 for none, and what was made of it."""
    low, best = 0, None
    while below - low > 1:
      middle = (low + below) // 2
      made = make(middle)
      if all(holds(made, middle, which) for which in checks):
        low, best = middle, made
      else:
        below = middle
    return low, best

  found, made = largest(count + 1, [0])
  if found and not holds(made, found, 1):
    found, made = largest(found, [0, 1])
  if not found:
    reason = (
      f'; of {said(min(not_numbers))} it is NaN: look at the run itself' if not_numbers else ''
    )
    raise ValueError(
      f'nothing that was tried, from {said(1)} on, keeps {bound.name} within {bound.most:g}'
      f'{reason}; allow more, or use a method that costs less'
    )
  return found, made


def cost_on(original, batches: Sequence[Batch], bound: QualityBound, vocabulary: int):
  """A function of a smaller model: what it costs on these rows, by what the bound is of; NaN where
  a model gives NaN.

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
      return (divergence(*laws, weights) * weights).sum(), weights.sum()
    before, after = (-logprobs(one, targets, weights) for one in laws)
    return ((after - before) * weights).sum(), weights.sum()

  run = jax.jit(sums)

  def cost(smaller) -> float:
    total = np.sum([jax.device_get(run(original, smaller, batch)) for batch in batches], axis=0)
    mean = np.float64(total[0]) / total[1]
    return float(mean if bound.name == 'kl' else np.expm1(mean))

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
