"""How do devices that share a row attend to all of it? Four strategies, each of parts that a
backend of kernels.attention computes.

`ring`: keys and values travel from device to device while the ones at hand are computed, and
results are merged by their log-sum-exp (Liu et al., arXiv:2310.01889). `gather`: every device gets
all keys and values. `ulysses`: devices exchange tokens for heads, so that each has all tokens of
some heads (Jacobs et al., arXiv:2309.14509). `ulysses_ring`: as many neighbours as share the key
heads evenly do that, and form a ring of groups (Fang & Zhao, arXiv:2405.07719).

A ring's causal work is the same on all devices when rows are laid out zig-zag (`lay_out`,
kernels.mask.zigzag); rows in another order, or with positions of their own, give the same result
with less balance. A window looks only at the chunks in its reach.

P devices · u of them exchange heads · R = P / u groups form the ring · C = T / 2R tokens of a
chunk · other letters: kernels.attention
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

import names
from kernels.mask import zigzag
from kernels.scoring import Scoring
from parallel import axes as ax

AXIS = ax.RULES['length']
STRATEGIES = ('ring', 'gather', 'ulysses', 'ulysses_ring')


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
  for what, length in (('queries', T), ('keys', S)):
    if length % P:
      raise ValueError(f'{length} {what} do not split over mesh.context={P}; make rows a multiple')
  k_heads = ax.whole_or('kv_heads', K)
  R = groups(strategy, N, K)
  if mask.window >= T:
    mask = dataclasses.replace(mask, window=0)
  plain = mask.causal and mask.fields() <= {'causal', 'window', 'segments', 'zigzag'} and T == S
  zigzagged = R > 1 and plain and mask.zigzag == R and relative is None
  if (
    R > 1 and (mask.positioned or relative is not None) and (strategy == 'gather' or not zigzagged)
  ):
    queries, keys = (jnp.broadcast_to(x, (B, x.shape[1])) for x in mask.positions(T, S))
    mask = dataclasses.replace(mask, query_positions=queries, key_positions=keys)
  rows, heads, kv = (
    ('batch', 'length'),
    ('batch', 'length', 'heads', 'head_width'),
    ('batch', 'length', k_heads, 'head_width'),
  )
  data = {f.name: getattr(mask, f.name) for f in dataclasses.fields(mask)}
  data = {
    name: ax.place(x, *rows[: x.ndim]) for name, x in data.items() if isinstance(x, jax.Array)
  }
  table = None if relative is None else relative.table

  def run(q, k, v, data, sinks, table):
    bias = None if relative is None else dataclasses.replace(relative, table=table)
    own = dataclasses.replace(
      scoring, mask=dataclasses.replace(mask, **data), sinks=sinks, relative=bias
    )
    return _on_device(q, k, v, own, local, R, strategy == 'gather', zigzagged)

  inputs = (
    heads,
    kv,
    kv,
    {name: rows[: x.ndim] for name, x in data.items()},
    None if sinks is None else ('heads',),
    None if table is None else (None, 'heads'),
  )
  return ax.local(run, inputs, (heads, heads[:3]))(q, k, v, data, sinks, table)


def _on_device(q, k, v, scoring, local, R, gather, zigzagged):
  """What each device runs; all arrays are its own parts."""
  u = jax.lax.axis_size(AXIS) // R
  if u > 1:
    q, k, v, scoring = _tokens_for_heads(q, k, v, scoring, u)
  sinks = scoring.sinks
  if R == 1:
    out, lse = local.attention(q, k, v, scoring)
  elif gather:
    out, lse = _gathered(q, k, v, scoring, local.attention, zigzagged)
  else:
    out, lse = _ring(q, k, v, scoring, local, R, zigzagged)
    if sinks is not None:  # once, over all parts together
      total = jnp.logaddexp(lse, sinks.astype(lse.dtype)[None, None])
      out, lse = (out * jnp.exp(lse - total)[..., None]).astype(out.dtype), total
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
      mask=_cut(scoring.mask, rows, rows),
      sinks=jax.tree.map(share, scoring.sinks),
      relative=jax.tree.map(share, scoring.relative),
    ),
  )


def _cut(mask, queries, keys):
  """The mask of what `queries` and `keys` make of a device's tokens."""
  found = {
    f'{side}_{what}': getattr(mask, f'{side}_{what}')
    for side in ('query', 'key')
    for what in ('segments', 'positions')
  }
  return dataclasses.replace(
    mask,
    **{
      name: None if x is None else (queries if name.startswith('query') else keys)(x)
      for name, x in found.items()
    },
  )


def _gathered(q, k, v, scoring, attend, zigzagged):
  """All keys and values on every device, by local.attention; its gradient sums what they find."""

  def run(q, k, v, mask):
    return attend(q, k, v, dataclasses.replace(scoring, mask=mask))

  def whole(x):
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)

  k, v, mask = whole(k), whole(v), _cut(scoring.mask, lambda x: x, whole)
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
    run(early(q), first_half(k), first_half(v), _cut(mask, early, first_half)),
    run(late(q), k, v, _cut(mask, late, lambda x: x)),
  )
  return tuple(jnp.concatenate(x, 1) for x in zip(*parts))


