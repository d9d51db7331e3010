"""When does which stage work on what? Layers split over the mesh axis `stage`,
and microbatches that flow through the stages.

A schedule is a table: at every tick, each stage runs its layers once, on one microbatch, or is
idle. The loop that follows the table is written over all stages at once: what a stage works on is
one entry of a leading dimension P that is split over `stage`. Inside a tick every stage is on its
own (`_each`); between ticks activations move to the next stage (`_shift`). All other mesh axes stay
as they are, so that layers are written as if there were no pipeline. An idle stage computes, too:
what it makes is used nowhere.

    gpipe      microbatch m is at stage p at tick m + p (Huang et al., arXiv:1811.06965)
    circular   every stage holds `repeats` runs of layers, and microbatches go round as often, P after P (the interleaved schedule of
               Narayanan et al., arXiv:2104.04473, section 2.2)
    1f1b       backward passes begin as soon as they can, so that what is kept for them is of at most 2 P - 1 microbatches, however many
               there are (Narayanan et al., arXiv:1806.03377, section 3.2; here a stage's tick holds one of each direction)

B batch · M microbatches · P stages · R blocks (of layers that a scan repeats) · v repeats
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import names
from parallel import axes as ax

AXIS = 'stage'
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
    names.check('model.pipeline.schedule', self.schedule, SCHEDULES)
    if self.microbatches < 0:
      raise ValueError(
        f'model.pipeline.microbatches={self.microbatches} must be at least 1, '
        'or 0 for as many as there are stages'
      )
    if self.repeats < 1 or (self.repeats > 1) != (self.schedule == 'circular'):
      raise ValueError(
        f'model.pipeline.repeats={self.repeats} does not suit '
        f"model.pipeline.schedule={self.schedule!r}: 'circular' takes 2 or more, the others 1"
      )

  def count(self, stages: int) -> int:
    """M on so many stages.
    Raises ValueError for a circular schedule whose rounds would not be full.
    """
    M = self.microbatches or stages
    if self.repeats > 1 and M % stages:
      raise ValueError(
        f'model.pipeline.microbatches={M} is not a multiple of mesh.stage={stages}: in the '
        "'circular' schedule as many microbatches as stages go round together; "
        "make it a multiple, or use 'gpipe'"
      )
    return M

  def bubble(self, stages: int) -> float:
    """The share of a step's ticks at which a stage is idle:
    (P - 1) / (v M + P - 1), forward and backward alike.
    """
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
  k = (
    np.arange(busy + stages - 1, dtype=np.int32)[:, None] - np.arange(stages, dtype=np.int32)[None]
  )
  idle = (k < 0) | (k >= busy)
  turn, k = np.divmod(k, stages)
  group, repeat = np.divmod(turn, repeats)
  return Slots(np.where(idle, -1, group * stages + k), np.where(idle, 0, repeat))


def schedule_1f1b(stages: int, microbatches: int) -> tuple[np.ndarray, np.ndarray]:
  """Whose forward pass, and whose backward pass, each stage runs at each tick,
  int32 [ticks, P] each; -1: none.

  No stage runs forward in the last P - 1 ticks, and none backward in the first P - 1.
  """
  t, p = (
    np.arange(microbatches + 2 * (stages - 1), dtype=np.int32)[:, None],
    np.arange(stages, dtype=np.int32)[None],
  )
  return tuple(
    np.where((m >= 0) & (m < microbatches), m, -1) for m in (t - p, t - 2 * (stages - 1) + p)
  )


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
    what = 'layers' if len(kinds) == 1 else f'repeats of a period of {len(kinds)} layers'
    raise ValueError(
      f'{field}: {blocks} {what} do not split over mesh.stage={stages} x '
      f'model.pipeline.repeats={config.repeats}; make them a multiple, '
      'or the stages or repeats fewer'
    )
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
    layers: (blocks, x, shared, whole) -> (y, reports), of any number of blocks and rows;
      reports hold, per block, sums over rows.
    blocks: pytree of [R, ...] arrays, split over `stage`. x: [B, ...].
      shared: pytree of [B, ...] arrays that all blocks see.
    whole: pytree of arrays without rows that all blocks see.
  Returns: y, laid out as x, and reports of all blocks, summed over microbatches.
  Raises ValueError when the rows do not split into microbatches.
  """
  stages, v = ax.size('layers'), config.repeats
  M = config.count(stages)
  parts, whole = (
    jax.tree.map(lambda a: _spread(_split(a, M), stages), (x, shared)),
    jax.tree.map(lambda a: _spread(a, stages), whole),
  )
  blocks = jax.tree.map(lambda a: a[None], blocks) if v == 1 else _deal(blocks, stages, v)

  def one(blocks, parts, whole, state, slot):
    microbatch, repeat = slot.microbatch[0], slot.repeat[0]
    fed, shared = jax.tree.map(lambda a: _at(a[0], jnp.maximum(microbatch, 0)), parts)
    x = jnp.where((jax.lax.axis_index(AXIS) == 0) & (repeat == 0), fed, state[0])
    y, reports = layers(
      jax.tree.map(lambda a: a[0] if v == 1 else _at(a, repeat), blocks),
      x,
      shared,
      jax.tree.map(lambda a: a[0], whole),
    )
    counted = (jnp.arange(v) == repeat) & (microbatch >= 0)
    return y[None], jax.tree.map(
      lambda a: jnp.where(jnp.expand_dims(counted, range(1, a.ndim + 1)), a[None], 0), reports
    )

  def tick(state, slot):
    y, reports = _each(one, (OF_REPEATS, SPLIT, SPLIT, SPLIT, SPLIT), (SPLIT, OF_REPEATS))(
      blocks, parts, whole, state, slot
    )
    return _shift(y, stages, 1), (y, reports)

  slots = jax.tree.map(lambda a: ax.place(jnp.asarray(a), None, 'layers'), schedule(stages, M, v))
  _, (y, reports) = jax.lax.scan(tick, jnp.zeros_like(parts[0][:, 0]), slots)
  # A microbatch leaves the last stage after its last repeat; those of a round one after another.
  together = stages if v > 1 else 1
  y = _reshape(y[stages - 1 :], (M // together, v, together), 1)[:, -1]
  return _merge(_from(_reshape(y, (M,), 2), stages - 1, 1)), jax.tree.map(
    lambda a: _whole(a.sum(0)), reports
  )


def relay(layers, blocks, x, kept, shared):
  """All blocks on one microbatch that leaves something behind in every stage (a cache),
  which need not be differentiated.

  Args:
    layers: (blocks, x, kept, shared, active) -> (y, kept, reports);
      where `active` is not true, kept is to come back as it was.
    blocks, kept: pytrees of arrays split over `stage` in their first dimension. x: [B, ...].
      shared: pytree that all blocks see.
  Returns: y, kept, and reports of all blocks. One stage works at a time: a bubble of (P - 1) / P.
  """
  stages = ax.size('layers')
  shared = jax.tree.map(lambda a: _spread(a, stages), shared)

  def one(blocks, shared, state, kept, microbatch):
    active = microbatch[0] >= 0
    y, kept, reports = layers(blocks, state[0], kept, jax.tree.map(lambda a: a[0], shared), active)
    return y[None], kept, jax.tree.map(lambda a: jnp.where(active, a, 0)[None], reports)

  def tick(carry, microbatch):
    y, kept, reports = _each(one, (SPLIT,) * 5, (SPLIT, SPLIT, OF_REPEATS))(
      blocks, shared, *carry, microbatch
    )
    return (_shift(y, stages, 1), kept), reports

  turns = ax.place(jnp.asarray(schedule(stages, 1).microbatch), None, 'layers')
  (y, kept), reports = jax.lax.scan(tick, (_spread(x, stages), kept), turns)
  # What left the last stage has come to the first
  return (_from(y, 0, 0), kept, jax.tree.map(lambda a: _whole(a.sum(0)), reports))


def gradients(first, layers, last, rest, blocks, rows, config: PipelineConfig):
  """A loss and its gradients, forward and backward passes of different microbatches side
  by side (see `schedule_1f1b`).

  Args:
    first: (rest, part) -> x, what enters the blocks. last: (rest, y, part) -> (loss, sums).
      All are sums over rows.
    layers: (blocks, x, part) -> (y, loss, reports), of any number of blocks and rows.
    rest, blocks: parameters, those of the blocks [R, ...], split over `stage`. rows: pytree of
      [B, ...] arrays, not differentiated.
  Returns: (loss, sums, reports), and gradients of the loss for rest and blocks,
    added up in f32 or wider, in the parameters' dtypes.
  """
  stages = ax.size('layers')
  M, kept_slots = config.count(stages), 2 * stages - 1
  parts = jax.tree.map(lambda a: _split(a, M), rows)
  spread = jax.tree.map(lambda a: _spread(a, stages), parts)

  def part_of(parts, microbatch):
    return jax.tree.map(lambda a: _at(a, jnp.maximum(microbatch, 0)), parts)

  def held(tree):
    return jax.tree.map(lambda a: a[0], tree)

  add = functools.partial(jax.tree.map, lambda total, new: total + new.astype(total.dtype))

  def forward(blocks, parts, entering, state, kept, slot):
    microbatch = slot[0]
    x = jnp.where(jax.lax.axis_index(AXIS) == 0, entering[0], state[0])
    y, loss, reports = layers(blocks, x, part_of(held(parts), microbatch))
    place = jnp.maximum(microbatch, 0) % kept_slots
    kept = jax.lax.dynamic_update_index_in_dim(
      kept[0], jnp.where(microbatch >= 0, x, _at(kept[0], place)), place, 0
    )

    def count(a):
      return jnp.where(microbatch >= 0, a, 0)

    return y[None], kept[None], count(loss)[None], jax.tree.map(count, reports)

  def backward(blocks, parts, kept, above, d_y, slot):
    microbatch = slot[0]
    x, part = (
      _at(kept[0], jnp.maximum(microbatch, 0) % kept_slots),
      part_of(held(parts), microbatch),
    )
    # After the forward pass of this tick, not beside it: XLA's CPU deadlocks on loops of
    # collectives that nothing orders but a barrier. Where d_y is not finite, no gradient is.
    x = x + 0 * d_y[0]
    _, pull = jax.vjp(lambda blocks, x: layers(blocks, x, part)[:2], blocks, x)
    d_y = jnp.where(jax.lax.axis_index(AXIS) == stages - 1, d_y[0], above[0])
    d_blocks, d_x = pull(
      (jnp.where(microbatch >= 0, d_y, 0), (microbatch >= 0).astype(jnp.float32))
    )
    return d_blocks, d_x[None]

  def tick(carry, slot, down, up):
    (state, kept, above, totals), found = carry, None
    d_y = jnp.zeros_like(above)
    if down:
      entering = _spread(first(rest, part_of(parts, slot.enters)), stages)
      y, kept, loss, reports = _each(forward, (SPLIT,) * 6, SPLIT)(
        blocks, spread, entering, state, kept, slot.down
      )
      state, found = _shift(y, stages, 1), (loss, reports)
    if down and up:
      last_of = jax.value_and_grad(last, (0, 1), has_aux=True)
      (loss, sums), (d_rest, d_y) = last_of(
        rest, _from(y, stages - 1, 0), part_of(parts, slot.leaves)
      )
      d_y, totals = _spread(d_y, stages), totals | {'rest': add(totals['rest'], d_rest)}
      found = found, (loss, sums)
    if up:
      d_blocks, d_x = _each(backward, (SPLIT,) * 6, SPLIT)(
        blocks, spread, kept, above, d_y, slot.up
      )
      above = _shift(d_x, stages, -1)
      _, pull = jax.vjp(lambda rest: first(rest, part_of(parts, slot.ends)), rest)
      totals = {
        'rest': add(totals['rest'], pull(_from(d_x, 0, 0))[0]),
        'blocks': add(totals['blocks'], d_blocks),
      }
    return (state, kept, above, totals), found

  down, up = schedule_1f1b(stages, M)

  def split(a):
    return ax.place(jnp.asarray(a), None, 'layers')

  slots = Ticks(
    split(down), split(up), *(jnp.asarray(a) for a in (down[:, 0], down[:, -1], up[:, 0]))
  )
  state = jnp.zeros_like(_spread(first(rest, part_of(parts, 0)), stages))
  kept = jnp.zeros(
    (stages, kept_slots, *state.shape[1:]),
    state.dtype,
    out_sharding=PartitionSpec(AXIS, None, *_entries(state)[1:]) if ax.explicit() else None,
  )

  def wide(a):
    return jnp.zeros_like(a, jnp.promote_types(a.dtype, jnp.float32))

  carry = state, kept, state, jax.tree.map(wide, {'rest': rest, 'blocks': blocks})
  found = []
  for begin, end, down, up in (
    (0, stages - 1, True, False),
    (stages - 1, M + stages - 1, True, True),
    (M + stages - 1, M + 2 * stages - 2, False, True),
  ):
    carry, new = jax.lax.scan(
      functools.partial(tick, down=down, up=up), carry, jax.tree.map(lambda a: a[begin:end], slots)
    )
    found.append(new)
  warm, (steady, (loss, sums)) = found[:2]
  inner, reports = jax.tree.map(lambda a, b: a.sum(0) + b.sum(0), warm, steady)
  loss, sums = jax.tree.map(lambda a: a.sum(0), (loss, sums))
  totals = jax.tree.map(
    lambda total, a: total.astype(a.dtype), carry[3], {'rest': rest, 'blocks': blocks}
  )
  return (loss + inner.sum(), sums, jax.tree.map(lambda a: _whole(a[None]), reports)), (
    totals['rest'],
    totals['blocks'],
  )


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


SPLIT, OF_REPEATS = PartitionSpec(AXIS), PartitionSpec(None, AXIS)


def inside() -> bool:
  """Whether what is traced is a stage's own part."""
  mesh = jax.sharding.get_abstract_mesh()
  return AXIS in mesh.manual_axes


def _each(function, inputs, outputs):
  """`function` run by every stage on its own part, split as the specs say;
  inside, all other mesh axes are as outside.
  """

  def run(*arguments):
    return jax.shard_map(
      function, in_specs=inputs, out_specs=outputs, axis_names={AXIS}, check_vma=False
    )(*arguments)

  if jax.__version_info__ >= (0, 12) or not ax.explicit():
    return run
  # Before jax 0.12 a shard_map over some of the explicit axes gathers its
  # arguments over all others; not so over auto axes.
  others = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis != AXIS)

  def automatic(*arguments):
    specs = jax.tree.map(lambda x: x.sharding.spec, jax.eval_shape(run, *arguments))
    return jax.sharding.auto_axes(run, axes=others, out_sharding=specs)(*arguments)

  return automatic


def _shift(x, stages, by):
  """[P, ...]: what stage p holds goes to stage p + by, from the last one to the first."""
  pairs = [(p, (p + by) % stages) for p in range(stages)]
  return _each(lambda x: jax.lax.ppermute(x, AXIS, pairs), SPLIT, SPLIT)(x)


def _from(x, stage, axis):
  """What `stage` holds of x, whose dimension `axis` counts stages, on all of them."""
  held = jax.lax.broadcasted_iota(
    jnp.int32, [n if i == axis else 1 for i, n in enumerate(x.shape)], axis
  )
  return jax.lax.reduce_sum(
    jnp.where(held == stage, x, 0), (axis,)
  )  # in its own type: all but one are 0


def _spread(x, stages):
  """[P, ...]: x, one for each stage. So that the gradient is summed over stages once,
  and not at every tick.
  """
  if ax.explicit():
    return jax.lax.broadcast(x, (stages,), out_sharding=PartitionSpec(AXIS, *_entries(x)))
  free = [PartitionSpec.UNCONSTRAINED] * x.ndim
  return jax.lax.with_sharding_constraint(
    jax.lax.broadcast(x, (stages,)), PartitionSpec(AXIS, *free)
  )


def _split(x, M):
  """[M, B / M, ...] of [B, ...]: strided, so that every device's rows stay on it."""
  B, devices = x.shape[0], ax.size('batch')
  if B % (M * devices):
    raise ValueError(
      f'{B} rows do not split into model.pipeline.microbatches={M} on {devices} devices of data, '
      'fsdp and expert; make the batch a multiple of both, or the microbatches fewer'
    )
  return jnp.moveaxis(_reshape(x, (B // M, M), 1, split=True), 1, 0)


def _merge(x):
  """The inverse of `_split`."""
  entries = _entries(x)
  sharding = PartitionSpec(*entries[1:]) if ax.explicit() else None
  return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:], out_sharding=sharding)


def _deal(blocks, stages, v):
  """[v, R / v, ...], split over stages in its second dimension, of [R, ...], split in its first.

  Stage q holds chunks q v .. q v + v - 1 of R / (P v) blocks each; stage p is to hold chunks p, P +
  p, 2 P + p, ... In each of v rounds every stage sends one chunk and receives one.
  """
  apart = math.gcd(v, stages)
  rounds = []
  for i in range(v):
    # No two of a round have the same destination
    sent = [q * v + (i + q // (stages // apart)) % v for q in range(stages)]
    slots = {chunk % stages: chunk // stages for chunk in sent}
    rounds.append(
      (
        [chunk % v for chunk in sent],
        [(q, chunk % stages) for q, chunk in enumerate(sent)],
        [slots[p] for p in range(stages)],
      )
    )

  def one(x):
    x = x.reshape(
      v, -1, *x.shape[1:], out_sharding=PartitionSpec(None, *_entries(x)) if ax.explicit() else None
    )
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
  """x with `shape` in the place of its first `dims` dimensions, which are not split;
  `split`: the first of them is, and stays so.
  """
  if not ax.explicit():
    return x.reshape(*shape, *x.shape[dims:])
  entries = _entries(x)
  first = (entries[0] if split else None,) + (None,) * (len(shape) - 1)
  return x.reshape(*shape, *x.shape[dims:], out_sharding=PartitionSpec(*first, *entries[dims:]))
