"""Which experts see a token, and how does it get there? A router, three dispatches that compute the same, statistics.

B batch · T length · D width · F feed-forward width of an expert · E experts · k experts of a token · C capacity of an expert
n = B * T tokens of this device
"""
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.grouped_matmul import grouped_matmul
from model.config import ModelConfig, MoEConfig
from model.layers import FeedForward, activate
from model.params import param, use
from parallel import axes as ax

# Of the arguments of what runs on each device; weights are gathered over fsdp before.
ROUTING = {'router': (None, None), 'router_bias': (None,), 'selection_bias': (None,)}
EXPERTS = {'gate': ('experts', None, 'feed_forward'), 'up': ('experts', None, 'feed_forward'), 'down': ('experts', 'feed_forward', None),
           'gate_bias': ('experts', 'feed_forward'), 'up_bias': ('experts', 'feed_forward'), 'down_bias': ('experts', None)}
STATS = {'load': (None,), 'dropped': (), 'balance_loss': (), 'router_z_loss': ()}


class MoE(nnx.Module):
  """A mixture of experts in place of a feed-forward (Shazeer et al., arXiv:1701.06538); see MoEConfig for its choices."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    moe, D, E, dtype = config.moe, config.D, config.E, config.parameter_dtype
    if not E:
      raise ValueError('model.moe.experts=0: a mixture of experts needs at least one')
    F, biased = moe.feed_forward or config.F, config.biases == 'all'
    self.moe, self.dtype, self.activation = moe, config.dtype, config.activation
    inner, outer = ('experts', 'expert_embed', 'feed_forward'), ('experts', 'feed_forward', 'expert_embed')

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
    self.shared = FeedForward(config, rngs, width=moe.shared_feed_forward) if moe.shared_feed_forward else None

  def __call__(self, x: Float[Array, 'B T D'],
               segments: Int[Array, 'B T'] | None = None) -> tuple[Float[Array, 'B T D'], dict[str, Float[Array, '...']]]:
    """The experts' outputs, and statistics of the routing.

    Args:
      segments: 0 for padding, which is sent to no expert and counts nowhere; None: there is none.
    Returns: y, and sums over the batch in f32, of all devices: `load` [E], choices that fell on each expert; `dropped` [], of
      them not computed for lack of capacity; `balance_loss` [] and `router_z_loss` [], times their weights, summed over tokens.
    """
    if segments is None:
      segments = ax.place(jnp.ones(x.shape[:2], jnp.int32), 'batch', 'length')
    held = lambda table, dtype: {name: use(getattr(self, name), dtype) for name in table if getattr(self, name) is not None}
    # The router stays f32, whatever the compute dtype: a rounded score sends a token elsewhere.
    routing, experts = held(ROUTING, 'float32'), held(EXPERTS, self.dtype)
    run = functools.partial(_dispatch, moe=self.moe, activation=self.activation, rows=ax.mesh_axes('batch'),
                            length=ax.mesh_axes('length'), columns=ax.mesh_axes('feed_forward'))
    tokens = ('batch', 'length', 'width')
    pick = lambda table, held: {name: table[name] for name in held}
    y, stats = ax.local(run, (tokens, ('batch', 'length'), pick(ROUTING, routing), pick(EXPERTS, experts)),
                        (tokens, STATS))(x, segments, routing, experts)
    y = ax.place(y, *ax.residual(x.shape[1]))
    return y if self.shared is None else y + self.shared(x), stats


def moved(bias: Float[Array, '*L E'], load: Float[Array, '*L E'], rate: float) -> Float[Array, '*L E']:
  """The selection bias after a step: up by `rate` for experts below the mean load, down above (arXiv:2408.15664, algorithm 1)."""
  return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


def _dispatch(x, segments, routing, experts, *, moe, activation, rows, length, columns):
  """Routes this device's tokens x [B, T, D] through its share of every expert; y is summed over the mesh axes `columns`.

  rows, length: mesh axes that B and T are split over, and statistics summed over.
  """
  (B, T, D), E = x.shape, moe.experts
  real = (segments > 0).reshape(B * T)
  flat = jnp.where(real[:, None], x.reshape(B * T, D), jnp.zeros((), x.dtype))
  logits = jnp.einsum('nD,DE->nE', flat.astype(jnp.float32), routing['router'], precision=jax.lax.Precision.HIGHEST)
  if 'router_bias' in routing:
    logits = logits + routing['router_bias'][None]
  scores, choices, gates = route(logits, routing.get('selection_bias'), moe)
  stats = _losses(logits, scores, choices, real.reshape(B, T), moe, rows, length)

  expert = jnp.where(real[:, None], choices, E)  # E: nowhere
  if moe.dispatch == 'capacity':
    C = min(B * T, math.ceil(moe.capacity_factor * B * T * moe.per_token / E))
    kept = _rank(expert, E) < C
    stats['dropped'] = _sum_over((real[:, None] & ~kept).sum(dtype=jnp.float32), rows + length)
    expert = jnp.where(kept, expert, E)
    y = capacity(flat, expert, gates, experts, activation, C)
  else:
    y = {'dense': dense, 'dropless': dropless}[moe.dispatch](flat, expert, gates, experts, activation)
  y = _sum_over(y.astype(x.dtype), columns)
  if 'down_bias' in experts:
    share = (jnp.where(expert[..., None] == jnp.arange(E)[None, None], gates[..., None], 0.0)).sum(1)
    y = y + jnp.einsum('nE,ED->nD', share, experts['down_bias'].astype(jnp.float32)).astype(x.dtype)
  return y.reshape(B, T, D), stats


def route(logits: Float[Array, 'n E'], selection_bias: Float[Array, 'E'] | None,
          moe: MoEConfig) -> tuple[Float[Array, 'n E'], Int[Array, 'n k'], Float[Array, 'n k']]:
  """Scores of all experts, the chosen ones in order of their score, and the gates of these; all f32.

  As transformers does it: a softmax group is as good as its best expert (DeepSeek-V2, arXiv:2405.04434, section 2.2.2), a sigmoid
  group as its best two (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), and experts of other groups score 0.
  """
  scores = jax.nn.softmax(logits) if moe.router == 'softmax' else jax.nn.sigmoid(logits)
  choice = scores if selection_bias is None else scores + selection_bias[None]
  choice = jax.lax.stop_gradient(choice)
  if moe.groups > 1:
    grouped = choice.reshape(len(choice), moe.groups, -1)
    best = jax.lax.top_k(grouped, min(2 if moe.router == 'sigmoid' else 1, grouped.shape[-1]))[0].sum(-1)
    groups = jax.lax.top_k(best, moe.groups_per_token)[1]
    inside = (groups[:, :, None] == jnp.arange(moe.groups)[None, None]).any(1)
    choice = jnp.where(inside[:, :, None], grouped, 0.0).reshape(choice.shape)
  choices = jax.lax.top_k(choice, moe.per_token)[1]
  gates = jnp.take_along_axis(scores, choices, 1)
  if moe.renormalise:
    gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
  return scores, choices, gates * moe.scale


def _losses(logits, scores, choices, real, moe, rows, length):
  """Load and losses of all devices' tokens; real [B, T] says which count."""
  (B, T), E, k = real.shape, moe.experts, moe.per_token
  probabilities = scores / scores.sum(-1, keepdims=True)
  chosen = (choices.reshape(B, T * k, 1) == jnp.arange(E)[None, None]) & jnp.repeat(real, k, 1)[..., None]
  count = _sum_over(chosen.sum(1, dtype=jnp.float32), length)  # [B, E], as the next one
  mass = _sum_over(jnp.where(real[..., None], probabilities.reshape(B, T, E), 0.0).sum(1), length)
  tokens = _sum_over(real.sum(1, dtype=jnp.float32), length)
  load = _sum_over(count.sum(0), rows)
  # Tokens * E * sum(fraction of choices * mean probability), of a row or of everything.
  if moe.balance_over == 'sequence':
    balance = _sum_over(((count * mass).sum(1) / jnp.maximum(tokens, 1.0)).sum(), rows)
  else:
    balance = (load * _sum_over(mass.sum(0), rows)).sum() / jnp.maximum(_sum_over(tokens.sum(), rows), 1.0)
  z = jnp.square(jax.nn.logsumexp(logits, -1))
  z = _sum_over(jnp.where(real.reshape(-1), z, 0.0).sum(), rows + length)
  return {'load': load, 'dropped': jnp.float32(0), 'balance_loss': moe.balance_loss * E / k * balance, 'router_z_loss': moe.z_loss * z}


