"""How far is a law from another one of which only a few ids are known? Both with all the other ids
as one, the rest: a divergence of these coarser laws, which is at most that of the whole ones, and 0
where they agree.

Renormalised without the rest, a student would not be told how much of its law belongs elsewhere.

B rows · T length · K ids of each token
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

LEAST = 1e-6  # that a rest counts for: less is a rounding error of what it is subtracted from


def kl(p: Float[Array, 'B T K'], q: Float[Array, 'B T K']) -> Float[Array, 'B T']:
  """KL(p || q) in nats, of log-probabilities of the same ids, and of the rest."""
  p, q = with_rest(p), with_rest(q)
  # As model.logprobs has it: the second term adds up to 0, and makes every share positive.
  return (jnp.exp(p) * (p - q) + jnp.exp(q) - jnp.exp(p)).sum(-1)


def jsd(p: Float[Array, 'B T K'], q: Float[Array, 'B T K'], beta: float) -> Float[Array, 'B T']:
  """Generalised Jensen-Shannon divergence, as model.logprobs.jsd, of the same."""
  p, q = with_rest(p), with_rest(q)
  m = jnp.logaddexp(p + math.log(beta), q + math.log1p(-beta))
  each = beta * jnp.exp(p) * (p - m) + (1 - beta) * jnp.exp(q) * (q - m)
  return each.sum(-1)


def with_rest(logs: Float[Array, 'B T K']) -> Float[Array, 'B T R']:
  """With the logarithm of what is left of 1 behind them."""
  rest = 1 - jnp.exp(logs).sum(-1, keepdims=True)
  return jnp.concatenate([logs, jnp.log(jnp.maximum(rest, LEAST))], -1)
