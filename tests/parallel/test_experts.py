"""Do rows reach the devices that hold their experts, all of them, and come back to their tokens?
For any routing, in any number of rounds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from parallel import axes as ax, experts
from parallel.mesh import MeshConfig, make_mesh

P, E, D, n, k = 4, 3, 5, 6, 2  # P devices with E experts each; n tokens of a device, k choices each


def twist(rows, gates, expert, weights):
  """A function of row, gate and weights that is not linear in any of them;
  of an empty slot anything.
  """
  scale, offset = (
    w.at[expert].get(mode='fill', fill_value=7.0) for w in (weights['scale'], weights['offset'])
  )
  return jnp.tanh(rows * scale) * gates[:, None] ** 2 + gates[:, None] * offset


def whole(x, gates, weights, expert):
  """The same as `split`, choice by choice, where everything is on one device; x [P * n, D]."""
  at = jnp.minimum(expert, P * E - 1).reshape(-1)
  y = twist(jnp.repeat(x, k, 0), gates.reshape(-1), at, weights).reshape(-1, k, D)
  return jnp.where((expert < P * E)[..., None], y, 0).sum(1)


def split(C, counted):
  """The same over P devices in rounds of C slots; the second result is how many there were."""

  def run(x, gates, weights, expert):
    exchange = experts.Exchange(('expert',), E, C)
    rounds = experts.plan(expert, exchange, ('data', 'expert'))
    assert (rounds.count is not None) == counted
    count = jnp.int32(1) if rounds.count is None else rounds.count
    return experts.in_rounds(twist, exchange, x, gates, weights, rounds), count

  table = {'scale': ('experts', None), 'offset': ('experts', None)}
  return ax.local(
    run, (('batch', None), ('batch', None), table, ('batch', None)), (('batch', None), ())
  )


@functools.cache
def compiled(C, counted):
  def loss(function, *inputs):
    y, count = function(*inputs)
    return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum(), (y, count)

  def gradient(function):
    return lambda expert, *inputs: jax.value_and_grad(
      lambda *inputs: loss(function, *inputs, expert), argnums=(0, 1, 2), has_aux=True
    )(*inputs)

  with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=P))):
    found = jax.jit(gradient(split(C, counted)))
  return found, jax.jit(gradient(lambda *inputs: (whole(*inputs), jnp.int32(0))))


def check(expert, C, rounds):
  draw = np.random.default_rng(0)
  x, gates = (
    draw.normal(size=(2 * P * n, D)).astype(np.float32),
    draw.uniform(0.1, 1, size=(2 * P * n, k)).astype(np.float32),
  )
  weights = {name: draw.normal(size=(P * E, D)).astype(np.float32) for name in ('scale', 'offset')}
  gates = np.where(expert < P * E, gates, 0).astype(np.float32)
  over_devices, on_one = compiled(C, C < n * k)
  mesh = make_mesh(MeshConfig(data=2, expert=P))
  with jax.set_mesh(mesh):

    def place(value, *axes):
      return jax.device_put(value, jax.NamedSharding(mesh, ax.spec(*axes)))

    inputs = (
      place(expert, 'batch', None),
      place(x, 'batch', None),
      place(gates, 'batch', None),
      place(weights, 'experts', None),
    )
    (_, (y, count)), gradients = over_devices(*inputs)
  (_, (wanted, _)), wanted_gradients = on_one(expert, x, gates, weights)
  np.testing.assert_allclose(y, wanted, atol=1e-5)
  wanted_x, wanted_gates, wanted_weights = wanted_gradients
  for a, b in zip(
    jax.tree.leaves(gradients),
    jax.tree.leaves((wanted_x, np.where(expert < P * E, wanted_gates, 0), wanted_weights)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert count == rounds


def choices(seed):
  """A different expert for each choice of a token; about one in five is nowhere."""
  draw = np.random.default_rng(seed)
  expert = np.stack([draw.permutation(P * E)[:k] for _ in range(2 * P * n)]).astype(np.int32)
  return np.where(draw.uniform(size=expert.shape) < 0.2, P * E, expert)


def most(expert):
  """Choices of the busiest pair of devices."""
  return max(
    (of_device // E == owner).sum()
    for of_device in expert.reshape(2 * P, n * k)
    for owner in range(P)
  )


@given(st.integers(0, 2**31), st.sampled_from([2, 3, n * k]))
@settings(max_examples=12)
def test_any_routing_is_exact(seed, C):
  expert = choices(seed)
  check(expert, C, max(1, -(-most(expert) // C)))


@pytest.mark.parametrize('C', [2, 5, n * k])
def test_the_worst_routing_takes_more_rounds_and_not_more_room(C):
  """All tokens of all devices choose experts of one device."""
  check(np.tile(np.array([[4, 5]], np.int32), (2 * P * n, 1)), C, -(-n * k // C))


def test_weights_in_codes_have_no_gradient_and_let_others_through():
  """As those of a frozen base under adapters."""
  draw = np.random.default_rng(0)
  x = draw.normal(size=(2 * P * n, D)).astype(np.float32)
  gates, expert = np.full((2 * P * n, k), 0.5, np.float32), choices(0)
  codes = draw.integers(-2, 3, (P * E, D)).astype(np.int8)
  offset = draw.normal(size=(P * E, D)).astype(np.float32)
  gates = np.where(expert < P * E, gates, 0)

  def loss(function, scale):
    def total(x, gates, offset, expert):
      result = function(x, gates, {'scale': scale, 'offset': offset}, expert)
      return (result[0] if isinstance(result, tuple) else result).sum()

    return jax.jit(jax.grad(total, (0, 1, 2)))

  mesh = make_mesh(MeshConfig(data=2, expert=P))
  with jax.set_mesh(mesh):

    def place(value, *axes):
      return jax.device_put(value, jax.NamedSharding(mesh, ax.spec(*axes)))

    arrays = place(x, 'batch', None), place(gates, 'batch', None), place(offset, 'experts', None)
    found = loss(split(3, True), place(codes, 'experts', None))(
      *arrays, place(expert, 'batch', None)
    )
  wanted = loss(whole, jnp.float32(codes))(x, gates, offset, expert)
  wanted = wanted[0], np.where(expert < P * E, wanted[1], 0), wanted[2]
  for a, b in zip(found, wanted):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_nobody_sends_anything():
  check(np.full((2 * P * n, k), P * E, np.int32), 2, 1)


def test_slots_go_to_their_experts_and_back():
  """Slot s of expert e, filled by device d, is seen where e lives at place d * C + s;
  and comes back.
  """
  C, mesh = 3, make_mesh(MeshConfig(data=2, expert=4))
  slots = np.arange(8 * P * E * C).reshape(8, P * E, C, 1).astype(np.float32)

  def run(slots):
    there = experts.to_experts(slots[0], ('expert',))
    return there[None], experts.from_experts(there, ('expert',))[None]

  with jax.set_mesh(mesh):
    split = ('batch', None, None, None)
    there, back = jax.jit(ax.local(run, (split,), (split, split)))(
      jax.device_put(slots, jax.NamedSharding(mesh, ax.spec(*split)))
    )
  np.testing.assert_array_equal(back, slots)
  for device, found in enumerate(np.asarray(there)):  # [E, P * C, 1], device = data * P + owner
    group, owner = divmod(device, P)
    wanted = slots[group * P : (group + 1) * P, owner * E : (owner + 1) * E]
    np.testing.assert_array_equal(found, wanted.swapaxes(0, 1).reshape(E, P * C, 1))
  whole = slots[0]
  assert experts.to_experts(whole, ()) is whole and experts.from_experts(whole, ()) is whole


def test_ranks_counts_and_inverses():
  group = jnp.array([[2, 0], [2, 3], [0, 2]])  # 3: no group
  assert experts.rank(group, 3).tolist() == [[0, 0], [1, 0], [1, 2]]
  assert experts.count(group, 3).tolist() == [2, 0, 3]
  assert experts.inverse(jnp.array([3, 0, 9, 1]), 5).tolist() == [1, 3, 4, 0, 4]
