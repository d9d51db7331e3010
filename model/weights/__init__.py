"""How is a matrix stored, and how is it read? One door for every product, look-up, expert and head.

`read(parameter)` is the door: a `Weight`, whatever the parameter's value is. weight.py says what
layers, experts, embedding and head may ask of it; each way of storing one is a file beside it.
"""

import jax
from flax import nnx

from model.params import is_param
from model.weights.gathered import Gathered
from model.weights.plain import Plain
from model.weights.weight import Weight


def read(p: nnx.Param) -> Weight:
  """The parameter as it is computed with; an array, which is how a model is trained, is `Plain`."""
  value = p.get_value()
  return value if isinstance(value, Weight) else Plain(value, p.axes)


def gathered(model, dtype: str):
  """The matrices that layers gather, whole and ready for the compute dtype; None for all else.

  Left out are tables and experts, which stay where they are or are used by those that hold them,
  what is computed with in f32, and what is `Gathered` already.
  """

  def whole(p):
    if p.kind != 'matrix' or 'embed' not in p.axes or p.wide or isinstance(read(p), Gathered):
      return None
    return read(p).gathered(dtype)

  return jax.tree.map(whole, model, is_leaf=is_param)


def joined(model, whole, reduce: bool = True):
  """The model that computes with `whole`, of `gathered`.

  reduce: whether gradients are reduced to shards where they arise.
  """

  def join(p, whole):
    return p if whole is None else p.replace(read(p).joined(whole) if reduce else whole)

  return jax.tree.map(join, model, whole, is_leaf=lambda x: x is None or is_param(x))


def of_rows(model, index):
  """The model as the rows of a call compute with it, each with an adapter of its own.

  index: [B] int32, as model.weights.bank.Bank has it; None for a model without adapters.
  """
  if index is None:
    return model

  def bind(p):
    value = p.get_value()
    return p.replace(value.of_rows(index)) if isinstance(value, Weight) else p

  return jax.tree.map(bind, model, is_leaf=is_param)


def adapters(model) -> int:
  """How many adapters rows of this model, which may be abstract, can have."""
  values = (p.get_value() for p in jax.tree.leaves(model, is_leaf=is_param))
  return max((value.adapters for value in values if isinstance(value, Weight)), default=0)
