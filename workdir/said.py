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

from data import building, cache
from data.said import Said, SaidWriter, WithSaid
from parallel import axes, hosts
from training.config import Config
from training.program import check_models
from workdir.checkpoint import Checkpoints
from workdir.frozen import opened


def kept(config: Config, prepared, workdir, log: Callable[[str], Any]) -> WithSaid:
  """The data with what its objective asks for (`asked`, an objectives/asked.py), asked now where it
  was not before; on the mesh in context. workdir: of the run, in which nothing of it is kept.

  Raises:
    cache.CorruptShardError: answers that are damaged, or others than the directory's name says.
    NotImplementedError: several processes, before one alone has asked.
    FileNotFoundError, ValueError: a model that cannot be opened, or does not fit the run.
  """
  del workdir
  asked = config.objective.asked()
  live = dataclasses.replace(config, objective=asked.objective)
  check_models(live)
  teacher = asked.objective.models(config.model)[asked.model].directory
  checkpoints = Checkpoints(teacher, log=log)
  checkpoint = checkpoints.reference(checkpoints.latest())
  identity = {
    'rows': prepared.key,
    'files': prepared.files,
    'checkpoint': [checkpoint['step'], checkpoint['digest']],
    'asked': asked.key,
  }
  digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8)
  directory = pathlib.Path(config.data.cache_dir) / f'said-{digest.hexdigest()}'
  if jax.process_count() > 1 and not (directory / cache.INDEX).exists():
    raise NotImplementedError(
      f'{directory} is not there, and {jax.process_count()} processes would each ask '
      f'{teacher} about all rows; start the run with one process first, until its first step, with '
      'a data.cache_dir that all see'
    )
  build = functools.partial(_build, live, asked, prepared, identity)
  building.once(directory, lambda partial: build(partial, log), log)
  return _load(prepared, asked, identity, directory)


def _build(
  config: Config, asked: Any, prepared, identity: dict, directory: pathlib.Path, log
) -> None:
  """Writes what the model says of every row of every split."""
  began = time.perf_counter()
  model, _ = opened(config, asked.model, log)
  batch_size, length = config.data.batch_size, config.data.sequence_length
  rows = jax.NamedSharding(jax.sharding.get_mesh(), axes.spec('batch', 'length'))
  put = hosts.RowShards(rows, (batch_size, length))
  answer = jax.jit(asked.answer)
  empty = config.objective.batch_like(config.data)
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
