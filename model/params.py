"""What is a parameter? One literal with shape, logical axes and initialiser; everything else is derived from it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from parallel import axes as ax, zero


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """What is known of a parameter without its values.

  Attributes:
    shape: with the leading layers dimension where blocks are stacked.
    axes: logical axis names, one for each dimension.
    kind: 'matrix', 'embedding' or 'vector'; decides about weight decay and Muon.
    inputs: how many dimensions (after layers and experts) a matrix contracts over.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  kind: str
  inputs: int


def param(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  init: float | str,
  *,
  kind: str = 'matrix',
  inputs: int = 1,
  wide: bool = False,
  dtype: str = 'float32',
) -> nnx.Param:
  """A parameter, born sharded as `axes` say.

  Args:
    init: standard deviation of a normal, or 'zeros' or 'ones'.
    kind, inputs: see ParamSpec. wide: it is computed with in f32 whatever the compute dtype.
  Raises ValueError when shape and axes differ in length or a name is unknown.
  """
  if len(shape) != len(axes):
    raise ValueError(f'shape {shape} has {len(shape)} dimensions, axes {axes} name {len(axes)}')
  sharding = ax.out(*axes)
  if init == 'zeros':
    value = jnp.zeros(shape, dtype, out_sharding=sharding)
  elif init == 'ones':
    value = jnp.ones(shape, dtype, out_sharding=sharding)
  else:
    value = jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=sharding) * init
    value = value.astype(dtype)
  return nnx.Param(ax.place(value, *axes), axes=axes, kind=kind, inputs=inputs, wide=wide)


def use(p: nnx.Param, dtype: str, product: bool = True) -> jax.Array:
  """The value as a layer computes with it: in the compute dtype first, then with its embed shards gathered, unless it is so already.

  product: whether all that is done with it is a product with tokens (see parallel.zero.gather).
  """
  value = p.get_value()
  if isinstance(value, Gathered):
    return _whole(value.shard, value.whole, p.axes)
  if not isinstance(value, jax.Array):  # see model.quantised
    return value.gathered(p.axes).whole(dtype)
  return (zero if product else ax).gather(value.astype(dtype), *p.axes)


def product(
  formula: str, x: jax.Array, p: nnx.Param, dtype: str, axes: tuple[str | None, ...] | None = None
) -> jax.Array:
  """Tokens times a matrix, as jnp.einsum; axes: of the result, where its sharding is a choice (parallel.axes.einsum)."""
  if hasattr(p.get_value(), 'product'):
    return p.get_value().gathered(p.axes).product(formula, x, axes, dtype)
  return (
    jnp.einsum(formula, x, use(p, dtype))
    if axes is None
    else ax.einsum(formula, x, use(p, dtype), axes)
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered:
  """A parameter whose shards were gathered before: `whole` is what is computed with, `shard` what its gradient belongs to."""

  shard: Any
  whole: Any


def gathered(model, dtype: str):
  """The matrices that layers gather, whole and in the compute dtype; None in place of all else.

  Left out are tables and experts, which stay where they are or are used by those that hold them, what is computed with in f32, and what is
  `Gathered` already.
  """

  def one(p):
    if p.kind != 'matrix' or 'embed' not in p.axes or p.wide:
      return None
    value = p.get_value()
    if isinstance(value, Gathered):
      return None
    return ax.gather(value.astype(dtype), *('layers',) * (value.ndim - len(p.axes)), *p.axes)

  return jax.tree.map(one, model, is_leaf=_is_param)


def joined(model, whole, reduce: bool = True):
  """The model that computes with `whole`, of `gathered`; with `reduce` gradients are reduced to shards where they arise."""

  def one(p, whole):
    return p if whole is None else p.replace(Gathered(p.get_value(), whole) if reduce else whole)

  return jax.tree.map(one, model, whole, is_leaf=lambda x: x is None or _is_param(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _whole(shard, whole, axes):
  return whole


_whole.defvjp(
  lambda shard, whole, axes: (whole, jnp.zeros((), shard.dtype)),
  lambda axes, shard, gradient: (ax.place(gradient, *axes).astype(shard.dtype), None),
)


def _is_param(x) -> bool:
  return isinstance(x, nnx.Variable)


def named_leaves(tree, prefix: str = '') -> dict[str, Any]:
  """Leaves by name, in the order of jax.tree.leaves: 'stack.blocks.0.attention.q'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  names_ = (
    jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value')
    for path, _ in leaves
  )
  return {
    f'{prefix}.{name}' if prefix else name: leaf
    for name, (_, leaf) in zip(names_, leaves, strict=True)
  }


def abstract(function: Callable[[], Any], mesh: Mesh | AbstractMesh):
  """The result of `function` as ShapeDtypeStructs with the shardings on `mesh`, the one in context, that it would be born with.

  On a mesh of auto axes, whose arrays have no sharding before they are compiled, these are its explicit twin's.
  """
  if mesh.are_all_axes_auto:
    with jax.set_mesh(mesh.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))):
      program, result = jax.make_jaxpr(function, return_shape=True)()
  else:
    program, result = jax.make_jaxpr(function, return_shape=True)()

  def one(x, known):
    memory = (
      'pinned_host' if known.memory_space == jax.memory.Space.Host else None
    )  # offloaded: see parallel.offload
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, known.sharding.spec, memory_kind=memory)
    )

  leaves, structure = jax.tree.flatten(result)
  return jax.tree.unflatten(
    structure, [one(x, known) for x, known in zip(leaves, program.out_avals, strict=True)]
  )


def specs(model) -> nnx.Module:
  """The tree of ParamSpec of a model, abstract or not; a leaf of a stacked block has 'layers' as its first axis."""

  def one(p):
    shape = tuple(p.get_value().shape)
    stacked = ('layers',) * (len(shape) - len(p.axes))
    return ParamSpec(shape, (*stacked, *p.axes), p.kind, p.inputs)

  return jax.tree.map(one, model, is_leaf=_is_param)


def count(model) -> int:
  """Number of parameters of a model, abstract or not."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(model))
