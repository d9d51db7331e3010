"""Which experts see a token, and how does it get there? A router, three dispatches, statistics.

The dispatches compute the same.

B batch · T length · D width · F feed-forward width of an expert · E experts
k experts of a token · C capacity of an expert · n = B * T tokens of this device
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import names
from kernels.grouped_matmul import RowGroups, chosen
from model.config import ModelConfig, MoEConfig
from model.layers import FeedForward, activate
from model.params import param
from model.weights import read
from model.weights.weight import Weight
from parallel import axes as ax
from parallel.experts import (
  Exchange,
  count,
  from_experts,
  in_rounds,
  inverse,
  plan,
  rank,
  to_experts,
)

ROUTING = 'router', 'router_bias', 'selection_bias'
EXPERTS = 'gate', 'up', 'down', 'gate_bias', 'up_bias', 'down_bias'
LANES = 128  # of a vector register
# Columns of the feed-forward width that are gathered and computed at once; more where a matrix of
# all experts here has no more numbers than WHOLE: a sum over pieces is written and read for each.
PIECE, WHOLE = 4096, 1 << 27
STATS = {'load': (None,), 'dropped': (), 'balance_loss': (), 'router_z_loss': ()}


class Axes(NamedTuple):
  """The mesh axes, larger than 1, over which a layer of experts is split.

  Attributes:
    rows, length: of tokens. columns: of the feed-forward width; where `sequence`, of the length of
      inputs and outputs, too.
    experts: which hold different experts. shards: along which D of their weights is stored.
  """

  rows: tuple[str, ...]
  length: tuple[str, ...]
  columns: tuple[str, ...]
  experts: tuple[str, ...]
  shards: tuple[str, ...]
  sequence: bool


class MoE(nnx.Module):
  """A mixture of experts in place of a feed-forward (Shazeer et al., arXiv:1701.06538).

  See MoEConfig for its choices.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    moe, D, E, dtype = config.moe, config.D, config.E, config.execution.parameter_dtype
    if not E:
      raise ValueError('model.moe.experts=0: a mixture of experts needs at least one')
    F, biased = moe.feed_forward or config.F, config.biases == 'all'
    self.moe, self.dtype, self.activation = moe, config.execution.dtype, config.activation
    self.backend = config.execution.experts
    inner, outer = (
      ('experts', 'expert_embed', 'feed_forward'),
      ('experts', 'feed_forward', 'expert_embed'),
    )

    def vector(shape, axes, wanted, dtype=dtype):
      return param(rngs, shape, axes, 'zeros', kind='vector', dtype=dtype) if wanted else None

    self.router = param(rngs, (D, E), ('embed', None), D**-0.5, wide=True, dtype=dtype)
    self.router_bias = vector((E,), ('norm',), biased)
    # A step moves it by 1e-3 or so, which bfloat16 would round away.
    self.selection_bias = vector((E,), ('norm',), moe.selection_bias, 'float32')
    self.gate = param(rngs, (E, D, F), inner, D**-0.5, dtype=dtype) if config.gated else None
    self.up = param(rngs, (E, D, F), inner, D**-0.5, dtype=dtype)
    self.down = param(rngs, (E, F, D), outer, (F * 2 * config.L) ** -0.5, dtype=dtype)
    self.gate_bias = vector((E, F), ('experts', 'feed_forward'), biased and config.gated)
    self.up_bias = vector((E, F), ('experts', 'feed_forward'), biased)
    self.down_bias = vector((E, D), ('experts', 'norm'), biased)
    self.shared = (
      FeedForward(config, rngs, width=moe.shared_feed_forward) if moe.shared_feed_forward else None
    )

  def __call__(
    self, x: Float[Array, 'B T D'], segments: Int[Array, 'B T'] | None = None
  ) -> tuple[Float[Array, 'B T D'], dict[str, Float[Array, '...']]]:
    """The experts' outputs, and statistics of the routing.

    Args:
      segments: 0 for padding, which is sent to no expert and counts nowhere; None: there is none.
    Returns: y, and sums over the batch in f32, of all devices: `load` [E], choices that fell on
      each expert; `dropped` [], of them not computed for lack of capacity; `balance_loss` [] and
      `router_z_loss` [], times their weights, summed over tokens.
    """
    if segments is None:
      segments = ax.place(jnp.ones(x.shape[:2], jnp.int32), 'batch', 'length')

    def weights(names):
      return {name: read(p) for name in names if (p := getattr(self, name)) is not None}

    # The router stays f32, whatever the compute dtype: a rounded score sends a token elsewhere.
    routing = {name: w.whole('float32', product=False) for name, w in weights(ROUTING).items()}
    experts = weights(EXPERTS)
    layout = {name: w.layout() for name, w in experts.items()}
    tokens = ax.residual(x.shape[1])
    axes = Axes(
      *(
        ax.mesh_axes(name)
        for name in ('batch', 'length', 'feed_forward', 'experts', 'expert_embed')
      ),
      'sequence' in tokens,
    )
    choices = dict(activation=self.activation, dtype=self.dtype, backend=self.backend)
    run = functools.partial(_layer, moe=self.moe, axes=axes, **choices)
    everywhere = {name: (None,) * value.ndim for name, value in routing.items()}
    y, stats = ax.local(run, (tokens, ('batch', 'length'), everywhere, layout), (tokens, STATS))(
      ax.place(x, *tokens), segments, routing, experts
    )
    return y if self.shared is None else y + self.shared(
      ax.place(x, 'batch', 'length', 'width')
    ), stats


