"""What does training carry from step to step?"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from model import params, transformer
from parallel import offload
from training import precision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """A step takes one and returns a new one; its buffers are donated.

  Attributes:
    step: [] int32, updates that were tried (skipped ones count).
    model: the parameters; with train.offload_parameters the matrices of stacked layers in the host's memory.
    optimizer: the state of the optax transformation, sharded as the parameters are; in the host's memory with
      train.offload_optimizer='host'.
    scale: precision.LossScale; constant 1 unless the compute dtype is float16.
    key: [2] uint32, data of the run's random key; what a step draws, it draws from this folded with `step`.
  """

  step: Array
  model: Any
  optimizer: Any
  scale: Any
  key: Array


def init(
  config, optimizer: optax.GradientTransformation, model: transformer.Decoder | None = None
) -> TrainState:
  """The state before the first step, on the mesh in context; of a new model, or of the one given. Traced: use under jit or eval_shape."""
  model = transformer.init(config.model, config.train.seed) if model is None else model
  key = jax.random.key_data(jax.random.fold_in(jax.random.key(config.train.seed), 1))
  state = optimizer.init(model)
  state = offload.to_host(state) if config.train.offload_optimizer == 'host' else state
  if config.train.offload_parameters:

    def away(spec, p):
      return offload.to_host(p) if spec.kind == 'matrix' and spec.axes[0] == 'layers' else p

    model = jax.tree.map(away, params.specs(model), model)
  return TrainState(jnp.int32(0), model, state, precision.init_loss_scale(config.model.dtype), key)
