"""What does training carry from step to step?"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import names
from model import params, transformer
from objectives.objective import Role
from parallel import offload
from training import precision
from training.config import network
from training.trainable import Rule, joined

ADAPTER = 'adapter'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """A step takes one and returns a new one; the buffers of what is trained are donated.

  Attributes:
    step: [] int32, updates that were tried (skipped ones count).
    models: by name, each with its own config; all that the objective takes, trained or frozen. With
      train.offload_parameters the trained matrices of stacked layers are in the host's memory.
    optimizer: the state of the optax transformation of what is trained, sharded as the parameters
      are; in the host's memory with train.offload_optimizer='host'.
    scale: precision.LossScale; constant 1 unless the compute dtype is float16.
    key: [2] uint32, data of the run's random key; what a step draws, it draws from this folded with
      `step`.
  """

  step: Array
  models: dict[str, Any]
  optimizer: Any
  scale: Any
  key: Array


def roles(config) -> dict[str, Role]:
  """The models that a run of this config holds, the main one first; an adapter of it last.

  What an objective takes as the main one began is not among them where an adapter leaves that as it
  is (`references`). Raises ValueError for adapter.base as model.weights.scheme.check_asked.
  """
  left_out = references(config)
  models = {
    name: dataclasses.replace(role, config=network(role, config.model))
    for name, role in config.objective.models(config.model).items()
    if name not in left_out
  }
  adapter, main = config.adapter, config.objective.main
  if not adapter.kind:
    return models
  stored = None
  if adapter.base:
    names.imported('model.weights.scheme.check_asked')(models[main].config, adapter.base)
    stored = names.imported('model.weights.scheme.everywhere')(adapter.base)
  base = dataclasses.replace(models[main], trained=False, stored=stored)
  return models | {main: base, ADAPTER: Role(base.config, adapter=adapter)}


def references(config) -> list[str]:
  """Names of what the objective takes as the main model began, and finds in an adapter's base."""
  taken = config.objective.models(config.model) if config.adapter.kind else {}
  return [
    name for name, role in taken.items() if role.begun == config.objective.main and not role.trained
  ]


def applied(config, models: Mapping[str, Any]) -> Mapping[str, Any]:
  """The models as the objective takes them: the adapter is on the one that it is of."""
  if not config.adapter.kind:
    return models
  others, main = dict(models), config.objective.main
  adapter = others.pop(ADAPTER)
  put = names.imported('model.adapters.applied')
  base = others[main]
  others |= dict.fromkeys(references(config), base)
  return others | {main: put(base, adapter, config.adapter)}


def rule(config) -> Rule:
  """Which parameters a run of this config trains."""
  whole = tuple(name for name, role in roles(config).items() if not role.trained)
  return Rule(config.train.trained, config.train.frozen, whole)


def new_model(config, name: str):
  """A model of the run as it would begin anew, on the mesh in context. Traced: use under jit or
  eval_shape.
  """
  everyone = roles(config)
  if everyone[name].adapter:
    return new_adapter(config, new_model(config, config.objective.main))
  # The main one, which is first, begins as it would alone, and a reference as what it is of.
  as_begun = everyone[name].begun or name
  seed = (config.train.seed + list(everyone).index(as_begun)) % 2**32
  if everyone[name].made:
    return everyone[name].made(everyone[name].config, seed)
  model = transformer.init(everyone[name].config, seed)
  return everyone[name].stored(model) if everyone[name].stored else model


def new_adapter(config, base, ids: Sequence[int] | None = None):
  """The adapter of a run of this config, on a base that may be abstract. Traced, as new_model.

  ids: of adapter.text, where it begins as a text.
  """
  key = jax.random.fold_in(jax.random.key(config.train.seed), 2)
  return names.imported('model.adapters.new')(base, config.adapter, key, ids)


def init(
  config, optimizer: optax.GradientTransformation, models: Mapping[str, Any] | None = None
) -> TrainState:
  """The state before the first step, on the mesh in context; of the models given, and new ones for
  the rest.

  What is None in a given model is None in the state. Traced: use under jit or eval_shape.
  """
  given = models or {}
  models = {
    name: given[name] if name in given else new_model(config, name) for name in roles(config)
  }
  key = jax.random.key_data(jax.random.fold_in(jax.random.key(config.train.seed), 1))
  trained, frozen = rule(config).parted(models)
  moments = optimizer.init(trained)
  if config.train.offload_optimizer == 'host':
    moments = offload.to_host(moments)
  if config.train.offload_parameters:

    def away(spec, p):
      return offload.to_host(p) if spec.kind == 'matrix' and spec.axes[0] == 'layers' else p

    trained = jax.tree.map(away, params.specs(trained), trained)
  scale = precision.init_loss_scale(config.model.execution.dtype)
  return TrainState(jnp.int32(0), joined(trained, frozen), moments, scale, key)
