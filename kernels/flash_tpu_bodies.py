"""What does a TPU do in one step of attention? The bodies of kernels.flash_tpu's kernels, forward
and backward.

Both walk over a step's R queries in chunks: a chunk's products with the keys are asked for while
the chunk before goes through its softmax, so that the matrix unit and the vector unit work at the
same time. Scores are in powers of two (queries are scaled by log2(e) before), because exp2 is what
the hardware has.

R = G x block of queries · H head width · other letters: kernels.flash_tpu_steps
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels.flash_tpu_steps import FIRST, FIRST_OF_ROW, FLAGS, LANES, LAST, LAST_OF_ROW, MASKED

# A score that is not seen; the greatest score of none. Numbers and not -inf, whose difference would
# be NaN: the weight of what is not seen is exp2(HIDDEN - NOTHING) = 0 even where nothing is.
HIDDEN, NOTHING = -3e38, -1e38
LOG2E = math.log2(math.e)


def seen(shape, ids, i, j, row, rows: int, transposed: bool):
  """[rows, bk] (or its transpose) bool of a chunk of `rows` queries from `row` on of block i,
  against block j of keys.

  ids: refs of the positions and segments of queries and keys, and of prefixes, as far as there are
  any.
  """
  at = row % shape.bq
  size = (shape.bk, rows) if transposed else (rows, shape.bk)
  queries, keys = (1, 0) if transposed else (0, 1)

  # Compact until compared: along the first dimension [n, LANES], the same in all lanes, along the
  # second [1, n]. A sum of positions is then made once a row and not once a pair.
  def given(name, axis):
    part = slice(at, at + rows) if axis == queries else slice(None)
    return ids[name][0, part] if axis == 0 else ids[name][0, :, part]

  def index(axis):
    return jax.lax.broadcasted_iota(
      jnp.int32, (size[0], LANES) if axis == 0 else (1, size[1]), axis
    )

  def compare(relation, q, k):
    def spread(x, axis):
      return over_lanes(x, size[1]) if axis == 0 else jnp.broadcast_to(x, size)

    return relation(spread(q, queries), spread(k, keys))

  allowed = []
  if shape.positioned:
    if shape.by_index:
      # Both from the block of keys' first on: that moves the scalar subtraction out of the keys'
      # side.
      offset = j * shape.bk
      q, k = index(queries) + (i * shape.bq + at - offset), index(keys)
    else:
      offset = 0
      q, k = given('query_positions', queries), given('key_positions', keys)
    if shape.causal:
      before = compare(jnp.greater_equal, q, k)
      if shape.prefix:
        before |= compare(jnp.greater, jnp.full_like(q, ids['prefix'] - offset), k)
      allowed.append(before)
    if shape.window:
      allowed.append(compare(jnp.less, q - shape.window, k))
      if not shape.causal:
        allowed.append(compare(jnp.greater, q + shape.window, k))
  if shape.segments:
    allowed.append(
      compare(jnp.equal, given('query_segments', queries), given('key_segments', keys))
    )
  # Keys that only fill the last block up. Queries that do are written and cut off.
  if shape.keys != shape.S:
    allowed.append(
      compare(jnp.greater, jnp.full_like(index(queries), shape.keys - j * shape.bk), index(keys))
    )
  return functools.reduce(jnp.logical_and, allowed) if allowed else jnp.ones(size, bool)


def over_lanes(x, n: int):
  """[rows, LANES], the same in all lanes, to [rows, n]."""
  return x[:, :n] if n <= LANES else jnp.concatenate([x] * -(-n // LANES), 1)[:, :n]


def _by_lane(x):
  """[rows, n] to [rows, LANES], sums of which are those of the rows."""
  return functools.reduce(
    jnp.add, (x[:, start : start + LANES] for start in range(0, x.shape[1], LANES))
  )


def div(x, n: int):
  return jax.lax.div(x, np.int32(n))  # as x is, even where jax counts in 64 bits


def rem(x, n: int):
  return jax.lax.rem(x, np.int32(n))


def _dot(a, b, a_axis, b_axis, precision):
  return jax.lax.dot_general(
    a,
    b,
    (((a_axis,), (b_axis,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _named(refs, shape):
  """The refs of ids by name, in the order that flash_tpu.ids_of gives arrays in."""
  names = [
    name
    for name, is_there in (
      ('positions', shape.positioned and not shape.by_index),
      ('segments', shape.segments),
    )
    if is_there
  ]
  return dict(
    zip([f'{side}_{name}' for name in names for side in ('query', 'key')], refs, strict=True)
  )


def _place(steps_q, steps_k, shape):
  """(row, block of queries, block of keys, flags) of the grid's step, out of the two numbers that
  kernels.flash_tpu_steps packs.
  """
  step = pl.program_id(1)
  row, keys = steps_q[step], steps_k[step]
  return div(row, shape.nq), rem(row, shape.nq), keys >> FLAGS, keys


def _either(flags, body):
  """Runs body(masked) of the two that are compiled: most steps of a causal mask are seen whole, and
  pay no comparison.
  """
  pl.when(flags & MASKED != 0)(functools.partial(body, True))
  pl.when(flags & MASKED == 0)(functools.partial(body, False))


def _with_ones(values, filled: int, shape):
  """[bk, Hv] values filled up to whole lanes, and a column of ones beside them.

  The product with weights then holds their sum, in every lane of its last register. Where heads are
  narrower than the matrix unit that costs nothing, and the vector unit adds nothing up.
  """
  Hv = values.shape[1]
  return jnp.concatenate(
    [
      values,
      *[jnp.zeros((shape.bk, filled - Hv), values.dtype)] * (filled > Hv),
      jnp.ones((shape.bk, LANES), values.dtype),
    ],
    1,
  )


def forward(steps_q, steps_k, prefix, q, k, v, sinks, *refs, shape):
  """Adds a block of keys to the softmax of a block of queries; `top`, `total` and `acc` are its
  state, from FIRST step to LAST.

  top, total: [R, LANES]. Of `total` the lanes hold the sum, each (ones), or shares of it that are
  added up at the end.
  """
  *ids, out, lse, top, total, acc = refs
  H = q.shape[-1]
  b, i, j, flags = _place(steps_q, steps_k, shape)
  ids = _named(ids, shape) | {'prefix': prefix[b]}
  pl.when(flags & FIRST != 0)(functools.partial(_begin, sinks, top, total, acc, shape))

  def body(masked):
    queries = q[0, 0].reshape(shape.R, H)
    filled = -(-v.shape[-1] // LANES) * LANES
    values = _with_ones(v[0, 0], filled, shape) if shape.tuning.ones else v[0, 0]

    def scores_of(start):
      return _dot(queries[start : start + shape.chunk], k[0, 0], 1, 1, shape.precision)

    ahead = scores_of(0)
    for start in range(0, shape.R, shape.chunk):
      scores = ahead
      # The matrix unit goes on with the next chunk's scores during this one's softmax.
      if start + shape.chunk < shape.R:
        ahead = scores_of(start + shape.chunk)
      if shape.softcap:
        scores = shape.softcap * LOG2E * jnp.tanh(scores / (shape.softcap * LOG2E))
      if masked:
        visible = seen(shape, ids, i, j, start, shape.chunk, False)
        scores = jnp.where(visible, scores, HIDDEN)
      _absorb(scores, values, slice(start, start + shape.chunk), (top, total, acc), filled, shape)

  _either(flags, body)
  pl.when(flags & LAST != 0)(functools.partial(_finish, out, lse, top, total, acc, shape))


def _begin(sinks, top, total, acc, shape):
  """The state before any key: of nothing, or of the sinks, which carry no value but are a weight of
  1 beside their own top.
  """
  acc[...] = jnp.zeros_like(acc)
  # By lanes' shares a sink is one in all lanes together.
  share = 1.0 if shape.tuning.ones else 1.0 / LANES
  for g in range(shape.G):
    rows = slice(g * shape.bq, (g + 1) * shape.bq)
    sink = jnp.broadcast_to(sinks[0, g : g + 1], (shape.bq, LANES))
    top[rows] = jnp.maximum(sink, NOTHING)
    total[rows] = jnp.where(sink > NOTHING, share, 0.0)


def _absorb(scores, values, rows, state, filled: int, shape):
  """One step of the online softmax (Milakov & Gimelshein, arXiv:1805.02867), of a chunk of queries:
  `rows` of the state.
  """
  (top, total, acc), Hv = state, state[2].shape[-1]
  # The greatest score so far; every weight is relative to it, so that none overflows.
  before = top[rows]
  now = jnp.maximum(before, scores.max(1, keepdims=True))
  weights = jnp.exp2(scores - over_lanes(now, shape.bk))
  # What was summed relative to the top before is brought to the one of now.
  shrink = jnp.exp2(before - now)
  mixed = _dot(weights.astype(values.dtype), values, 1, 0, shape.precision)
  # Without ones the lanes' own sums are kept, so that a step moves nothing between lanes.
  total[rows] = total[rows] * shrink + (
    mixed[:, filled:] if shape.tuning.ones else _by_lane(weights)
  )
  acc[rows] = acc[rows] * over_lanes(shrink, Hv) + mixed[:, :Hv]
  top[rows] = now


def _finish(out, lse, top, total, acc, shape):
  """Divides by the sum of weights, once and not at every step; of a query that saw nothing zeros,
  and -inf.
  """
  (G, bq), Hv = (shape.G, shape.bq), acc.shape[-1]
  sums = total[...]
  if not shape.tuning.ones:
    sums = jnp.broadcast_to(sums.sum(1, keepdims=True), sums.shape)
  mixed = acc[...] / over_lanes(jnp.where(sums == 0, 1.0, sums), Hv)
  out[0, 0] = mixed.reshape(G, bq, Hv).astype(out.dtype)
  logs = jnp.where(sums == 0, -jnp.inf, (top[...] + jnp.log2(sums)) / LOG2E)
  # Numbers of queries are written along lanes, where they take a row instead of a register each.
  for g in range(G):
    lse[0, 0, g : g + 1] = logs[g * bq : (g + 1) * bq].T[:1]


def backward(steps_q, steps_k, prefix, q, k, v, lse, delta, d_out, *refs, shape, scale: float):
  """The gradients of a block of queries and of a block of keys that their pairs add to
  (FlashAttention-2, algorithm 2).

  Scores are transposed here, [keys, queries]: what belongs to a query is a row then, and only small
  operands are transposed. Gradients of queries are transposed, [H, R], until they are written:
  scores are what the matrix unit holds still then, and fill it.
  """
  *ids, d_q, d_k, d_v, sum_q, sum_k, sum_v = refs
  H, Hv = q.shape[-1], v.shape[-1]
  b, i, j, flags = _place(steps_q, steps_k, shape)
  ids = _named(ids, shape) | {'prefix': prefix[b]}
  here = pl.ds(pl.multiple_of(j * shape.bk, shape.bk), shape.bk)

  # A row's keys are all in VMEM, since every block of queries adds to them; of queries there is one
  # block at a time.
  @pl.when(flags & FIRST_OF_ROW != 0)
  def _():
    sum_k[...], sum_v[...] = jnp.zeros_like(sum_k), jnp.zeros_like(sum_v)

  @pl.when(flags & FIRST != 0)
  def _():
    sum_q[...] = jnp.zeros_like(sum_q)

  def body(masked):
    queries, d_outs = q[0, 0].reshape(shape.R, H), d_out[0, 0].reshape(shape.R, Hv)
    of_k, of_v = jnp.zeros((shape.bk, H), jnp.float32), jnp.zeros((shape.bk, Hv), jnp.float32)
    chunk = shape.chunk

    def start_of(start):
      return (
        _dot(k[0, 0], queries[start : start + chunk], 1, 1, shape.precision),
        _dot(v[0, 0], d_outs[start : start + chunk], 1, 1, shape.precision),
      )

    ahead = start_of(0)
    for start in range(0, shape.R, chunk):
      rows, (scores, d_weights) = slice(start, start + chunk), ahead
      if start + chunk < shape.R:
        ahead = start_of(start + chunk)
      g, at = start // shape.bq, start % shape.bq
      of_chunk = 0, 0, slice(g, g + 1), slice(at, at + chunk)
      visible = functools.partial(seen, shape, ids, i, j, start, chunk, True) if masked else None
      weights, d_scores = _slopes(scores, d_weights, lse, delta, of_chunk, visible, shape)
      d_scores = d_scores.astype(queries.dtype)
      of_v += _dot(weights.astype(d_outs.dtype), d_outs[rows], 1, 0, shape.precision)
      of_k += _dot(d_scores, queries[rows], 1, 0, shape.precision)
      sum_q[:, rows] += _dot(k[0, 0], d_scores, 0, 0, shape.precision)
    # Once a step and not once a chunk: the sums of a row are large, and reading them costs.
    sum_v[here] += of_v
    sum_k[here] += of_k

  _either(flags, body)

  # Products were with scaled queries: those of queries lack the scale, those of keys have log2(e)
  # too much.
  @pl.when(flags & LAST != 0)
  def _():
    d_q[0, 0] = (sum_q[...].T * scale).reshape(d_q.shape[2:]).astype(d_q.dtype)

  @pl.when(flags & LAST_OF_ROW != 0)
  def _():
    d_k[0, 0], d_v[0, 0] = (sum_k[...] / LOG2E).astype(d_k.dtype), sum_v[...].astype(d_v.dtype)


def _slopes(scores, d_weights, lse, delta, of_chunk, visible, shape):
  """(weights, gradients of scores), [keys, queries] of a chunk. lse, delta: refs, of_chunk: where
  its [1, queries] are.

  visible: () -> the mask, or None: all is seen. The log-sum-exp is of all keys, so weights need no
  other block; that of a query which sees nothing comes as +inf: no weight.
  """
  if shape.softcap:
    bent = jnp.tanh(scores / (shape.softcap * LOG2E))
    scores = shape.softcap * LOG2E * bent
  if visible is not None:
    scores = jnp.where(visible(), scores, HIDDEN)
  weights = jnp.exp2(scores - lse[of_chunk])
  d_scores = weights * (d_weights - delta[of_chunk])
  if shape.softcap:
    d_scores = d_scores * (1 - bent * bent)
  return weights, d_scores
