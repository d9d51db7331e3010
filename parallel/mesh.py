"""Which devices form the mesh? The only place that builds one.

Six axes, always all six, in this order: `data` (replicas), `fsdp` (replicas that share parameters),
`stage`, `expert`, `context`, `tensor`. An axis that is not used has size 1, so that a spec never
has to ask which axes exist.
"""

import collections
import dataclasses
import functools
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

import names

AXES = ('data', 'fsdp', 'stage', 'expert', 'context', 'tensor')
# In context, arrays of single devices can be worked on one by one.
NO_MESH = Mesh(np.empty((), object), ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1: it takes the devices that are left.

  Attributes:
    data: replicas. fsdp: replicas that share parameters, gradients and optimizer state.
    stage: of a pipeline of layers. expert: parts of the experts. context: parts of a row's tokens.
    tensor: parts of heads, feed-forward and vocabulary.
    zero: what `fsdp` splits while a step computes (ZeRO, arXiv:1910.02054, section 5): 1 the
      optimizer's state and the parameters it updates, 2 gradients too, 3 also the weights that
      layers compute with. Between steps all are split. With 3 a layer gathers its weights forward
      and again backward (in a pipeline, for every microbatch). With 2 they are gathered once a
      step, with 1 once a microbatch (train.accumulation), and are whole, in the compute dtype,
      while that lasts.

  Raises ValueError for a size below 1 (except one -1), and for another `zero`.
  """

  data: int = -1
  fsdp: int = 1
  stage: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1
  zero: int = 3

  def __post_init__(self):
    sizes = self.sizes()
    for axis, size in sizes.items():
      if size < 1 and size != -1:
        raise ValueError(
          f'mesh.{axis}={size} is not a size; give 1 or more, '
          'or -1 on one axis for the devices left'
        )
    if sum(size == -1 for size in sizes.values()) > 1:
      raise ValueError(
        f'mesh has -1 on {[a for a in AXES if sizes[a] == -1]}; only one axis can take what is '
        'left, give the others their size, as in --config.mesh.data=1'
      )
    if self.zero not in (1, 2, 3):
      raise ValueError(
        f'mesh.zero={self.zero} must be 1, 2 or 3; '
        'for copies of everything use mesh.data instead of mesh.fsdp'
      )

  def sizes(self) -> dict[str, int]:
    """Axis name -> size as configured (may hold one -1)."""
    return {axis: getattr(self, axis) for axis in AXES}

  def resolve(self, devices: int) -> dict[str, int]:
    """Axis name -> size on `devices` devices. Raises ValueError when the product does not fit."""
    sizes = self.sizes()
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 not in sizes.values():
      if known != devices:
        raise ValueError(
          f'mesh {sizes} needs {known} devices, {devices} are here; '
          'set one axis to -1 to take what is left'
        )
      return sizes
    if devices % known:
      raise ValueError(
        f'mesh {sizes} cannot divide {devices} devices: the fixed axes take {known}, which does '
        f'not divide {devices}; change one of them'
      )
    return {axis: devices // known if size == -1 else size for axis, size in sizes.items()}


def make_mesh(config: MeshConfig, devices=None, axis_type: AxisType = AxisType.Explicit) -> Mesh:
  """The six-axis mesh over `devices` (default: all; those of a topology description will do).

  Neighbours along an axis are neighbours in the network of a slice, the later axes first; `expert`,
  whose devices all send to all, is as square a part of a torus as there is (parallel.torus); slices
  are `data`'s or `stage`'s to cross. `axis_type=Auto` is for the twin that explicit axes are
  compared with (benchmarks/explicit.py). Raises ValueError where the sizes do not fit the devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = config.resolve(len(devices))
  across = _across_slices(sizes, devices)
  within = [size // across.get(axis, 1) for axis, size in sizes.items()]
  slices = [across.get(axis, 1) for axis in AXES]
  # All devices of `expert` send to all: through a box of a torus more passes than through a line.
  if sizes['expert'] > 2 and devices[0].platform == 'tpu':
    boxed = names.imported('parallel.torus.boxed')
    lay_out = functools.partial(boxed, laid_out, AXES.index('expert'))
  else:
    lay_out = laid_out
  return Mesh(lay_out(within, slices, devices), AXES, axis_types=(axis_type,) * len(AXES))


def laid_out(within: list[int], slices: list[int], devices) -> np.ndarray:
  """Devices in an array: along each axis as many as it has `within` a slice, for each of the slices
  that it crosses.
  """
  # Splitting a physical axis changes nothing for meshes that need no splitting,
  # and most others have no layout without it.
  if math.prod(slices) > 1:
    return mesh_utils.create_hybrid_device_mesh(
      within, slices, devices, allow_split_physical_axes=True
    )
  return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)


def _across_slices(sizes: dict[str, int], devices) -> dict[str, int]:
  """How many slices each axis crosses; empty where the devices need no grouping into slices.

  Raises ValueError for slices of unequal sizes, and for TPU slices
  that neither `data` nor `stage` nor both can cross.
  """
  counts = collections.Counter(getattr(device, 'slice_index', 0) for device in devices)
  slices = len(counts)
  if slices == 1:
    return {}
  if len(set(counts.values())) > 1:
    raise ValueError(
      f'slices hold different numbers of devices, {dict(sorted(counts.items()))} by index; '
      'give as many of each'
    )
  # `data` crosses as many as it can, `stage` the rest.
  data = math.gcd(sizes['data'], slices)
  if sizes['stage'] % (slices // data) == 0:
    return {'data': data, 'stage': slices // data}
  # To jax a node is a slice; the network between nodes carries any axis, the outermost first.
  if devices[0].platform != 'tpu':
    return {}
  raise ValueError(
    f'mesh.data={sizes["data"]} and mesh.stage={sizes["stage"]} do not divide over {slices} '
    f'slices, whose network only these two may cross; make one of them a multiple of {slices}'
  )


def platform() -> str:
  """What is compiled for: 'cpu', 'gpu' or 'tpu'; that of the mesh in context,
  which may lie on devices that are not here.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.abstract_device is None:
    name = jax.default_backend()
  else:
    name = mesh.abstract_device.platform
  return 'gpu' if name in ('cuda', 'rocm') else name
