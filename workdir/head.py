"""How is a run opened that trained a head on its model? The head, beside what workdir.open has."""

import os

import jax

from model import heads, params
from objectives.objective import Objective
from training import state as states
from training.config import Config
from workdir.checkpoint import Checkpoints
from workdir.open import config_of, step_of

WORDS = 'words'


def labels_by(config: Config) -> str:
  """By what a run tells labels apart: WORDS that follow a text, a head of this name, or '', not at
  all.
  """
  return getattr(config.objective, 'tells_labels', '')


def head_of(
  workdir: str | os.PathLike, name: str, checkpoint: str, mesh: jax.sharding.Mesh, asked: Objective
) -> heads.Head:
  """The head of a checkpoint, on a mesh.

  name: among the run's models. checkpoint: 'last', 'best', or a step's. asked: whose `labels` its
    scores are to be of.
  Raises ValueError for a run that has none, or one of other labels.
  """
  config = config_of(workdir)
  if config.objective.kind != asked.kind:
    raise ValueError(
      f'{workdir} was trained with objective.kind={config.objective.kind!r} and has no head; train '
      f'one, --config.objective.kind={asked.kind}, or ask its model by a template, with '
      '--config=configs/classify.py'
    )
  if config.objective.labels != asked.labels:
    raise ValueError(
      f'the head in {workdir} tells {list(config.objective.labels)} apart, and '
      f'objective.template={asked.template!r} has {list(asked.labels)}; give the one that it was '
      'trained with'
    )
  checkpoints = Checkpoints(workdir)
  return restored(config, checkpoints, step_of(checkpoints, checkpoint), name, mesh)


def restored(config, checkpoints: Checkpoints, step: int, name: str, mesh) -> heads.Head:
  """The head `name` of a run's checkpoint, on a mesh."""
  with jax.set_mesh(mesh):
    target = params.abstract(lambda: states.new_model(config, name), mesh)
  return checkpoints.restore(step, target, f'models.{name}')
