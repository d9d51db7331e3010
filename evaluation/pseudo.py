"""Which of two sentences does an encoder find likelier? By their pseudo-log-likelihoods: each token
is masked, one at a time, and foretold by all others (Salazar et al. 2020, arXiv:1910.14659).

Of a pair only tokens count that both have (Nangia et al. 2020, arXiv:2010.00133): as many of
either, and what the two differ in is what these are asked beside, not how frequent a word it is.
"""

import difflib
from collections.abc import Sequence

import numpy as np

from data.template import mask_of
from decode.choices import masked_scores
from decode.loaded import LoadedModel


def shared(a: Sequence[int], b: Sequence[int]) -> tuple[list[int], list[int]]:
  """Places of the tokens that both have in one order, in either: the longest runs first, as
  CrowS-Pairs takes them.
  """
  blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
  at = [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]
  return [i for i, _ in at], [i for _, i in at]


def pair_scores(model: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[list[list[float]]]:
  """Of each pair and each of its texts, log p of every token that both have, masked by itself.

  Raises ValueError for a pair that has no token in common, and for a tokenizer without a mask.
  """
  mask, tokenizer = mask_of(model.tokenizer), model.tokenizer
  rows, targets, counts = [], [], []
  for pair in pairs:
    ids = [tokenizer.encode(text) for text in pair]
    places = shared(*ids)
    if not places[0]:
      raise ValueError(
        f'{pair[0][:60]!r} and {pair[1][:60]!r} have no token in common: an encoder compares '
        'sentences that differ in some words; ask it by Classification, or ask a decoder'
      )
    counts.append(len(places[0]))
    for own, at in zip(ids, places):
      for i in at:
        rows.append([tokenizer.bos, *own[:i], mask, *own[i + 1 :], tokenizer.eos])
        targets.append(own[i])
  scores = iter(masked_scores(model, rows, np.array(targets, np.int32)[:, None], mask)[:, 0])
  return [[[float(next(scores)) for _ in range(n)] for _ in range(2)] for n in counts]
