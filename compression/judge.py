"""What did it cost to make a model smaller? Token by token of the same texts: how far the smaller
one's law is from the original's, whether both would write the same, and what each gives the text.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.logprobs import kl, likeliest, logprobs
from model.transformer import Decoder
from model.vocabulary import TOKENS, Law
from parallel import axes as ax


class Costs(NamedTuple):
  """Of every token but a text's first, 0 (or False) where there is none.

  Attributes:
    kl: KL(original || smaller) in nats; NaN where one of them gives what is no number.
    agrees: whether both have the same likeliest id.
    nats: (the original's, the smaller one's) -log p of the token that stands there.
  """

  kl: Float[Array, 'B T']
  agrees: Bool[Array, 'B T']
  nats: tuple[Float[Array, 'B T'], Float[Array, 'B T']]


def divergence(original: Law, smaller: Law, weights: Float[Array, 'B T']) -> Float[Array, 'B T']:
  """KL(original || smaller), at least 0; 0 where weights are, and NaN where a law has no numbers.

  Asked of the laws themselves: a CPU may sum the larger of NaN and 0 as 0.
  """
  apart = kl(original, smaller, weights)
  # Two sums of the same numbers in another order may come out a rounding below 0.
  apart = jnp.where(apart < 0, 0, apart)
  for law in (original, smaller):
    hidden, rows = (jnp.isfinite(x).all(-1) for x in (law.hidden, law.head))
    if law.vocabulary:
      rows |= jnp.arange(rows.shape[0]) >= law.vocabulary
    apart = jnp.where((hidden & rows.all()) | (weights == 0), apart, jnp.nan)
  return apart


def costs(
  original: Decoder,
  smaller: Decoder,
  tokens: Int[Array, 'B T'],
  lengths: Int[Array, 'B'],
  vocabulary: int,
) -> Costs:
  """Of texts, padded at the end. vocabulary: ids below it are the tokenizer's. Traced."""
  T = tokens.shape[1]
  targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
  weights = (jnp.arange(T)[None] < lengths[:, None] - 1).astype(jnp.float32)
  tokens, targets, weights = (ax.place(x, *TOKENS) for x in (tokens, targets, weights))

  def law(model):
    x = ax.place(model(tokens).hidden, *TOKENS, 'width')
    return Law(*model.scored(x), softcap=model.config.logit_softcap, vocabulary=vocabulary)

  laws = [law(model) for model in (original, smaller)]
  first, second = (likeliest(one, weights, 1)[0][..., 0] for one in laws)
  nats = tuple(-logprobs(one, targets, weights) for one in laws)
  return Costs(divergence(*laws, weights), (first == second) & (weights > 0), nats)
