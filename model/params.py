"""What is a parameter? One literal with shape, logical axes and initialiser; the rest is derived.

How its value is stored and read is model.weights' business.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from parallel import axes as ax


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


# For jax.tree's is_leaf: a parameter is one, whatever arrays it is stored in.
def is_param(x) -> bool:
  return isinstance(x, nnx.Variable)


def name_of(path) -> str:
  """Of a parameter, or its array, by the path in a tree: 'stack.blocks.0.attention.q'."""
  # From an nnx.Param to its array is a step of its own.
  of_array = path[-1:] == (jax.tree_util.GetAttrKey('value'),)
  return jax.tree_util.keystr(path[:-1] if of_array else path, simple=True, separator='.')


def by_name(model) -> dict[str, nnx.Param]:
  """A model's parameters, in the order of its leaves; each is one, whatever it is stored in."""
  return {
    name_of(path): p for path, p in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_param)
  }


def named_leaves(tree, prefix: str = '') -> dict[str, Any]:
  """Leaves by name, in the order of jax.tree.leaves: 'stack.blocks.0.attention.q'."""
  return {
    f'{prefix}.{name_of(path)}' if prefix else name_of(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def abstract(function: Callable[[], Any], mesh: Mesh | AbstractMesh):
  """The result of `function` as ShapeDtypeStructs with the shardings that it would be born with.

  mesh: the one in context.
  On a mesh of auto axes, whose arrays have no sharding before they are compiled, these are its
  explicit twin's.
  """
  if mesh.are_all_axes_auto:
    with jax.set_mesh(mesh.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))):
      program, result = jax.make_jaxpr(function, return_shape=True)()
  else:
    program, result = jax.make_jaxpr(function, return_shape=True)()

  def described(x, known):
    # In the host's memory: see parallel.offload.
    memory = 'pinned_host' if known.memory_space == jax.memory.Space.Host else None
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, known.sharding.spec, memory_kind=memory)
    )

  leaves, structure = jax.tree.flatten(result)
  return jax.tree.unflatten(
    structure, [described(x, known) for x, known in zip(leaves, program.out_avals, strict=True)]
  )


def specs(model) -> Any:
  """The tree of ParamSpec of a model, or of a tree of models, abstract or not.

  A leaf of a stacked block has 'layers' as its first axis.
  """

  def spec(p):
    shape = tuple(p.get_value().shape)
    stacked = ('layers',) * (len(shape) - len(p.axes))
    return ParamSpec(shape, (*stacked, *p.axes), p.kind, p.inputs)

  return jax.tree.map(spec, model, is_leaf=is_param)


def count(model) -> int:
  """Number of parameters of a model, abstract or not: of numbers, however they are stored."""
  every = jax.tree.leaves(specs(model), is_leaf=lambda x: isinstance(x, ParamSpec))
  return sum(math.prod(spec.shape) for spec in every)
