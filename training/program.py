"""What does a run execute? Its state and its step, made from the config alone, so that they can be
planned, lowered, and begun.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax

import names
from model import params
from parallel import axes
from training import state as states
from training.config import Config
from training.optimizer import make_optimizer
from training.state import TrainState
from training.step import make_step
from training.trainable import joined


def make_program(config: Config):
  """(make_state, step): a function that makes the initial state of a run of this config (of models
  given: states.init), and its step.

  Raises ValueError for a pattern of train.trained or train.frozen that matches no parameter.
  """
  models = jax.eval_shape(
    lambda: {name: states.new_model(config, name) for name in states.roles(config)}
  )
  rule = states.rule(config)
  rule.check(models)
  optimizer = make_optimizer(
    config.optimizer, config.train.steps, params.specs(rule.parted(models)[0])
  )
  return functools.partial(states.init, config, optimizer), make_step(config, optimizer)


def make_target(config: Config, make_state, mesh: jax.sharding.Mesh, directory) -> TrainState:
  """Shapes and places of what make_state makes: on the mesh, in context, and on disk below
  `directory`.
  """
  state = params.abstract(make_state, mesh)
  if config.train.offload_optimizer == 'disk':
    return names.imported('training.spill.on_disk')(state, config.train.spill_dir or directory)
  return state


def begin_state(
  config: Config, make_state, target: TrainState, models: Mapping | None = None
) -> TrainState:
  """The first state, in the places of `target`; of the models given, whose trained part is donated,
  and new ones for the rest.
  """
  given = models or {}
  trained, frozen = states.rule(config).parted(given)

  def make(trained):
    state = make_state(trained)
    return (
      state
      if config.train.offload_optimizer != 'disk'
      else dataclasses.replace(state, optimizer=None)
    )

  state = jax.jit(make, donate_argnums=0)(trained)
  # What is frozen goes round the program, which would copy it.
  state = dataclasses.replace(
    state, models=state.models | joined({name: state.models[name] for name in given}, frozen)
  )
  if config.train.offload_optimizer != 'disk':
    return state
  return names.imported('training.spill.begin')(config, state, target)


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
  """Shapes and shardings of what a run of this config carries, on a mesh whose devices may be
  elsewhere.

  Raises ValueError for a batch or a size that the mesh does not divide, and for an open vocabulary;
    and what the
  objective raises for models that it does not take.
  """
  check_models(config)
  if not config.model.vocabulary:
    raise ValueError(
      "model.vocabulary=0 is the tokenizer's, which is not read here; set it, as in "
      "--config.model.vocabulary=50257"
    )
  config = config.resolve(config.model.vocabulary)
  config.check_mesh(dict(mesh.shape))
  with jax.set_mesh(mesh):
    return make_target(config, make_program(config)[0], mesh, '.')


def check_models(config: Config) -> None:
  """Raises NotImplementedError or ValueError where the objective does not take the run's models, or
  what they begin with.
  """
  networks = {
    name: role for name, role in states.roles(config).items() if not (role.adapter or role.made)
  }
  taken = {name: role.config for name, role in networks.items()}
  taken |= dict.fromkeys(states.references(config), taken[config.objective.main])
  if config.model.execution.stored and not config.adapter.kind:
    names.imported('training.together.refuse_codes')(config)
  config.objective.accepts(taken)
  config.objective.begins(config.init, config.adapter)
  if config.adapter.soft:
    names.imported('training.soft.check')(config)


def read(config: Config, log):
  """What the objective reads, behind the soft tokens that an adapter has: see Objective.read."""
  soft = names.imported('training.soft.ids')(config) if config.adapter.soft else {}
  return config.objective.read(config.data, log, **soft)


def lower_step(config: Config, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Lowered, TrainState]:
  """The step that a run of this config takes on a mesh, lowered, and the state that it takes;
  raises as abstract_state does.
  """
  state = abstract_state(config, mesh)
  config = config.resolve(config.model.vocabulary)
  with jax.set_mesh(mesh):
    batch = jax.tree.map(lambda x: placed(x, config), config.objective.batch_like(config.data))
    return make_program(config)[1].lower(state, batch), state


def placed(x: jax.ShapeDtypeStruct, config: Config) -> jax.ShapeDtypeStruct:
  """An array of a batch as hosts.RowShards lays it out on the mesh in context."""
  by_length = x.shape == (config.data.batch_size, config.data.sequence_length)
  spec = axes.spec('batch', *('length',) * by_length)
  return jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.NamedSharding(jax.sharding.get_mesh(), spec)
  )
