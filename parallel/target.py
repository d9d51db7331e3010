"""What device is compiled for, and is it the only one? Of the mesh in context, which may
lie on devices that are not here (parallel.mesh.platform says of which platform).
"""

import math

import jax


def kind() -> str:
  """As jax calls it: 'TPU v5 lite', 'NVIDIA H100 80GB HBM3'."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.abstract_device is None:
    return jax.devices()[0].device_kind
  return mesh.abstract_device.device_kind


def alone() -> bool:
  """Whether nothing is split: the mesh in context has one device, or there is none."""
  return math.prod(jax.sharding.get_abstract_mesh().shape.values() or [1]) == 1
