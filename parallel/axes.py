"""Where does each logical axis of an array live? The only logical -> mesh table,
and the helpers that state a sharding.

The helpers serve meshes of explicit axes (reshard, out_sharding) and of auto axes (constraints)
alike, and do nothing without a mesh, so that the same model code runs on one device, on an explicit
mesh, and as the auto-mode twin.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import names
from parallel.mesh import platform

# Parameters name how they are stored; activations name how they flow. `embed` of a parameter is
# split over every axis but `data` whose devices would hold copies of it, and gathered where it is
# used (see parallel.zero); `expert_embed` is the same of a parameter whose experts are split
# already. The width of an activation (`width`) is never split. `length` is that of tokens where
# they are multiplied with weights or with each other; between, `sequence` splits it over `tensor`,
# too (Megatron's sequence parallelism, Korthikanti et al., arXiv:2205.05198, section 4.2.2).
# `slots` is what a cache has for tokens.
RULES = {
  'batch': ('data', 'fsdp', 'expert'),
  'length': 'context',
  'sequence': ('context', 'tensor'),
  'slots': 'context',
  'width': None,
  'embed': ('fsdp', 'expert', 'context'),
  'expert_embed': ('fsdp', 'context'),
  # Embedding and loss are outside of the pipeline: no stage does it all (arXiv:2411.05288)
  'vocab': ('tensor', 'stage'),
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'feed_forward': 'tensor',
  'experts': 'expert',
  'head_width': None,
  'group': None,
  'norm': None,
  'position': None,
  'latent': None,
  'layers': 'stage',
  'chunk': None,
}
EMBED = ('embed', 'expert_embed')
# True: tokens of a row are on all devices of `context`. The few that are appended to a cache do not
# split; the slots that they see do.
whole_rows = jax.make_user_context(False)


def spec(*axes: str | None) -> P:
  """PartitionSpec of an array whose dimensions carry these logical names (None: not split).

  Mesh axes of size 1 are left out, so that what is not split has no type of its own; so is `stage`
  inside of a stage, which sees its own part only. Without a mesh in context all are there. Raises
  ValueError for an unknown name, or when two dimensions would be split over the same mesh axis.
  """
  entries, used = [], {}
  free = _free()
  for axis in axes:
    entry = _entry(axis) if axis is not None else ()
    for mesh_axis in entry:
      if mesh_axis in used:
        raise ValueError(
          f'logical axes {used[mesh_axis]!r} and {axis!r} of {axes} both map '
          f'to mesh axis {mesh_axis!r}'
        )
      used[mesh_axis] = axis
    # Of an axis of size 1 nothing is split; one that is no axis of the mesh in context stays.
    entry = tuple(a for a in entry if free.get(a, 2) > 1)
    if len(entry) > 1:
      entries.append(entry)
    else:
      entries.append(entry[0] if entry else None)
  return P(*entries)


def _entry(axis: str) -> tuple[str, ...]:
  entry = of_entry(RULES[names.check('logical axis', axis, RULES)])
  if whole_rows.value and axis in ('length', 'sequence'):
    return tuple(a for a in entry if a != 'context')
  return entry


def _mesh() -> jax.sharding.AbstractMesh:
  """The mesh in context; an empty one inside `local`, where nothing is split any more."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.sharding.AbstractMesh((), ()) if set(mesh.axis_types) == {AxisType.Manual} else mesh


def _free() -> dict[str, int]:
  """Sizes of the axes of the mesh in context;
  1 where a device, or a pipeline's stage, sees its own part only.
  """
  mesh = _mesh()
  return {
    axis: 1 if kind == AxisType.Manual else mesh.shape[axis]
    for axis, kind in zip(mesh.axis_names, mesh.axis_types)
  }


def mesh_axes(*axes: str) -> tuple[str, ...]:
  """The mesh axes that these logical axes are split over,
  of those in context that are larger than 1.
  """
  free = _free()
  return tuple(a for axis in axes for a in _entry(axis) if free.get(a, 1) > 1)


def size(*axes: str) -> int:
  """Into how many parts the mesh in context splits these logical axes together."""
  free = _free()
  return math.prod(free[axis] for axis in mesh_axes(*axes))


def of_entry(entry) -> tuple[str, ...]:
  """The mesh axes of an entry of a spec: a tuple, one name, or None."""
  if isinstance(entry, tuple):
    return entry
  return (entry,) if entry else ()


def stacks(axes: tuple[str | None, ...]) -> int:
  """How many leading axes of a parameter count its matrices, those of layers and of experts."""
  return sum(axis in ('layers', 'experts') for axis in axes[:2])


def whole_or(axis: str, n: int) -> str | None:
  """`axis` where n entries split over it, else None: not split."""
  return None if n % size(axis) else axis


def residual(T: int) -> tuple[str, str, str]:
  """Logical axes of the residual stream [B, T, D]: over `sequence` where T can be split so,
  else (a few tokens of a decode) `length`.
  """
  return 'batch', 'length' if T % size('sequence') else 'sequence', 'width'


def explicit() -> bool:
  """Whether the mesh in context has explicit axes."""
  mesh = _mesh()
  return not mesh.empty and AxisType.Explicit in mesh.axis_types


