"""How do tokens reach the devices that hold their experts, and come back?
Exchanges between devices, called inside ax.local.

The experts of a layer lie, in order, on the devices along the mesh axes `axes`: P devices with E
experts each. Every device routes tokens of its own.

n tokens of this device · k choices of a token · D width · C slots
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROUNDS = 'rounds'  # scope in a program of a loop whose end the routing decides


def to_experts(slots: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Slots [P * E, C, D] of all experts, filled here, become those of the experts that are here,
  filled everywhere: [E, P * C, D].
  """
  return jax.lax.all_to_all(slots, axes, split_axis=0, concat_axis=1, tiled=True) if axes else slots


def from_experts(slots: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """The way back: [E, P * C, D] to [P * E, C, D]."""
  return jax.lax.all_to_all(slots, axes, split_axis=1, concat_axis=0, tiled=True) if axes else slots


class Exchange(NamedTuple):
  """Who exchanges how much.

  Attributes:
    axes: of the mesh, along which the experts lie.
    E: experts of a device.
    C: rows from one device to another in a round.
  """

  axes: tuple[str, ...]
  E: int
  C: int


class Rounds(NamedTuple):
  """Which slot of which round a choice has.

  In a round every device sends up to C rows to every other. There are as many rounds as the busiest
  pair of devices needs, so that any routing is computed exactly, in memory that does not depend on
  it; a balanced one takes a single round.

  Attributes:
    order, expert: choices sorted by expert, and which one that is on its device, [n * k].
    sizes, first: how many of them go to each device, and where in `order` these start, [P].
    owner, place: of a choice, the device it goes to (P: none)
      and how many before it in `order` go there, too, [n, k].
    count: how many rounds, the same on all devices, []; None: one, whatever the routing.
  """

  order: jax.Array
  expert: jax.Array
  sizes: jax.Array
  first: jax.Array
  owner: jax.Array
  place: jax.Array
  count: jax.Array | None


def plan(expert: jax.Array, exchange: Exchange, everyone: tuple[str, ...]) -> Rounds:
  """The rounds of the choices `expert` [n, k], 0 .. P * E - 1, or P * E for nowhere.

  everyone: the mesh axes along which devices route different tokens,
  or compute different parts of the same.
  """
  (axes, E, C), (n, k) = exchange, expert.shape
  P = jax.lax.axis_size(axes)
  owner = expert // E  # P for those that go nowhere, which sorting puts last
  order = jnp.argsort(expert.reshape(-1), stable=True).astype(jnp.int32)
  # Sorted by expert, choices are sorted by device, too: those of device p are a run of sizes[p]
  # from first[p] on, and a choice's place in it is its place in `order` less where the run starts.
  sizes = count(owner, P)
  first = jnp.cumsum(sizes) - sizes
  place = inverse(order, order.size).reshape(n, k) - first.at[owner].get(mode='clip')

  # A token chooses an expert once, so that one device sends another n min(k, E) rows at most. Where
  # C is less, all devices go as many rounds as the busiest pair needs: a collective in a loop has
  # to be run by all or by none.
  one_is_enough = C >= n * min(k, E)
  rounds = None if one_is_enough else jax.lax.pmax(jnp.maximum(1, -(-sizes.max() // C)), everyone)
  return Rounds(order, (expert % E).reshape(-1)[order], sizes, first, owner, place, rounds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_rounds(
  function: Callable,
  exchange: Exchange,
  x: jax.Array,
  gates: jax.Array,
  weights: Any,
  rounds: Rounds,
) -> jax.Array:
  """The sum over a token's choices of `function`, each computed where its expert is; f32 [n, D].

  Nothing of a round is kept for the backward pass,
  which sends rows and computes the function once more.

  Args:
    function: (rows [M, D], gates [M], experts [M], weights) -> [M, D], in the type of the rows. An
      expert is one of the E here, or E: of an empty slot, whose gate is 0, and its row, too, if E
      is 1, else any; its result goes nowhere. Differentiable but for `experts`.
    x: [n, D]. gates: [n, k], f32. weights: of the E experts here, a pytree.
  """

  def add_round(i, y):
    rows, gate, expert = _sent(exchange, rounds, i, x, gates)
    results = _returned(exchange, rounds, i, function(rows, gate, expert, weights))
    return y + results.sum(0, dtype=jnp.float32)

  return _repeat(rounds, add_round, jnp.zeros(x.shape, jnp.float32))


def _forward(function, exchange, *arguments):
  return in_rounds(function, exchange, *arguments), arguments


def _backward(function, exchange, arguments, dy):
  x, gates, weights, rounds = arguments
  # A frozen base may be in codes, which have no gradient.
  leaves, tree = jax.tree.flatten(weights)
  numeric = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
  numbers = [leaf for leaf, is_number in zip(leaves, numeric) if is_number]

  def whole(numbers, code):
    numbers = iter(numbers)
    return tree.unflatten(
      [next(numbers) if yes else code(leaf) for leaf, yes in zip(leaves, numeric)]
    )

  def add_round(i, sums):
    # Rows are sent and the function is computed again. The gradient of what came back, dy of the
    # token, travels as the rows did; gradients of rows and gates come back as results do.
    rows, gate, expert = _sent(exchange, rounds, i, x, gates)
    _, pull = jax.vjp(
      lambda rows, gate, numbers: function(rows, gate, expert, whole(numbers, lambda leaf: leaf)),
      rows,
      gate,
      numbers,
    )
    d_rows, d_gate, d_numbers = pull(_sent(exchange, rounds, i, dy.astype(x.dtype), gates)[0])
    d_x = _returned(exchange, rounds, i, d_rows).sum(0, dtype=jnp.float32)
    d_gates = _returned(exchange, rounds, i, d_gate[:, None])[..., 0].T
    return jax.tree.map(jnp.add, sums, (d_x, d_gates, d_numbers))

  zeros = jax.tree.map(jnp.zeros_like, (x.astype(jnp.float32), gates, numbers))
  d_x, d_gates, d_numbers = _repeat(rounds, add_round, zeros)
  d_weights = whole(d_numbers, lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0))
  return d_x.astype(x.dtype), d_gates, d_weights, None


in_rounds.defvjp(_forward, _backward)


def _repeat(rounds, add_round, start):
  if rounds.count is None:
    return add_round(0, start)
  with jax.named_scope(ROUNDS):
    return jax.lax.fori_loop(0, rounds.count, add_round, start)


def _sent(exchange, rounds, i, x, gates):
  """What this device is sent in round i: rows [P * C, D], their gates and experts [P * C]."""
  (axes, E, C), n, k = exchange, *rounds.owner.shape
  # Slots i C .. i C + C - 1 of each device's run of choices, [P, C]; behind its end they are empty
  # (n k, which is out of bounds everywhere: `pick` fills them).
  slot = i * C + jnp.arange(C, dtype=jnp.int32)[None]
  at = jnp.where(slot < rounds.sizes[:, None], rounds.first[:, None] + slot, n * k).reshape(-1)
  choice = rounds.order.at[at].get(mode='fill', fill_value=n * k)
  send = functools.partial(
    jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0, tiled=True
  )

  def pick(values, index, fill):
    return send(values.at[index].get(mode='fill', fill_value=fill))

  gate, expert = pick(gates.reshape(-1), choice, 0), pick(rounds.expert, at, E)
  # An empty slot's row is zeros where one expert computes all, whoever they are for; several look
  # at their own only.
  return (
    (pick(x, choice // k, 0) if E == 1 else send(x.at[choice // k].get(mode='clip'))),
    gate,
    expert,
  )


def _returned(exchange, rounds, i, rows):
  """What became of the rows [P * C, D] of round i, of each choice of this device, all tokens' first
  ones first; zeros for those of other rounds; [k, n, D].
  """
  axes, _, C = exchange
  rows = jax.lax.all_to_all(rows, axes, split_axis=0, concat_axis=0, tiled=True)
  # Where a choice's row was put in round i, its slot of its device's C; of other rounds, and of
  # choices that go nowhere, none.
  slot = (rounds.place - i * C).T
  here = (slot >= 0) & (slot < C) & (rounds.owner.T < rounds.sizes.size)
  at = jnp.where(here, rounds.owner.T * C + slot, 0)
  return jnp.where(here[..., None], rows.at[at].get(mode='promise_in_bounds'), 0)


def count(group: jax.Array, groups: int) -> jax.Array:
  """How many of each of `groups` groups there are, int32 [groups]."""
  return (group.reshape(-1, 1) == jnp.arange(groups)[None]).sum(0, dtype=jnp.int32)


def rank(group: jax.Array, groups: int) -> jax.Array:
  """How many earlier choices, in order of token, fell on the same group (`groups`: on none),
  as [n, k] as `group` is.
  """
  # A stable sort keeps the order of tokens within a group: a choice's rank is its place among the
  # sorted, less where its group starts.
  order = jnp.argsort(group.reshape(-1), stable=True)
  ends = jnp.cumsum(count(group, groups + 1))
  starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])
  return inverse(order, order.size).reshape(group.shape) - starts[group]


def inverse(index: jax.Array, size: int) -> jax.Array:
  """Where each of 0..size-1 stands in `index`; len(index), which is nowhere,
  for one that does not.
  """
  return (
    jnp.full(size, index.size, jnp.int32)
    .at[index]
    .set(jnp.arange(index.size, dtype=jnp.int32), mode='drop', unique_indices=True)
  )
