"""How does a run become a smaller one? Its checkpoint's matrices in codes, in a run of its own;
what it was made of stays as it is.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from compression.quantise import quantised
from model import checkpoint, params, transformer
from model.weights import read
from workdir.adapted import copied
from workdir.checkpoint import Checkpoints
from workdir.open import check_own, config_of, step_of
from workdir.untrained import write_run


def quantise(
  workdir: str | os.PathLike,
  to: str | os.PathLike,
  entries: Sequence[str],
  method: str,
  name: str,
  log: Callable[[str], Any],
) -> None:
  """Writes a run, at `to`, whose matrices are in codes.

  entries: of model.execution.stored. method: of compression.quantise. name: of the checkpoint.
  Raises ValueError for a run that is an adapter or in codes already, and for entries that do not
    fit; FileExistsError where `to` is taken.
  """
  workdir, config = pathlib.Path(workdir), config_of(workdir)
  if config.adapter.kind:
    raise ValueError(
      f'{workdir} holds an adapter: quantise the run that it lies on, {config.init}, or merge them '
      'first (convert.py merge)'
    )
  if config.model.execution.stored:
    raise ValueError(
      f'{workdir} is in codes already ({", ".join(config.model.execution.stored)}); quantise the '
      'run that it was made of'
    )
  checkpoints = Checkpoints(workdir, log=log)
  step = step_of(checkpoints, name)
  if step is None:
    raise FileNotFoundError(f'{workdir} has no checkpoint')
  check_own(checkpoints.record(step), workdir)
  small = config.model.with_execution(stored=tuple(entries))
  in_codes = functools.partial(quantised, entries=entries, method=method)
  mesh = checkpoint.default_mesh(small)
  with checkpoint.new_directory(to) as partial, jax.set_mesh(mesh):
    target = params.abstract(lambda: transformer.init(config.model, 0), mesh)
    jax.eval_shape(in_codes, target)  # what does not fit is said before anything is read
    model = checkpoints.model(target, step)
    before = model_bytes(model)
    model = jax.jit(in_codes)(model)
    copied(workdir, partial)
    run = dataclasses.replace(config, model=small, init='')
    write_run(partial, run, {'model': model}, log)
  for line in kept(model):
    log(line)
  after = model_bytes(model)
  log(
    f'{to}: step {step} of {workdir}, {before / 2**20:,.1f} MiB as {after / 2**20:,.1f} MiB '
    f'({after / before:.0%}), by {method}'
  )


def model_bytes(model) -> int:
  """Of all arrays of a model."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))


def kept(model) -> list[str]:
  """Lines about what is not in codes, and how many bytes that is."""
  size: dict[str, int] = {}

  def look(path, p):
    if not read(p).coded:
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      kind = name.split('.')[0] if p.kind != 'vector' else 'norms and biases'
      size[kind] = size.get(kind, 0) + math.prod(p.shape) * p.dtype.itemsize

  jax.tree_util.tree_map_with_path(look, model, is_leaf=lambda x: hasattr(x, 'get_value'))
  return [f'kept as it is: {kind}, {count / 2**20:,.1f} MiB' for kind, count in size.items()]