def moved(
  bias: Float[Array, '*L E'], load: Float[Array, '*L E'], rate: float
) -> Float[Array, '*L E']:
  """The selection bias after a step: up by `rate` for experts below the mean load, down above.

  arXiv:2408.15664, algorithm 1.
  """
  return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


def _layer(x, segments, routing, experts, *, moe, activation, axes, dtype, backend):
  """What a device does: x [B, T, D] are its tokens, `experts` its shards of the weights."""
  x = (
    jax.lax.all_gather(x, axes.columns, axis=1, tiled=True) if axes.sequence and axes.columns else x
  )
  if 'down_bias' in experts and axes.columns:  # a part of a sum over columns: added once
    experts['down_bias'] = jax.tree.map(
      lambda bias: jnp.where(jax.lax.axis_index(axes.columns) == 0, bias, 0), experts['down_bias']
    )
  (B, T, D), E = x.shape, moe.experts
  real = (segments > 0).reshape(B * T)
  # Padding may hold anything, NaN too, and a product with a gate of 0 would keep it.
  x = jnp.where(real[:, None], x.reshape(B * T, D), jnp.zeros((), x.dtype))
  logits = jnp.einsum(
    'nD,DE->nE', x.astype(jnp.float32), routing['router'], precision=jax.lax.Precision.HIGHEST
  )
  if 'router_bias' in routing:
    logits = logits + routing['router_bias'][None]
  scores, choices, gates = route(logits, routing.get('selection_bias'), moe)
  stats = _losses(logits, scores, choices, real.reshape(B, T), moe, axes)

  expert = jnp.where(real[:, None], choices, E)  # E: nowhere
  if moe.dispatch == 'capacity':
    # Of the choices of an expert, in the order of tokens, the first C are kept.
    C = _slots(moe, B * T, E)
    kept = rank(expert, E) < C
    stats['dropped'] = _sum_over(
      (real[:, None] & ~kept).sum(dtype=jnp.float32), axes.rows + axes.length
    )
    expert = jnp.where(kept, expert, E)
  gates = jnp.where(expert < E, gates, 0.0)

  def gather(experts):
    return {name: w.here(axes.shards, dtype) for name, w in experts.items()}

  # Where no shards are gathered, pieces buy little: compiled for v5p, layers of Mixtral take 27%
  # less to 3% more memory whole than in pieces, which compute 30% more with remat 'none'.
  columns = max(PIECE, WHOLE // (len(routing['router']) * experts['up'].shape[0]))
  F = experts['up'].shape[2]
  pieces = _pieces(F, columns) if axes.shards else 1
  compute = functools.partial(_in_pieces, activation=activation, gather=gather, pieces=pieces)
  grouped = dict(backend=backend, columns=F // pieces)
  dispatch = functools.partial(DISPATCHES[moe.dispatch], moe=moe, axes=axes, **grouped)
  y = dispatch(x, expert, gates, experts, compute=compute)
  # Of padding zeros anyway, but its gradient may hold anything, too.
  y = jnp.where(real[:, None], y.astype(x.dtype), 0).reshape(B, T, D)
  if axes.sequence and axes.columns:
    return jax.lax.psum_scatter(y, axes.columns, scatter_dimension=1, tiled=True), stats
  return _sum_over(y, axes.columns), stats


def _slots(moe, n, parts):
  """Slots for the choices of n tokens that fall on one of `parts` equal parts of the experts."""
  most = n * min(moe.per_token, moe.experts // parts)
  return min(most, max(1, math.ceil(moe.capacity_factor * n * moe.per_token / parts)))


def route(
  logits: Float[Array, 'n E'], selection_bias: Float[Array, 'E'] | None, moe: MoEConfig
) -> tuple[Float[Array, 'n E'], Int[Array, 'n k'], Float[Array, 'n k']]:
  """Scores of all experts, the chosen ones in order of their score, the gates of these; all f32.

  As transformers does it: a softmax group is as good as its best expert (DeepSeek-V2,
  arXiv:2405.04434, section 2.2.2), a sigmoid group as its best two (DeepSeek-V3, arXiv:2412.19437,
  section 2.1.2), and experts of other groups are never chosen, however low a bias brings the rest.
  """
  scores = jax.nn.softmax(logits) if moe.router == 'softmax' else jax.nn.sigmoid(logits)
  choice = scores if selection_bias is None else scores + selection_bias[None]
  # Which experts are chosen has no gradient; the gates carry the router's.
  choice = jax.lax.stop_gradient(choice)
  if moe.groups > 1:
    grouped = choice.reshape(len(choice), moe.groups, -1)
    best = jax.lax.top_k(grouped, min(2 if moe.router == 'sigmoid' else 1, grouped.shape[-1]))[
      0
    ].sum(-1)
    groups = jax.lax.top_k(best, moe.groups_per_token)[1]
    inside = (groups[:, :, None] == jnp.arange(moe.groups)[None, None]).any(1)
    choice = jnp.where(inside[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
  choices = jax.lax.top_k(choice, moe.per_token)[1]
  # Of the scores: the selection bias decides who is chosen, not how much that counts.
  gates = jnp.take_along_axis(scores, choices, 1)
  if moe.renormalise:
    gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
  return scores, choices, gates * moe.scale


def _losses(logits, scores, choices, real, moe, axes):
  """Load and losses of all devices' tokens; real [B, T] says which count."""
  (B, T), E, k, (rows, length) = real.shape, moe.experts, moe.per_token, axes[:2]
  probabilities = scores / scores.sum(-1, keepdims=True)
  chosen = (choices.reshape(B, T * k, 1) == jnp.arange(E)[None, None]) & jnp.repeat(real, k, 1)[
    ..., None
  ]
  counts = _sum_over(chosen.sum(1, dtype=jnp.float32), length)  # [B, E], as the next one
  mass = _sum_over(jnp.where(real[..., None], probabilities.reshape(B, T, E), 0.0).sum(1), length)
  tokens = _sum_over(real.sum(1, dtype=jnp.float32), length)
  load = _sum_over(counts.sum(0), rows)
  # Tokens * E * sum(fraction of choices * mean probability), of a row or of everything.
  if moe.balance_over == 'sequence':
    balance = _sum_over(((counts * mass).sum(1) / jnp.maximum(tokens, 1.0)).sum(), rows)
  else:
    balance = (load * _sum_over(mass.sum(0), rows)).sum() / jnp.maximum(
      _sum_over(tokens.sum(), rows), 1.0
    )
  z = jnp.square(jax.nn.logsumexp(logits, -1))
  z = _sum_over(jnp.where(real.reshape(-1), z, 0.0).sum(), rows + length)
  return {
    'load': load,
    'dropped': jnp.float32(0),
    'balance_loss': moe.balance_loss * E / k * balance,
    'router_z_loss': moe.z_loss * z,
  }


def dense(x, expert, gates, experts, *, moe, compute, axes, backend, columns):
  """Every expert computes every token: obviously right.

  All dispatches take and give the same, but for what capacity drops.

  x [n, D] · expert [n, k], E for nowhere · gates [n, k], f32, 0 for nowhere
  experts: stored weights by name, of those here. backend, columns: of grouped products, where there
    are any, and how many columns of the feed-forward width they compute at once.
  Returns the sum over k of gate * expert, f32 [n, D]: a part of it where F is split, over
  axes.columns.
  """

  def everyone(a):
    return jax.lax.all_gather(a, axes.experts, axis=0, tiled=True) if axes.experts else a

  # Experts stay where they are: all tokens come to each device, and go back as sums.
  x, expert, gates = everyone(x), everyone(expert), everyone(gates)
  here = experts['up'].shape[0]
  first = jax.lax.axis_index(axes.experts) * here if axes.experts else 0

  def add(y, numbered):
    index, w = numbered
    share = jnp.where(expert == first + index, gates, 0.0).sum(1, keepdims=True)
    w = jax.tree.map(lambda value: value[None], w)
    return y + share * compute(x[None], w, _each)[0].astype(jnp.float32), None

  # What an expert computes is as large as everything else together: cheaper to compute again than
  # to keep E times.
  numbered = jnp.arange(here, dtype=expert.dtype), experts
  y, _ = jax.lax.scan(
    jax.checkpoint(add, prevent_cse=False), jnp.zeros(x.shape, jnp.float32), numbered
  )
  return (
    jax.lax.psum_scatter(y, axes.experts, scatter_dimension=0, tiled=True) if axes.experts else y
  )


def dropless(x, expert, gates, experts, *, moe, compute, axes, backend, columns):
  """Each choice is computed, whatever the routing: on one device at once, on several in rounds."""
  # Of an exchange's slots those are filled that a balanced routing needs.
  grouped = dict(backend=backend, columns=columns, filled=expert.size)
  run = functools.partial(_sorted, compute=compute, **grouped)
  if not axes.experts:
    # First choices before second ones: a sum over the first dimension is of whole registers.
    y = run(x, gates.T.reshape(-1), expert.T.reshape(-1), experts)
    return y.reshape(-1, *x.shape).sum(0, dtype=jnp.float32)
  E = experts['up'].shape[0]
  exchange = Exchange(axes.experts, E, _slots(moe, len(x), moe.experts // E))
  rounds = plan(expert, exchange, axes.rows + axes.length + axes.columns)
  return in_rounds(run, exchange, x, gates, experts, rounds)


def capacity(x, expert, gates, experts, *, moe, compute, axes, backend, columns):
  """Each expert computes C slots of each device, filled or not.

  The caller has sent to nowhere what does not fit.
  """
  E, (n, D) = moe.experts, x.shape
  C = _slots(moe, n, E)
  # A choice's slot is its rank among those of its expert; what goes nowhere gets a number behind
  # all slots, another one each: `inverse` must not find two in one place.
  slot = jnp.where(
    expert < E, expert * C + rank(expert, E), E * C + jnp.arange(expert.size).reshape(expert.shape)
  ).reshape(-1)
  choice = inverse(slot, E * C)
  rows = _permute(jnp.repeat(x, expert.shape[1], 0), choice, slot).reshape(E, C, D)
  y = from_experts(compute(to_experts(rows, axes.experts), experts, _each), axes.experts)
  return _combine(_permute(y.reshape(E * C, D), slot, choice), gates)


DISPATCHES = {'dense': dense, 'dropless': dropless, 'capacity': capacity}


def _sorted(rows, gates, expert, experts, *, compute, backend, columns, filled):
  """Rows, each through its experts [M] and times their gates [M]: [M, D]. Of several choices all
  rows' first ones come first.

  One grouped product per weight, of rows sorted by expert.
  E of E experts is none: it yields zeros where the gate is 0, and is computed only if E is 1.
  """
  E = experts['up'].shape[0]
  # What is multiplied: gathered, a piece at a time, and not as it is stored.
  matrices = jax.ShapeDtypeStruct((E, rows.shape[1], columns), rows.dtype)
  if E == 1 and chosen(rows, matrices, backend) != 'pallas_tpu':  # which leaves empty slots out
    return compute(rows[None], experts, _each, gates[None])[0]
  # Sorted, an expert's rows lie side by side, those of none at the end: one product for all experts
  # goes through them group by group, and none is filled up to the size of the largest.
  order = jnp.argsort(expert, stable=True)
  position = inverse(order, order.size)
  groups = RowGroups(count(expert, E), jnp.minimum(expert[order], E - 1), backend, filled)

  def product(rows, w, bias, gates=None, chained=False):
    y, rows = _chained(w, rows, groups) if chained else (w.grouped(rows, groups), rows)
    y = _biased(y, bias and bias.rows(groups.of_row), gates)
    return (y, rows) if chained else y

  y = compute(_spread(rows, order, position), experts, product, _spread(gates, order, position))
  return _spread(y, position, order)


def _chained(w, rows, groups):
  """A grouped product, and the rows for the next one of the same: where a kernel computes both, it
  adds up their gradients (kernels.grouped_matmul_tpu.chained).
  """
  if type(w).grouped is Weight.grouped:  # of numbers, and of nothing besides
    numbers = w.numbers(rows.dtype)
    if chosen(rows, numbers, groups.backend) == 'pallas_tpu':
      multiply = names.imported('kernels.grouped_matmul_tpu.chained')
      return multiply(rows, numbers, groups.sizes, groups.filled or len(rows))
  return w.grouped(rows, groups), rows


def _each(rows, w, bias, gates=None, chained=False):
  """Rows [E, C, D], of each expert as many."""
  y = _biased(w.each(rows), bias and bias.numbers(rows.dtype)[:, None], gates)
  return (y, rows) if chained else y


def _biased(y, bias, gates):
  """Products of rows that were multiplied with their gates, if given, and so is the bias."""
  if bias is None:
    return y
  return y + (bias if gates is None else bias * gates[..., None].astype(bias.dtype))


def _in_pieces(rows, experts, product, gates=None, *, activation, gather, pieces):
  """act(rows gate) * (rows up) down, of `product(rows, weight, bias, gates)`; in the type of the
  rows. Times `gates`, if given. `product(.., chained=True)` has the rows, too, for another one.

  A wide feed-forward is a sum over pieces of its width: weights are gathered, and their gradients
  scattered, piece by piece, and what a piece computes is computed again in the backward pass: of a
  model's largest arrays, only a piece is there at a time.
  """

  def feed_forward(w):
    gate, again = None, rows
    if 'gate' in w:
      gate, again = product(rows, w['gate'], w.get('gate_bias'), chained=True)
    h = activate(gate, product(again, w['up'], w.get('up_bias')), activation)
    if gates is None:
      return product(h, w['down'], w.get('down_bias'))
    # Before the last product and not behind it, or the gradient of the gates would need that once
    # more.
    h = (h.astype(jnp.float32) * gates[..., None]).astype(h.dtype)
    return product(h, w['down'], w.get('down_bias'), gates)

  if pieces == 1:
    return feed_forward(gather(experts)).astype(rows.dtype)

  parts = {
    name: w.cut(-2 if name == 'down' else -1, pieces)
    for name, w in experts.items()
    if name != 'down_bias'
  }
  if 'down_bias' in experts:  # added once
    parts['down_bias'] = jax.tree.map(
      lambda bias: jnp.zeros((pieces, *bias.shape), bias.dtype).at[0].set(bias),
      experts['down_bias'],
    )

  def add(y, part):
    return y + feed_forward(gather(part)).astype(jnp.float32), None

  y, _ = jax.lax.scan(
    jax.checkpoint(add, prevent_cse=False), jnp.zeros(rows.shape, jnp.float32), parts
  )
  return y.astype(rows.dtype)


def _pieces(F, most=PIECE):
  """The fewest equal pieces of whole lanes no wider than `most`; 1 where there are none."""
  return next(
    (
      n
      for n in range(1, F + 1)
      if F % n == 0 and F // n <= most and (n == 1 or F // n % LANES == 0)
    ),
    1,
  )


@jax.custom_vjp
def _permute(x, index, back):
  """Rows index[0], index[1], ... of x; zeros for a row that is not there.

  `back` is the same the other way. As both ways are known, the gradient is a gather too, where jax
  would scatter and add.
  """
  return x.at[index].get(mode='fill', fill_value=0)


_permute.defvjp(
  lambda x, index, back: (_permute(x, index, back), (index, back)),
  lambda kept, dy: (_permute(dy, *kept[::-1]), None, None),
)


@jax.custom_vjp
def _spread(x, order, position):
  """Rows order[0], order[1], ... of as many copies of x, one behind the other, as that needs; each
  is there once. As `_permute` otherwise, without a look at every number for rows that are not.
  """
  return x.at[order % len(x)].get(mode='promise_in_bounds')


def _spread_backward(kept, dy):
  order, position, shape = kept
  copies = dy.at[position].get(mode='promise_in_bounds').reshape(-1, *shape)
  return copies.sum(0, dtype=jnp.float32).astype(dy.dtype), None, None


_spread.defvjp(
  lambda x, order, position: (_spread(x, order, position), (order, position, x.shape)),
  _spread_backward,
)


def _combine(y, gates):
  """Sum over k of gate * row, f32 [n, D], of rows [n * k, D]."""
  return (y.reshape(*gates.shape, -1).astype(jnp.float32) * gates[..., None]).sum(1)


def _sum_over(value, axes):
  return jax.lax.psum(value, axes) if axes else value
