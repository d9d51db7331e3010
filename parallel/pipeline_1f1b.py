"""How does a 1F1B pipeline find a loss and its gradients in one loop?
Forward and backward passes of different microbatches run side by side.

The schedule (`pipeline.schedule_1f1b`) has three phases, each a scan of its own, so that no program
computes a direction in which no stage works:

    ticks                      forward  backward
    0     .. P - 2             yes      no         no microbatch has reached the last stage yet
    P - 1 .. M + P - 2         yes      yes        at each one leaves it, and turns around at once
    M + P - 1 .. M + 2 P - 3   no       yes        all are in; the last ones are on their way back

A microbatch enters stage p at tick m + p and its gradient leaves there at tick m + 2 (P - 1) - p:
meanwhile, of a stage, no more than 2 (P - 1) + 1 are under way (of the first one, which has most).
So what enters a stage is kept in 2 P - 1 places, microbatch m at m mod (2 P - 1), and its layers
are computed again from there in the backward pass.

M microbatches · P stages · R blocks (of layers that a scan repeats)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from parallel import axes as ax, stages as st
from parallel.pipeline import PipelineConfig, schedule_1f1b
from parallel.stages import AXIS, SPLIT


def gradients(first, layers, last, rest, blocks, rows, config: PipelineConfig):
  """A loss and its gradients.

  Args:
    first: (rest, part) -> x, what enters the blocks.
    layers: (blocks, x, part) -> (y, loss, reports), of any number of blocks and rows.
    last: (rest, y, part) -> (loss, sums). All losses, sums and reports are sums over rows.
    rest, blocks: parameters, those of the blocks [R, ...], split over `stage`.
    rows: pytree of [B, ...] arrays, not differentiated.
  Returns: (loss, sums, reports), and gradients of the loss for rest and blocks,
    added up in f32 or wider, in the parameters' dtypes.
  """
  stages = ax.size('layers')
  M = config.count(stages)
  parts = jax.tree.map(lambda a: st.split(a, M), rows)
  spread = jax.tree.map(lambda a: st.spread(a, stages), parts)
  loop = _Loop(first, layers, last, rest, blocks, parts, spread, stages)

  ticks = _ticks(*schedule_1f1b(stages, M))
  carry, (warm, _) = loop.phase(loop.start(), ticks, 0, stages - 1, down=True, up=False)
  carry, (steady, scored) = loop.phase(carry, ticks, stages - 1, M + stages - 1, True, True)
  carry, _ = loop.phase(carry, ticks, M + stages - 1, M + 2 * stages - 2, down=False, up=True)

  # Losses of the layers themselves (of experts) are of all stages, and of both phases that run
  # forward; the loss at the end is of the phase in which microbatches leave.
  inner, reports = jax.tree.map(lambda a, b: a.sum(0) + b.sum(0), warm, steady)
  loss, sums = jax.tree.map(lambda a: a.sum(0), scored)
  reports = jax.tree.map(lambda a: st.whole(a[None]), reports)
  d_rest, d_blocks = jax.tree.map(
    lambda total, a: total.astype(a.dtype), (carry.d_rest, carry.d_blocks), (rest, blocks)
  )
  return (loss + inner.sum(), sums, reports), (d_rest, d_blocks)


class Ticks(NamedTuple):
  """Of a 1F1B schedule: whose forward and backward pass each stage runs, [ticks, P]; of all stages
  together, whose enters the first one, leaves the last one, and ends its backward pass, [ticks];
  -1: none.
  """

  down: jax.Array
  up: jax.Array
  enters: jax.Array
  leaves: jax.Array
  ends: jax.Array


def _ticks(down: np.ndarray, up: np.ndarray) -> Ticks:
  tables = (ax.place(jnp.asarray(table), None, 'layers') for table in (down, up))
  return Ticks(*tables, *map(jnp.asarray, (down[:, 0], down[:, -1], up[:, 0])))


class Carry(NamedTuple):
  """What a tick hands to the next.

  Attributes:
    x: [P, ...], what the stage before has made, about to enter each stage.
    kept: [P, 2 P - 1, ...], what entered each stage, of the microbatches under way.
    d_y: [P, ...], gradients for what left each stage, as the stage behind it has found them.
    d_rest, d_blocks: gradients of the parameters, the sums so far.
  """

  x: jax.Array
  kept: jax.Array
  d_y: jax.Array
  d_rest: Any
  d_blocks: Any


@dataclasses.dataclass(frozen=True, eq=False)  # told apart by identity: it holds arrays
class _Loop:
  """The loop over ticks. Arguments as of `gradients`.

  Attributes:
    parts: the rows as [M, B / M, ...].
    spread: [P, M, B / M, ...], the same, for every stage to pick its own from.
  """

  first: Callable
  layers: Callable
  last: Callable
  rest: Any
  blocks: Any
  parts: Any
  spread: Any
  stages: int

  def start(self) -> Carry:
    """Before the first tick: zeros, of the shape of what `first` makes of a microbatch."""
    x = jnp.zeros_like(st.spread(self.first(self.rest, _part(self.parts, 0)), self.stages))
    kept = jnp.zeros(
      (self.stages, 2 * self.stages - 1, *x.shape[1:]),
      x.dtype,
      out_sharding=PartitionSpec(AXIS, None, *st.entries(x)[1:]) if ax.explicit() else None,
    )

    def wide(a):
      return jnp.zeros_like(a, jnp.promote_types(a.dtype, jnp.float32))

    d_rest, d_blocks = jax.tree.map(wide, (self.rest, self.blocks))
    return Carry(x, kept, x, d_rest, d_blocks)

  def phase(self, carry: Carry, ticks: Ticks, begin: int, end: int, down: bool, up: bool):
    """Ticks begin .. end - 1, in the directions that some stage works in.
    Returns: the carry, and [ticks, ...] of what `forward` and `score` give (None: not run).
    """
    tick = functools.partial(self.tick, down=down, up=up)
    return jax.lax.scan(tick, carry, jax.tree.map(lambda a: a[begin:end], ticks))

  def tick(self, carry: Carry, now: Ticks, down: bool, up: bool):
    """Every stage runs forward, what leaves the last one is scored, every stage runs backward."""
    made = scored = None
    d_last = jnp.zeros_like(carry.d_y)
    if down:
      carry, y, made = self.forward(carry, now)
    if down and up:
      carry, scored, d_last = self.score(carry, now, y)
    if up:
      carry = self.backward(carry, now, d_last)
    return carry, (made, scored)

  def forward(self, carry: Carry, now: Ticks):
    """Returns: the carry, [P, ...] what leaves each stage, (loss, reports) of its layers."""
    entering = st.spread(self.first(self.rest, _part(self.parts, now.enters)), self.stages)
    y, kept, loss, reports = st.each(self.stage_forward, (SPLIT,) * 6, SPLIT)(
      self.blocks, self.spread, entering, carry.x, carry.kept, now.down
    )
    return carry._replace(x=st.shift(y, self.stages, 1), kept=kept), y, (loss, reports)

  def stage_forward(self, blocks, parts, entering, x, kept, down):
    """One stage's own part, of size 1 in P, of arguments and results."""
    microbatch = down[0]
    busy = microbatch >= 0
    x = jnp.where(jax.lax.axis_index(AXIS) == 0, entering[0], x[0])
    y, loss, reports = self.layers(blocks, x, _own(parts, microbatch))

    # An idle stage puts back what is at the place that it would overwrite, and counts nothing.
    place = jnp.maximum(microbatch, 0) % len(kept[0])
    x = jnp.where(busy, x, st.at(kept[0], place))
    kept = jax.lax.dynamic_update_index_in_dim(kept[0], x, place, 0)
    loss, reports = jax.tree.map(lambda a: jnp.where(busy, a, 0), (loss, reports))
    return y[None], kept[None], loss[None], reports

  def score(self, carry: Carry, now: Ticks, y):
    """Returns: the carry, (loss, sums) of what left the last stage, and the loss's gradient for it,
    which starts the backward pass of that microbatch in this very tick.
    """
    score_of = jax.value_and_grad(self.last, (0, 1), has_aux=True)
    left = st.of_stage(y, self.stages - 1, 0)
    scored, (d_rest, d_y) = score_of(self.rest, left, _part(self.parts, now.leaves))
    carry = carry._replace(d_rest=_add(carry.d_rest, d_rest))
    return carry, scored, st.spread(d_y, self.stages)

  def backward(self, carry: Carry, now: Ticks, d_last) -> Carry:
    """Every stage's backward pass, and that of `first` for the microbatch that is back there."""
    d_blocks, d_x = st.each(self.stage_backward, (SPLIT,) * 6, SPLIT)(
      self.blocks, self.spread, carry.kept, carry.d_y, d_last, now.up
    )
    _, pull = jax.vjp(lambda rest: self.first(rest, _part(self.parts, now.ends)), self.rest)
    (d_rest,) = pull(st.of_stage(d_x, 0, 0))
    return carry._replace(
      d_y=st.shift(d_x, self.stages, -1),
      d_rest=_add(carry.d_rest, d_rest),
      d_blocks=_add(carry.d_blocks, d_blocks),
    )

  def stage_backward(self, blocks, parts, kept, d_y, d_last, up):
    """One stage's own part, of size 1 in P, of arguments and results."""
    microbatch = up[0]
    busy = microbatch >= 0
    x = st.at(kept[0], jnp.maximum(microbatch, 0) % len(kept[0]))
    part = _own(parts, microbatch)
    # After the forward pass of this tick, not beside it: XLA's CPU deadlocks on loops of
    # collectives that nothing orders but a barrier. Where d_last is not finite, no gradient is.
    x = x + 0 * d_last[0]
    _, pull = jax.vjp(lambda blocks, x: self.layers(blocks, x, part)[:2], blocks, x)
    d_y = jnp.where(jax.lax.axis_index(AXIS) == self.stages - 1, d_last[0], d_y[0])
    # The layers' own loss counts once for a microbatch. An idle stage's cotangents are zeros.
    d_blocks, d_x = pull((jnp.where(busy, d_y, 0), busy.astype(jnp.float32)))
    return d_blocks, d_x[None]


def _part(parts, microbatch):
  """Rows of a microbatch; of -1, none, those of the first."""
  return jax.tree.map(lambda a: st.at(a, jnp.maximum(microbatch, 0)), parts)


def _own(parts, microbatch):
  """The same of parts [1, M, ...], as a stage sees them."""
  return _part(jax.tree.map(lambda a: a[0], parts), microbatch)


def _add(totals, more):
  """Sums, in the dtypes of the totals."""
  return jax.tree.map(lambda total, a: total + a.astype(total.dtype), totals, more)
