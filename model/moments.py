"""How likely is a token beside the others that a law has in its place? Its log-probability with the
mean and the standard deviation that those of the law have, of tokens drawn from it.

As in model.logprobs [B, T, V] never is: a second pass over the vocabulary adds up squares of what
is left of the mean, which does not cancel as the mean of squares less that of the mean would.

B batch · T length · V vocabulary
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model import vocabulary as passes
from model.vocabulary import CHUNK, TOKENS, Law


class Moments(NamedTuple):
  """Of every token, f32, in nats; 0 where weights are.

  Attributes:
    logprob: log p of the target. mean: sum p log p, minus the entropy. std: the root of
      sum p (log p - mean)^2.
  """

  logprob: Float[Array, 'B T']
  mean: Float[Array, 'B T']
  std: Float[Array, 'B T']


def moments(
  law: Law, targets: Int[Array, 'B T'], weights: Float[Array, 'B T'], *, chunk: int = CHUNK
) -> Moments:
  """Not differentiable. targets: ids that the law has. weights: where 0, nothing is scored."""

  def run(parts, arrays, place):
    weights, targets = arrays
    part = parts[0]
    seen = passes.statistics(part, targets, place.columns, True)

    def step(total, chunk):
      log_p = passes.tempered(part, passes.capped(part, chunk)) - seen.lse[..., None]
      exists = chunk['ids'][None, None] >= 0
      apart = jnp.where(exists, log_p + seen.entropy[..., None], 0)
      return total + (jnp.exp(log_p) * jnp.square(apart)).sum(-1), None

    zeros = jnp.zeros(weights.shape, jnp.float32)
    squares, _ = jax.lax.scan(step, zeros, part.chunks)
    std = jnp.sqrt(passes.sum_over(squares, place.columns))
    values = seen.picked - seen.lse, -seen.entropy, std
    return tuple(jnp.where(weights != 0, value, 0) for value in values)

  return Moments(*passes.on_devices(run, (law,), (weights, targets), (TOKENS,) * 3, chunk))
