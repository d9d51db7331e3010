"""Where does each logical axis of an array live? The only logical -> mesh table, and the helpers that state a sharding.

The helpers serve meshes of explicit axes (reshard, out_sharding) and of auto axes (constraints) alike, and do nothing
without a mesh, so that the same model code runs on one device, on an explicit mesh, and as the auto-mode twin.
"""
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import names

# Parameters name how they are stored; activations name how they flow. `embed` of a parameter is split over fsdp (ZeRO-3)
# and gathered where it is used; the width of an activation (`width`) is never split.
RULES = {
    'batch': ('data', 'fsdp'),
    'length': None,
    'width': None,
    'embed': 'fsdp',
    'vocab': 'tensor',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'feed_forward': 'tensor',
    'experts': 'expert',
    'head_width': None,
    'group': None,
    'norm': None,
    'position': None,
    'latent': None,
    'layers': None,
    'chunk': None,
}


def spec(*axes: str | None) -> P:
  """PartitionSpec of an array whose dimensions carry these logical names (None: not split).

  Raises ValueError for an unknown name, or when two dimensions would be split over the same mesh axis.
  """
  entries, used = [], {}
  for axis in axes:
    entry = RULES[names.check('logical axis', axis, RULES)] if axis is not None else None
    for mesh_axis in (entry if isinstance(entry, tuple) else (entry,) if entry else ()):
      if mesh_axis in used:
        raise ValueError(f'logical axes {used[mesh_axis]!r} and {axis!r} of {axes} both map to mesh axis {mesh_axis!r}')
      used[mesh_axis] = axis
    entries.append(entry)
  return P(*entries)


def explicit() -> bool:
  """Whether the mesh in context has explicit axes."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and AxisType.Explicit in mesh.axis_types


def out(*axes: str | None) -> P | None:
  """The `out_sharding` argument for an operation whose result carries these logical names."""
  return spec(*axes) if explicit() else None


def out_like(x: jax.Array, rows: jax.Array, skip: int) -> P | None:
  """The `out_sharding` of looking up `x` in `rows`: laid out as `x`, then as `rows` behind its first `skip` dimensions."""
  def entries(a):
    found = tuple(jax.typeof(a).sharding.spec)
    return found + (None,) * (a.ndim - len(found))
  return P(*entries(x), *entries(rows)[skip:]) if explicit() else None


def place(x: jax.Array, *axes: str | None) -> jax.Array:
  """`x` laid out as these logical names say: a reshard under explicit axes, a constraint under auto axes."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  if explicit():
    return jax.sharding.reshard(x, spec(*axes))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(*axes)))


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
  """A parameter as it is used: its `embed` shards all-gathered (the transpose reduce-scatters the gradient)."""
  return place(x, *(None if axis == 'embed' else axis for axis in axes))


def einsum(formula: str, x: jax.Array, y: jax.Array, axes: tuple[str | None, ...], **kwargs) -> jax.Array:
  """jnp.einsum whose result carries `axes`; written where the result's sharding is a choice (row-parallel products)."""
  if explicit():
    return jnp.einsum(formula, x, y, out_sharding=spec(*axes), **kwargs)
  return place(jnp.einsum(formula, x, y, **kwargs), *axes)


def local(function, inputs, outputs):
  """`function` run by each device on its own shards (a shard_map over the mesh in context); without a mesh, on the whole.

  inputs: logical axes of each argument, a tuple of names each. outputs: the same of the result (a pytree of such tuples).
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function
  is_axes = lambda x: isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)
  specs = lambda tree: jax.tree.map(lambda axes: spec(*axes), tree, is_leaf=is_axes)
  return jax.shard_map(function, mesh=mesh, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False)
