"""How do arrays lie on the stages of a pipeline, and move between them?

What stages hold apart is one array with a dimension P that is split over the mesh axis `stage`:
`each` lets every stage work on its own entry, `shift` moves entries on by a stage.

B batch · M microbatches · P stages · R blocks (of layers that a scan repeats) · v repeats
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from parallel import axes as ax

AXIS = 'stage'
SPLIT = PartitionSpec(AXIS)
OF_REPEATS = PartitionSpec(None, AXIS)


def each(function, inputs, outputs):
  """`function` run by every stage on its own part, split as the specs say;
  inside, all other mesh axes are as outside.
  """

  def run(*arguments):
    return jax.shard_map(
      function, in_specs=inputs, out_specs=outputs, axis_names={AXIS}, check_vma=False
    )(*arguments)

  if jax.__version_info__ >= (0, 12) or not ax.explicit():
    return run
  # Before jax 0.12 a shard_map over some of the explicit axes gathers its arguments over all
  # others; not so over auto axes.
  others = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis != AXIS)

  def automatic(*arguments):
    specs = jax.tree.map(lambda x: x.sharding.spec, jax.eval_shape(run, *arguments))
    return jax.sharding.auto_axes(run, axes=others, out_sharding=specs)(*arguments)

  return automatic


def shift(x, stages, by):
  """[P, ...]: what stage p holds goes to stage p + by, from the last one to the first."""
  pairs = [(p, (p + by) % stages) for p in range(stages)]
  return each(lambda x: jax.lax.ppermute(x, AXIS, pairs), SPLIT, SPLIT)(x)


def of_stage(x, stage, axis):
  """What `stage` holds of x, whose dimension `axis` counts stages, on all of them."""
  column = [n if i == axis else 1 for i, n in enumerate(x.shape)]
  stages = jax.lax.broadcasted_iota(jnp.int32, column, axis)
  # A sum in x's own type, and exact: all but one of its terms are 0.
  return jax.lax.reduce_sum(jnp.where(stages == stage, x, 0), (axis,))


def spread(x, stages):
  """[P, ...]: x, one for each stage.
  Done once before a loop, so that the gradient is summed over stages once, and not at every tick.
  """
  if ax.explicit():
    return jax.lax.broadcast(x, (stages,), out_sharding=PartitionSpec(AXIS, *entries(x)))
  free = [PartitionSpec.UNCONSTRAINED] * x.ndim
  return jax.lax.with_sharding_constraint(
    jax.lax.broadcast(x, (stages,)), PartitionSpec(AXIS, *free)
  )


def split(x, M):
  """[M, B / M, ...] of [B, ...]: strided, so that every device's rows stay on it."""
  B, devices = x.shape[0], ax.size('batch')
  if B % (M * devices):
    raise ValueError(
      f'{B} rows do not split into model.execution.pipeline.microbatches={M} on {devices} devices '
      'of data, fsdp and expert; make the batch a multiple of both, or the microbatches fewer'
    )
  return jnp.moveaxis(reshape(x, (B // M, M), 1, split=True), 1, 0)


def merge(x):
  """The inverse of `split`."""
  sharding = PartitionSpec(*entries(x)[1:]) if ax.explicit() else None
  return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:], out_sharding=sharding)


def deal(blocks, stages, v):
  """[v, R / v, ...], split over stages in its second dimension, of [R, ...], split in its first.

  Stage q has chunks q v .. q v + v - 1 of R / (P v) blocks each; stage p is to have chunks p,
  P + p, 2 P + p, ... In each of v rounds every stage sends one chunk and receives one.
  """
  rounds = [_round(i, stages, v) for i in range(v)]

  def deal_leaf(x):
    sharding = PartitionSpec(None, *entries(x)) if ax.explicit() else None
    x = x.reshape(v, -1, *x.shape[1:], out_sharding=sharding)
    stage, dealt = jax.lax.axis_index(AXIS), jnp.zeros_like(x)
    for send, pairs, put in rounds:
      chunk = jax.lax.ppermute(at(x, jnp.asarray(send)[stage]), AXIS, pairs)
      dealt = jax.lax.dynamic_update_index_in_dim(dealt, chunk, jnp.asarray(put)[stage], 0)
    return dealt

  return each(lambda blocks: jax.tree.map(deal_leaf, blocks), SPLIT, OF_REPEATS)(blocks)


def _round(i, stages, v):
  """Round i of `deal`: which of its v chunks each stage sends, the pairs (from, to), and at which
  of its v places each stage puts what it receives.

  Chunk c goes to stage c mod P. If stage q sent chunk q v + i, stages whose q v agree mod P would
  send to the same one: there are g = gcd(v, P) of them, P / g apart, and q v is a multiple of g. So
  each run of P / g stages is shifted by one more: (i + q // (P / g)) mod v differs mod g (which
  divides v) between runs, and no two stages of a round have the same destination. Over all v
  rounds i a stage sends each of its chunks once.
  """
  run = stages // math.gcd(v, stages)
  sent = [q * v + (i + q // run) % v for q in range(stages)]
  place = {chunk % stages: chunk // stages for chunk in sent}
  pairs = [(q, chunk % stages) for q, chunk in enumerate(sent)]
  return [chunk % v for chunk in sent], pairs, [place[p] for p in range(stages)]


def whole(x):
  """A report [v, R / v, ...] as [R, ...], on all stages."""
  if ax.explicit():
    x = jax.sharding.reshard(x, PartitionSpec(None, None, *entries(x)[2:]))
  return reshape(x, (-1,), 2)


def at(x, index):
  """x[index], of an index that a program computes."""
  return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def entries(x):
  """What splits each dimension of an array on an explicit mesh."""
  spec = tuple(jax.typeof(x).sharding.spec)
  return spec + (None,) * (x.ndim - len(spec))


def reshape(x, shape, dims, split=False):
  """x with `shape` in the place of its first `dims` dimensions, which are not split;
  `split`: the first of them is, and stays so.
  """
  if not ax.explicit():
    return x.reshape(*shape, *x.shape[dims:])
  spec = entries(x)
  first = (spec[0] if split else None,) + (None,) * (len(shape) - 1)
  return x.reshape(*shape, *x.shape[dims:], out_sharding=PartitionSpec(*first, *spec[dims:]))