def dense(x, expert, gates, experts, activation):
  """Every expert computes every token: obviously right. All dispatches take and give the same, but for capacity's own C.

  x [n, D] · expert [n, k], E for nowhere, whatever its gate · gates [n, k], f32 · experts: weights by name.
  Returns the sum over k of gate * expert, f32 [n, D], without the bias of `down`.
  """
  def one(y, found):
    index, w = found
    product = lambda name: _biased(x @ w[name], w.get(f'{name}_bias'))
    h = activate(product('gate') if 'gate' in w else None, product('up'), activation)
    share = jnp.where(expert == index, gates, 0.0).sum(1, keepdims=True)
    return y + share * (h @ w['down']).astype(jnp.float32), None
  # What an expert computes is as large as everything else together: cheaper to compute again than to keep E times.
  found = jnp.arange(len(experts['up']), dtype=expert.dtype), experts
  return jax.lax.scan(jax.checkpoint(one, prevent_cse=False), jnp.zeros(x.shape, jnp.float32), found)[0]


def dropless(x, expert, gates, experts, activation):
  """Choices sorted by expert, one grouped product per weight; those for nowhere come last and are not computed."""
  E, k = len(experts['up']), expert.shape[1]
  order = jnp.argsort(expert.reshape(-1), stable=True)
  position = _inverse(order, order.size)
  sizes = _sizes(expert, E)
  sorted_expert = jnp.minimum(expert.reshape(-1)[order], E - 1)

  def product(rows, name):
    bias = experts.get(f'{name}_bias')
    y = grouped_matmul(rows, experts[name], sizes)
    return y if bias is None else y + bias[sorted_expert]
  rows = _permute(jnp.repeat(x, k, 0), order, position)
  h = activate(product(rows, 'gate') if 'gate' in experts else None, product(rows, 'up'), activation)
  return _combine(_permute(grouped_matmul(h, experts['down'], sizes), position, order), gates)


