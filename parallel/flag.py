"""Which mesh does a command line name?"""

import names
from parallel.mesh import AXES, MeshConfig


def mesh_of(text: str) -> MeshConfig:
  """The mesh that a flag names, as in data=2,tensor=4."""
  sizes = {'data': 1}
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    names.check('mesh axis', axis, AXES)
    if not size.lstrip('-').isdigit():
      raise ValueError(f'--mesh: {part!r} is no axis=size')
    sizes[axis] = int(size)
  return MeshConfig(**sizes)
