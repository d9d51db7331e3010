"""When does which stage work on what? Layers split over the mesh axis `stage`,
and microbatches that flow through the stages.

A schedule is a table: at every tick, each stage runs its layers once, on one microbatch, or is
idle. The loop that follows the table is written over all stages at once: what a stage works on is
one entry of a leading dimension P that is split over `stage`. Inside a tick every stage is on its
own (`stages.each`); between ticks activations move to the next stage (`stages.shift`). All other
mesh axes stay as they are, so that layers are written as if there were no pipeline. An idle stage
computes, too: what it makes is used nowhere.

    gpipe      microbatch m is at stage p at tick m + p (Huang et al., arXiv:1811.06965)
    circular   every stage holds `repeats` runs of layers, and microbatches go round as often,
               P after P (the interleaved schedule of Narayanan et al., arXiv:2104.04473, section
               2.2)
    1f1b       backward passes begin as soon as they can, so that what is kept for them is of at
               most 2 P - 1 microbatches, however many there are (Narayanan et al.,
               arXiv:1806.03377, section 3.2; here a stage's tick holds one of each direction); its
               loop is in parallel/pipeline_1f1b.py

B batch · M microbatches · P stages · R blocks (of layers that a scan repeats) · v repeats
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import names
from parallel import axes as ax, stages as st
from parallel.stages import AXIS, OF_REPEATS, SPLIT

SCHEDULES = ('gpipe', 'circular', '1f1b')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
  """How microbatches flow through the stages; without effect where mesh.stage=1.

  Attributes:
    schedule: 'gpipe', 'circular', '1f1b': see the head of this file. '1f1b' keeps only what enters
      a stage and computes its layers again in the backward pass, whatever remat says of each of
      them; what has no backward pass runs as in 'gpipe'.
    microbatches: M that a batch is split into, its rows dealt out one by one; 0: as many as there
      are stages. What looks at a whole batch (capacity of experts) looks at a microbatch. With
      remat='none' a stage (but of '1f1b') gathers weights once a step and keeps them whole, those
      of experts once for every microbatch; with another, for every microbatch and layer, forward
      and again backward.
    repeats: runs of layers of a stage; more than 1 in, and only in, the circular schedule, which
      moves parameters between stages once a step, and gradients back, so that checkpoints keep the
      order of layers.

  Raises ValueError when a value is impossible.
  """

  schedule: str = 'gpipe'
  microbatches: int = 0
  repeats: int = 1

  def __post_init__(self):
    names.check('model.execution.pipeline.schedule', self.schedule, SCHEDULES)
    if self.microbatches < 0:
      raise ValueError(
        f'model.execution.pipeline.microbatches={self.microbatches} must be at least 1, '
        'or 0 for as many as there are stages'
      )
    if self.repeats < 1 or (self.repeats > 1) != (self.schedule == 'circular'):
      raise ValueError(
        f'model.execution.pipeline.repeats={self.repeats} does not suit '
        f"model.execution.pipeline.schedule={self.schedule!r}: 'circular' takes 2 or more, the "
        'others 1'
      )

  def count(self, stages: int) -> int:
    """M on so many stages.
    Raises ValueError for a circular schedule whose rounds would not be full.
    """
    M = self.microbatches or stages
    if self.repeats > 1 and M % stages:
      raise ValueError(
        f'model.execution.pipeline.microbatches={M} is not a multiple of mesh.stage={stages}: in '
        "the 'circular' schedule as many microbatches as stages go round together; "
        "make it a multiple, or use 'gpipe'"
      )
    return M

  def bubble(self, stages: int) -> float:
    """The share of a step's ticks at which a stage is idle:
    (P - 1) / (v M + P - 1), forward and backward alike.
    """
    return (stages - 1) / (self.repeats * self.count(stages) + stages - 1)


class Schedule(NamedTuple):
  """A schedule: what each stage works on at each tick, int32 [ticks, P] each.

  Attributes: microbatch, -1 where the stage is idle; repeat: which of the stage's runs of layers.
  """

  microbatch: np.ndarray
  repeat: np.ndarray


def schedule(stages: int, microbatches: int, repeats: int = 1) -> Schedule:
  """The forward pass; the backward pass is the same, mirrored."""
  busy = microbatches * repeats
  ticks = np.arange(busy + stages - 1, dtype=np.int32)[:, None]
  # A stage is one tick behind the stage before it: this is the how manieth of its busy ticks.
  nth = ticks - np.arange(stages, dtype=np.int32)[None]
  idle = (nth < 0) | (nth >= busy)

  # P microbatches at a time go round: all P through run 0 of this stage, then all P through run 1,
  # and so on; then the next P. By the time the last of the P has left, the first is back.
  turn, in_group = np.divmod(nth, stages)
  group, repeat = np.divmod(turn, repeats)
  return Schedule(np.where(idle, -1, group * stages + in_group), np.where(idle, 0, repeat))


def schedule_1f1b(stages: int, microbatches: int) -> tuple[np.ndarray, np.ndarray]:
  """Whose forward pass, and whose backward pass, each stage runs at each tick,
  int32 [ticks, P] each; -1: none.

  No stage runs forward in the last P - 1 ticks, and none backward in the first P - 1.
  """
  t = np.arange(microbatches + 2 * (stages - 1), dtype=np.int32)[:, None]
  p = np.arange(stages, dtype=np.int32)[None]
  # Down: stage p has microbatch m at tick m + p. The last stage, P - 1, goes on with its backward
  # pass at that very tick, m + P - 1, and a stage p is P - 1 - p further up: m + 2 (P - 1) - p.
  down, up = t - p, t - 2 * (stages - 1) + p
  return tuple(np.where((m >= 0) & (m < microbatches), m, -1) for m in (down, up))


def split_scan(periods) -> int:
  """Which of a stack's scans ((period of kinds, repeats), ...) is split over the stages: the one
  with most layers, the first of these.

  The layers of all others are not split: every stage runs them on every microbatch, before or
  after, as it does embedding and norm.
  """
  sizes = [len(kinds) * repeats for kinds, repeats in periods]
  return sizes.index(max(sizes))


def check(field: str, periods, config: PipelineConfig, stages: int) -> None:
  """Raises ValueError where the layers that config field `field` counts do not split evenly, or
  microbatches do not suit the schedule.
  """
  kinds, blocks = periods[split_scan(periods)]
  if blocks % (stages * config.repeats):
    counted = 'layers' if len(kinds) == 1 else f'repeats of a period of {len(kinds)} layers'
    raise ValueError(
      f'{field}: {blocks} {counted} do not split over mesh.stage={stages} x '
      f'model.execution.pipeline.repeats={config.repeats}; make them a multiple, '
      'or the stages or repeats fewer'
    )
  config.count(stages)


def describe(periods, config: PipelineConfig, stages: int) -> str:
  """A line about the schedule and its cost, for a run's log."""
  M, chosen = config.count(stages), split_scan(periods)
  outside = sum(len(kinds) * repeats for i, (kinds, repeats) in enumerate(periods) if i != chosen)
  rounds = f' x {config.repeats} repeats' if config.repeats > 1 else ''
  line = (
    f'pipeline: {config.schedule}, {stages} stages x {M} microbatches{rounds}, '
    f'bubble {config.bubble(stages):.1%}'
  )
  if config.repeats > 1:
    line += f' (without repeats {(stages - 1) / (M + stages - 1):.1%})'
  return line + (f'; {outside} layers are not split: every stage runs them' if outside else '')


