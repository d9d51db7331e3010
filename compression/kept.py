"""Where is a layer that is done, when its process was killed? In a file of its arrays, sealed by
their digest, beside a file that says of what work it is a part.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import files

KEY = 'work.json'


class Kept:
  """A directory of layers that are done.

  Args:
    work: what they depend on, JSON-able.
  Raises ValueError where the directory has layers of other work.
  """

  def __init__(self, directory: str | os.PathLike, work: dict):
    self._directory = pathlib.Path(directory)
    path, work = self._directory / KEY, json.loads(json.dumps(work))
    if path.exists():
      before = files.json_object(path.read_bytes(), path)
      names = sorted(before.keys() | work.keys())
      other = [name for name in names if before.get(name) != work.get(name)]
      if other:
        told = ', '.join(f'{name}={before.get(name)!r}' for name in other)
        raise ValueError(
          f'{self._directory} has layers of other work that was not finished ({told}); finish that '
          'by its own command, or remove the directory'
        )
    else:
      files.replace(path, json.dumps(work, indent=1) + '\n')

  def write(self, name: str, layer) -> None:
    """Arrays of a layer, on the host."""
    leaves = [np.ascontiguousarray(x) for x in jax.tree.leaves(layer)]
    body = b''.join(x.tobytes() for x in leaves)
    head = {
      'arrays': [[str(x.dtype), list(x.shape)] for x in leaves],
      'digest': hashlib.sha256(body).hexdigest(),
    }
    files.replace(self._path(name), json.dumps(head).encode() + b'\n' + body)

  def read(self, name: str, like, log: Callable[[str], Any]):
    """The layer, in the structure of `like`; None where it is not there, or damaged."""
    path = self._path(name)
    if not path.exists():
      return None
    head, _, body = path.read_bytes().partition(b'\n')
    leaves, structure = jax.tree.flatten(like)
    wanted = [[str(x.dtype), list(x.shape)] for x in leaves]
    try:
      said = json.loads(head)
    except ValueError:
      said = {}
    if said.get('arrays') != wanted or said.get('digest') != hashlib.sha256(body).hexdigest():
      log(f'NOTE: {path} is damaged; {name} is done again')
      return None
    arrays, at = [], 0
    for x in leaves:
      size = x.size * np.dtype(x.dtype).itemsize
      arrays.append(np.frombuffer(body[at : at + size], x.dtype).reshape(x.shape))
      at += size
    log(f'{name}: done before')
    return jax.tree.unflatten(structure, arrays)

  def remove(self) -> None:
    """When all is done."""
    shutil.rmtree(self._directory)

  def _path(self, name: str) -> pathlib.Path:
    return self._directory / f'{name.replace(" ", "-")}.layer'
