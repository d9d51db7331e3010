"""What is a parameter? One literal with shape, logical axes and initialiser; everything else is derived from it."""
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

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


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: float | str, *, kind: str = 'matrix',
          inputs: int = 1, dtype: str = 'float32') -> nnx.Param:
  """A parameter, born sharded as `axes` say.

  Args:
    init: standard deviation of a normal, or 'zeros' or 'ones'.
    kind, inputs: see ParamSpec.
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
  return nnx.Param(ax.place(value, *axes), axes=axes, kind=kind, inputs=inputs)


def use(p: nnx.Param, dtype: str) -> jax.Array:
  """The value as a layer computes with it: in the compute dtype first, then with its embed shards gathered."""
  return ax.gather(p[...].astype(dtype), *p.axes)


def named_leaves(tree, prefix: str = '') -> dict[str, Any]:
  """Leaves by name, in the order of jax.tree.leaves: 'stack.blocks.0.attention.q'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  names_ = (jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value') for path, _ in leaves)
  return {f'{prefix}.{name}' if prefix else name: leaf for name, (_, leaf) in zip(names_, leaves, strict=True)}


def abstract(function: Callable[[], Any], mesh: Mesh):
  """The result of `function` as ShapeDtypeStructs with the shardings on `mesh`, the one in context, that it would be born with."""
  def one(x):
    spec = getattr(x.sharding, 'spec', None) or P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  return jax.tree.map(one, jax.eval_shape(function))


def specs(model) -> nnx.Module:
  """The tree of ParamSpec of a model, abstract or not; a leaf of a stacked block has 'layers' as its first axis."""
  def one(p):
    shape = tuple(p.get_value().shape)
    stacked = ('layers',) * (len(shape) - len(p.axes))
    return ParamSpec(shape, (*stacked, *p.axes), p.kind, p.inputs)
  return jax.tree.map(one, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def count(model) -> int:
  """Number of parameters of a model, abstract or not."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(model))
