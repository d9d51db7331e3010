"""Can one tell from a model's scores whether it has read a text? Scores of texts that it has read
and of others, by how well they tell the two apart.

A score alone says nothing: easy text is likely whether it was read or not.
"""

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from data.tokenizer import Tokenizer
from decode.generator import Generator, scored_tokens
from evaluation import unpaired
from evaluation.intervals import Estimate
from evaluation.journal import JournalPart, nothing_kept
from evaluation.passages import Passage
from model.moments import moments

ROWS = 16  # texts that are scored together
SHARE = 20.0  # K, in per cent
FALSE = 0.05  # of the control, that may be taken for members
ALIKE = 1e-5  # nats: a law whose log-probabilities spread less has rounding left of them
LOSS, ZLIB = 'mean log-probability', 'log-probability per byte of zlib'
BLIND = 'zlib alone, without the model'  # tells the sides apart only where they are unlike


def min_k_name(share: float) -> str:
  """Of the score of a share, in per cent; with ++ behind it of what `TokenScores.standings` say."""
  return f'min-{share:g}%'


class TokenScores(NamedTuple):
  """Of a passage's tokens, those that training asks for, f64.

  Attributes:
    logprobs: log p of each. standings: the same less its mean over the law, by its standard
      deviation there: how likely the token is for a place in which all tokens are about as likely,
      or one is far ahead.
  """

  logprobs: np.ndarray
  standings: np.ndarray


def token_scores(model: Generator, passages: Sequence[Passage]) -> list[TokenScores]:
  """Of each, by the pass that training makes; at most ROWS passages.

  Raises FloatingPointError, naming the passage, where a log-probability is no finite number, and
  ValueError for a model that is no decoder.
  """
  front, config = model.plain, model.model.config
  if config.encoder_layers or not config.causal:
    raise ValueError('scores of texts are those of a decoder; this model has an encoder')
  # The last ones fill the batch up: its program is there already.
  whole = [front.whole(p.ids) for p in (*passages, *passages[-1:] * (ROWS - len(passages)))]
  whole += whole[-1:] * (-len(whole) % model.parts)
  tokens, _ = model.padded(whole)
  index = model.indices([front] * len(whole))
  with jax.set_mesh(model.mesh):
    index = None if index is None else model.put(index)
    found = scored_tokens(model.model, model.put(tokens), index, model.vocabulary, moments)
    found = jax.device_get(found)
  made = []
  for row, passage in enumerate(passages):
    first, end = (len(front.soft) + n - 1 for n in (passage.learned, len(passage.ids)))
    logprob, mean, std = (np.asarray(each[row, first:end], np.float64) for each in found)
    if not np.isfinite(logprob).all():
      raise FloatingPointError(
        f"{passage.place}: the model's scores are not finite; the checkpoint is broken: take "
        'another one (--checkpoint)'
      )
    made.append(TokenScores(logprob, standings(logprob, mean, std)))
  return made


def standings(logprob: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
  """(log p - mean) / std; 0 where a law has all tokens alike, which says nothing of one of them."""
  return np.where(std < ALIKE, 0.0, (logprob - mean) / np.maximum(std, ALIKE))


def min_k(scores: np.ndarray, share: float = SHARE) -> float:
  """Min-K% Prob (Shi et al. 2023, arXiv:2310.16789): the mean over the unlikeliest share of tokens,
  in per cent; one at least.
  """
  count = max(1, math.floor(len(scores) * share / 100))
  return float(np.sort(scores)[:count].mean())


def scores(
  tokens: Sequence[TokenScores], passages: Sequence[Passage], tokenizer: Tokenizer, share: float
) -> dict[str, np.ndarray]:
  """{name: of each passage}; higher means likelier read. Besides Min-K%: the same of standings
  (Min-K%++, Zhang et al. 2024, arXiv:2404.02936), the loss (Yeom et al. 2018, arXiv:1709.01604), by
  what zlib makes of the text (Carlini et al. 2021), and BLIND: what tells texts apart without the
  model is no memory of its.
  """
  texts = [tokenizer.decode_bytes(p.ids[p.learned :]) for p in passages]
  zipped = np.array([len(zlib.compress(text, 9)) for text in texts])
  return {
    min_k_name(share): np.array([min_k(each.logprobs, share) for each in tokens]),
    min_k_name(share) + '++': np.array([min_k(each.standings, share) for each in tokens]),
    LOSS: np.array([each.logprobs.mean() for each in tokens]),
    ZLIB: np.array([each.logprobs.sum() for each in tokens]) / zipped,
    BLIND: -zipped / np.array([max(len(text), 1) for text in texts]),
  }


def scored(
  model: Generator, passages: Sequence[Passage], share: float, kept: JournalPart | None = None
) -> dict[str, np.ndarray]:
  """`scores` of all passages, those of about the same length together; kept: of batches that were
  scored before, and for more.
  """
  kept = nothing_kept() if kept is None else kept
  order = sorted(range(len(passages)), key=lambda i: len(passages[i].ids))
  made: dict[str, np.ndarray] = {}
  for first in range(0, len(order), ROWS):
    here = order[first : first + ROWS]
    values = kept.values.get(first)
    if values is None:
      these = [passages[i] for i in here]
      found = scores(token_scores(model, these), these, model.tokenizer, share)
      values = {name: of.tolist() for name, of in found.items()}
      kept.add(first, values)
    for name, of in values.items():
      made.setdefault(name, np.zeros(len(passages)))[here] = of
  return made


def findings(
  members: dict[str, np.ndarray], control: dict[str, np.ndarray], seed: int
) -> dict[str, dict[str, Estimate]]:
  """{score: {'auc', 'caught': an estimate}}: how often a member has more than one of the control,
  and how many members are above all but FALSE of it.
  """
  return {
    name: {
      'auc': unpaired.compared(of, control[name], unpaired.auc, seed),
      'caught': unpaired.compared(of, control[name], unpaired.caught, seed),
    }
    for name, of in members.items()
  }
