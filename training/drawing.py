"""What does a step draw? Keys for the rows of its batch, by which the models that it trains leave
out, or add noise to, what the config says (model/drawn.py).

Keys are made of a whole batch and cut with it: what a row draws is its own, in any microbatch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, UInt32

from kernels import draws
from model import adapters
from model.drawn import Drawn, put
from training import state as states
from training.config import Config
from training.state import TrainState

MODEL = 2**16  # what the number of a model is counted from: no site has it
BACKENDS = 'auto', 'blocked', 'reference'  # of attention, that hold its weights


class StepDraws:
  """What is drawn in the steps of a run.

  Raises NotImplementedError for adapted matrices whose input is nowhere by token.
  """

  def __init__(self, config: Config):
    self.config, self.roles = config, states.roles(config)
    if config.adapter.dropout:
      _check_adapter(config)

  def keys(self, state: TrainState, batch) -> UInt32[Array, 'B 2']:
    """Of the rows of a step's whole batch: the run's key folded with the step, and that with the
    row.
    """
    key = jax.random.wrap_key_data(state.key, impl='threefry2x32')
    key = jax.random.key_data(jax.random.fold_in(key, state.step))
    return draws.keys_of_rows(key, jax.tree.leaves(batch)[0].shape[0])

  def on(self, models: Mapping[str, Any], keys: UInt32[Array, 'B 2']) -> dict[str, Any]:
    """The models as they draw for these rows: those that are trained, themselves or by an adapter
    on them; each for itself.
    """
    adapted = self.config.adapter.kind and self.config.objective.main
    drawing = dict(models)
    for i, (name, role) in enumerate(self.roles.items()):
      if name in models and (role.trained or name == adapted) and not role.made:
        drawn = Drawn(
          keys=draws.folded(keys, MODEL, i),
          rates=self.config.dropout,
          adapter=self.config.adapter.dropout,
          neftune=self.config.objective.neftune_alpha,
        )
        drawing[name] = put(models[name], drawn)
    return drawing


def check(config: Config) -> None:
  """Raises NotImplementedError for what a run cannot draw."""
  dropout, network = config.dropout, config.model
  run = network.execution
  if dropout.attention and run.attention not in BACKENDS:
    raise NotImplementedError(
      f'train.dropout=attention={dropout.attention} with model.execution.attention='
      f'{run.attention!r}, which never holds the weights; use one of {list(BACKENDS)}, or leave it '
      'out'
    )
  if dropout.feed_forward and network.E:
    raise NotImplementedError(
      f'train.dropout=feed_forward={dropout.feed_forward} with model.moe.experts={network.E}: rows '
      'of experts lie in an order of their own; use residual, which is of what they give back'
    )
  drawn = {f'train.dropout={name}': rate for name, rate in dataclasses.asdict(dropout).items()}
  drawn['adapter.dropout'] = config.adapter.dropout
  drawn['objective.neftune_alpha'] = config.objective.neftune_alpha
  if run.pipeline.schedule == '1f1b':
    name = next(name for name, value in drawn.items() if value)
    raise NotImplementedError(
      f"{name}={drawn[name]} with model.execution.pipeline.schedule='1f1b', which computes forward "
      "passes of its own; use 'gpipe' or 'circular'"
    )


def _check_adapter(config: Config) -> None:
  model = jax.eval_shape(lambda: states.new_model(config, config.objective.main))
  for name, p in adapters.targets(model, config.adapter):
    if '.blocks.' not in name or 'experts' in p.axes or p.wide:
      raise NotImplementedError(
        f'adapter.dropout={config.adapter.dropout} of {name}, which is no matrix that every token '
        'of a layer is multiplied with; leave it out of adapter.targets, or use adapter.dropout=0'
      )
