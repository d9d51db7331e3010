"""What is done with a run that trained an adapter? It is opened and merged with the model that it
lies on, which its checkpoints name by place, step and digest; and told where that model went.
"""

import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import files
from data import tokenizers
from data.generation import GENERATION
from model import adapters, checkpoint, params, peft, transformer
from model.adaptation import AdapterConfig
from model.config import ModelConfig
from model.weights.scheme import dequantised, numbers_config
from training import config as configs, state as states
from workdir import seals
from workdir.checkpoint import Checkpoints
from workdir.open import check_own, config_of, step_of
from workdir.untrained import write_run

Log = Callable[[str], Any]


def adapter_of(config: configs.Config, checkpoints: Checkpoints, step: int) -> adapters.Adapter:
  """The adapter of a step, on the mesh in context."""
  target = params.abstract(
    lambda: states.new_model(config, states.ADAPTER), jax.sharding.get_mesh()
  )
  return checkpoints.restore(step, target, f'models.{states.ADAPTER}')


def begun(config: configs.Config, models, imported: str | os.PathLike, log: Log) -> dict[str, Any]:
  """The adapter that a run begins with, by name: the one that was imported into its directory, or
  a new one on the base among `models`.
  """
  if imported:
    return {states.ADAPTER: adapter_of(config, Checkpoints(imported, log=log), 0)}
  base = models.get(config.objective.main)
  # Without a base that was read, a new one is begun with it.
  ids = None
  if config.adapter.text:
    tokenizer = tokenizers.load(files.place(config.init) / 'tokenizer')
    ids = tokenizer.encode(config.adapter.text)
  make = jax.jit(functools.partial(states.new_adapter, config, ids=ids))
  return {} if base is None else {states.ADAPTER: make(base)}


def refuse_as_base(directory: str | os.PathLike) -> None:
  """Raises ValueError: the model of an adapter's run is in two places, and none to begin with."""
  config = configs.load(directory)
  if config.adapter.soft:
    raise ValueError(
      f'{directory} holds soft tokens (adapter.kind={config.adapter.kind!r}) and not a model: '
      f'begin with the one that reads them, {config.init}'
    )
  raise ValueError(
    f'{directory} holds an adapter and not a model: merge them first, python convert.py merge '
    f'--workdir {directory} --to DIR, and begin with DIR'
  )


def opened(
  config: configs.Config, checkpoints: Checkpoints, step: int, target: transformer.Decoder
) -> transformer.Decoder:
  """The model of a step, in the shape of `target`, with the adapter merged into it.

  Of a base in bytes it is the numbers that these stand for, which the adapter was trained on.
  """
  base = checkpoints.model(target, step)
  stored = states.roles(config)[config.objective.main].stored
  if stored:
    base = jax.jit(stored, donate_argnums=0)(base)
  return merged(config, base, adapter_of(config, checkpoints, step))


def beside(
  runs: Mapping[str, str | os.PathLike],
  base: pathlib.Path,
  config: configs.Config,
  step: int,
  weights: str,
) -> dict[str, tuple[adapters.Adapter, AdapterConfig]]:
  """The adapters of runs, by the names that these have here, that go beside each other onto one
  checkpoint of their base, on the mesh in context.

  base, config, step: the base's directory, its config, and which checkpoint. weights: how its
    matrices will lie in memory (decode.loaded.LoadedModel).
  Raises ValueError for runs that have no adapter, or one of another checkpoint, or that read or end
    texts otherwise.
  """
  if config.adapter.kind:
    raise ValueError(
      f'{base} holds an adapter itself; give the run that it lies on, {config.init}, and it as one '
      'of the adapters'
    )
  digest = Checkpoints(base).reference(step)['digest']
  read = {}
  for name, directory in runs.items():
    run, checkpoints = config_of(directory), Checkpoints(directory)
    if not run.adapter.kind:
      raise ValueError(
        f'adapter {name!r}: {directory} has none (adapter.kind is empty), but a model of its own; '
        'generate with that'
      )
    last = checkpoints.latest()
    record = checkpoints.record(last)
    check_own(record, files.place(directory))
    reference = record.get('references', {}).get(run.objective.main)
    if not reference or reference['digest'] != digest or run.model.places != config.model.places:
      where = (
        'itself' if not reference else f'at {reference["directory"]}, step {reference["step"]}'
      )
      raise ValueError(
        f'adapter {name!r}: the model that {directory} lies on is kept {where}, and is another one '
        f'than {base} has at step {step}; give that run and --checkpoint, or merge the adapter '
        '(convert.py merge)'
      )
    if run.adapter.base not in ('', weights):
      raise ValueError(
        f'adapter {name!r} was trained on a base in {run.adapter.base} (adapter.base): load it '
        f'with weights={run.adapter.base!r} (--weights={run.adapter.base})'
      )
    _check_texts(name, files.place(directory), base)
    read[name] = adapter_of(run, checkpoints, last), run.adapter
  return read


