"""Which token comes next? One law for plain generation and for whatever else draws tokens, every option traced per row.

The order is fixed: temperature, then top-k, then top-p, each on what the one before left.

B rows · V vocabulary
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """Options of each row; arrays, so that another value compiles nothing anew.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs and placeholders.

  Attributes:
    temperature: [B] f32, logits are divided by it; 0 is greedy.
    top_k: [B] int32, only the k most likely tokens; 0 keeps all.
    top_p: [B] f32, only the most likely tokens whose probabilities reach p, the one that reaches it included; 1 keeps all
      (nucleus sampling, Holtzman et al., arXiv:1904.09751).
    seed: [B] uint32, a row's draws depend on its seed and on the token's position, and on nothing else.
  """
  temperature: Any
  top_k: Any
  top_p: Any
  seed: Any


def make_sampling(rows: int, temperature: float, top_k: int, top_p: float, seed: int) -> Sampling:
  """The same options for every row, as numpy arrays; row i draws with seed + i. Raises ValueError for a value that makes no sense."""
  if not 0 <= temperature < float('inf'):
    raise ValueError(f'temperature={temperature} must be 0 (greedy) or positive')
  if top_k < 0:
    raise ValueError(f'top_k={top_k} must be 0 (all tokens) or positive')
  if not 0 < top_p <= 1:
    raise ValueError(f'top_p={top_p} must be above 0 and at most 1 (all tokens)')
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed={seed} must be in [0, 2**32)')
  full = lambda value, dtype: np.full(rows, value, dtype)
  seeds = ((seed + np.arange(rows)) % 2**32).astype(np.uint32)
  return Sampling(full(temperature, np.float32), full(top_k, np.int32), full(top_p, np.float32), seeds)


def law(logits: Float[Array, 'B V'], sampling: Sampling) -> Float[Array, 'B V']:
  """Log-probabilities, f32, of what `sample` draws from: -inf for tokens that are ruled out; one-hot where greedy."""
  V = logits.shape[-1]
  greedy = sampling.temperature[:, None] == 0
  logits = logits.astype(jnp.float32)
  best = jnp.where(jnp.arange(V)[None] == logits.argmax(-1, keepdims=True), 0.0, -jnp.inf)
  # From the best downwards, so that no temperature is too small to divide by.
  scaled = (logits - logits.max(-1, keepdims=True)) / jnp.where(greedy, 1.0, sampling.temperature[:, None])
  filtering = jnp.any(((sampling.top_k > 0) | (sampling.top_p < 1)) & (sampling.temperature > 0))
  kept = jax.lax.cond(filtering, lambda: _filtered(scaled, sampling), lambda: scaled)  # most callers need no sort
  return jnp.where(greedy, best, jax.nn.log_softmax(kept, -1))


def sample(logits: Float[Array, 'B V'], sampling: Sampling, positions: Int[Array, 'B']) -> Int[Array, 'B']:
  """A token of each row, drawn for the absolute position that it will have (the Gumbel-max way)."""
  keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(sampling.seed, positions)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys)
  return jnp.argmax(law(logits, sampling) + noise, -1).astype(jnp.int32)


def _filtered(scaled, sampling):
  """Logits with what top-k, then top-p rule out at -inf; ties at a border stay in."""
  V = scaled.shape[-1]
  ordered = -jnp.sort(-scaled, -1)
  k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)[:, None]
  ordered = jnp.where(jnp.arange(V)[None] < k, ordered, -jnp.inf)
  probabilities = jax.nn.softmax(ordered, -1)
  before = jnp.cumsum(probabilities, -1) - probabilities  # mass of the tokens that are likelier
  kept = jnp.where(before < sampling.top_p[:, None], ordered, jnp.inf)
  smallest = jnp.min(jnp.where(jnp.isneginf(kept), jnp.inf, kept), -1, keepdims=True)
  return jnp.where(scaled >= smallest, scaled, -jnp.inf)
