"""What lies in the host's memory between steps? Arrays that are moved to the device where they are needed, and back.

Inside jit a move is part of the program: the compiler starts it ahead of what needs it and goes on meanwhile (ZeRO-Offload,
Ren et al., arXiv:2101.06840, keeps the optimizer's state there).
"""
import jax


def to_host(tree):
  """The arrays of a tree in the host's memory, each shard beside its device; scalars stay."""
  return _moved(tree, jax.memory.Space.Host)


def to_device(tree):
  """The arrays of a tree in the devices' memory, sharded as they were."""
  return _moved(tree, jax.memory.Space.Device)


def _moved(tree, space):
  return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, tree)
