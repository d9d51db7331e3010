"""What do layers with experts report, all of them together, and what does a step make of it?

L layers · E experts
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import names


def in_order(reports):
  """Results of a scan over periods, one tree a place of the period, as a list of one tree in the
  order of layers (or none).
  """

  def merge(*x):
    return jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]) if len(x) > 1 else x[0]

  return [jax.tree.map(merge, *reports)] if reports else []


def summed(reports):
  """What the layers with experts report: by layer, and losses summed over them."""
  by_layer = {name: jnp.concatenate([report[name] for report in reports]) for name in reports[0]}
  return {name: x.sum() if name.endswith('loss') else x for name, x in by_layer.items()}


def balanced(model, load: Float[Array, 'L E'], rate: float):
  """The model with the selection bias of every router moved towards experts with less than their
  share (moe.moved).

  load: choices that fell on each expert, of the layers with experts in order (Output.router).
  A bias that is None stays so: a frozen one is no part of what is trained.
  """
  moved = names.imported('model.moe.moved')
  model = jax.tree.map(lambda x: x, model)  # a copy, to be written to
  row = {
    layer: i for i, layer in enumerate(i for i, kind in enumerate(model.config.kinds) if kind.moe)
  }
  for block, (kind, layers) in zip(model.stack.blocks, model.config.places, strict=True):
    if kind.moe and (bias := block.feed_forward.selection_bias) is not None:
      of = load[np.array([row[layer] for layer in layers])]
      # Of layers that share a router, together.
      of = of.reshape(-1, model.config.shared_layers, of.shape[1]).sum(1)
      bias[...] = moved(bias[...], of, rate)
  return model
