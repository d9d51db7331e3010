"""Is a program's text read rightly: how often each instruction runs, and what its products cost?"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from analysis import hlo
from analysis.instruction import HOST, arrays, dims, nbytes
from model import flops
from parallel import axes as ax, experts
from parallel.mesh import MeshConfig, make_mesh


def program(function, *shapes, dtype='float32'):
  return (
    jax.jit(function)
    .lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))
    .compile()
    .as_text()
  )


def looped(x, w):
  """3 x (2 x one product + 5 x another)."""

  def inner(n):
    return lambda x, _: (jnp.tanh(x @ w), None) if n else (jnp.sin(w @ x), None)

  def body(x, _):
    x, _ = jax.lax.scan(inner(1), x, None, length=2)
    return jax.lax.scan(inner(0), x, None, length=5)

  return jax.lax.scan(body, x, None, length=3)[0]


def test_a_loop_counts_as_often_as_it_runs():
  module = hlo.Module(program(looped, (64, 64), (64, 64)))
  assert module.flops() == 3 * (2 + 5) * 2 * 64**3
  loops = [(i, times) for _, i, times in module.walk() if i.opcode == 'while']
  assert sorted(times for _, times in loops) == [1, 3, 3]


def test_counting_a_loop_gives_what_the_compiler_says():
  text = program(looped, (64, 64), (64, 64))
  silent = re.sub(r'"known_trip_count":\{[^}]*\},?', '', text)
  assert 'known_trip_count' in text and 'known_trip_count' not in silent
  assert hlo.Module(silent).flops() == hlo.Module(text).flops()


def test_a_loop_that_does_not_tell_raises():
  text = program(
    lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 1e3, lambda x: x @ x, x), (8, 8)
  )
  with pytest.raises(ValueError, match='no trip count is to be found of while'):
    hlo.Module(text).flops()


def test_rounds_of_an_exchange_count_once():
  """A product forward, two backward, whatever the routing that decides about the loop."""
  P, E, D, n, k, C = 4, 2, 8, 6, 2, 2

  def run(x, weights, expert):
    exchange = experts.Exchange(('expert',), E, C)

    def function(rows, gates, _, w):
      return rows @ w * gates[:, None]

    return experts.in_rounds(
      function, exchange, x, jnp.ones((n, k)), weights, experts.plan(expert, exchange, ('expert',))
    )

  with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=P), jax.devices()[:P])):
    local = ax.local(run, (('batch', None), (None, None), ('batch', None)), ('batch', None))
    gradient = jax.grad(
      lambda x, weights, expert: jnp.sum(local(x, weights, expert) ** 2), argnums=(0, 1)
    )
    shapes = (
      ((P * n, D), 'float32', ('batch', None)),
      ((D, D), 'float32', (None, None)),
      ((P * n, k), 'int32', ('batch', None)),
    )
    shapes = [
      jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.NamedSharding(jax.sharding.get_mesh(), ax.spec(*axes))
      )
      for shape, dtype, axes in shapes
    ]
    module = hlo.Module(jax.jit(gradient).lower(*shapes).compile().as_text())
  assert sum(module.routed(i) for _, i, _ in module.walk() if i.opcode == 'while') == 2
  # The gates need no gradient, nor the product for it
  assert module.flops() == 3 * 2 * P * C * D * D


def test_a_counter_may_start_anywhere_and_step_by_two():
  text = program(
    lambda x: jax.lax.while_loop(lambda c: c[0] < 11, lambda c: (c[0] + 2, c[1] @ c[1]), (4, x))[1],
    (8, 8),
  )
  assert hlo.Module(re.sub(r'"known_trip_count":\{[^}]*\},?', '', text)).flops() == 4 * 2 * 8**3


def test_a_conditional_counts_as_its_dearest_branch():
  text = program(
    lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), (32, 32)
  )
  assert hlo.Module(text).flops() == 2 * 2 * 32**3


@pytest.mark.parametrize(
  'formula, x, y, wanted',
  [
    ('ij,jk->ik', (8, 16), (16, 32), 2 * 8 * 16 * 32),
    ('bij,bjk->bik', (4, 8, 16), (4, 16, 32), 2 * 4 * 8 * 16 * 32),
    ('ijh,hjk->ik', (8, 4, 16), (16, 4, 32), 2 * 8 * 4 * 16 * 32),
  ],
)
def test_products(formula, x, y, wanted):
  assert hlo.Module(program(functools.partial(jnp.einsum, formula), x, y)).flops() == wanted


@pytest.mark.parametrize(
  'stride, padding, pairs', [(1, 'VALID', 6 * 3), (1, 'SAME', 8 * 3 - 2), (2, 'VALID', 3 * 3)]
)
def test_a_convolution_counts_where_its_window_meets_an_input(stride, padding, pairs):
  def convolve(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (stride,), padding, dimension_numbers=('NWC', 'WIO', 'NWC')
    )

  assert hlo.Module(program(convolve, (2, 8, 5), (3, 5, 7))).flops() == 2 * 2 * 7 * 5 * pairs


def test_shapes():
  assert dims('bf16[4,1,512]{2,1,0:T(8,128)(2,1)}') == (4, 1, 512) and dims('f32[]') == ()
  assert list(arrays('(bf16[4,8]{1,0:T(8,128)S(1)}, pred[3]{0}, s4[6], f32[])')) == [
    (64, 1),
    (3, 0),
    (3, 0),
    (4, 0),
  ]
  assert nbytes('f32[4]{0:S(5)}') == 16 and next(arrays('f32[4]{0:S(5)}')) == (16, HOST)


def test_text_that_is_no_program_raises():
  with pytest.raises(ValueError, match='no ENTRY computation'):
    hlo.Module('hello')


def closed_form(model, tokens, length):
  """FLOPs of a training step without remat,
  all keys multiplied (the causal half is masked, not skipped).
  """
  masked = 4 * model.N * model.H * model.L * (length - flops.mean_keys(length))
  return 3 * tokens * (flops.forward_flops_per_token(model, length) + masked)


@pytest.mark.slow
def test_products_of_a_step_are_the_closed_form(tpu_step):
  config, mesh = tpu_step.config, tpu_step.mesh
  wanted = closed_form(
    config.model, config.data.batch_size * config.data.sequence_length, config.data.sequence_length
  )
  assert hlo.Module(tpu_step.text).flops() == pytest.approx(wanted / mesh.size, rel=0.02)


@pytest.mark.slow
def test_products_of_a_gpu_step_are_the_closed_form(compile_step):
  step = compile_step('h100:1x1x4')
  T = step.config.data.sequence_length
  wanted = closed_form(step.config.model, step.config.data.batch_size * T, T)
  assert hlo.Module(step.text).flops() == pytest.approx(wanted / 4, rel=0.02)
