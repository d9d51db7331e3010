"""What is a weight on top of another? It looks as that one does, and all that is done to a weight
as a whole is done to each of those that it is made of.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.weights.weight import Weight


class Above(Weight):
  """A dataclass with a field `base`, the weight below.

  Attributes:
    made_of: names of all fields that are weights, or None.
  """

  made_of = ('base',)
  base: Any

  @property
  def axes(self):
    return self.base.axes

  @property
  def shape(self):
    return self.base.shape

  @property
  def dtype(self):
    return self.base.dtype

  @property
  def coded(self):
    return self.base.coded

  def layout(self):
    return self._each(lambda weight: weight.layout())

  def cast(self, dtype):
    return self._each(lambda weight: weight.cast(dtype))

  def gathered(self, dtype):
    return self._each(lambda weight: weight.gathered(dtype))

  def here(self, shards, dtype):
    return self._each(lambda weight: weight.here(shards, dtype))

  def _each(self, function: Callable[[Weight], Any]):
    """With every weight in it replaced."""
    weights = {name: getattr(self, name) for name in self.made_of}
    replaced = {name: weight and function(weight) for name, weight in weights.items()}
    return dataclasses.replace(self, **replaced)


def again(weight, pieces: int):
  """As `cut` gives a weight of which every piece has all."""
  return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (pieces, *x.shape)), weight)
