"""Is a matrix that lies with its outputs in front the same, and is it multiplied as it lies?"""

import jax
import numpy as np
import pytest

from decode.generating import generating_model
from model import adapters, params, rearranged
from model.adapters import AdapterConfig
from model.weights import read
from model.weights.int8 import Int8
from model.weights.plain import Plain
from model.weights.turned import Turned
from parallel.one_cpu import FEW, of_rows
from tests.model import laws

AXES = ('embed', None, 'heads')


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(laws.make_mesh(laws.MeshConfig(), jax.devices()[:1])):
    yield


@pytest.mark.parametrize('kind', ['numbers', 'bytes'])
def test_a_turned_matrix_is_the_same(kind):
  """Numbers, pieces and products are those of the matrix, for few tokens and for many."""
  w = jax.random.normal(jax.random.key(0), (6, 2, 4))
  for summed, formula, inputs in (((-3,), 'BD,DNH->BNH', (6,)), ((-3, -2), 'BNH,NHD->BD', (6, 2))):
    weight = Plain(w, AXES) if kind == 'numbers' else Int8.of(w, summed, AXES)
    other = Turned.of(weight, len(summed))
    assert (other.shape, other.axes, other.coded) == (weight.shape, AXES, kind == 'bytes')
    lies = other.inner.value if kind == 'numbers' else other.inner.values
    assert lies.shape == (*w.shape[len(summed) :], *w.shape[: len(summed)])
    tokens = [jax.random.normal(jax.random.key(n), (n, *inputs)) for n in (1, 2, FEW)]

    @jax.jit
    def everything(y):
      pieces = [y.cut(axis, 2).numbers('float32') for axis in (-1, -2, -3)]
      products = [y.product(formula, x, 'float32') for x in tokens]
      return y.numbers('float32'), pieces, products

    for a, b in zip(*(jax.tree.leaves(everything(y)) for y in (other, weight)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('tokens', [1, FEW - 1, FEW])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_rows_of_a_table_go_first_where_tokens_are_few(tokens, dtype):
  """By numpy's product, and by the compiled program: XLA does not exchange the sides."""
  x, y = (jax.random.normal(jax.random.key(n), (n, 24), dtype) for n in (tokens, 40))
  compiled = jax.jit(of_rows).lower(x, y).compile()
  expected = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T
  error = dict(rtol=1e-5, atol=1e-5) if dtype == 'float32' else dict(rtol=2e-2, atol=5e-2)
  np.testing.assert_allclose(np.asarray(compiled(x, y), np.float64), expected, **error)
  if tokens > 1:
    first = f'f32[40,{tokens}]' in compiled.as_text()
    assert first == (dtype == 'float32' and tokens < FEW)


def kept(model) -> dict[str, object]:
  leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=params.is_param)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): p for path, p in leaves}


@pytest.mark.parametrize('family', ['llama', 'deepseek', 'relative', 'mixtral'])
def test_generation_on_a_cpu_holds_matrices_turned(family):
  """All but tables, experts and routers; on two devices none, and what they say is the same."""
  config = laws.make_config(family)
  model = rearranged.unstacked(laws.make_model(config))
  turned = {name for name, p in kept(jax.jit(generating_model)(model)).items() if is_turned(p)}
  matrices = {
    name
    for name, p in kept(model).items()
    if p.kind == 'matrix' and not p.wide and 'experts' not in p.axes
  }
  assert turned == matrices and turned
  with jax.set_mesh(laws.make_mesh(laws.MeshConfig(data=2), jax.devices()[:2])):
    model = rearranged.unstacked(laws.make_model(config))
    assert not any(map(is_turned, kept(jax.jit(generating_model)(model)).values()))


def is_turned(p) -> bool:
  value = p.get_value()
  return isinstance(value, Turned) or isinstance(getattr(value, 'base', None), Turned)


def test_the_matrix_below_an_adapter_is_turned():
  config = laws.make_config('llama')
  model = rearranged.unstacked(laws.make_model(config))
  made = AdapterConfig(kind='lora', rank=2)
  adapted = adapters.applied(model, adapters.new(model, made, jax.random.key(1)), made)
  generating = jax.jit(generating_model)(adapted)
  assert any(map(is_turned, kept(generating).values()))
  tokens = laws.tokens_of(config, 2, 12)
  said = [np.asarray(laws.forward()(each, tokens)) for each in (generating, adapted)]
  np.testing.assert_allclose(*said, atol=1e-5 * np.abs(said[0]).max())
  for name, p in kept(adapted).items():
    other = kept(generating)[name]
    np.testing.assert_allclose(
      read(other).numbers('float32'), read(p).numbers('float32'), atol=1e-6, err_msg=name
    )


@pytest.mark.parametrize('scheme', ['int8', 'int4:group=8'])
def test_codes_of_a_model_that_generates_are_those_of_one_that_is_stored(scheme):
  model = rearranged.unstacked(laws.make_model(laws.make_config('llama', width=32)))
  made = jax.jit(generating_model, static_argnames='weights')
  once, again = made(model, weights=scheme), made(made(model), weights=scheme)
  assert jax.tree.structure(once) == jax.tree.structure(again)
  jax.tree.map(np.testing.assert_array_equal, once, again)