def capacity(x, expert, gates, experts, activation, C):
  """Each expert computes C slots, filled or not; the caller has sent to nowhere what does not fit."""
  E, k, D = len(experts['up']), expert.shape[1], x.shape[1]
  slot = jnp.where(expert < E, expert * C + _rank(expert, E), E * C + jnp.arange(expert.size).reshape(expert.shape)).reshape(-1)
  choice = _inverse(slot, E * C)
  rows = _permute(jnp.repeat(x, k, 0), choice, slot).reshape(E, C, D)
  product = lambda name: _biased(jnp.einsum('ECD,EDF->ECF', rows, experts[name]), experts.get(f'{name}_bias'))
  h = activate(product('gate') if 'gate' in experts else None, product('up'), activation)
  y = jnp.einsum('ECF,EFD->ECD', h, experts['down']).reshape(E * C, D)
  return _combine(_permute(y, slot, choice), gates)


def _rank(expert, E):
  """[n, k]: how many earlier choices, in order of token, fell on the same expert."""
  order = jnp.argsort(expert.reshape(-1), stable=True)
  ends = jnp.cumsum(_sizes(expert, E + 1))
  starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])
  return _inverse(order, order.size).reshape(expert.shape) - starts[expert]


def _sizes(expert, E):
  return (expert.reshape(-1, 1) == jnp.arange(E)[None]).sum(0, dtype=jnp.int32)


def _inverse(index, size):
  """Where each of 0..size-1 stands in `index`; len(index), which is nowhere, for one that does not."""
  return jnp.full(size, index.size, jnp.int32).at[index].set(jnp.arange(index.size, dtype=jnp.int32), mode='drop', unique_indices=True)


@jax.custom_vjp
def _permute(x, index, back):
  """Rows index[0], index[1], ... of x; zeros for a row that is not there. `back` is the same the other way.

  As both ways are known, the gradient is a gather too, where jax would scatter and add.
  """
  return x.at[index].get(mode='fill', fill_value=0)


_permute.defvjp(lambda x, index, back: (_permute(x, index, back), (index, back)), lambda kept, dy: (_permute(dy, *kept[::-1]), None, None))


def _combine(y, gates):
  """Sum over k of gate * row, f32 [n, D], of rows [n * k, D]."""
  return (y.reshape(*gates.shape, -1).astype(jnp.float32) * gates[..., None]).sum(1)


def _biased(y, bias):
  """`y` [.., rows, F] plus `bias` [.., F]; `y` itself where there is none."""
  return y if bias is None else y + bias[..., None, :]


def _sum_over(value, axes):
  return jax.lax.psum(value, axes) if axes else value
