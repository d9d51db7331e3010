"""What lies in the host's memory between steps?
Arrays that are moved to the device where they are needed, and back.

Inside jit a move is part of the program: the compiler starts it ahead of what needs it and goes on
meanwhile (ZeRO-Offload, Ren et al., arXiv:2101.06840). What is stacked by layers is moved a layer
at a time, in loops: the gradient of a move to the device is one to the host, so gradients of
parameters that lie there arrive there as the backward loop finds them.
"""

import jax
import jax.numpy as jnp

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def is_on_host(x) -> bool:
  """Whether an array, traced or abstract, lies in the host's memory."""
  return jax.typeof(x).memory_space == _HOST


def to_host(tree):
  """The arrays of a tree in the host's memory, each shard beside its device; scalars stay."""
  return jax.tree.map(lambda x: jax.device_put(x, _HOST) if x.ndim else x, tree)


def to_device(tree):
  """The arrays of a tree in the devices' memory, sharded as they were."""
  return jax.tree.map(lambda x: jax.device_put(x, _DEVICE) if is_on_host(x) else x, tree)


def back(tree, like):
  """The arrays of a tree where those of `like` lie."""
  return jax.tree.map(lambda x, y: jax.device_put(x, _HOST) if is_on_host(y) else x, tree, like)


def sum_by_layer(function, x: jax.Array) -> jax.Array:
  """function(x), which is a sum over elements to a scalar f32;
  of x [L, ...] in the host's memory as the sum over its layers.
  """
  if not is_on_host(x):
    return function(x)
  total, _ = jax.lax.scan(
    lambda total, layer: (total + function(to_device(layer)), None), jnp.float32(0), x
  )
  return total
