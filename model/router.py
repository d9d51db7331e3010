"""What do layers with experts report, all of them together?"""

import jax
import jax.numpy as jnp


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
