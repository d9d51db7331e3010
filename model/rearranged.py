"""Which other forms does a model take? Every layer by itself, its first layers only: rearranged
leaves, of the same values.
"""

import dataclasses
import re
from collections.abc import Callable

import jax
from flax import nnx

from model.config import ModelConfig, MoEConfig
from model.transformer import Decoder


def unstacked(model: Decoder) -> Decoder:
  """The same model with every layer by itself (model.execution.scan=False): matrices lie where a
  product reads them, and none is cut out of a stack.

  Traceable; on the mesh that the model is on, in context.
  """
  config = model.config.with_execution(scan=False)
  stacked = stacked_names(model.config)
  model = jax.tree.map(lambda x: x, model)  # a copy, to be written to
  model.config = config
  for name in ('stack', *(['encoder'] if config.encoder_layers else [])):
    stack = getattr(model, name)
    layers = config.L // config.shared_layers if name == 'stack' else config.encoder_layers
    blocks = []
    for i in range(layers):
      place, repeat = stacked(f'{name}.blocks.{i}.')
      blocks.append(_layer(stack.blocks[int(place.split('.')[2])], repeat))
    stack.periods = config.stacks if name == 'stack' else config.encoder_stacks
    stack.blocks = nnx.List(blocks)
  return model


def _layer(block, repeat: int):
  """One layer of those that are stacked at a place."""

  def cut(x):
    return x if x.shape[0] == 1 else jax.lax.slice_in_dim(x, repeat, repeat + 1)

  return jax.tree.map(cut, block)


def stacked_names(config: ModelConfig) -> Callable[[str], tuple[str, int | None]]:
  """Where a leaf of an unstacked model is in the stacked one, of this config: its name there, and
  its index in the first dimension, or None where layers have no part in it.
  """
  places = {
    layer: (place, repeat)
    for place, (_, layers) in enumerate(config.places)
    for repeat, layer in enumerate(layers)
  }

  def stacked(name):
    stack, layer, rest = re.fullmatch(r'(?:(stack|encoder)\.blocks\.(\d+)\.)?(.*)', name).groups()
    if stack is None:
      return name, None
    if stack == 'encoder':
      place, repeat = (0, int(layer)) if config.execution.scan else (int(layer), 0)
      return f'encoder.blocks.{place}.{rest}', repeat
    # An unstacked model has a place for each set of parameters.
    place, repeat = places[int(layer) * config.shared_layers]
    return f'stack.blocks.{place}.{rest}', repeat // config.shared_layers

  return stacked


def shallow(model: Decoder, layers: int) -> Decoder:
  """The first layers of an unstacked model, with its final norm and head; nothing is copied.

  Raises ValueError for a stacked model, and for no layers or more than there are.
  """
  config = model.config
  if config.execution.scan or not 0 < layers <= config.L:
    raise ValueError(
      f'{layers} layers of model.layers={config.L}, '
      f'model.execution.scan={config.execution.scan}: take at least 1 and at most all of them, of '
      'a model whose layers are each by itself (unstacked)'
    )
  if layers % config.shared_layers:
    raise ValueError(
      f'{layers} layers of a model whose parameters are of model.shared_layers='
      f'{config.shared_layers} each: take a multiple of it'
    )
  moe = config.moe if any(kind.moe for kind in config.kinds[:layers]) else MoEConfig()
  model = jax.tree.map(lambda x: x, model)  # a copy, to be written to
  model.config = dataclasses.replace(config, layers=layers, moe=moe)
  model.stack.periods = model.config.stacks
  model.stack.blocks = nnx.List(list(model.stack.blocks)[: layers // config.shared_layers])
  return model
