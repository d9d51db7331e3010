"""How do a parameter's shards become whole where it is used, and its gradient shards again?
ZeRO's two collectives.

ZeRO-3 (Rajbhandari et al., arXiv:1910.02054, section 5.3; FSDP): all-gather before a layer,
reduce-scatter behind its backward pass. Of a product between tokens that devices share and a whole
parameter, each device knows a part of the gradient's sum. XLA would sum it everywhere and then cut
it; here the sum stays open (the type of the whole parameter says so: `reduced`, its gradient is
`unreduced`) until it is scattered.
"""

import functools
import math

import jax
from jax.sharding import PartitionSpec as P

from parallel import axes as ax
from parallel.mesh import platform

# The most chips that are all of a slice of two dimensions (v5e, v6e: 'lite'), or of three, over
# which libtpu (0.0.42 to 0.0.52) has each. Over more it makes an all-reduce, which sends twice the
# bytes and is then cut; over parts of a slice it does not.
AT_ONCE = {'all_gather': (math.inf, 32), 'reduce_scatter': (8, 4)}


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
  """A parameter with these logical axes as products with tokens use it: whole along `embed`;
  its gradient is reduce-scattered.

  For those products only: what else is done with it may not know how to leave a sum open,
  and takes `axes.gather`.
  """
  split = ax.opens() and any(
    axis in ax.EMBED and entry for axis, entry in zip(axes, jax.typeof(x).sharding.spec)
  )
  return _gather(x, axes) if split else ax.gather(x, *axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x, axes):
  dim, shards, whole = _split(axes)
  run = ax.manual(functools.partial(all_gather, shards=shards, dim=dim), (ax.spec(*axes),), whole)
  return jax.sharding.reshard(run(x), P(*whole, reduced=frozenset(ax.mesh_axes('batch', 'length'))))


def _backward(axes, _, gradient):
  dim, shards, whole = _split(axes)
  tokens = ax.mesh_axes('batch', 'length')
  copies = tuple(axis for axis in tokens if axis not in shards)

  def run(x):
    x = reduce_scatter(x, shards, dim)
    return jax.lax.psum(x, copies) if copies else x

  return (ax.manual(run, (P(*whole, unreduced=frozenset(tokens)),), ax.spec(*axes))(gradient),)


_gather.defvjp(lambda x, axes: (_gather(x, axes), None), _backward)


def _split(axes):
  """Which dimension is split, over which mesh axes, and the spec of the whole."""
  dim = next(i for i, axis in enumerate(axes) if axis in ax.EMBED)
  return dim, ax.mesh_axes(axes[dim]), ax.spec(*axes[:dim], None, *axes[dim + 1 :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def all_gather(x: jax.Array, shards: tuple[str, ...], dim: int) -> jax.Array:
  """Inside of a shard_map: dimension `dim` of all devices along the mesh axes `shards`,
  one after another.
  """
  for groups in reversed(_steps(shards, 'all_gather')):
    x = jax.lax.all_gather(x, shards, axis=dim, tiled=True, axis_index_groups=groups)
  return x


all_gather.defvjp(
  lambda x, shards, dim: (all_gather(x, shards, dim), None),
  lambda shards, dim, _, gradient: (reduce_scatter(gradient, shards, dim),),
)


def reduce_scatter(x: jax.Array, shards: tuple[str, ...], dim: int) -> jax.Array:
  """Inside of a shard_map: the sum over all devices along the mesh axes `shards`,
  of which each has its part of dimension `dim`.
  """
  for groups in _steps(shards, 'reduce_scatter'):
    x = jax.lax.psum_scatter(x, shards, scatter_dimension=dim, tiled=True, axis_index_groups=groups)
  return x


def _steps(shards: tuple[str, ...], kind: str) -> list[list[list[int]] | None]:
  """Groups of devices for each step of a reduce-scatter over these mesh axes,
  or backwards of an all-gather; None: all at once.

  Over all chips of a TPU's slice there are two steps where one would be an all-reduce.
  """
  mesh = jax.sharding.get_abstract_mesh()
  n = math.prod(mesh.shape[axis] for axis in shards)
  # The largest divisor that is at most sqrt(n): the two steps are as alike as they can be.
  inner = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
  if platform() != 'tpu' or n < mesh.size or inner == 1:
    return [None]
  if n <= AT_ONCE[kind]['lite' not in mesh.abstract_device.device_kind]:
    return [None]

  # Device i is a * inner + b. A first step among those of the same b gives it the a-th of n / inner
  # parts, a second one among those of the same a the b-th part of that: part i of the whole.
  return [
    [list(range(i, n, inner)) for i in range(inner)],
    [list(range(i, i + inner)) for i in range(0, n, inner)],
  ]
