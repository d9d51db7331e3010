"""Which devices form the mesh? The only place that builds one.

Six axes, always all six, in this order: `data` (replicas), `fsdp` (replicas that share parameters), `stage`, `expert`,
`context`, `tensor`. An axis that is not used has size 1, so that a spec never has to ask which axes exist.
"""
import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ('data', 'fsdp', 'stage', 'expert', 'context', 'tensor')
NO_MESH = Mesh(np.empty((), object), ())  # in context, arrays of single devices can be worked on one by one
UNSUPPORTED = ('stage', 'expert', 'context')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1: it takes the devices that are left.

  Raises ValueError for a size below 1 (except one -1) and NotImplementedError for a split along an axis that no module
  honours yet.
  """
  data: int = -1
  fsdp: int = 1
  stage: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1

  def __post_init__(self):
    sizes = self.sizes()
    for axis, size in sizes.items():
      if size < 1 and size != -1:
        raise ValueError(f'mesh.{axis}={size} is not a size; give 1 or more, or -1 on one axis for the devices left')
    if sum(size == -1 for size in sizes.values()) > 1:
      raise ValueError(f'mesh has -1 on {[a for a in AXES if sizes[a] == -1]}; only one axis can take what is left')
    for axis in UNSUPPORTED:
      if sizes[axis] != 1:
        raise NotImplementedError(f'mesh.{axis}={sizes[axis]}: nothing is split over {axis!r} yet, so the only size is 1; '
                                  'use data, fsdp or tensor')

  def sizes(self) -> dict[str, int]:
    """Axis name -> size as configured (may hold one -1)."""
    return {axis: getattr(self, axis) for axis in AXES}

  def resolve(self, devices: int) -> dict[str, int]:
    """Axis name -> size on `devices` devices. Raises ValueError when the product does not fit."""
    sizes = self.sizes()
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 not in sizes.values():
      if known != devices:
        raise ValueError(f'mesh {sizes} needs {known} devices, {devices} are here; set one axis to -1 to take what is left')
      return sizes
    if devices % known:
      raise ValueError(f'mesh {sizes} cannot divide {devices} devices: the fixed axes take {known}, which does not divide '
                       f'{devices}; change one of them')
    return {axis: devices // known if size == -1 else size for axis, size in sizes.items()}


def make_mesh(config: MeshConfig, devices=None, axis_type: AxisType = AxisType.Explicit) -> Mesh:
  """The six-axis mesh over `devices` (default: all), which may be those of a topology that is only compiled for.

  Neighbours in the mesh are neighbours in a TPU's torus. Of several slices `data` crosses them: each holds a part of the replicas.
  Raises ValueError where data does not divide into the slices. `axis_type=Auto` is for the compile-time twin in tests only.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = config.resolve(len(devices))
  return Mesh(_arranged(sizes, devices), AXES, axis_types=(axis_type,) * len(AXES))


def _arranged(sizes: dict[str, int], devices: list) -> np.ndarray:
  """Devices in the shape of the mesh. Links are known of whole TPU topologies only; other devices stay in their order."""
  shape, first = tuple(sizes.values()), devices[0]
  if first.platform != 'tpu' or len(devices) < len(first.client.devices()):
    return np.asarray(devices).reshape(shape)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  if sizes['data'] % slices:
    raise ValueError(f'mesh.data={sizes["data"]} does not divide into {slices} slices, which only `data` crosses; make it a multiple of '
                     f'{slices}')
  within = tuple((sizes | {'data': sizes['data'] // slices}).values())
  across = tuple(slices if axis == 'data' else 1 for axis in AXES)
  return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
