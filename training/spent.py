"""How much does training compute for a token? What its models need; what is computed anew (remat)
is not in it.
"""

import jax

from model import flops, params
from training import state as states
from training.config import Config

WHOLE = 3.0  # passes: forward, the gradient by what goes in, the gradient by the weights


def flops_per_token(config: Config, document_length: float | None = None) -> float:
  """FLOPs of training for a token of a batch: of every model a forward pass for each time that the
  objective reads it, and backward what is needed for the parameters that are trained, its own or
  those of an adapter on it.

  document_length: mean tokens of a document, where that is known (model/flops.py).
  """
  objective, total = config.objective, 0.0
  for name, role in states.roles(config).items():
    if role.adapter or role.made:
      # Soft tokens are looked up, and multiplied with nothing.
      soft = role.adapter and config.adapter.soft
      total += 0 if soft else 2 * WHOLE * sum(_multiplied(config, name).values())
      continue
    if name in objective.aside:  # a critic, which scores no vocabulary
      length = config.data.sequence_length
      forward = flops.forward_flops_per_token(role.config, length, document_length)
      forward -= 2 * role.config.D * role.config.V
    else:
      forward = objective.forward_flops(role.config, config.data, document_length)
    total += _passes(config, name, role) * forward
  return total


def _passes(config: Config, name: str, role: states.Role) -> float:
  objective = config.objective
  frozen, main = objective.frozen_passes, name == objective.main
  if role.trained:
    passes = _of_trained(config, name)
  else:
    passes = 2.0 if main and config.adapter.kind else frozen
  if main:
    passes += frozen * len(states.references(config)) + objective.main_passes
  elif name in objective.aside:
    passes += frozen  # what it says of a rollout, before it learns
  return passes


def _of_trained(config: Config, name: str) -> float:
  """Passes of a model of which only some parameters may be trained: a gradient by weights is
  computed of these alone, and one by what goes in where layers, or what is below them, learn.
  """
  rule = states.rule(config)
  if rule.everything:
    return WHOLE
  sizes = _multiplied(config, name)
  trained = [leaf for leaf in sizes if rule.trains(f'{name}.{leaf}')]
  if not trained:
    return 1.0
  below = any(not leaf.startswith('head.') for leaf in trained)
  return 1.0 + below + sum(sizes[leaf] for leaf in trained) / sum(sizes.values())


def _multiplied(config: Config, name: str) -> dict[str, float]:
  """Of each parameter how many numbers a token is multiplied with: of experts, of those that it
  goes to, and of tables that are looked up in none.
  """
  model = states.roles(config)[name].config
  moe = model.moe
  leaves = params.named_leaves(jax.eval_shape(lambda: states.new_model(config, name)))

  def share(leaf, x):
    if leaf.startswith('embedding.') and not (model.tie_embeddings and '.tokens' in leaf):
      return 0.0
    routed = moe.experts and '.feed_forward.' in leaf and moe.experts in x.shape[1:2]
    return moe.per_token / moe.experts if routed else 1.0

  return {leaf: x.size * share(leaf, x) for leaf, x in leaves.items()}
