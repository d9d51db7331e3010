"""How do devices in a ring attend to each other's keys? Keys and values travel from one to the next
while those at hand are computed, and results are merged by their log-sum-exp (Liu et al.,
arXiv:2310.01889).

Of rows in zig-zag order a causal mask leaves each device the same work at every step (`_pairs`),
and a window looks only at the chunks in its reach (`_back`).

R groups of devices form the ring, of u devices that exchange heads (kernels.context) · C = T / 2
tokens of a chunk · other letters: kernels.attention
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels.scoring import Scoring
from parallel import axes as ax

AXIS = ax.RULES['length']


def attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  scoring: Scoring,
  part: Callable,
  part_backward: Callable,
  R: int,
  zigzagged: bool,
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Attention of a device's queries to the keys of all R groups, and its log-sum-exp.

  Args:
    q, k, v: the device's own; so are the arrays of `scoring`.
    part, part_backward: see kernels.context.Local.
    zigzagged: whether rows are laid out as kernels.mask.zigzag(T, R) and nothing else decides who
      sees whom.
  """
  out, lse = _of_all_parts(q, k, v, scoring, part, part_backward, R, zigzagged)
  if scoring.sinks is None:
    return out, lse
  # Once, over all parts together. Of a query that sees nothing, not even a sink, differences with
  # its log-sum-exp would be NaN, and so would be gradients.
  sinks = scoring.sinks.astype(lse.dtype)[None, None]
  nothing = jnp.isneginf(lse) & jnp.isneginf(sinks)
  total = jnp.logaddexp(jnp.where(nothing, 0, lse), sinks)
  out = (out * jnp.exp(lse - total)[..., None]).astype(out.dtype)
  return out, jnp.where(nothing, -jnp.inf, total)


def _of_all_parts(q, k, v, scoring, part, part_backward, R, zigzagged):
  """The same without sinks; with a backward pass of its own, in which keys' gradients travel
  along.
  """
  # Chunk by chunk, what is computed is in order.
  mask = dataclasses.replace(scoring.mask, zigzag=1)
  wide = jnp.promote_types(q.dtype, jnp.float32)

  def scored(hop, mask, relative, keys):
    """What is asked of a hop, without sinks; numbers are closed over, since a scale may be
    traced.
    """
    mask = hop.mask(_with_keys(mask, keys).cut(hop.queries, hop.keys))
    return dataclasses.replace(scoring, mask=mask, sinks=None, relative=relative)

  def where_valid(hop, lse):
    return lse if hop.valid is None else jnp.where(hop.valid(q.shape[0]), lse, -jnp.inf)

  @jax.custom_vjp
  def run(q, k, v, relative, mask):
    return forward(q, k, v, relative, mask)[0]

  def forward(q, k, v, relative, mask):
    def visit(state, _, hop, keys):
      k, v, _ = keys
      asked = scored(hop, mask, relative, keys)
      out, lse = part(hop.queries(q), hop.keys(k), hop.keys(v), asked)
      lse = where_valid(hop, lse)
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
      of_queries, *of_keys, of_relative = part_backward(
        hop.queries(q),
        hop.keys(k),
        hop.keys(v),
        scored(hop, mask, relative, keys),
        where_valid(hop, hop.queries(lse)),
        hop.queries(delta),
        hop.queries(d_out),
      )
      # Taking keys is linear: its transpose brings their gradients back to where they were taken.
      d_keys = tuple(
        d + jax.linear_transpose(hop.keys, d)(of_taken)[0] for d, of_taken in zip(d_keys, of_keys)
      )
      d_q = sum(hop.spread(of_queries, 0), d_q)
      return (d_q, jax.tree.map(jnp.add, d_relative, of_relative)), d_keys

    def zeros(x):
      return jnp.zeros(x.shape, wide)

    start = zeros(q), jax.tree.map(jnp.zeros_like, relative)
    (d_q, d_relative), (d_k, d_v) = _walk(
      visit, start, (k, v, _keys_data(mask)), (zeros(k), zeros(v)), mask, q.shape[1], R, zigzagged
    )
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_relative, None

  run.defvjp(forward, backward)
  return run(q, k, v, scoring.relative, mask)


class Hop(NamedTuple):
  """What one step of a ring computes. `queries` and `keys` are linear.

  Attributes:
    queries, keys: from the tokens at hand, [B, T, ...] of the device and of whom the keys are from,
      to those computed.
    spread: (x, fill) -> arrays as the device's queries [B, T, ...]: where the results belong,
      `fill` elsewhere.
    mask: from the mask of the tokens computed to the part of it that matters.
    valid: of the queries [B, 1, 1], whether there are keys for them; or None: there are.
  """

  queries: Callable = lambda x: x
  keys: Callable = lambda x: x
  spread: Callable = lambda x, fill: [x]
  mask: Callable = lambda mask: mask
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
