"""Which other runs of a config are worth compiling?
Meshes, remat policies and microbatches, and the flags that ask for them.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator

from parallel import compiler, remat
from parallel.mesh import AXES, MeshConfig
from training.config import Config

# Remat policies, in order of how little they keep.
KEEPS = {'none': 0, 'dots': 1, 'full': 2, 'sqrt': 3}
# Of an axis that cuts layers into pieces; beyond it communication dominates or heads run out
LARGEST = 8


# What `change` changes, and `flags` names.
PATHS = (
  'model.execution.remat',
  'train.accumulation',
  'optimizer.name',
  'train.offload_optimizer',
  'train.compiler',
  *(f'mesh.{axis}' for axis in AXES),
)


def change(
  config: Config,
  mesh: dict[str, int] | None = None,
  policy: str = '',
  accumulation: int = 0,
  optimizer: str = '',
  offload: str = '',
  compiler: str = '',
) -> Config:
  """The config with another mesh, remat policy, number of microbatches, optimizer, place of its
  state, or table of compiler options. Raises as Config does.
  """
  train = {
    'accumulation': accumulation or config.train.accumulation,
    'offload_optimizer': offload or config.train.offload_optimizer,
    'compiler': (compiler,) if compiler else config.train.compiler,
  }
  name = optimizer or config.optimizer.name
  return dataclasses.replace(
    config,
    model=config.model.with_execution(remat=policy or config.model.execution.remat),
    train=dataclasses.replace(config.train, **train),
    optimizer=dataclasses.replace(config.optimizer, name=name),
    mesh=dataclasses.replace(config.mesh, **(mesh or {})),
  )


def flags(old: Config, new: Config) -> str:
  """The flags that turn `old` into `new`, as far as `change` changes it."""
  changed = []
  for path in PATHS:
    value = operator.attrgetter(path)(new)
    if value != operator.attrgetter(path)(old):
      said = ','.join(value) if isinstance(value, tuple) else value
      changed.append(f'--config.{path}={said}')
  return ' '.join(changed)


def refused(config: Config, sizes: dict[str, int]) -> str:
  """Why a config cannot run on a mesh of these sizes, or ''."""
  try:
    MeshConfig(**sizes)
    config.check_mesh(sizes)
  except (ValueError, NotImplementedError) as error:
    return str(error)
  return ''


def policies(config: Config) -> list[str]:
  """Remat policies that the config could have, those that keep most first;
  one that is not in KEEPS counts as in the middle.
  """

  def possible(name):
    try:
      return bool(change(config, policy=name))
    except ValueError:  # a policy that excludes the names that the config keeps
      return False

  return sorted(filter(possible, remat.POLICIES), key=lambda name: KEEPS.get(name, 1))


def meshes(config: Config, devices: int, slices: int = 1) -> Iterator[dict[str, int]]:
  """Sizes of the axes: `data` as small as the slices allow or all that fsdp leaves, `fsdp` the
  rest, other axes in powers of two up to LARGEST together: `tensor`, `expert` for experts,
  `context` for fewer rows than devices, and what the config uses already. Those that the config's
  sizes do not divide into are left out.
  """
  useful = {
    'tensor': True,
    'expert': bool(config.model.E),
    'context': config.data.batch_size < devices,
  }
  cutting = [
    axis
    for axis in AXES
    if axis not in ('data', 'fsdp') and (useful.get(axis) or getattr(config.mesh, axis) != 1)
  ]
  powers = [1 << n for n in range(LARGEST.bit_length())]
  for sizes in itertools.product(powers, repeat=len(cutting)):
    cut = math.prod(sizes)
    if cut > LARGEST or devices % (cut * slices):
      continue
    rest = devices // cut
    for data in sorted({slices, rest, *(d for d in (2 * slices, 4 * slices) if rest % d == 0)}):
      mesh = dict.fromkeys(AXES, 1) | dict(zip(cutting, sizes))
      mesh |= {'data': data, 'fsdp': rest // data}
      if not refused(config, mesh):
        yield mesh


def compilers(config: Config, device_kind: str) -> list[str]:
  """Tables of compiler options that the config could be compiled with besides its own, on devices
  of this kind; none where it changes options by name, which are meant.
  """
  if any('=' in entry for entry in config.train.compiler):
    return []
  sizes, tried, possible = config.mesh.sizes(), [], []
  for table in (*config.train.compiler[:1], compiler.NONE, *compiler.TABLES):
    try:
      made = compiler.chosen((table,), device_kind, sizes)
    except ValueError:  # of other chips
      continue
    if made.options not in tried:
      tried.append(made.options)
      possible.append(table)
  return possible[1:]


def microbatches(config: Config, sizes: dict[str, int]) -> list[int]:
  """Numbers of microbatches above the config's, doubling, as long as each splits over the mesh."""
  possible, n = [], 2 * config.train.accumulation
  while config.data.batch_size % n == 0:
    try:
      if refused(change(config, accumulation=n), sizes):
        break
    except ValueError:
      break
    possible.append(n)
    n *= 2
  return possible


def nearest(
  config: Config, sizes: dict[str, int], devices: int, slices: int = 1
) -> Iterator[Config]:
  """Changes that may need less memory, the nearest first: a remat policy, that with more
  microbatches; with these, a smaller optimizer state or one in the host's memory; that with another
  mesh.
  """
  stronger = policies(config)
  stronger = stronger[stronger.index(config.model.execution.remat) + 1 :]
  yield from (change(config, policy=name) for name in stronger)
  least = change(config, policy=stronger[-1]) if stronger else config
  yield from (change(least, accumulation=n) for n in microbatches(least, sizes))

  most = change(least, accumulation=max(microbatches(least, sizes), default=0))
  smaller = {'optimizer': 'adam8bit'} if config.optimizer.name == 'adamw' else {}
  elsewhere = {} if config.train.offload_optimizer else {'offload': 'host'}
  yield from (change(most, **fields) for fields in (smaller, elsewhere) if fields)

  def moved(mesh):
    return sum(mesh[axis] != sizes[axis] for axis in AXES)

  # More shards, not fewer.
  others = [
    mesh
    for mesh in meshes(config, devices, slices)
    if moved(mesh) and mesh['data'] <= sizes['data']
  ]
  for mesh in sorted(others, key=lambda mesh: (moved(mesh), mesh['data'])):
    yield from (change(least, mesh, accumulation=n) for n in (0, *microbatches(least, mesh)[-1:]))
