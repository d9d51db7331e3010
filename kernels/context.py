"""How do devices that share a row attend to all of it? By the strategies of kernels/strategies.py,
each of parts that a backend of kernels.attention computes.

Causal work is the same on all devices when rows are laid out zig-zag (`lay_out`,
kernels.mask.zigzag); rows in another order, or with positions of their own, give the same result
with less balance.

P devices · u of them exchange heads · R = P / u groups form the ring · C = T / 2R tokens of a
chunk · other letters: kernels.attention
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import names
from kernels.mask import zigzag
from kernels.scoring import Scoring
from kernels.strategies import STRATEGIES
from parallel import axes as ax

AXIS = ax.RULES['length']


class Local(NamedTuple):
  """What one device computes with: kernels.attention's functions, their settings filled in.

  Attributes:
    attention: (q, k, v, scoring) -> (out, lse), differentiable. part: the same, without sinks and
      not differentiable.
    part_backward: see kernels.reference.backward.
  """

  attention: Callable
  part: Callable
  part_backward: Callable


def groups(strategy: str, heads: int, kv_heads: int) -> int:
  """R on the mesh in context: parts that a row is laid out in, for so many heads; 1: in order.

  Raises ValueError for an unknown strategy, and where heads do not split.
  """
  P, tensor = ax.size('length'), ax.size('heads')
  return P // degree(strategy, heads // tensor, max(1, kv_heads // tensor), P)


def in_parts(strategy: str, heads: int, kv_heads: int) -> bool:
  """Whether attention is put together from parts (kernels.attention.PARTS) on the mesh at hand."""
  return strategy != 'gather' and groups(strategy, heads, kv_heads) > 1


def degree(strategy: str, N: int, K: int, P: int) -> int:
  """u for N query and K key heads of a device. Raises as `groups` does."""
  names.check('model.execution.context', strategy, STRATEGIES)
  if P == 1 or strategy in ('ring', 'gather'):
    return 1
  u = P if strategy == 'ulysses' else math.gcd(K, P)
  if N % u:
    raise ValueError(
      f"model.execution.context='ulysses' splits heads: {N} (model.heads / mesh.tensor) is not a "
      f"multiple of mesh.context={P}; make context a divisor, or use 'ulysses_ring', 'ring' "
      "or 'gather'"
    )
  if u == 1:
    raise ValueError(
      f"model.execution.context='ulysses_ring': {K} key heads (model.kv_heads / mesh.tensor) and "
      f"mesh.context={P} have no common divisor to exchange heads by; use 'ring'"
    )
  return u


def lay_out(batch, n: int):
  """A pytree of [B, T] arrays, in order, laid out as zigzag(T, n) and split over the mesh.

  Raises ValueError where T does not split.
  """

  def one(x):
    B, T = x.shape
    zigzag(T, n)  # raises
    first, second = jnp.split(ax.place(x, 'batch', None).reshape(B, 2 * n, -1), 2, 1)
    return ax.place(jnp.stack([first, second[:, ::-1]], 2).reshape(B, T), 'batch', 'length')

  return batch if n == 1 else jax.tree.map(one, batch)


def in_order(x: Float[Array, 'B T'], n: int) -> Float[Array, 'B T']:
  """What `lay_out` laid out, in order again; whole on every device of a row."""
  if n == 1:
    return x
  B, T = x.shape
  pairs = ax.place(x, 'batch', None).reshape(B, n, 2, -1)
  return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], 1).reshape(B, T)


def attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  scoring: Scoring,
  local: Local,
  *,
  strategy: str,
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """kernels.attention.attention on a mesh that splits T and S; the same contract.

  Raises ValueError where lengths or heads do not split.
  """
  (B, T, N, _), (S, K), P = q.shape, k.shape[1:3], ax.size('length')
  mask, sinks, relative = scoring.mask, scoring.sinks, scoring.relative
  for side, length in (('queries', T), ('keys', S)):
    if length % P:
      raise ValueError(f'{length} {side} do not split over mesh.context={P}; make rows a multiple')

  # A part of a row does not say where in the row it is, so that its tokens carry their positions;
  # a ring of zig-zag chunks knows who sees whom without.
  R = groups(strategy, N, K)
  if mask.window >= T == S and mask.query_positions is None:
    mask = dataclasses.replace(mask, window=0)
  plain = mask.causal and mask.fields() <= {'causal', 'window', 'segments', 'zigzag'} and T == S
  zigzagged = R > 1 and plain and mask.zigzag == R and relative is None
  by_position = mask.positioned or relative is not None
  if R > 1 and by_position and (strategy == 'gather' or not zigzagged):
    queries, keys = (jnp.broadcast_to(x, (B, x.shape[1])) for x in mask.positions(T, S))
    mask = dataclasses.replace(mask, query_positions=queries, key_positions=keys)

  # Arrays are arguments, since each device gets its own part of them; the rest is closed over.
  rows = ('batch', 'length')
  heads = (*rows, 'heads', 'head_width')
  kv = (*rows, ax.whole_or('kv_heads', K), 'head_width')
  data = {f.name: getattr(mask, f.name) for f in dataclasses.fields(mask)}
  data = {
    name: ax.place(x, *rows[: x.ndim]) for name, x in data.items() if isinstance(x, jax.Array)
  }
  table = None if relative is None else relative.table

  def run(q, k, v, data, sinks, table):
    bias = None if relative is None else dataclasses.replace(relative, table=table)
    part = dataclasses.replace(mask, **data)
    scored = dataclasses.replace(scoring, mask=part, sinks=sinks, relative=bias)
    return _on_device(q, k, v, scored, local, strategy, R, zigzagged)

  inputs = (
    heads,
    kv,
    kv,
    {name: rows[: x.ndim] for name, x in data.items()},
    None if sinks is None else ('heads',),
    None if table is None else (None, 'heads'),
  )
  return ax.local(run, inputs, (heads, heads[:3]))(q, k, v, data, sinks, table)


def _on_device(q, k, v, scoring, local, strategy, R, zigzagged):
  """What each device runs; all arrays are its own parts."""
  u = jax.lax.axis_size(AXIS) // R
  if u > 1:
    q, k, v, scoring = _tokens_for_heads(q, k, v, scoring, u)
  if R == 1:
    out, lse = local.attention(q, k, v, scoring)
  elif STRATEGIES[strategy] is None:
    out, lse = _gathered(q, k, v, scoring, local.attention, zigzagged)
  else:
    in_parts = names.imported(STRATEGIES[strategy])
    out, lse = in_parts(q, k, v, scoring, local.part, local.part_backward, R, zigzagged)
  if u > 1:
    out, lse = (_exchange(x, 1, 2, u) for x in (out, lse))
  return out, lse


def _exchange(x, split, concatenate, u):
  """u neighbours exchange parts along `split`, and put them together along the other dimension."""
  return jax.lax.all_to_all(
    x, AXIS, split, concatenate, tiled=True, axis_index_groups=_neighbours(u)
  )


def _neighbours(u):
  return [list(range(first, first + u)) for first in range(0, jax.lax.axis_size(AXIS), u)]


def _tokens_for_heads(q, k, v, scoring, u):
  """All arguments with u times the tokens and a u-th of the heads.

  Too few key heads are repeated.
  """
  copies = u // math.gcd(k.shape[2], u)
  q, k, v = (_exchange(x, 2, 1, u) for x in (q, jnp.repeat(k, copies, 2), jnp.repeat(v, copies, 2)))

  def rows(x):
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True, axis_index_groups=_neighbours(u))

  def share(x):
    return jnp.take(jnp.stack(jnp.split(x, u, -1)), jax.lax.axis_index(AXIS) % u, 0)

  # Sinks, and a table's columns, are of query heads.
  return (
    q,
    k,
    v,
    dataclasses.replace(
      scoring,
      mask=scoring.mask.cut(rows, rows),
      sinks=jax.tree.map(share, scoring.sinks),
      relative=jax.tree.map(share, scoring.relative),
    ),
  )


def _gathered(q, k, v, scoring, attend, zigzagged):
  """All keys and values on every device, by local.attention; its gradient sums what they find."""

  def run(q, k, v, mask):
    return attend(q, k, v, dataclasses.replace(scoring, mask=mask))

  def whole(x):
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)

  k, v, mask = whole(k), whole(v), scoring.mask.cut(lambda x: x, whole)
  if not zigzagged:
    return run(q, k, v, mask)
  C = q.shape[1] // 2

  def early(x):
    return x[:, :C]

  def late(x):
    return x[:, C:]

  # A device's first chunk is of the first half of the row, and so is all that it sees.
  def first_half(x):
    return x.reshape(x.shape[0], -1, 2, C, *x.shape[2:])[:, :, 0].reshape(
      x.shape[0], -1, *x.shape[2:]
    )

  parts = (
    run(early(q), first_half(k), first_half(v), mask.cut(early, first_half)),
    run(late(q), k, v, mask.cut(late, lambda x: x)),
  )
  return tuple(jnp.concatenate(x, 1) for x in zip(*parts))
