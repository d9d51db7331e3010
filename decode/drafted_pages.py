"""How do rows that draft share one pool of pages? As decode.drafted and decode.paged have it: what
a step writes of rejected drafts lies in pages that are the row's, and is written over there.

A row has pages for the most that its steps may write, up to its own end, behind which nothing is
judged. While it waits, every step of the others goes over what its drafter remembers, and over the
law that its last step rejected: both are put aside, as the next token depends on them.

B rows
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from decode.drafted import DraftingEngine
from decode.paged import PagedEngine
from decode.speculative import Speculation
from parallel import axes as ax


class DraftingPagedEngine(PagedEngine, DraftingEngine):
  """Sizes.lookup and Sizes.pages."""

  def reset(self) -> None:
    self._kept_drafts: Any = None  # before there is room for others
    super().reset()
    if self.sizes.host_pages:
      self._kept_drafts = self._run('no drafts')

  def _wait(self, leaving: jax.Array, returning: jax.Array) -> None:
    super()._wait(leaving, returning)
    self._drafts, self._kept_drafts = self._run(
      'hold drafts', self._drafts, self._kept_drafts, leaving, returning
    )

  def _holder(self) -> None:
    super()._holder()
    if 'hold drafts' not in self._programs:
      masks = [self._put(np.zeros(self.sizes.rows, bool)) for _ in range(2)]
      self._programs['hold drafts'] = self._compiled(
        hold_drafts, self._drafts, self._kept_drafts, *masks
      )


@functools.partial(jax.jit, donate_argnums=(0, 1))
def hold_drafts(
  drafts: Speculation, kept: Speculation, leaving: Bool[Array, 'B'], returning: Bool[Array, 'B']
) -> tuple[Speculation, Speculation]:
  """Drafts of all rows with those of rows that return, and what is kept with those of rows that
  leave.
  """

  def chosen(rows, some, others):
    def of(rows, x, y):
      return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    axes = ('batch', *(None,) * (some.ndim - 1))
    return ax.local(of, (('batch',), axes, axes), axes)(rows, some, others)

  def each(rows, some, others):
    return jax.tree.map(functools.partial(chosen, rows), some, others)

  return each(returning, kept, drafts), each(leaving, drafts, kept)
