"""Which mesh does a command line name?"""

import re

import names
from parallel.mesh import AXES, MeshConfig


def mesh_of(text: str) -> MeshConfig:
  """The mesh that a flag names, as in data=2,tensor=4."""
  sizes: dict[str, int] = {}
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    names.check('mesh axis', axis, AXES)
    if not re.fullmatch(r'-?\d+', size, re.ASCII):
      raise ValueError(f'--mesh: {part!r} is no axis=size')
    if axis in sizes:
      raise ValueError(f'--mesh={text}: {axis!r} is named twice; give it one size')
    sizes[axis] = int(size)
  return MeshConfig(**{'data': 1} | sizes)