def _check_texts(name: str, directory: pathlib.Path, base: pathlib.Path) -> None:
  mine, its = seals.own(base), seals.own(directory)
  for kept in (seals.TOKENIZER, GENERATION):
    if mine[kept] != its[kept]:
      raise ValueError(
        f'adapter {name!r}: {directory / kept} is not what {base / kept} is, and texts of one '
        'batch are read, and end, in one way; merge it (convert.py merge), or train it on a run '
        'that has the same (a chat template that objective.template gave is a part of it)'
      )


def merged(config: configs.Config, base, adapter: adapters.Adapter) -> transformer.Decoder:
  """The model in which the base, as it lies in memory, and its adapter are one."""
  model = jax.jit(functools.partial(adapters.merged, config=config.adapter))(base, adapter)
  if config.adapter.base:
    model.config = untied(model.config)
  return model


def untied(config: ModelConfig) -> ModelConfig:
  """Of a model that lay in bytes, whose head has numbers of its own, in f32."""
  return dataclasses.replace(config, tie_embeddings=False).with_execution(parameter_dtype='float32')


def merge(
  workdir: str | os.PathLike, to: str | os.PathLike, name: str, dequantise: bool, log: Log
) -> None:
  """Writes a run, at `to`, whose model is that of a checkpoint with its adapter merged; what it was
  made of stays as it is.

  name: of the checkpoint. Raises ValueError for a run without an adapter, and for a base in bytes
    where nobody has said that it may become numbers, or one in numbers where somebody has;
    FileExistsError where `to` is taken.
  """
  workdir, config = files.place(workdir), config_of(workdir)
  if not config.adapter.kind:
    raise ValueError(f'{workdir} has no adapter (adapter.kind is empty): there is nothing to merge')
  if config.adapter.soft:
    raise ValueError(
      f'{workdir} has soft tokens (adapter.kind={config.adapter.kind!r}), which the model reads '
      'before every text: they are no sum with its matrices. generate.py and convert.py export '
      'take the run as it is'
    )
  coded = config.adapter.base or ', '.join(config.model.execution.stored)
  if dequantise and not coded:
    raise ValueError(
      f'--dequantise is of a base in bytes, and that of {workdir} is in numbers; leave it out'
    )
  if coded and not dequantise:
    raise ValueError(
      f'{workdir} was trained on a base in {coded} (adapter.base, or a run in codes), which a sum '
      'is not: --dequantise writes the numbers, in f32'
    )
  model_config = config.model
  if config.adapter.base:
    model_config = untied(model_config)
  checkpoints = Checkpoints(workdir, log=log)
  step = step_of(checkpoints, name)
  check_own(checkpoints.record(step), workdir)
  mesh = checkpoint.default_mesh(config.model)
  with checkpoint.new_directory(to) as partial, jax.set_mesh(mesh):
    target = params.abstract(lambda: transformer.init(config.model, 0), mesh)
    model = opened(config, checkpoints, step, target)
    if coded:
      model = jax.jit(dequantised, static_argnames='dtype')(model, dtype='float32')
      model_config = numbers_config(model_config, model.head.tokens is not None)
      model_config = model_config.with_execution(parameter_dtype='float32')
    heads = heads_at(config, checkpoints, step)
    copied(workdir, partial)
    run = dataclasses.replace(config, model=model_config, adapter=AdapterConfig(), init='')
    write_run(partial, run, with_heads(config, model, heads), log)
  log(f'{to}: step {step} of {workdir}, its adapter merged')


def heads_of(config: configs.Config) -> list[str]:
  """Names of the heads that a run trained on its model, which are a part of what it is."""
  aside = config.objective.aside
  taken = config.objective.models(config.model)
  return [name for name, role in taken.items() if role.made and name not in aside]


