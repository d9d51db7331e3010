"""When does which stage work on what? Layers split over the mesh axis `stage`, and microbatches that flow through the stages.

A schedule is a table: at every tick, each stage runs its layers once, on one microbatch, or is idle. The loop that follows the table
is written over all stages at once: what a stage works on is one entry of a leading dimension P that is split over `stage`. Inside a
tick every stage is on its own (`_each`); between ticks activations move to the next stage (`_shift`). All other mesh axes stay as they
are, so that layers are written as if there were no pipeline. An idle stage computes, too: what it makes is used nowhere.

    gpipe      microbatch m is at stage p at tick m + p (Huang et al., arXiv:1811.06965)
    circular   every stage holds `repeats` runs of layers, and microbatches go round as often, P after P (the interleaved schedule of
               Narayanan et al., arXiv:2104.04473, section 2.2)

B batch · M microbatches · P stages · R blocks (of layers that a scan repeats) · v repeats
"""
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import names
from parallel import axes as ax

AXIS = 'stage'
SCHEDULES = ('gpipe', 'circular')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
  """How microbatches flow through the stages; without effect where mesh.stage=1.

  Attributes:
    schedule: 'gpipe', 'circular': see the head of this file.
    microbatches: M that a batch is split into, its rows dealt out one by one; 0: as many as there are stages.
    repeats: runs of layers of a stage; more than 1 in, and only in, the circular schedule.

  Raises ValueError when a value is impossible.
  """
  schedule: str = 'gpipe'
  microbatches: int = 0
  repeats: int = 1

  def __post_init__(self):
    names.check('model.pipeline.schedule', self.schedule, SCHEDULES)
    if self.microbatches < 0:
      raise ValueError(f'model.pipeline.microbatches={self.microbatches} must be at least 1, or 0 for as many as there are stages')
    if self.repeats < 1 or (self.repeats > 1) != (self.schedule == 'circular'):
      raise ValueError(f'model.pipeline.repeats={self.repeats} does not suit model.pipeline.schedule={self.schedule!r}: '
                       "'circular' takes 2 or more, the others 1")

  def count(self, stages: int) -> int:
    """M on so many stages. Raises ValueError for a circular schedule whose rounds would not be full."""
    M = self.microbatches or stages
    if self.repeats > 1 and M % stages:
      raise ValueError(f"model.pipeline.microbatches={M} is not a multiple of mesh.stage={stages}: in the 'circular' schedule as many "
                       "microbatches as stages go round together; make it a multiple, or use 'gpipe'")
    return M

  def bubble(self, stages: int) -> float:
    """The share of a step's ticks at which a stage is idle: (P - 1) / (v M + P - 1), forward and backward alike."""
    return (stages - 1) / (self.repeats * self.count(stages) + stages - 1)


class Slots(NamedTuple):
  """A schedule: what each stage works on at each tick, int32 [ticks, P] each.

  Attributes: microbatch, -1 where the stage is idle; repeat: which of the stage's runs of layers.
  """
  microbatch: np.ndarray
  repeat: np.ndarray


def schedule(stages: int, microbatches: int, repeats: int = 1) -> Slots:
  """The forward pass; the backward pass is the same, mirrored."""
  busy = microbatches * repeats
  k = np.arange(busy + stages - 1, dtype=np.int32)[:, None] - np.arange(stages, dtype=np.int32)[None]
  idle = (k < 0) | (k >= busy)
  turn, k = np.divmod(k, stages)
  group, repeat = np.divmod(turn, repeats)
  return Slots(np.where(idle, -1, group * stages + k), np.where(idle, 0, repeat))


def split_scan(periods) -> int:
  """Which of a stack's scans ((period of kinds, repeats), ...) is split over the stages: the one with most layers, the first of these.

  The layers of all others are not split: every stage runs them on every microbatch, before or after, as it does embedding and norm.
  """
  sizes = [len(kinds) * repeats for kinds, repeats in periods]
  return sizes.index(max(sizes))