class Hop(NamedTuple):
  """What one step of a ring computes. `queries` and `keys` are linear.

  Attributes:
    queries, keys: from the tokens at hand, [B, T, ...] of the device and of whom the keys are from,
      to those computed.
    spread: (x, fill) -> arrays as the device's queries [B, T, ...]: where the results belong,
      `fill` elsewhere.
    mask: from the mask of the tokens computed to the part of it that matters. seen: [] whether
      anything is seen, or None: it is.
    valid: of the queries [B, 1, 1], whether there are keys for them; or None: there are.
  """

  queries: Callable = lambda x: x
  keys: Callable = lambda x: x
  spread: Callable = lambda x, fill: [x]
  mask: Callable = lambda mask: mask
  seen: Any = None
  valid: Any = None


def _everything(mask):
  return dataclasses.replace(mask, causal=False, window=0)


def _pairs(mine, other) -> Hop:
  """Of zig-zag chunks, those of another device: two pairs, wherever it stands, that see all.

  The chunks are `mine` and 2R - 1 - `mine`, and of the other device alike. The late chunk sees the
  other's early one. When the other device comes before, so does the early chunk; otherwise the late
  chunk sees the late one, too.
  """
  before = other < mine

  def choose(early, late):
    return jnp.where(before, early, late)

  def queries(x):
    early, late = jnp.split(x, 2, 1)
    return jnp.concatenate([choose(early, late), late])

  def keys(x):
    early, late = jnp.split(x, 2, 1)
    return jnp.concatenate([choose(early, late), early])

  def spread(x, fill):
    first, second = jnp.split(x, 2)
    none = jnp.full_like(first, fill)
    return [
      jnp.concatenate([choose(first, none), second], 1),
      jnp.concatenate([none, choose(none, first)], 1),
    ]

  return Hop(queries, keys, spread, _everything)


def _back(mine, d: int, C: int, R: int, window: int) -> Hop:
  """Of zig-zag chunks, for each the one that is d chunks before it in the row, wherever that is."""
  u = jax.lax.axis_size(AXIS) // R

  def devices(moves):
    return [(a * u + m, b * u + m) for a, b in moves for m in range(u)]

  early_to_early = devices((g, g + d) for g in range(R) if g + d < R)
  late_to_late = devices((g, g - d) for g in range(R) if g >= d)
  early_to_late = devices(
    (g, 2 * R - 1 - g - d) for g in range(R) if g + d >= R and 2 * R - 1 - g >= d
  )

  def chunks(x):
    return jnp.concatenate(jnp.split(x, 2, 1))

  def keys(x):
    early, late = jnp.split(x, 2, 1)

    def move(x, moves):
      return jax.lax.ppermute(x, AXIS, moves)  # zeros where nothing comes

    return jnp.concatenate(
      [move(early, early_to_early), move(late, late_to_late) + move(early, early_to_late)]
    )

  def within(mask):
    if d * C + C <= window:  # the last query of a chunk sees the first key
      return _everything(mask)
    index = jnp.arange(C, dtype=jnp.int32)[None]
    return dataclasses.replace(mask, query_positions=index + d * C, key_positions=index)

  if d == 0:
    return Hop(chunks, chunks, lambda x, fill: [jnp.concatenate(jnp.split(x, 2), 1)])

  def valid(B):
    first = jnp.concatenate([jnp.full(B, mine), jnp.full(B, 2 * R - 1 - mine)])
    return (first >= d)[:, None, None]

  return Hop(
    chunks, keys, lambda x, fill: [jnp.concatenate(jnp.split(x, 2), 1)], within, valid=valid
  )


