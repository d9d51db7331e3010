"""Does loss scaling follow its rules, and skip what overflows?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

from training import precision

update = jax.jit(precision.update)


def as_numbers(state):
  return float(state.scale), int(state.good_steps), int(state.skipped_steps)


@given(
  steps=st.lists(st.booleans(), max_size=60),
  interval=st.integers(1, 5),
  exponent=st.integers(0, 24),
)
@settings(max_examples=40, deadline=None)
def test_state_machine(steps, interval, exponent):
  state = precision.init_loss_scale('float16', initial=2.0**exponent, interval=interval)
  scale, good, skipped = 2.0**exponent, 0, 0
  for finite in steps:
    state = update(state, jnp.asarray(finite))
    if not finite:
      scale, good, skipped = max(1.0, scale / 2), 0, skipped + 1
    elif good + 1 == interval:
      scale, good = min(2.0**24, scale * 2), 0
    else:
      good += 1
    assert as_numbers(state) == (scale, good, skipped)


def test_defaults_are_the_usual_ones():
  state = precision.init_loss_scale('float16')
  assert as_numbers(state) == (2.0**15, 0, 0) and state.interval == 2000
  state = dataclasses.replace(state, good_steps=jnp.int32(1999))
  assert as_numbers(update(state, jnp.array(True))) == (2.0**16, 0, 0)
  assert as_numbers(update(state, jnp.array(False))) == (2.0**14, 0, 1)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_other_types_are_not_scaled(dtype):
  state = precision.init_loss_scale(dtype, interval=1)
  assert float(precision.scale(jnp.float32(1.7), state)) == np.float32(1.7)
  for finite in (True, False, True):
    state = update(state, jnp.array(finite))
  assert as_numbers(state) == (1.0, 0, 1), 'the scale must stay, skipped steps must be counted'


def step(params, opt_state, scale, x, optimizer):
  """A float16 step on a loss whose gradient overflows while the scale is too large."""

  def loss_fn(params):
    y = (params['w'].astype(jnp.float16) * x.astype(jnp.float16)).astype(jnp.float32)
    return precision.scale(jnp.sum(jnp.square(y)), scale)

  grads = jax.tree.map(lambda g: g / scale.scale, jax.grad(loss_fn)(params))
  finite = jnp.isfinite(optax.tree.norm(grads))
  updates, new_state = optimizer.update(grads, opt_state, params)
  new = optax.apply_updates(params, updates), new_state
  return (
    *precision.select(finite, new, (params, opt_state)),
    precision.update(scale, finite),
    finite,
  )


def test_float16_training_backs_off_then_trains():
  optimizer = optax.adam(0.01)
  params = {'w': jnp.full((4,), 1.0)}
  opt_state, scale = optimizer.init(params), precision.init_loss_scale('float16')
  run = jax.jit(functools.partial(step, optimizer=optimizer))
  x = jnp.full((4,), 8.0)
  # The gradient of the f16 product is 2 * 8 * scale * 8 = 2**7 * scale; above 65504 it overflows:
  # at 2**15 to 2**9.
  skipped = 0
  while True:
    before = params, opt_state
    params, opt_state, scale, finite = run(params, opt_state, scale, x)
    if finite:
      break
    skipped += 1
    jax.tree.map(np.testing.assert_array_equal, (params, opt_state), before)
  assert skipped == int(scale.skipped_steps) == 7 and float(scale.scale) == 2.0**8
  np.testing.assert_allclose(params['w'], 0.99, rtol=1e-5)
  assert int(opt_state[0].count) == 1


def test_small_gradients_survive_in_float16_only_when_scaled():
  def grad(scale):
    def half(w):
      return (w.astype(jnp.float16) * jnp.float16(1e-2)).astype(jnp.float32)

    gradient = jax.grad(lambda w: precision.scale(half(w) * 1e-6, scale))(jnp.ones(()))
    return float(gradient / scale.scale)

  assert grad(precision.init_loss_scale('bfloat16')) == 0
  np.testing.assert_allclose(grad(precision.init_loss_scale('float16')), 1e-8, rtol=1e-2)


def test_select_takes_one_tree_or_the_other():
  old, new = (
    {'a': jnp.zeros((2, 3)), 'n': jnp.int32(0)},
    {'a': jnp.full((2, 3), jnp.nan), 'n': jnp.int32(1)},
  )
  jax.tree.map(np.testing.assert_array_equal, precision.select(jnp.array(False), new, old), old)
  jax.tree.map(np.testing.assert_array_equal, precision.select(jnp.array(True), new, old), new)


def test_state_can_be_donated():
  state = precision.init_loss_scale('float16')
  donated = jax.jit(precision.update, donate_argnums=0)(state, jnp.array(True))
  assert as_numbers(donated) == (2.0**15, 1, 0)


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(initial=0.5), 'initial loss scale 0.5 must be from 1.0 to'),
    (dict(initial=2.0**25), 'must be from 1.0 to'),
    (dict(interval=0), 'interval 0 must be at least 1 step'),
  ],
)
def test_errors(arguments, message):
  with pytest.raises(ValueError, match=message):
    precision.init_loss_scale('float16', **arguments)