def opens() -> bool:
  """Whether a product's sum over devices can stay open, to be closed by what follows: under
  explicit axes, but for a pipeline's stages.

  XLA (jax 0.12.0.1) aborts on such a type where only some axes are manual.
  """
  return explicit() and AxisType.Manual not in _mesh().axis_types


def out(*axes: str | None) -> P | None:
  """The `out_sharding` argument for an operation whose result carries these logical names."""
  return spec(*axes) if explicit() else None


def of_gradient(x: jax.Array) -> P | None:
  """The `out_sharding` of the gradient by `x`: laid out as `x` is, and in parts where what comes
  after adds up those of all devices (parallel.zero).
  """
  if not explicit():
    return None
  spec = jax.typeof(x).sharding.spec
  return P(*spec.partitions, unreduced=spec.reduced)


def out_like(x: jax.Array, rows: jax.Array, skip: int) -> P | None:
  """The `out_sharding` of looking up `x` in `rows`: laid out as `x`,
  then as `rows` behind its first `skip` dimensions.
  """

  def entries(a):
    spec_of = tuple(jax.typeof(a).sharding.spec)
    return spec_of + (None,) * (a.ndim - len(spec_of))

  return P(*entries(x), *entries(rows)[skip:]) if explicit() else None


def place(x: jax.Array, *axes: str | None) -> jax.Array:
  """`x` laid out as these logical names say: a reshard under explicit axes,
  a constraint under auto axes.
  """
  mesh = _mesh()
  if mesh.empty:
    return x
  if explicit():
    return jax.sharding.reshard(x, spec(*axes))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(*axes)))


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
  """A parameter as it is used: its shards all-gathered
  (the transpose reduce-scatters the gradient).
  """
  return place(x, *(None if axis in EMBED else axis for axis in axes))


def product(
  formula: str, x: jax.Array, y: jax.Array, axes: tuple[str | None, ...] | None = None
) -> jax.Array:
  """jnp.einsum of tokens and a matrix; `einsum` where the result's `axes` are given."""
  if on_one_cpu():
    return names.imported('parallel.one_cpu.product')(formula, x, y)
  return jnp.einsum(formula, x, y) if axes is None else einsum(formula, x, y, axes)


def on_one_cpu() -> bool:
  """Whether what is computed here is split over no devices, and on a CPU."""
  return platform() == 'cpu' and max(_free().values(), default=1) == 1


def einsum(
  formula: str, x: jax.Array, y: jax.Array, axes: tuple[str | None, ...], **kwargs
) -> jax.Array:
  """jnp.einsum whose result carries `axes`; written where the result's sharding is a choice
  (row-parallel products).

  Of a dimension that is split and summed over, devices have parts of the sum, which the result's
  layout then adds up: an all-reduce, or where it splits the result over the same devices a
  reduce-scatter, whose transpose gathers the gradient.
  """
  # jnp.einsum sums over dimensions in the order of the alphabet: in another than that of y, which
  # would be laid out anew. So letters are renamed, those of y first and in its order.
  letters = (*formula.split('->')[0].split(',')[1], *formula)
  order = dict.fromkeys(letter for letter in letters if letter.isalpha())
  formula = formula.translate({ord(old): chr(ord('a') + n) for n, old in enumerate(order)})
  if not explicit():
    return place(jnp.einsum(formula, x, y, **kwargs), *axes)

  # The mesh axes over which the sum is in parts: those of x's dimensions that the result has not.
  terms, result = formula.split('->')
  split = dict(zip(terms.split(',')[0], jax.typeof(x).sharding.spec))
  parts = {
    axis for letter, entry in split.items() if letter not in result for axis in of_entry(entry)
  }
  if not parts or not opens():
    return jnp.einsum(formula, x, y, out_sharding=spec(*axes), **kwargs)

  # The product leaves the sum open, and the reshard closes it: in two steps that a remat policy can
  # tell apart (parallel.remat), with the transpose of each where it belongs.
  kept = (tuple(axis for axis in of_entry(entry) if axis not in parts) for entry in spec(*axes))
  sums = jnp.einsum(formula, x, y, out_sharding=P(*kept, unreduced=parts), **kwargs)
  return jax.sharding.reshard(sums, spec(*axes))


def local(function, inputs, outputs):
  """`function` run by each device on its own shards (a shard_map over the mesh in context);
  without a mesh, on the whole.

  inputs: logical axes of each argument, a tuple of names each.
  outputs: the same of the result (a pytree of such tuples).
  """
  if _mesh().empty:
    return function

  def is_axes(x):
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)

  def specs(tree):
    return jax.tree.map(lambda axes: spec(*axes), tree, is_leaf=is_axes)

  return manual(function, specs(inputs), specs(outputs))


def manual(function, inputs, outputs):
  """`local` by specs instead of names, on a mesh."""
  mesh = _mesh()
  # Inside a pipeline's stage the axis `stage` is manual already.
  free = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
  return jax.shard_map(
    function, mesh=mesh, in_specs=inputs, out_specs=outputs, axis_names=free, check_vma=False
  )