def run(layers, blocks, x, shared, whole, config: PipelineConfig):
  """All blocks, one after another, on all rows, over the stages of the mesh in context.

  Args:
    layers: (blocks, x, shared, whole) -> (y, reports), of any number of blocks and rows;
      reports hold, per block, sums over rows.
    blocks: pytree of [R, ...] arrays, split over `stage`.
    x: [B, ...].
    shared: pytree of [B, ...] arrays that all blocks see.
    whole: pytree of arrays without rows that all blocks see.
  Returns: y, laid out as x, and reports of all blocks, summed over microbatches.
  Raises ValueError when the rows do not split into microbatches.
  """
  stages, v = ax.size('layers'), config.repeats
  M = config.count(stages)
  parts = jax.tree.map(lambda a: st.spread(st.split(a, M), stages), (x, shared))
  whole = jax.tree.map(lambda a: st.spread(a, stages), whole)
  # [v, R / v, ...]: the runs of layers of a stage come first, to be chosen from at every tick.
  if v == 1:
    blocks = jax.tree.map(lambda a: a[None], blocks)
  else:
    blocks = st.deal(blocks, stages, v)

  def stage(blocks, parts, whole, state, slot):
    """What one stage does in a tick; of each argument it sees its own part, of size 1 in P."""
    microbatch, repeat = slot.microbatch[0], slot.repeat[0]
    # The first run of the first stage takes a microbatch in; all others go on with what was shifted
    # to them. An idle stage (-1) computes on microbatch 0, and none of it counts.
    fed, shared = jax.tree.map(lambda a: st.at(a[0], jnp.maximum(microbatch, 0)), parts)
    x = jnp.where((jax.lax.axis_index(AXIS) == 0) & (repeat == 0), fed, state[0])
    y, reports = layers(
      jax.tree.map(lambda a: a[0] if v == 1 else st.at(a, repeat), blocks),
      x,
      shared,
      jax.tree.map(lambda a: a[0], whole),
    )
    # Reports of this run of layers go to its place among the v, zeros to the others.
    counted = (jnp.arange(v) == repeat) & (microbatch >= 0)

    def placed(report):
      return jnp.where(jnp.expand_dims(counted, range(1, report.ndim + 1)), report[None], 0)

    return y[None], jax.tree.map(placed, reports)

  def tick(state, slot):
    y, reports = st.each(stage, (OF_REPEATS, SPLIT, SPLIT, SPLIT, SPLIT), (SPLIT, OF_REPEATS))(
      blocks, parts, whole, state, slot
    )
    return st.shift(y, stages, 1), (y, reports)

  slots = jax.tree.map(lambda a: ax.place(jnp.asarray(a), None, 'layers'), schedule(stages, M, v))
  _, (y, reports) = jax.lax.scan(tick, jnp.zeros_like(parts[0][:, 0]), slots)
  # y [ticks, P, ...]: a microbatch leaves the last stage after its last repeat; those of a round
  # one after another. The last stage is idle for the first P - 1 ticks, and then has in turn, for
  # each group of `together` microbatches, its v runs of them all: the last run is what is wanted.
  together = stages if v > 1 else 1
  y = st.reshape(y[stages - 1 :], (M // together, v, together), 1)[:, -1]
  y = st.merge(st.of_stage(st.reshape(y, (M,), 2), stages - 1, 1))
  return y, jax.tree.map(lambda a: st.whole(a.sum(0)), reports)


def relay(layers, blocks, x, kept, shared):
  """All blocks on one microbatch that leaves something behind in every stage (a cache),
  which need not be differentiated.

  Args:
    layers: (blocks, x, kept, shared, active) -> (y, kept, reports);
      where `active` is not true, kept is to come back as it was.
    blocks, kept: pytrees of arrays split over `stage` in their first dimension.
    x: [B, ...].
    shared: pytree that all blocks see.
  Returns: y, kept, and reports of all blocks. One stage works at a time: a bubble of (P - 1) / P.
  """
  stages = ax.size('layers')
  shared = jax.tree.map(lambda a: st.spread(a, stages), shared)

  def stage(blocks, shared, state, kept, microbatch):
    active = microbatch[0] >= 0
    y, kept, reports = layers(blocks, state[0], kept, jax.tree.map(lambda a: a[0], shared), active)
    return y[None], kept, jax.tree.map(lambda a: jnp.where(active, a, 0)[None], reports)

  def tick(carry, microbatch):
    y, kept, reports = st.each(stage, (SPLIT,) * 5, (SPLIT, SPLIT, OF_REPEATS))(
      blocks, shared, *carry, microbatch
    )
    return (st.shift(y, stages, 1), kept), reports

  turns = ax.place(jnp.asarray(schedule(stages, 1).microbatch), None, 'layers')
  (y, kept), reports = jax.lax.scan(tick, (st.spread(x, stages), kept), turns)
  # What left the last stage at the last tick has come round to the first.
  return st.of_stage(y, 0, 0), kept, jax.tree.map(lambda a: st.whole(a.sum(0)), reports)


def inside() -> bool:
  """Whether what is traced is a stage's own part."""
  mesh = jax.sharding.get_abstract_mesh()
  return AXIS in mesh.manual_axes
