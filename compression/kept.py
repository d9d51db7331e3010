"""Where is a part of long work that is done, a layer or what some texts cost, when its process was
killed? In a file of its arrays, sealed by their digest, beside a file that says of what work it is.
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
  """A directory of parts that are done.

  Args:
    work: what they depend on, JSON-able.
    anew: who is told that parts of other work are removed, for work that is cheap enough to be
      begun anew; None: they are refused.
  Raises ValueError where the directory has parts of other work.
  """

  def __init__(
    self, directory: str | os.PathLike, work: dict, anew: Callable[[str], Any] | None = None
  ):
    self._directory = pathlib.Path(directory)
    path, work = self._directory / KEY, json.loads(json.dumps(work))
    try:
      self._check(path, work)
    except ValueError as error:
      if anew is None:
        raise ValueError(
          f'{error}; finish that by its own command, or remove the directory'
        ) from error
      anew(f'NOTE: {error}; it is removed, and all is done anew')
      self.remove()
    if not path.exists():
      files.replace(path, json.dumps(work, indent=1) + '\n')

  def _check(self, path: pathlib.Path, work: dict) -> None:
    if not path.exists():
      return
    before = files.json_object(path.read_bytes(), path)
    names = sorted(before.keys() | work.keys())
    if other := [name for name in names if before.get(name) != work.get(name)]:
      told = ', '.join(f'{name}={before.get(name)!r}' for name in other)
      raise ValueError(f'{self._directory} has parts of other work that was not finished ({told})')

  def write(self, name: str, part) -> None:
    """Arrays of a part, on the host."""
    leaves = [np.ascontiguousarray(x) for x in jax.tree.leaves(part)]
    body = b''.join(x.tobytes() for x in leaves)
    head = {
      'arrays': [[str(x.dtype), list(x.shape)] for x in leaves],
      'digest': hashlib.sha256(body).hexdigest(),
    }
    files.replace(self._path(name), json.dumps(head).encode() + b'\n' + body)

  def read(self, name: str, like, log: Callable[[str], Any]):
    """The part, in the structure of `like`; None where it is not there, or damaged."""
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
    return self._directory / f'{name.replace(" ", "-")}.part'