def _ring(q, k, v, scoring, local, R, zigzagged):
  """Attention to the keys of all groups, and its log-sum-exp; with a backward pass of its own, in
  which keys' gradients travel along.
  """
  # Chunk by chunk, what is computed is in order.
  mask = dataclasses.replace(scoring.mask, zigzag=1)
  wide = jnp.promote_types(q.dtype, jnp.float32)

  def part_of(mask, relative):
    """Of parts, which have no sinks; numbers are closed over, since a scale may be traced."""
    return dataclasses.replace(scoring, mask=mask, sinks=None, relative=relative)

  @jax.custom_vjp
  def run(q, k, v, relative, mask):
    return forward(q, k, v, relative, mask)[0]

  def forward(q, k, v, relative, mask):
    def visit(state, _, hop, keys):
      k, v, _ = keys
      part = hop.mask(_cut(_with_keys(mask, keys), hop.queries, hop.keys))
      out, lse = local.part(hop.queries(q), hop.keys(k), hop.keys(v), part_of(part, relative))
      if hop.valid is not None:
        lse = jnp.where(hop.valid(q.shape[0]), lse, -jnp.inf)
      for parts in zip(hop.spread(out.astype(wide), 0), hop.spread(lse, -jnp.inf)):
        state = _merge(*state, *parts)
      return state, ()

    start = jnp.zeros((*q.shape[:3], v.shape[3]), wide), jnp.full(q.shape[:3], -jnp.inf, wide)
    (out, lse), _ = _walk(
      visit, start, (k, v, _keys_data(mask)), (), mask, q.shape[1], R, zigzagged
    )
    # With these kept (remat policies know the name) the backward pass goes around once, not twice.
    out, lse = checkpoint_name(out.astype(v.dtype), 'attention'), checkpoint_name(lse, 'attention')
    return (out, lse), (q, k, v, relative, mask, out, lse)

  def backward(kept, cotangents):
    q, k, v, relative, mask, out, lse = kept
    d_out, d_lse = cotangents
    delta = (d_out.astype(wide) * out.astype(wide)).sum(-1) - d_lse

    def visit(state, d_keys, hop, keys):
      (d_q, d_relative), (k, v, _) = state, keys
      part = hop.mask(_cut(_with_keys(mask, keys), hop.queries, hop.keys))
      seen = hop.queries(lse)
      if hop.valid is not None:
        seen = jnp.where(hop.valid(q.shape[0]), seen, -jnp.inf)
      new, *new_keys, new_relative = local.part_backward(
        hop.queries(q),
        hop.keys(k),
        hop.keys(v),
        part_of(part, relative),
        seen,
        hop.queries(delta),
        hop.queries(d_out),
      )
      d_keys = tuple(
        d + jax.linear_transpose(hop.keys, d)(new)[0] for d, new in zip(d_keys, new_keys)
      )
      return (sum(hop.spread(new, 0), d_q), jax.tree.map(jnp.add, d_relative, new_relative)), d_keys

    def zeros(x):
      return jnp.zeros(x.shape, wide)

    start = zeros(q), jax.tree.map(jnp.zeros_like, relative)
    (d_q, d_relative), (d_k, d_v) = _walk(
      visit, start, (k, v, _keys_data(mask)), (zeros(k), zeros(v)), mask, q.shape[1], R, zigzagged
    )
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_relative, None

  run.defvjp(forward, backward)
  return run(q, k, v, scoring.relative, mask)


def _keys_data(mask):
  return {name: getattr(mask, name) for name in ('key_segments', 'key_positions')}


def _with_keys(mask, keys):
  return dataclasses.replace(mask, **keys[2])


def _walk(visit, state, keys, d_keys, mask, T, R, zigzagged):
  """visit(state, d_keys, hop, keys) -> (state, d_keys), hop by hop; d_keys travel with the keys
  that they belong to, and come home.

  Each transfer is independent of the hop computed meanwhile, so that a scheduler can hide it.
  """
  u, C = jax.lax.axis_size(AXIS) // R, T // 2
  mine = jax.lax.axis_index(AXIS) // u
  if zigzagged and mask.window:
    for d in range(min(2 * R - 1, -(-(mask.window - 1) // C)) + 1):
      state, d_keys = visit(state, d_keys, _back(mine, d, C, R, mask.window), keys)
    return state, d_keys
  moves = [(device, (device + u) % (R * u)) for device in range(R * u)]

  def move(tree):
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, moves), tree)

  def hop(state, d_keys, keys, s):
    """The keys of the group that is s before this one in the ring."""
    if zigzagged:
      return visit(state, d_keys, _pairs(mine, (mine - s) % R), keys)
    seen = _seen(_with_keys(mask, keys))
    if seen is None:
      return visit(state, d_keys, Hop(), keys)
    return jax.lax.cond(seen, lambda: visit(state, d_keys, Hop(), keys), lambda: (state, d_keys))

  def step(carry, s):
    state, d_keys, keys = carry
    following, d_keys = move(keys), move(d_keys)
    return (*hop(state, d_keys, keys, s), following), None

  state, d_keys = visit(state, d_keys, Hop(), keys)
  (state, d_keys, keys), _ = jax.lax.scan(step, (state, d_keys, move(keys)), jnp.arange(1, R - 1))
  state, d_keys = hop(state, move(d_keys), keys, R - 1)
  return state, move(d_keys)


def _seen(mask):
  """[] Whether any query sees any key, as far as positions tell; None: it may."""
  if not mask.positioned or mask.prefix is not None:
    return None
  queries, keys = mask.query_positions, mask.key_positions
  seen = keys.min() <= queries.max() if mask.causal else keys.min() - queries.max() < mask.window
  if mask.window:
    seen &= queries.min() - keys.max() < mask.window
  return seen


def _merge(out, lse, new_out, new_lse):
  """Attention to two sets of keys together, each with the log-sum-exp of its scores."""
  # Shares that are 1 together whatever the rounding of large log-sum-exps; of a set that nothing is
  # seen of, 0.
  share = jnp.where(new_lse == -jnp.inf, 0, jax.nn.sigmoid(new_lse - lse))[..., None]
  return out + share * (new_out - out), jnp.logaddexp(lse, new_lse)
