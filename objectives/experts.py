"""What keeps the experts of a model balanced, whatever it learns, and what is said of them? A term
of its own: routers add up over all tokens that they route, and are divided by these, however few of
them are learned from (Fedus et al., arXiv:2101.03961, equation 4).
"""

import jax.numpy as jnp
from jaxtyping import Array

from model.config import ModelConfig
from objectives.objective import Sums, or_one

EXPERTS = 'experts'
LOSSES = 'balance_loss', 'router_z_loss'


def balance(router: dict | None) -> Array:
  """What balances experts, a sum over tokens, of what routers report (model/moe.py); 0 without
  any.
  """
  return jnp.float32(0) if router is None else sum(router[name] for name in LOSSES)


def check_apart(config: ModelConfig) -> None:
  """Raises NotImplementedError where a few tokens are learned from, and the schedule adds what
  balances experts to their loss.
  """
  moe = config.moe
  weighed = moe.experts and (moe.balance_loss or moe.z_loss)
  if weighed and config.execution.pipeline.schedule == '1f1b':
    raise NotImplementedError(
      "model.execution.pipeline.schedule='1f1b' knows one loss, and what balances experts "
      f'(model.moe.balance_loss={moe.balance_loss}, z_loss={moe.z_loss}) is of all tokens, not of '
      "the learned ones alone; use 'gpipe' or 'circular'"
    )


def routed(tokens: Array) -> Array:
  """The weight of the term, of a batch of so many tokens without padding."""
  return tokens.astype(jnp.float32)


def router_metrics(sums: Sums, tokens: Array) -> dict[str, Array]:
  """Of a model with experts, {} without: `expert_load` [E], 1 where an expert has its share, of all
  layers together; `expert_load_max`, of the busiest expert of all layers; `dropped`, the share of
  choices that found no room; the two losses, per token. tokens: the weight of the term.
  """
  if 'load' not in sums:
    return {}
  load, E = sums['load'], sums['load'].shape[1]
  shares = load / jnp.maximum(load.sum(1, keepdims=True), 1) * E
  return {
    'expert_load': shares.mean(0),
    'expert_load_max': shares.max(),
    'dropped': sums['dropped'].sum() / jnp.maximum(load.sum(), 1),
    **{name: sums[name] / or_one(tokens) for name in LOSSES},
  }
