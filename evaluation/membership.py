"""Can one tell from a model's scores whether it has read a text? Scores of texts that it has read
and of others, by how well they tell the two apart.

A score alone says nothing: easy text is likely whether it was read or not.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np

from data.tokenizer import Tokenizer
from decode.generator import Generator
from evaluation import unpaired
from evaluation.intervals import Estimate
from evaluation.passages import Passage

ROWS = 16  # texts that are scored together
SHARE = 20.0  # K, in per cent
FALSE = 0.05  # of the control, that may be taken for members
LOSS, ZLIB = 'mean log-probability', 'log-probability per byte of zlib'
BLIND = 'zlib alone, without the model'  # tells the sides apart only where they are unlike


def min_k_name(share: float) -> str:
  """Of the score of a share, in per cent."""
  return f'min-{share:g}%'


def token_logprobs(model: Generator, passages: Sequence[Passage]) -> list[np.ndarray]:
  """Of each, the log-probabilities of what training asks for, by the pass that training makes.

  Raises FloatingPointError, naming the passage, where one is no finite number.
  """
  order = sorted(range(len(passages)), key=lambda i: len(passages[i].ids))
  logprobs = [np.zeros(0)] * len(passages)
  for first in range(0, len(order), ROWS):
    here = order[first : first + ROWS]
    # The last ones fill the batch up: its program is there already.
    texts = [passages[i].ids for i in here] + [passages[here[-1]].ids] * (ROWS - len(here))
    for i, row in zip(here, model.score(texts)):
      logprobs[i] = np.asarray(row[passages[i].learned - 1 :], np.float64)
      if not np.isfinite(logprobs[i]).all():
        raise FloatingPointError(
          f"{passages[i].place}: the model's scores are not finite; the checkpoint is broken: take "
          'another one (--checkpoint)'
        )
  return logprobs


def min_k(logprobs: np.ndarray, share: float = SHARE) -> float:
  """Min-K% Prob (Shi et al. 2023, arXiv:2310.16789): the mean over the unlikeliest share of tokens,
  in per cent; one at least.
  """
  count = max(1, math.floor(len(logprobs) * share / 100))
  return float(np.sort(logprobs)[:count].mean())


def scores(
  logprobs: Sequence[np.ndarray], passages: Sequence[Passage], tokenizer: Tokenizer, share: float
) -> dict[str, np.ndarray]:
  """{name: of each passage}; higher means likelier read. Besides Min-K%: the loss (Yeom et al.
  2018, arXiv:1709.01604), by what zlib makes of the text (Carlini et al. 2021), and BLIND: what
  tells texts apart without the model is no memory of its.
  """
  texts = [tokenizer.decode_bytes(p.ids[p.learned :]) for p in passages]
  zipped = np.array([len(zlib.compress(text, 9)) for text in texts])
  return {
    min_k_name(share): np.array([min_k(each, share) for each in logprobs]),
    LOSS: np.array([each.mean() for each in logprobs]),
    ZLIB: np.array([each.sum() for each in logprobs]) / zipped,
    BLIND: -zipped / np.array([max(len(text), 1) for text in texts]),
  }


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
