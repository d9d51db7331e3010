"""A table with rows behind its own, which are looked up and never scored: soft prompts.

V rows of the table · P rows behind them · D width
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from model.weights.above import Above, again


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Appended(Above):
  """The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs
  and placeholders.

  Attributes:
    base: the table, a Weight of any kind: as a matrix, and as a head that is tied to it, this is
      the table alone.
    soft: [P, D], a Weight whose rows are on every device: a few, which are read and added to by
      all.
    first: the id of its first row: how many rows the whole table has, of which a device may hold a
      part.
  """

  base: Any
  soft: Any
  first: int = dataclasses.field(metadata={'static': True})
  made_of = 'base', 'soft'

  @property
  def virtual(self):
    return range(self.first, self.first + self.soft.shape[0])

  def numbers(self, dtype):
    return self.base.numbers(dtype)

  def cut(self, axis, pieces):
    return Appended(self.base.cut(axis, pieces), again(self.soft, pieces), self.first)

  def whole(self, dtype, product=True):
    return self.base.whole(dtype, product)

  def product(self, formula, x, dtype, axes=None):
    return self.base.product(formula, x, dtype, axes)

  def rows(self, ids, mode=None):
    return self._chosen(ids, self.base.rows(jnp.where(ids < self.first, ids, 0), mode))

  def rows_here(self, ids, part):
    # The soft rows are whole everywhere: one part answers for them, so that the sum has each once.
    table = self.base.rows_here(ids, part)
    return jnp.where(part == 0, self._chosen(ids, table), table)

  def _chosen(self, ids, table):
    """Of the soft rows those that are meant, of the table the others."""
    soft = self.soft.rows(jnp.clip(ids - self.first, 0, self.soft.shape[0] - 1))
    return jnp.where((ids >= self.first)[..., None], soft, table)

  def scored(self, x, bias, dtype):
    return self.base.scored(x, bias, dtype)

  def scores(self, x, bias, dtype):
    return self.base.scores(x, bias, dtype)