def check(periods, config: PipelineConfig, stages: int) -> None:
  """Raises ValueError where layers do not split evenly, or microbatches do not suit the schedule."""
  kinds, blocks = periods[split_scan(periods)]
  if blocks % (stages * config.repeats):
    what = 'layers' if len(kinds) == 1 else f'repeats of a period of {len(kinds)} layers'
    raise ValueError(f'{blocks} {what} do not split over mesh.stage={stages} x model.pipeline.repeats={config.repeats}; make '
                     'model.layers a multiple, or the stages or repeats fewer')
  config.count(stages)


def describe(periods, config: PipelineConfig, stages: int) -> str:
  """A line about the schedule and its cost, for a run's log."""
  M, chosen = config.count(stages), split_scan(periods)
  outside = sum(len(kinds) * repeats for i, (kinds, repeats) in enumerate(periods) if i != chosen)
  rounds = f' x {config.repeats} repeats' if config.repeats > 1 else ''
  line = f'pipeline: {config.schedule}, {stages} stages x {M} microbatches{rounds}, bubble {config.bubble(stages):.1%}'
  if config.repeats > 1:
    line += f' (without repeats {(stages - 1) / (M + stages - 1):.1%})'
  return line + (f'; {outside} layers are not split: every stage runs them' if outside else '')


