"""What of an older checkpoint is read as something else? Names of leaves, and what was narrow."""

import re

import jax
import jax.numpy as jnp

from objectives.objective import MAIN
from parallel import offload

# What optimizers keep in f32, and once kept as narrow as parameters of bfloat16.
NARROW = re.compile(r'optimizer\..*(\.(squares|nu)\.|\.largest$)')


def name(now: str) -> str:
  """The name of a leaf in a checkpoint of a run that knew one model only, which had no name."""
  parts = now.split('.')
  if parts[:2] == ['models', MAIN]:
    return '.'.join(('model', *parts[2:]))
  if parts[0] == 'optimizer' and MAIN in parts:
    parts.remove(MAIN)
  return '.'.join(parts)


def narrow(wanted: dict, kept: dict) -> dict:
  """Of the abstract leaves that are wanted those that a checkpoint has as bfloat16, as it has them.

  kept: shape and type of its leaves, by name.
  """
  return {
    leaf: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding)
    for leaf, x in wanted.items()
    if NARROW.match(leaf)
    and x.dtype == jnp.float32
    and kept.get(leaf) == (tuple(x.shape), 'bfloat16')
  }


def widened(x: jax.Array, asked) -> jax.Array:
  """x in the type and at the place of `asked`, which is abstract."""
  return jax.device_put(offload.to_device(x).astype(asked.dtype), asked.sharding)
