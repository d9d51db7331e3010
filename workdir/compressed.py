"""How does a run become a smaller one? Its checkpoint's matrices in codes, in a run of its own;
what it was made of stays as it is.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

import files
import names
from compression.calibrated import CALIBRATED, Method, calibrated
from compression.kept import Kept
from compression.quantise import METHODS, streamed
from data import tokenizers
from decode.generating import generating
from model import checkpoint, params, transformer
from model.weights import read
from model.weights.doubled import Doubled
from model.weights.grids import spread
from model.weights.scheme import parsed, stored
from parallel.mesh import MeshConfig, make_mesh
from workdir.adapted import copied, heads_at, with_heads
from workdir.calibrated import Calibration, rows as rows_of
from workdir.checkpoint import Checkpoints
from workdir.open import check_own, config_of, step_of
from workdir.untrained import write_run

FILE = 'compressed.json'  # by what a run became what it is


def quantise(
  workdir: str | os.PathLike,
  to: str | os.PathLike,
  entries: Sequence[str],
  method: str,
  name: str,
  log: Callable[[str], Any],
  calibration: Calibration | None = None,
  act_order: bool = False,
) -> None:
  """Writes a run, at `to`, whose matrices are in codes.

  entries: of model.execution.stored. method: of compression.quantise, or of compression.calibrated,
    which looks at rows of `calibration`. name: of the checkpoint.
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
  network, mesh, by = config.model, checkpoint.default_mesh(small), None
  names.check('--method', method, [*METHODS, *CALIBRATED])
  if method in CALIBRATED:
    if any(scheme.sparse for _, scheme in parsed(entries)):
      raise NotImplementedError(
        f'--method={method} chooses codes of whole matrices: use rtn or mse for N:M, of what '
        'python convert.py prune --scheme=2:4 --method=sparsegpt leaves'
      )
    by = Method(method, act_order)
    network, mesh = generating(config.model), make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
  elif calibration is not None or act_order:
    raise ValueError(
      f'--method={method} looks at no text: leave out what says of which, or use one of '
      + ', '.join(CALIBRATED)
    )
  with checkpoint.new_directory(to) as partial, jax.set_mesh(mesh):
    target = params.abstract(lambda: transformer.init(network, 0), mesh)
    # What does not fit is said before anything is read.
    jax.eval_shape(functools.partial(stored, entries=entries), target)
    heads = heads_at(config, checkpoints, step)
    before, facts = model_bytes(target), {'method': method, 'stored': list(entries)}
    if by is None:
      model = streamed(target, entries, method, functools.partial(_taken, checkpoints, step))
    else:
      tokenizer = tokenizers.load(workdir / 'tokenizer')
      rows = rows_of(workdir, config, name, tokenizer, calibration or Calibration(), log)
      facts |= {'act_order': act_order, 'calibration': rows.described}
      kept = Kept(layers_beside(to), facts | {'of': checkpoints.reference(step)})
      model = checkpoints.model(target, step)
      model = calibrated(model, rows.batches, entries, by, log, kept)
    copied(workdir, partial)
    files.replace(partial / FILE, json.dumps(facts, indent=1) + '\n')
    run = dataclasses.replace(config, model=small, init='')
    write_run(partial, run, with_heads(config, model, heads), log)
    notes = [*kept_as_it_is(model), *lost(model)]
  if by is not None:
    kept.remove()
  for line in notes:
    log(line)
  after = model_bytes(model)
  log(
    f'{to}: step {step} of {workdir}, {before / 2**20:,.1f} MiB as {after / 2**20:,.1f} MiB '
    f'({after / before:.0%}), by {method}'
  )


def _taken(checkpoints: Checkpoints, step: int, name: str, p):
  """A parameter of a checkpoint, alone."""
  alone = p
  for key in reversed(name.split('.')):
    alone = {key: alone}
  return jax.tree.leaves(checkpoints.model(alone, step, some=True), is_leaf=params.is_param)[0]


def layers_beside(to: str | os.PathLike) -> pathlib.Path:
  """Where layers lie that are done, until a run is."""
  to = pathlib.Path(to).absolute()
  return to.with_name(f'.{to.name}.layers')


def model_bytes(model) -> int:
  """Of all arrays of a model."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))


def kept_as_it_is(model) -> list[str]:
  """Lines about what is not in codes, and how many bytes that is."""
  size: dict[str, int] = {}

  for name, p in params.by_name(model).items():
    if not read(p).coded:
      kind = name.split('.')[0] if p.kind != 'vector' else 'norms and biases'
      size[kind] = size.get(kind, 0) + math.prod(p.shape) * p.dtype.itemsize

  return [f'kept as it is: {kind}, {count / 2**20:,.1f} MiB' for kind, count in size.items()]


def lost(model) -> list[str]:
  """Lines about groups whose scales are too small for the codes that they lie in."""
  lines = []
  for name, p in params.by_name(model).items():
    for weight in jax.tree.leaves(p.get_value(), is_leaf=lambda x: isinstance(x, Doubled)):
      if not isinstance(weight, Doubled):
        continue
      scale = weight.single().scale
      if count := int((scale < spread(weight.step, weight.blocks) / 2).sum()):
        lines.append(
          f'NOTE: {name}: {count:,} of {scale.size:,} groups have a scale below half a step of '
          ':double, beside one some 250 times as large: their numbers are 0, or clipped, unless '
          'all of them were 0; without :double they are kept'
        )
  return lines
