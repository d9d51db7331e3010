"""Does a mesh on the command line mean one thing, or nothing?"""

import pytest

from parallel.flag import mesh_of
from parallel.mesh import MeshConfig


def test_axes_are_named_once_with_a_whole_number():
  assert mesh_of('') == MeshConfig(data=1)
  assert mesh_of('data=-1,tensor=4') == MeshConfig(data=-1, tensor=4)
  for text, said in (
    ('data=--5', "--mesh: 'data=--5' is no axis=size"),
    ('data', "--mesh: 'data' is no axis=size"),
    ('data=1,data=2', "'data' is named twice"),
    ('tensr=2', "did you mean 'tensor'"),
  ):
    with pytest.raises(ValueError, match=said):
      mesh_of(text)
