"""Are products of codes by codes what their formula says, and does the compiler make them such?"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis import aot
from model.weights.scheme import Scheme
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

FORMULAS = {
  'BTD,DNH->BTNH': ((2, 3, 16), (16, 2, 4), (-3,)),
  'BTNH,NHD->BTD': ((2, 3, 2, 8), (2, 8, 5), (-3, -2)),
}


def expected(x, w, inputs, grid):
  """By NumPy: each token and each output is rounded by a scale of its own, and summed exactly."""
  x = np.asarray(x, np.float32).reshape(*x.shape[: x.ndim - inputs], -1)
  w = np.asarray(w, np.float32).reshape(x.shape[-1], -1)
  top = 127 if grid == 'int8' else 448

  def codes(a, axis):
    scale = np.abs(a).max(axis, keepdims=True) / np.float32(top)
    a = a / np.where(scale > 0, scale, 1)
    a = np.round(a) if grid == 'int8' else np.asarray(jnp.asarray(a).astype(jnp.float8_e4m3fn))
    return a.astype(np.float64), scale

  (x, of_tokens), (w, of_outputs) = codes(x, -1), codes(w, 0)
  return (x @ w) * of_tokens * of_outputs.reshape(-1)


@pytest.mark.parametrize('grid', ['int8', 'fp8'])
@pytest.mark.parametrize('formula', FORMULAS)
def test_products_are_of_codes(grid, formula):
  """And not those of the numbers of x, from which they differ; a token of zeros is zeros."""
  rows, shape, summed = FORMULAS[formula]
  x, w = (jax.random.normal(jax.random.key(n), size) for n, size in enumerate((rows, shape)))
  x = x.at[0, 0].set(0)
  weight = Scheme.parse(f'{grid}:activations').of(w, summed, (None,) * len(shape))
  found = jax.jit(lambda x, w: w.product(formula, x, 'float32'))(x, weight)
  wanted = expected(x, w, len(summed), grid).reshape(found.shape)
  np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
  numbers = jnp.einsum(formula, x, weight.numbers('float32'))
  assert 1e-4 < np.abs(found - numbers).max() / np.abs(numbers).max() < 0.1
  assert not np.asarray(found[0, 0]).any()


def test_codes_of_one_scale_are_of_fp8():
  with pytest.raises(ValueError, match='int8:activations with .*tensor=True'):
    Scheme.parse('int8:tensor:activations')


def test_a_product_that_keeps_a_letter_of_both_is_of_numbers():
  """As latent attention's, of every head: tokens have no scale of all of them."""
  shapes = (2, 1, 3, 4), (5, 3, 4)
  x, w = (jax.random.normal(jax.random.key(n), size) for n, size in enumerate(shapes))
  weight = Scheme.parse('fp8:tensor:activations').of(w, (-1,), (None,) * 3)
  found = weight.product('BTNH,RNH->BTNR', x, 'float32')
  expected = jnp.einsum('BTNH,RNH->BTNR', x, weight.numbers('float32'))
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_gradient_is_that_of_the_numbers():
  rows, shape, summed = FORMULAS['BTD,DNH->BTNH']
  x, w = (jax.random.normal(jax.random.key(n), size) for n, size in enumerate((rows, shape)))
  weight = Scheme.parse('int8:activations').of(w, summed, (None,) * 3)

  def total(x):
    return (
      weight.product('BTD,DNH->BTNH', x, 'float32') * jnp.cos(jnp.arange(4.0))[None, None, None]
    ).sum()

  wanted = np.einsum('DNH,H->D', np.asarray(weight.numbers('float32')), np.cos(np.arange(4.0)))
  found = jax.grad(total)(x)
  np.testing.assert_allclose(found, np.broadcast_to(wanted, rows), atol=1e-5)


def test_the_gradient_over_devices_is_that_of_one():
  """As an adapter on such a model asks for it: of rows that are split, by a sum that is."""
  x, w = (
    jax.random.normal(jax.random.key(n), size) for n, size in enumerate(((4, 4, 16), (16, 8)))
  )

  def gradient(x, w):
    axes = 'feed_forward', 'embed'
    weight = Scheme.parse('int8:activations').of(ax.place(w, *axes), (-2,), axes)

    def total(x):
      y = weight.product('BTF,FD->BTD', x, 'float32', ax.residual(x.shape[1]))
      return (y * jnp.cos(y)).sum()

    return jax.grad(total)(ax.place(x, 'batch', 'length', 'feed_forward'))

  made = []
  for sizes in ({}, {'data': 2, 'fsdp': 2, 'tensor': 2}):
    devices = jax.devices()[: 8 if sizes else 1]
    with jax.set_mesh(make_mesh(MeshConfig(**{'data': 1} | sizes), devices)):
      made.append(np.asarray(jax.jit(gradient)(x, w)))
  np.testing.assert_allclose(made[1], made[0], atol=1e-5 * np.abs(made[0]).max())


def test_what_does_not_go_together_is_refused():
  for text in ('int4:activations', 'int8:group=32:activations', 'int8:asymmetric:activations'):
    with pytest.raises(ValueError, match='a product of codes is scaled once; use int8:activations'):
      Scheme.parse(text)


@pytest.mark.parametrize(
  'chip, grid, code',
  [
    ('v5e:1x1', 'int8', 's8'),
    pytest.param('v6e:1x1', 'int8', 's8', marks=pytest.mark.slow),
    pytest.param('tpu7x:1x1x1', 'fp8', 'f8e4m3', marks=pytest.mark.slow),
    pytest.param('h100:1x1x1', 'fp8', 'f8e4m3', marks=pytest.mark.slow),
    ('v5e:1x1', 'fp8', ''),
  ],
)
def test_the_compiler_multiplies_codes(chip, grid, code):
  """Both operands of the product are codes; where a chip has none, that is said."""
  try:
    device = aot.topology(chip)[0]
  except ImportError as error:
    pytest.skip(f'{chip} cannot be compiled for: {error}')
  place = jax.sharding.SingleDeviceSharding(device)

  def here(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  def make(x):
    return Scheme.parse(f'{grid}:activations').of(x, (-2,), (None, None))

  w = jax.tree.map(here, jax.eval_shape(make, jax.ShapeDtypeStruct((1024, 512), jnp.float32)))
  x = here(jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16))
  with jax.set_mesh(make_mesh(MeshConfig(), [device])):
    run = jax.jit(lambda x, w: w.product('BD,DF->BF', x, 'bfloat16'))
    if not code:
      with pytest.raises(NotImplementedError, match='has no product of fp8; use int8:activations'):
        run.lower(x, w)
      return
    text = run.lower(x, w).compile().as_text()
  defined = dict(re.findall(r'(%[\w.-]+) = (\w+)\[', text))
  products = re.findall(r'(?:convolution|custom-call|dot)\((%[\w.-]+), (%[\w.-]+)', text)
  types = [{defined[name][: len(code)] for name in names} for names in products]
  assert {code} in types, f'products of {types}'
