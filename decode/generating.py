"""In what form does a trained model generate? Its config and its weights, as every program of
generation takes them.
"""

import dataclasses

import jax

from kernels.blocks import Blocks
from model import params, rearranged, transformer
from model.config import ModelConfig
from model.weights import Weight, gathered, joined, scheme
from model.weights.turned import turned
from parallel import axes as ax


def generating(config: ModelConfig) -> ModelConfig:
  """The config with which a trained model generates."""
  # Which backend trained, in which blocks, is indifferent to the parameters, and not every one of
  # them can attend to a cache. What an expert has no room for would depend on a row's neighbours.
  moe = (
    dataclasses.replace(config.moe, dispatch='dropless')
    if config.moe.dispatch == 'capacity'
    else config.moe
  )
  return dataclasses.replace(
    config.with_execution(
      attention='auto', attention_blocks=Blocks(), remat='none', remat_save=(), remat_offload=()
    ),
    moe=moe,
  )


def generating_model(
  model: transformer.Decoder, weights: str = '', whole: bool = False
) -> transformer.Decoder:
  """The model as generation holds it: every layer by itself, but over pipeline stages,
  and in the compute dtype or in codes.

  whole: matrices that `fsdp` splits are gathered here, instead of at every token; tables and
    experts stay as they are.
  Raises ValueError for weights as model.weights.scheme.check_asked.
  """
  scheme.check_asked(model.config, weights)
  model = in_compute_dtype(model if ax.size('layers') > 1 else rearranged.unstacked(model))
  model = turned(scheme.everywhere(weights)(model) if weights else model)
  dtype = model.config.execution.dtype
  return joined(model, gathered(model, dtype), reduce=False) if whole else model


def in_compute_dtype(model: transformer.Decoder) -> transformer.Decoder:
  """The model, cast once, as `Weight.whole` would at every token; norms, biases and routers keep
  their own precision.
  """

  dtype = model.config.execution.dtype

  def cast(p):
    if p.kind == 'vector' or p.wide:
      return p
    value = p.get_value()
    return p.replace(value.cast(dtype) if isinstance(value, Weight) else value.astype(dtype))

  return jax.tree.map(cast, model, is_leaf=lambda x: isinstance(x, params.nnx.Param))
