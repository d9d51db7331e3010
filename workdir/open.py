"""How is a run's directory opened? Its config, its model on a mesh, its tokenizer."""

import dataclasses
import math
import os
import pathlib

import jax

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
  generates.
  """

  config: configs.Config
  model: transformer.Decoder
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh


def open_run(
  workdir: str | os.PathLike, checkpoint: str = 'last', mesh: MeshConfig = MeshConfig(data=1)
) -> Run:
  """A run's model at its 'last' or 'best' checkpoint, or at a step's, to generate with.

  mesh: over how many of this machine's devices; the default is one.

  Raises FileNotFoundError for a directory without a run or without checkpoints, ValueError for a
  checkpoint that is not there or damaged, and for a mesh that the devices do not fill.
  """
  config = seals.opened(workdir)
  model_config = generating(config.model)
  checkpoints = Checkpoints(workdir)
  step = _step(checkpoints, checkpoint)
  sizes = mesh.sizes().values()
  devices = jax.local_devices()[: None if -1 in sizes else math.prod(sizes)]
  mesh = make_mesh(mesh, devices)
  with jax.set_mesh(mesh):
    target = params.abstract(lambda: transformer.init(model_config, config.train.seed), mesh)
    model = checkpoints.model(target, step)
  seals.check_own(checkpoints.record(step), pathlib.Path(workdir))
  tokenizer = tokenizers.load(pathlib.Path(workdir) / 'tokenizer')
  tokenizer.generation = generation.read(workdir)
  return Run(config, model, tokenizer, mesh)


def _step(checkpoints: Checkpoints, checkpoint: str) -> int | None:
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
