"""Is it GPTQ: the codes of a reference in float64, nearer in what a matrix gives out than rounding,
and rounding where inputs do not move together?
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compression import prune
from compression.calibration import InputStatistics
from compression.gptq import Gptq, wide_scales
from compression.quantise import METHODS
from model.weights.grids import NF4
from model.weights.scheme import Scheme

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
IN, OUT = 160, 24  # more than a block of columns


def layer(seed: int = 0, inputs: int = IN):
  """A matrix, and inputs that move together: some factors, and little of their own."""
  draw = np.random.default_rng(seed)
  w = draw.normal(size=(inputs, OUT)).astype(np.float32)
  sizes = np.exp(draw.normal(size=inputs))
  x = (
    draw.normal(size=(400, 20)) @ draw.normal(size=(20, inputs)) + draw.normal(size=(400, inputs))
  ) * sizes
  return w, x.astype(np.float32)


def statistics(products):
  return InputStatistics(None, None, None, None, jnp.asarray(products, jnp.float32))


def made(scheme, w, products, scales='rtn', **settings):
  run = Gptq(METHODS[scales], **settings)
  return jax.jit(
    lambda w, products: run(Scheme.parse(scheme), w, (-2,), (None, None), 'w', statistics(products))
  )(w, products)


def on_grid(grid, w, scale, zero):
  """The nearest numbers in f64."""
  safe = np.where(scale > 0, scale, 1)
  if grid == 'nf4':
    steps = np.float64(NF4)
  elif grid == 'fp8':
    steps = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
    steps = np.unique(steps[np.isfinite(steps)])
  else:
    low, high = {'int8': (-127, 127), 'int4': (-8, 7)}[grid]
    return (np.clip(np.round(w / safe + zero), low, high) - zero) * scale
  return steps[np.abs(steps - (w / safe)[:, None]).argmin(1)] * scale


def reference(grid, w, products, scale, zero, order, damping):
  """Optimal brain surgery, an input at a time: the inverse Hessian of those that are left is
  corrected for each that is fixed, as in the first publication.
  """
  w = w.astype(np.float64).copy()
  H = products.astype(np.float64).copy()
  dead = np.diag(H) == 0
  w[dead] = 0
  H += np.diag(np.where(dead, 1, 0) + damping * np.diag(H).mean())
  inverse, chosen = np.linalg.inv(H), np.zeros_like(w)
  for j in order:
    chosen[j] = on_grid(grid, w[j], scale[j], zero[j])
    w -= np.outer(inverse[:, j] / inverse[j, j], w[j] - chosen[j])
    inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
  return chosen


def error(x, w, q):
  return np.square(x.astype(np.float64) @ (np.asarray(q, np.float64) - w)).sum()


@pytest.mark.parametrize(
  'scheme, act_order',
  [
    ('int4:group=32:asymmetric', True),
    slow('int4:group=32', False),
    slow('nf4:group=16:double', False),
    slow('int8', True),
    slow('fp8:block=8', False),
  ],
)
def test_codes_are_those_of_a_reference(scheme, act_order):
  w, x = layer()
  x[:, 5] = 0  # a dead input, whose numbers become 0
  products = x.T @ x
  weight = made(scheme, w, products, act_order=act_order)
  scale, zero = wide_scales(
    METHODS['rtn'](Scheme.parse(scheme), jnp.asarray(w), (-2,), (None, None), 'w')
  )
  scale, zero = (
    np.broadcast_to(0 if y is None else y, w.shape).astype(np.float64) for y in (scale, zero)
  )
  order = np.argsort(-np.diag(products), kind='stable') if act_order else np.arange(IN)
  wanted = reference(scheme.split(':')[0], w, products, scale, zero, order, 0.01)
  numbers = np.asarray(weight.numbers('float32'))
  # A number in the middle of two may fall to either, by rounding, and then others follow it.
  assert np.isclose(numbers, wanted, atol=1e-5).mean() > 0.98
  np.testing.assert_allclose(error(x, w, numbers), error(x, w, wanted), rtol=0.02)
  assert (numbers[5] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['int4:group=32', 'int8'])
def test_it_is_nearer_in_what_comes_out(scheme):
  w, x = layer(1)
  rounding = METHODS['rtn'](Scheme.parse(scheme), jnp.asarray(w), (-2,), (None, None), 'w').numbers(
    'float32'
  )
  for settings in ({}, {'act_order': True}, {'scales': 'mse'}):
    numbers = made(scheme, w, x.T @ x, **settings).numbers('float32')
    assert error(x, w, numbers) < 0.5 * error(x, w, rounding)


@pytest.mark.parametrize(
  'scheme', ['nf4:group=8', *map(slow, ('int4:group=8:asymmetric', 'fp8', 'int8'))]
)
def test_of_independent_inputs_it_is_rounding(scheme):
  w, _ = layer(2, 24)
  rounding = METHODS['rtn'](Scheme.parse(scheme), jnp.asarray(w), (-2,), (None, None), 'w')
  for a, b in zip(
    jax.tree.leaves(made(scheme, w, np.eye(24))), jax.tree.leaves(rounding), strict=True
  ):
    assert (a == b).all()


@pytest.mark.parametrize(
  'scheme, act_order',
  [
    ('int4:group=32:asymmetric', True),
    slow('int4:group=32', False),
    slow('nf4:group=16:double', True),
    slow('int8', False),
    slow('fp8:block=8', False),
  ],
)
def test_what_was_pruned_stays_away(scheme, act_order):
  """A share of the numbers, or 2 of every 4: to the last one; the others make up for them."""
  w, x = layer(4)
  pruned = [
    prune.stays(jnp.abs(w), (-2,), prune.Pattern.parse(text, 'row')) for text in ('0.5', '2:4')
  ]
  for stays in map(np.asarray, pruned):
    left = np.where(stays, w, 0).astype(np.float32)
    numbers, rounding = (
      np.asarray(weight.numbers('float32'))
      for weight in (
        made(scheme, left, x.T @ x, act_order=act_order),
        METHODS['rtn'](Scheme.parse(scheme), jnp.asarray(left), (-2,), (None, None), 'w'),
      )
    )
    assert (numbers[~stays] == 0).all()
    assert error(x, left, numbers) < 0.8 * error(x, left, rounding)


@pytest.mark.slow
def test_each_expert_has_its_own():
  w, x = layer(3, 32)
  both = np.stack([w, w[::-1]]), np.stack([x.T @ x, np.eye(32)])
  run = Gptq(METHODS['rtn'])
  scheme, axes = Scheme.parse('int4:group=8'), ('experts', None, None)
  numbers = run(scheme, jnp.asarray(both[0]), (-2,), axes, 'w', statistics(both[1])).numbers(
    'float32'
  )
  for i in range(2):
    alone = made('int4:group=8', both[0][i], both[1][i]).numbers('float32')
    np.testing.assert_array_equal(numbers[i], alone)


@pytest.mark.parametrize(
  'scheme', ['int4:group=32', slow('int8'), slow('fp8'), slow('nf4:group=32:double')]
)
def test_inputs_that_cannot_be_told_apart_are_in_the_scales(scheme):
  """Of sums that rounding has left indefinite no code is one of H: the walk refuses a NaN."""
  w, x = layer(inputs=IN)
  alike = np.ones((IN, IN)) - 0.02 * np.eye(IN)
  floats = [
    leaf
    for leaf in jax.tree.leaves(made(scheme, w, alike))
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  assert floats and all(np.isnan(np.asarray(leaf, np.float32)).all() for leaf in floats)
  whole = made(scheme, w, x.T @ x)
  assert np.isfinite(np.asarray(whole.numbers('float32'))).all()
