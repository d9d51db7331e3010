"""A matrix as an array of its numbers: how models are trained."""

import dataclasses
from typing import Any

import jax

from model.weights.gathered import Gathered
from model.weights.weight import Weight, along, gathered_here, in_pieces
from parallel import axes as ax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plain(Weight):
  """Attributes:
  value: the array; Any because JAX rebuilds registered dataclasses with tracers and placeholders.
  """

  value: Any
  axes: tuple[str | None, ...] = dataclasses.field(metadata={'static': True})

  @property
  def shape(self):
    return self.value.shape

  @property
  def dtype(self):
    return self.value.dtype

  def numbers(self, dtype):
    return self.value.astype(dtype)

  def layout(self):
    return Plain(self.axes, self.axes)

  def gathered(self, dtype):
    return Plain(ax.gather(self.value.astype(dtype), *along(self.axes, self.value)), self.axes)

  def joined(self, whole):
    return Gathered(self.value, whole.numbers(whole.dtype), self.axes)

  def here(self, shards, dtype):
    return Plain(gathered_here(self.value.astype(dtype), self.axes, shards), self.axes)

  def cut(self, axis, pieces):
    return Plain(in_pieces(self.value, axis, pieces), self.axes)

  def rows(self, ids, mode=None):
    return self.value.at[ids].get(mode=mode)
