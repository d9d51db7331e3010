"""How is a run's directory opened? Its config, its model on a mesh, its tokenizer."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import files
import names
from data import generation, tokenizers
from data.tokenizer import Tokenizer
from decode.generating import generating
from model import params, transformer
from parallel.mesh import MeshConfig, make_mesh
from training import config as configs
from workdir import seals
from workdir.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Run:
  """What a directory held. model: on `mesh`, as it is stored but with the config of one that
  generates. adapters: of other runs on it, with their configs, by name. identity: of all weights
  there are, and how they lie in memory: where it is the same, so are they.
  """

  config: configs.Config
  model: transformer.Decoder
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  adapters: Mapping[str, Any]
  identity: str = ''


def open_run(
  workdir: str | os.PathLike,
  checkpoint: str = 'last',
  mesh: MeshConfig | jax.sharding.Mesh = MeshConfig(data=1),
  adapters: Mapping[str, str | os.PathLike] | None = None,
  weights: str = '',
) -> Run:
  """A run's model at its 'last' or 'best' checkpoint, or at a step's, to generate with.

  mesh: over how many of this machine's devices; the default is one. Or one that is there.
  adapters: runs whose adapters lie on this checkpoint, by name; weights: with which they will.

  Raises FileNotFoundError for a directory without a run or without checkpoints, ValueError for a
  checkpoint that is not there or damaged, and for a mesh that the devices do not fill, or that does
  not split the model; for adapters as workdir.adapted.beside.
  """
  config = config_of(workdir)
  model_config = generating(config.model)
  checkpoints = Checkpoints(workdir)
  step = step_of(checkpoints, checkpoint)
  if isinstance(mesh, MeshConfig):
    sizes = mesh.sizes().values()
    devices = jax.local_devices()[: None if -1 in sizes else math.prod(sizes)]
    mesh = make_mesh(mesh, devices)
  model_config.check_parameters(dict(mesh.shape))
  with jax.set_mesh(mesh):
    target = params.abstract(lambda: transformer.init(model_config, config.train.seed), mesh)
    if config.adapter.kind:
      adapted = names.imported('workdir.adapted.opened')
      model = adapted(dataclasses.replace(config, model=model_config), checkpoints, step, target)
    else:
      model = checkpoints.model(target, step)
    beside, digests = {}, [checkpoints.reference(step)['digest']]
    if adapters:
      read = names.imported('workdir.adapted.beside')
      beside = read(adapters, files.place(workdir), config, step, weights)
      digests += [f'{name}={run_of(adapters[name], "last")["digest"]}' for name in adapters]
  check_own(checkpoints.record(step), files.place(workdir))
  tokenizer = tokenizers.load(files.place(workdir) / 'tokenizer')
  tokenizer.generation = generation.read(workdir)
  return Run(config, model, tokenizer, mesh, beside, ' '.join([*digests, f'weights={weights}']))


def step_of(checkpoints: Checkpoints, checkpoint: str) -> int | None:
  """The step of a checkpoint by name; None where there is none."""
  if checkpoint == 'last':
    return checkpoints.latest()
  best = checkpoints.best()
  known = {str(step): step for step in checkpoints.steps()}
  if best is not None:
    known['best'] = best
  step = known[names.check('checkpoint', checkpoint, [*known, 'last'])]
  if problems := checkpoints.problems(step):
    raise ValueError(
      f'checkpoint {step} is damaged: ' + '; '.join(problems) + "; use another, or 'last'"
    )
  return step


def run_of(workdir: str | os.PathLike, checkpoint: str, weights: str = '') -> dict[str, Any]:
  """What results say of the model that they are of, JSON-able. The digest is the checkpoint's:
  another model may be at the same step of the same directory.

  Raises FileNotFoundError where there is no checkpoint.
  """
  checkpoints = Checkpoints(workdir)
  step = step_of(checkpoints, checkpoint)
  digest = checkpoints.reference(step)['digest']
  return {'workdir': str(workdir), 'step': step, 'digest': digest, 'weights': weights}


def config_of(workdir: str | os.PathLike) -> configs.Config:
  """A directory's config.json, for who reads its model.

  Raises FileNotFoundError where there is none, ValueError where it tells of another model than the
  last checkpoint's record.
  """
  path = files.place(workdir) / configs.FILE
  kept = seals.last_config(Checkpoints(workdir))
  if kept is not None and not path.exists():
    raise FileNotFoundError(
      f'{path} does not exist, though there are checkpoints; {seals.SEAL} {workdir} writes it anew '
      'from the last one'
    )
  config = configs.load(workdir)
  lines = [] if kept is None else configs.differences(kept, config)
  lines = [line for line in lines if line.startswith('model.')]
  if lines:
    raise ValueError(
      f'{path} is not of the model that the last checkpoint was trained as: {"; ".join(lines)}; '
      f'bring the file back, or, where that is meant, run {seals.SEAL} {workdir}'
    )
  return config


def check_own(
  record: Mapping[str, Any], workdir: pathlib.Path, of: Sequence[str] = seals.OWN
) -> None:
  """Raises ValueError where the run's tokenizer, or where it ends texts, is not what it was."""
  run, now = record.get('run', {}), seals.own(workdir)
  for name in of:
    if name in run and run[name] != now[name]:
      raise ValueError(
        f'{workdir / name} was changed since checkpoint {record["step"]} was written; bring it '
        f'back from a copy, or, where that is meant, run {seals.SEAL} {workdir}'
      )
