"""How does a run generate while it trains? By the generator that generate.py has, with the
parameters as they are after a step.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax

import names
from data import generation
from data.tokenizer import Tokenizer
from decode.generating import generating
from decode.generator import Generator
from model import params, transformer
from training import state as states
from training.config import Config
from workdir import able


class InHand:
  """Makes a generator of the main model of a run, its adapter merged: a copy of the matrices in the
  compute dtype is in memory as long as that one is.
  """

  def __init__(
    self,
    config: Config,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    directory: str | os.PathLike,
  ):
    """directory: the run's. Raises NotImplementedError as workdir.able.check."""
    able.check(config, directory)
    self._config, self._main = config, config.objective.main
    tokenizer.generation = generation.read(directory)  # where its texts end
    self._tokenizer, self._mesh = tokenizer, mesh
    network = generating(config.model)
    if config.adapter.base:
      network = names.imported('workdir.adapted.untied')(network)
    with jax.set_mesh(mesh):
      abstract = params.abstract(lambda: _generating(config, network), mesh)
    self._structure = jax.tree.structure(abstract)

  def generator(self, models: Mapping[str, Any]) -> Generator:
    """Of the models as they are."""
    model = models[self._main]
    if self._config.adapter.kind:
      merged = names.imported('workdir.adapted.merged')
      model = merged(self._config, model, models[states.ADAPTER])
    model = jax.tree.unflatten(self._structure, jax.tree.leaves(model))
    return Generator(model, self._tokenizer, self._mesh)


def _generating(config: Config, network):
  """A model of a run as it generates, with its adapter merged. Traced."""
  model = transformer.init(network, 0)
  if not config.adapter.kind:
    return model
  adapter = states.new_adapter(config, model)
  return names.imported('model.adapters.merged')(model, adapter, config.adapter)