def heads_at(config: configs.Config, checkpoints: Checkpoints, step: int) -> dict[str, Any]:
  """These heads, at a step, by name; on the mesh in context."""
  read = {}
  for name in heads_of(config):
    target = params.abstract(lambda: states.new_model(config, name), jax.sharding.get_mesh())
    read[name] = checkpoints.restore(step, target, f'models.{name}')
  return read


def with_heads(config: configs.Config, model, heads: dict[str, Any]) -> dict[str, Any]:
  """What a run keeps (workdir.untrained) whose model was made of another's, with heads of that."""
  return {'models': {config.objective.main: model} | heads} if heads else {'model': model}


def export_adapter(
  workdir: pathlib.Path, name: str, directory: pathlib.Path, family, log: Log
) -> int:
  """Writes a checkpoint's adapter as PEFT keeps it; returns its step."""
  config, checkpoints = config_of(workdir), Checkpoints(workdir, log=log)
  step = step_of(checkpoints, name)
  with jax.set_mesh(checkpoint.default_mesh(config.model)):
    adapter = jax.device_get(adapter_of(config, checkpoints, step))
  arrays = {
    leaf: {part: np.asarray(p[...]) for part, p in parts.items()} for leaf, parts in adapter.items()
  }
  peft.write(directory, arrays, config.adapter, config.model, family)
  return step


def import_adapter(
  source: pathlib.Path, base: pathlib.Path, directory: pathlib.Path, family, log: Log
) -> None:
  """Writes a run whose adapter is one of PEFT's, on the model of the run at `base`.

  Raises as peft.read, and ValueError where the base's texts are read or end otherwise now.
  """
  config = config_of(base)
  if config.adapter.kind:
    raise ValueError(f'--base={base} holds an adapter itself; merge it first (convert.py merge)')
  checkpoints = Checkpoints(base, log=log)
  last = checkpoints.latest()
  check_own(checkpoints.record(last), base)
  settings, arrays = peft.read(source, config.model, family)
  optimizer = dataclasses.replace(config.optimizer, prune='')  # what is frozen keeps its zeros
  config = dataclasses.replace(config, adapter=settings, init=str(base), optimizer=optimizer)
  mesh = checkpoint.default_mesh(config.model)
  with jax.set_mesh(mesh):
    target = params.abstract(lambda: states.new_model(config, states.ADAPTER), mesh)
    leaves = params.named_leaves(target)
    placed = []
    for path, x in leaves.items():
      leaf, _, part = path.rpartition('.')
      placed.append(jax.device_put(arrays[leaf][part].reshape(x.shape), x.sharding))
    adapter = jax.tree.unflatten(jax.tree.structure(target), placed)
    copied(base, directory)
    references = {config.objective.main: checkpoints.reference(last)}
    write_run(directory, config, {'models': {states.ADAPTER: adapter}}, log, references)


def copied(workdir: pathlib.Path, to: pathlib.Path) -> None:
  """Copies what a run has besides its config and checkpoints (seals.OWN)."""
  for name in seals.OWN:
    if (workdir / name).is_dir():
      shutil.copytree(workdir / name, to / name)
    elif (workdir / name).is_file():
      shutil.copyfile(workdir / name, to / name)


def rebase(workdir: str | os.PathLike, base: str | os.PathLike, log: Log) -> None:
  """Tells a run that the model that its adapter lies on is at `base` now.

  Raises ValueError where another model is there.
  """
  workdir, config = files.place(workdir), configs.load(workdir)
  if not config.adapter.kind:
    raise ValueError(f'{workdir} has no adapter, and lies on no other model')
  checkpoints, there = Checkpoints(workdir, log=log), Checkpoints(base, log=log)
  main = config.objective.main
  config = dataclasses.replace(config, init=str(base))
  references = {step: checkpoints.record(step)['references'] for step in checkpoints.steps()}
  # All are looked at before one is changed.
  for step, of in references.items():
    if main not in of:
      raise ValueError(
        f'checkpoint {step} in {workdir} holds its base itself: nothing is elsewhere'
      )
    there.check(of[main])
  for step, of in references.items():
    moved = of | {main: of[main] | {'directory': str(files.place(base).absolute())}}
    checkpoints.amend(step, {'references': moved, 'config': configs.to_dict(config)})
  configs.save(config, workdir)
  log(f'{workdir}: lies on {base}, which is what it was')
