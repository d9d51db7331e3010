"""Where are frozen parameters kept? Not in a run's checkpoints, but where they came from: by
directory, step and digest.

That is so for models that an objective takes from another run, and for the frozen part of a model
that began with one (`config.init`). What was frozen as it was initialised has no such place, and is
saved like what is trained.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

import files
import names
from model import params, transformer
from training import state as states
from training.config import Config
from training.state import TrainState
from training.trainable import divided, joined, shared
from workdir.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Frozen:
  """What of a run's models is by reference: `references` by model, as checkpoints record them."""

  config: Config
  references: dict[str, dict]

  def kept(self, state: TrainState) -> TrainState:
    """The state, abstract or not, as a checkpoint holds it: without what is by reference."""
    rule = states.rule(self.config)
    models, _ = divided(
      state.models,
      lambda name: rule.trains(name) or name.split('.')[0] not in self.references,
    )
    return dataclasses.replace(state, models=models)

  def completed(self, state: TrainState, log: Callable[[str], Any]) -> TrainState:
    """A state that was kept, with what it left out. Raises ValueError where that is not what it
    was, and where the config names another model for it now.
    """
    for name, reference in self.references.items():
      place = named(self.config, name) if name in states.roles(self.config) else ''
      if place and place != reference['directory']:
        names.imported('workdir.changes.check_same_model')(name, reference, place, log)
    models = {
      name: _frozen(self.config, name, reference, log)
      for name, reference in self.references.items()
      if name in states.roles(self.config)  # which may have changed where that is allowed
    }
    models = _shared(self.config, joined(state.models, state.models | models), self.references)
    return dataclasses.replace(state, models=models)


def begin(
  config: Config, log: Callable[[str], Any], imported: str | os.PathLike = ''
) -> tuple[dict[str, Any], Frozen]:
  """The models that begin with a run's parameters, by name, on the mesh in context; and what of
  them is frozen.

  imported: the run's own directory where the main model was imported into it, as a checkpoint that
    later ones replace.
  Raises FileNotFoundError where there is no run, ValueError where it does not fit.
  """
  models, references, rule = {}, {}, states.rule(config)
  for name, role in states.roles(config).items():
    if role.adapter:
      models |= names.imported('workdir.adapted.begun')(config, models, imported, log)
      continue
    own = config.objective.main in (name, role.begun) and imported and not config.adapter.kind
    directory = imported if own else named(config, name)
    if not directory or role.made:
      continue
    if not own:
      check_base(directory)
    models[name], reference = read(config, name, directory, log, own)
    frozen = jax.tree.leaves(rule.parted({name: models[name]})[1])
    if frozen and not own:
      references[name] = reference
  return _shared(config, models, references), Frozen(config, references)


def named(config: Config, name: str) -> str:
  """The directory of the run that a model begins with, as the config names it; '' for none."""
  role = states.roles(config)[name]
  return config.init if config.objective.main in (name, role.begun) else role.directory


def check_base(directory) -> None:
  """Raises ValueError where no model begins with the run there, or its config is of another."""
  if names.imported('workdir.open.config_of')(directory).adapter.kind:
    names.imported('workdir.adapted.refuse_as_base')(directory)


def read(config: Config, name: str, directory: str, log, own: bool = False) -> tuple[Any, dict]:
  """A model with the parameters of the run there, and the reference of it.

  own: whether it is the run that goes on, whose files were looked at already.
  Raises ValueError where the tokenizer there, or where it ends texts, is not the model's.
  """
  log(
    f'beginning with the parameters of {directory}'
    + ('' if name == config.objective.main else f' as {name}')
  )
  checkpoints = Checkpoints(directory, log=log)
  step = checkpoints.latest()
  if not own:
    names.imported('workdir.open.check_own')(checkpoints.record(step), files.place(directory))
  model = checkpoints.model(_abstract(config, name), step)
  return _stored(model, states.roles(config)[name].stored), checkpoints.reference(step)


def _frozen(config, name, reference, log):
  """The frozen part of a model."""
  checkpoints = Checkpoints(reference['directory'], log=log)
  checkpoints.check(reference)
  _, part = states.rule(config).parted({name: _abstract(config, name)})
  model = checkpoints.model(part[name], reference['step'], some=True)
  return _stored(model, states.roles(config)[name].stored)


def _stored(model, how):
  return jax.jit(how, donate_argnums=0)(model) if how else model


def _abstract(config, name):
  """A model as the run that it comes from keeps it."""
  role = states.roles(config)[name]
  return params.abstract(
    lambda: transformer.init(role.config, config.train.seed), jax.sharding.get_mesh()
  )


def _shared(config, models, references):
  known = {
    name: (reference['digest'], states.roles(config)[name].stored)
    for name, reference in references.items()
    if name in models
  }
  return shared(models, known, states.rule(config))