def run(layers, blocks, x, shared, whole, config: PipelineConfig):
  """All blocks, one after another, on all rows, over the stages of the mesh in context.

  Args:
    layers: (blocks, x, shared, whole) -> (y, reports), of any number of blocks and rows; reports hold, per block, sums over rows.
    blocks: pytree of [R, ...] arrays, split over `stage`. x: [B, ...]. shared: pytree of [B, ...] arrays that all blocks see.
    whole: pytree of arrays without rows that all blocks see.
  Returns: y, laid out as x, and reports of all blocks, summed over microbatches.
  Raises ValueError when the rows do not split into microbatches.
  """
  stages, v = ax.size('layers'), config.repeats
  M = config.count(stages)
  parts, whole = jax.tree.map(lambda a: _spread(_split(a, M), stages), (x, shared)), jax.tree.map(lambda a: _spread(a, stages), whole)
  blocks = jax.tree.map(lambda a: a[None], blocks) if v == 1 else _deal(blocks, stages, v)

  def one(blocks, parts, whole, state, slot):
    microbatch, repeat = slot.microbatch[0], slot.repeat[0]
    fed, shared = jax.tree.map(lambda a: _at(a[0], jnp.maximum(microbatch, 0)), parts)
    x = jnp.where((jax.lax.axis_index(AXIS) == 0) & (repeat == 0), fed, state[0])
    y, reports = layers(jax.tree.map(lambda a: a[0] if v == 1 else _at(a, repeat), blocks), x, shared,
                        jax.tree.map(lambda a: a[0], whole))
    counted = (jnp.arange(v) == repeat) & (microbatch >= 0)
    return y[None], jax.tree.map(lambda a: jnp.where(jnp.expand_dims(counted, range(1, a.ndim + 1)), a[None], 0), reports)

  def tick(state, slot):
    y, reports = _each(one, (OF_REPEATS, SPLIT, SPLIT, SPLIT, SPLIT), (SPLIT, OF_REPEATS))(blocks, parts, whole, state, slot)
    return _shift(y, stages, 1), (y, reports)

  slots = jax.tree.map(lambda a: ax.place(jnp.asarray(a), None, 'layers'), schedule(stages, M, v))
  _, (y, reports) = jax.lax.scan(tick, jnp.zeros_like(parts[0][:, 0]), slots)
  # A microbatch leaves the last stage after its last repeat; those of a round one after another.
  together = stages if v > 1 else 1
  y = _reshape(y[stages - 1:], (M // together, v, together), 1)[:, -1]
  return _merge(_from(_reshape(y, (M,), 2), stages - 1, 1)), jax.tree.map(lambda a: _whole(a.sum(0)), reports)


SPLIT, OF_REPEATS = PartitionSpec(AXIS), PartitionSpec(None, AXIS)


def _each(function, inputs, outputs):
  """`function` run by every stage on its own part; inside, all other mesh axes are as outside."""
  return jax.shard_map(function, in_specs=inputs, out_specs=outputs, axis_names={AXIS}, check_vma=False)


def _shift(x, stages, by):
  """[P, ...]: what stage p holds goes to stage p + by, from the last one to the first."""
  pairs = [(p, (p + by) % stages) for p in range(stages)]
  return _each(lambda x: jax.lax.ppermute(x, AXIS, pairs), SPLIT, SPLIT)(x)


def _from(x, stage, axis):
  """What `stage` holds of x, whose dimension `axis` counts stages, on all of them."""
  held = jax.lax.broadcasted_iota(jnp.int32, [n if i == axis else 1 for i, n in enumerate(x.shape)], axis)
  return jax.lax.reduce(jnp.where(held == stage, x, 0), jnp.zeros((), x.dtype), jax.lax.add, (axis,))


def _spread(x, stages):
  """[P, ...]: x, one for each stage. So that the gradient is summed over stages once, and not at every tick."""
  if ax.explicit():
    return jax.lax.broadcast(x, (stages,), out_sharding=PartitionSpec(AXIS, *_entries(x)))
  free = [PartitionSpec.UNCONSTRAINED] * x.ndim
  return jax.lax.with_sharding_constraint(jax.lax.broadcast(x, (stages,)), PartitionSpec(AXIS, *free))


def _split(x, M):
  """[M, B / M, ...] of [B, ...]: strided, so that every device's rows stay on it."""
  B, devices = x.shape[0], ax.size('batch')
  if B % (M * devices):
    raise ValueError(f'{B} rows do not split into model.pipeline.microbatches={M} on {devices} devices of data, fsdp and expert; make '
                     'the batch a multiple of both, or the microbatches fewer')
  return jnp.moveaxis(_reshape(x, (B // M, M), 1, split=True), 1, 0)


def _merge(x):
  """The inverse of `_split`."""
  entries = _entries(x)
  sharding = PartitionSpec(*entries[1:]) if ax.explicit() else None
  return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:], out_sharding=sharding)


def _deal(blocks, stages, v):
  """[v, R / v, ...], split over stages in its second dimension, of [R, ...], split in its first.

  Stage q holds chunks q v .. q v + v - 1 of R / (P v) blocks each; stage p is to hold chunks p, P + p, 2 P + p, ... In each of v rounds
  every stage sends one chunk and receives one. So checkpoints keep the order of layers, whatever the schedule; a step pays for it
  with moving the parameters once, and their gradients back.
  """
  apart = math.gcd(v, stages)
  rounds = []
  for i in range(v):
    sent = [q * v + (i + q // (stages // apart)) % v for q in range(stages)]  # no two of a round have the same destination
    slots = {chunk % stages: chunk // stages for chunk in sent}
    rounds.append(([chunk % v for chunk in sent], [(q, chunk % stages) for q, chunk in enumerate(sent)], [slots[p] for p in range(stages)]))

  def one(x):
    x = x.reshape(v, -1, *x.shape[1:], out_sharding=PartitionSpec(None, *_entries(x)) if ax.explicit() else None)
    stage, dealt = jax.lax.axis_index(AXIS), jnp.zeros_like(x)
    for send, pairs, put in rounds:
      chunk = jax.lax.ppermute(_at(x, jnp.asarray(send)[stage]), AXIS, pairs)
      dealt = jax.lax.dynamic_update_index_in_dim(dealt, chunk, jnp.asarray(put)[stage], 0)
    return dealt
  return _each(lambda blocks: jax.tree.map(one, blocks), SPLIT, OF_REPEATS)(blocks)


def _whole(x):
  """A report [v, R / v, ...] as [R, ...], on all stages."""
  if ax.explicit():
    x = jax.sharding.reshard(x, PartitionSpec(None, None, *_entries(x)[2:]))
  return _reshape(x, (-1,), 2)


def _at(x, index):
  return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _entries(x):
  """What splits each dimension of an array on an explicit mesh."""
  entries = tuple(jax.typeof(x).sharding.spec)
  return entries + (None,) * (x.ndim - len(entries))


def _reshape(x, shape, dims, split=False):
  """x with `shape` in the place of its first `dims` dimensions, which are not split; `split`: the first of them is, and stays so."""
  if not ax.explicit():
    return x.reshape(*shape, *x.shape[dims:])
  entries = _entries(x)
  first = (entries[0] if split else None,) + (None,) * (len(shape) - 1)
  return x.reshape(*shape, *x.shape[dims:], out_sharding=PartitionSpec(*first, *entries[dims:]))
