"""How is a frozen model asked about all rows of a run's data, once? In batches of the run's mesh,
before its first step; the answers are kept in the cache, under a key of the rows, of the model's
checkpoint and of the question, so that no other ones are ever read in their place.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import files
from data import building, cache
from data.prepared import Prepared
from data.said import Said, SaidWriter, WithSaid
from parallel import axes, hosts
from training import state as states
from training.config import Config
from training.program import check_models
from workdir import frozen
from workdir.checkpoint import Checkpoints


def in_rows(config: Config, prepared, workdir, log: Callable[[str], Any]) -> Prepared:
  """As `kept`, in the rows' own batches."""
  return kept(config, prepared, workdir, log).in_rows


def kept(config: Config, prepared, workdir, log: Callable[[str], Any]) -> WithSaid:
  """The data with what its objective asks for (`asked`, an objectives/asked.py), asked now where it
  was not before; on the mesh in context. workdir: of the run, in which nothing of it is kept.

  Raises:
    cache.CorruptShardError: answers that are damaged, or others than the directory's name says.
    NotImplementedError: several processes, before one alone has asked; a model whose answers are
      not a function of rows.
    FileNotFoundError, ValueError: a model that cannot be opened, or does not fit the run.
  """
  asked = config.objective.asked()
  live = dataclasses.replace(config, objective=asked.objective)
  teacher = place(live, asked.model)
  _check(live, asked.model, teacher, workdir)
  checkpoints = Checkpoints(teacher, log=log)
  step = checkpoints.latest()
  if step is None:
    raise FileNotFoundError(
      f'{teacher} holds no checkpoint; train with train.py --workdir={teacher} first'
    )
  checkpoint = checkpoints.reference(step)
  run = states.roles(live)[asked.model].config.execution
  identity = {
    'rows': prepared.key,
    'files': prepared.files,
    'checkpoint': [checkpoint['step'], checkpoint['digest']],
    'asked': asked.key,
    'precision': [run.dtype, run.parameter_dtype],
  }
  digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8)
  directory = files.kept(config.data.cache_dir) / f'said-{digest.hexdigest()}'
  if jax.process_count() > 1 and not (directory / cache.INDEX).exists():
    raise NotImplementedError(
      f'{directory} is not there, and {jax.process_count()} processes would each ask '
      f'{teacher} about all rows; start the run with one process first, until its first step, with '
      'a data.cache_dir that all see'
    )
  build = functools.partial(_build, live, asked, prepared, identity)
  building.once(directory, lambda partial: build(partial, log), log)
  return _load(prepared, asked, identity, directory)


def _check(config: Config, name: str, directory: str, workdir) -> None:
  """Raises NotImplementedError or ValueError where a run of this config could not hold the model,
  or would hold another one than the last checkpoint at `directory`.
  """
  check_models(config)
  config.check_mesh(dict(jax.sharding.get_mesh().shape))
  role = states.roles(config)[name]
  if role.begun and 0 in Checkpoints(workdir).steps():
    raise ValueError(
      f'{workdir} begins with the model that was imported into it, and not with that of '
      f'config.init={directory}, which would be asked in its place; use another --workdir, with '
      f'--config.init={workdir}'
    )
  moe = role.config.moe
  if moe.experts and moe.dispatch == 'capacity':
    raise NotImplementedError(
      f"the {name} of {directory} with model.moe.dispatch='capacity' leaves out tokens by what "
      "else is in a batch: what it says of a row once is not what it says later; use 'dropless', "
      'or store nothing of it'
    )


def place(config: Config, name: str) -> str:
  """The directory of the run that a model begins with; '' for one that is new."""
  role = states.roles(config)[name]
  return config.init if config.objective.main in (name, role.begun) else role.directory


def opened(config: Config, name: str, log: Callable[[str], Any]) -> tuple[Any, dict]:
  """A frozen model of another run alone, on the mesh in context, and the reference of it. Raises as
  workdir.frozen.begin.
  """
  frozen.check_base(place(config, name))
  return frozen.read(config, name, place(config, name), log)


def _build(
  config: Config, asked: Any, prepared, identity: dict, directory: pathlib.Path, log
) -> None:
  """Writes what the model says of every row of every split, of a microbatch's rows at a time."""
  began = time.perf_counter()
  model, _ = opened(config, asked.model, log)
  data = config.data
  data = dataclasses.replace(data, batch_size=data.batch_size // config.train.accumulation)
  batch_size, length = data.batch_size, data.sequence_length
  rows = jax.NamedSharding(jax.sharding.get_mesh(), axes.spec('batch', 'length'))
  put = hosts.RowShards(rows, (batch_size, length))
  answer = jax.jit(asked.answer)
  empty = config.objective.batch_like(data)
  records = []
  for name, split in _splits(prepared).items():
    with SaidWriter(directory, name, asked.fields) as writer:
      for first in range(0, len(split), batch_size):
        batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), empty)
        count = min(batch_size, len(split) - first)
        for row in range(count):
          split.fill(first + row, batch, row)
        said = jax.device_get(answer(model, put(batch)))
        for row in range(count):
          writer.add(batch.weights[row] != 0, {field: x[row] for field, x in said.items()})
    records += writer.records()
  cache.write_index(directory, records, identity)
  size = sum(entry['bytes'] for entry in records)
  log(
    f'data: {asked.model} said {size / 1e6:,.1f} MB of all rows in '
    f'{time.perf_counter() - began:.1f} s'
  )


def _load(prepared, asked: Any, identity: dict, directory: pathlib.Path) -> WithSaid:
  index = cache.read_index(directory)
  if index['report'] != identity:
    raise cache.CorruptShardError(
      f'{directory} holds what {index["report"].get("checkpoint")} said of '
      f'{index["report"].get("rows")}, and not what its name says; delete it and run again: the '
      f'{asked.model} is asked anew'
    )
  size = sum(entry['bytes'] for entry in index['files'])
  cache.check(directory, index['files'], contents=size <= cache.CHECK_BYTES)
  *train, held_out = (Said(directory, name, asked.fields) for name in _splits(prepared))
  return WithSaid(prepared, tuple(train), held_out, directory.name)


def _splits(prepared) -> dict[str, Any]:
  sources = {f'train-{i}': source for i, source in enumerate(prepared.train)}
  return sources | {'validation': prepared.validation}
