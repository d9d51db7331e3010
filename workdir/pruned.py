"""How does a run become one with fewer numbers, or fewer parts? Its checkpoint, pruned, in a run of
its own; what it was made of stays as it is.

N:M is stored packed (model.execution.stored); of other shares the numbers that went are 0, and
optimizer.prune='kept' has training keep them so; heads, channels and layers are not there any more.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import files
from compression import bounded, structured, walk
from compression.calibrated import expected
from compression.calibration import sizes_of
from compression.kept import Kept
from compression.prune import highest, shared_out, sparsegpt, stays, wanda
from data import tokenizers
from model import checkpoint, params, transformer
from model.weights import read
from model.weights.scheme import stored, summed_of
from parallel.mesh import MeshConfig, make_mesh
from workdir.adapted import copied, heads_at, with_heads
from workdir.bounded_codes import costs_of
from workdir.calibrated import Calibration, rows as rows_of
from workdir.checkpoint import Checkpoints
from workdir.compressed import FILE, layers_beside, model_bytes
from workdir.open import check_own, config_of, step_of
from workdir.prune_request import PruneRequest
from workdir.untrained import write_run

Log = Callable[[str], Any]
MOST = 95  # percent of the numbers that may go
INSTEAD = '--method=magnitude'


def prune(
  workdir: str | os.PathLike,
  to: str | os.PathLike,
  asked: PruneRequest,
  name: str,
  calibration: Calibration | None,
  log: Log,
) -> None:
  """Writes a pruned run at `to`. name: of the checkpoint. calibration: which rows are looked at;
  None: the default ones, where there is need.

  Raises ValueError for a run that is an adapter or in codes, and for what does not fit;
    FileExistsError where `to` is taken.
  """
  workdir, config = pathlib.Path(workdir), config_of(workdir)
  if config.adapter.kind:
    raise ValueError(
      f'{workdir} holds an adapter: prune the run that it lies on, {config.init}, or merge them '
      'first (convert.py merge)'
    )
  if config.model.execution.stored:
    raise ValueError(
      f'{workdir} is in codes already ({", ".join(config.model.execution.stored)}); prune the run '
      'that it was made of'
    )
  checkpoints = Checkpoints(workdir, log=log)
  step = step_of(checkpoints, name)
  if step is None:
    raise FileNotFoundError(f'{workdir} has no checkpoint')
  check_own(checkpoints.record(step), workdir)
  if calibration is not None and not asked.calibrated:
    raise ValueError(
      '--method=magnitude looks at no text: leave out what says of which, or use wanda or sparsegpt'
    )
  if asked.bound:
    bounded.check(config.model)
  small = small_config(config.model, asked)
  mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
  with checkpoint.new_directory(to) as partial, jax.set_mesh(mesh):
    target = params.abstract(lambda: transformer.init(config.model, 0), mesh)
    # What does not fit is said before anything is read.
    asked.check_keep(params.by_name(target))
    jax.eval_shape(functools.partial(_packed, asked=asked), target)
    heads = heads_at(config, checkpoints, step)
    facts, batches, kept = dataclasses.asdict(asked), [], None
    if asked.calibrated:
      tokenizer = tokenizers.load(workdir / 'tokenizer')
      given = calibration or Calibration()
      batches, facts['calibration'] = rows_of(workdir, config, name, tokenizer, given, log)
    if asked.method != 'magnitude':
      work = facts | {'of': checkpoints.reference(step)}
      kept = functools.partial(_kept, layers_beside(to), work)
    model = checkpoints.model(target, step)
    before = model_bytes(model), params.count(model)
    if asked.units:
      model = cut(model, small, asked, batches, kept, log)
    elif asked.bound:
      asked, model = within(model, asked, batches, tokenizer, kept, log)
      facts |= {'share': asked.pattern.share}
    else:
      model = thinned(model, asked, batches, kept, log)
    for line in described(model, asked):
      log(line)
    model = jax.jit(functools.partial(_packed, asked=asked))(model)
    optimizer = config.optimizer
    if not asked.units and not asked.entries:
      optimizer = dataclasses.replace(optimizer, prune='kept')
    run = dataclasses.replace(config, model=small, init='', optimizer=optimizer)
    copied(workdir, partial)
    files.replace(partial / FILE, json.dumps(facts, indent=1) + '\n')
    write_run(partial, run, with_heads(config, model, heads), log)
  shutil.rmtree(layers_beside(to), ignore_errors=True)
  after = model_bytes(model)
  log(
    f'{to}: step {step} of {workdir}, {before[1]:,} -> {params.count(model):,} parameters, '
    f'{before[0] / 2**20:,.1f} MiB as {after / 2**20:,.1f} MiB ({after / before[0]:.0%}), by '
    f'{asked.method}'
  )
  if optimizer != config.optimizer:
    log('what went is 0, and takes as much memory as before; training keeps it so')


def _kept(directory: pathlib.Path, work: dict, asked: PruneRequest) -> Kept:
  """Where layers that are done lie, of this one of what is tried."""
  (directory / asked.scheme).mkdir(parents=True, exist_ok=True)
  return Kept(directory / asked.scheme, work)


def small_config(config, asked: PruneRequest):
  """Of the pruned model."""
  if asked.units:
    return structured.smaller(config, asked.units)
  return config.with_execution(stored=asked.entries)


def _packed(model, asked: PruneRequest):
  """The model as it is stored. Traced."""
  if asked.units or not asked.entries:
    return model
  return stored(model, asked.entries)


def thinned(
  model, asked: PruneRequest, batches, kept: Callable[[PruneRequest], Kept] | None, log: Log
):
  """The model with 0 for what goes."""
  chosen = {name: p for name, p in params.by_name(model).items() if asked.goes(name, p)}
  if not chosen:
    raise ValueError(f'--keep={",".join(asked.keep)} leaves no matrix to prune; leave some out')
  if asked.method != 'magnitude':
    change = walk.LayerChange(
      walk.by_matrix(functools.partial(_change, asked)),
      asked.goes,
      asked.method == 'sparsegpt',
      instead=INSTEAD,
    )
    for line in expected(model, batches, change):
      log(line)
    return walk.walk(model, batches, change, log, kept and kept(asked))
  counts = {}
  if asked.pattern.scope == 'global':
    sizes = {name: jnp.abs(read(p).numbers(p.dtype)) for name, p in chosen.items()}
    summed = {name: summed_of(p) for name, p in chosen.items()}
    counts = shared_out(sizes, summed, asked.pattern.share)

  def one(path, p):
    name = params.name_of(path)
    if name not in chosen:
      return p
    return p.replace(_thin(p.get_value(), summed_of(p), asked.pattern, counts.get(name)))

  return jax.tree_util.tree_map_with_path(one, model, is_leaf=params.is_param)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _thin(x, summed, pattern, counts):
  scores = jnp.abs(x.astype(jnp.float32))
  if counts is None:
    keep = stays(scores, summed, pattern)
  else:
    axes = tuple(range(x.ndim + min(summed), x.ndim))
    keep = highest(scores, jnp.expand_dims(counts, axes), axes)
  return jnp.where(keep, x, jnp.zeros((), x.dtype))


def _change(asked: PruneRequest, name: str, p, statistics):
  """A matrix, or those of experts, by what it multiplies. Traced."""
  x, (lead, inputs) = read(p).numbers('float32'), sizes_of(p)
  flat = x.reshape(math.prod(lead), inputs, -1)
  if asked.method == 'wanda':
    scores = jax.vmap(wanda)(flat, jnp.sqrt(statistics.squares).reshape(-1, inputs))
    made = jnp.where(stays(scores, (-2,), asked.pattern), flat, 0)
  else:
    products = statistics.products.reshape(-1, inputs, inputs)
    made = jax.lax.map(lambda both: sparsegpt(*both, asked.pattern), (flat, products))
  return made.reshape(x.shape).astype(p.dtype)


def cut(
  model, small, asked: PruneRequest, batches, kept: Callable[[PruneRequest], Kept] | None, log: Log
):
  """The model with fewer parts."""
  mesh, config = jax.sharding.get_mesh(), model.config
  influence = None
  if small.L < config.L:
    influence = structured.influence(model, batches)
    log('influence of layers: ' + ', '.join(f'{i} {x:.4f}' for i, x in enumerate(influence)))
  layers = structured.left(config, small, influence)
  gone = sorted({*range(config.L)} - {*layers})
  if gone:
    log(f'layers that go: {", ".join(map(str, gone))}')
  narrower = (small.N, small.F) != (config.N, config.F)
  if narrower and asked.method == 'magnitude':
    model = structured.by_magnitude(model, small)
  elif narrower:
    make = functools.partial(structured.without, config=config, small=small)
    read_by = ('attention.o', 'feed_forward.down')
    change = walk.LayerChange(make, lambda name, p: name.endswith(read_by), False, INSTEAD)
    model = walk.walk(model, batches, change, log, kept and kept(asked))
  return structured.joined(model, small, layers, mesh)


def within(model, asked: PruneRequest, batches, tokenizer, kept, log: Log):
  """(what is asked, with its share, the model): as much as the bound lets go."""
  costs = costs_of(model, batches, tokenizer, asked.bound)

  def with_share(percent):
    return dataclasses.replace(asked, scheme=f'{percent / 100:.2f}', bound=None)

  def make(percent):
    return thinned(model, with_share(percent), batches, kept, lambda _: None)

  def said(percent):
    return f'{percent}% of the numbers'

  percent, made = bounded.search(make, costs, asked.bound, MOST, said, log)
  return with_share(percent), made


def described(model, asked: PruneRequest) -> list[str]:
  """Lines about what went, by kind of matrix, and what stays as it is."""
  if asked.units:
    config = model.config
    left = {'heads': config.N, 'keys and values': config.K, 'channels': config.F}
    left['layers'] = config.L
    return [f'{unit} now: {count:,}' for unit, count in left.items()]
  gone: dict[str, np.ndarray] = {}
  left: dict[str, int] = {}
  for name, p in params.by_name(model).items():
    size = math.prod(p.shape)
    if asked.goes(name, p):
      kind = '.'.join(name.split('.')[3:])
      zeros = int((np.asarray(p.get_value()) == 0).sum())
      gone[kind] = gone.get(kind, 0) + np.array([zeros, size])
    else:
      kind = name.split('.')[0] if p.kind == 'embedding' else name.split('.')[-1]
      kind = 'norms and biases' if p.kind == 'vector' else kind
      left[kind] = left.get(kind, 0) + size
  lines = [f'{kind}: {n:,} of {size:,} are 0 ({n / size:.2%})' for kind, (n, size) in gone.items()]
  return [*lines, *(f'kept as it is: {kind}, {size:,} numbers' for kind, size in left.items())]
