"""Is a model in bytes the model of its numbers, of every family, on every mesh?"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.tokenizers import ByteTokenizer
from decode.generating import generating
from decode.generator import Generator
from decode.report import weight_bytes
from kernels import quantised_matmul
from model import families, moe as moe_module, rearranged
from model.execution import ExecutionConfig
from model.weights import Gathered, Plain, Weight, gathered, int8, joined, read
from model.weights.int8 import Int8, in_bytes
from model.weights.turned import Turned
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh
from tests.goldens import tiny
from tests.model import laws

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
FAMILIES = sorted(tiny.CASES)
QUICK = ('bert_pooled', 'deepseek_v3', 'gpt2', 'mixtral', 't5')
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
BYTES = jax.jit(in_bytes)

# What is summed over, counted from the last, of each matrix; all that is not named is no matrix.
SUMMED = dict.fromkeys(('q', 'k', 'v'), (-3,)) | {'o': (-3, -2), 'head.tokens': (-1,)}
SUMMED |= dict.fromkeys(('q_down', 'kv_down', 'rope_key', 'gate', 'up', 'down', 'dense'), (-2,))


def config_of(name: str):
  """The small config of a family, as it generates; a vocabulary that splits."""
  hf = json.loads(str(np.load(GOLDENS / f'{name}.npz')['config']))
  tensors = {'lm_head.weight'} if name == 't5_v1_1' else {'shared.weight'}
  config = generating(families.read(hf, tensors)[1])
  return dataclasses.replace(config, vocabulary=68)


def summed(name: str):
  """Of a parameter by name: what SUMMED says, or None."""
  return SUMMED.get('.'.join(name.split('.')[-2:]), SUMMED.get(name.split('.')[-1]))


def parameters(model) -> dict[str, nnx.Param]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): p
    for path, p in jax.tree_util.tree_leaves_with_path(
      model, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
  }


def numbers(model):
  """The plain model that bytes and scales stand for: computed here, not by the code under test."""

  def product(value: Int8):
    return value.values.astype(jnp.float32) * value.scale

  def plain(p):
    value = p.get_value()
    if isinstance(value, Turned):
      # [.., outputs, inputs] -> [.., inputs, outputs], each of some dimensions.
      rank, inputs = len(value.inner.axes), value.inputs
      x = product(value.inner)
      stacked, outputs = x.ndim - rank, x.ndim - inputs
      order = (*range(stacked), *range(outputs, x.ndim), *range(stacked, outputs))
      return p.replace(x.transpose(order))
    assert isinstance(value, Int8 | jax.Array), type(value)
    return p.replace(product(value)) if isinstance(value, Int8) else p

  return jax.tree.map(plain, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def everything(length: int = 12, rows: int = 4):
  """A new jitted model -> what it computes of some tokens: new, so that faults are traced."""

  def run(model):
    config = model.config
    tokens, more = (laws.tokens_of(config, rows, length, seed) for seed in (0, 1))
    tokens = ax.place(tokens, 'batch', 'length')
    given = {'source': ax.place(more, 'batch', 'length')} if config.encoder_layers else {}
    hidden = model(tokens, **given).hidden
    pooled = [] if model.pooler is None else [model.pooler(hidden)]
    return [model.logits(hidden), *pooled]

  return jax.jit(run)


def on(sizes: dict[str, int]):
  count = int(np.prod(list(sizes.values()))) if sizes else 1
  return make_mesh(MeshConfig(**{'data': 1} | sizes), jax.devices()[:count])


def born(config, seed: int = 0):
  """Weights that keep activations near 1, so that no law is lost in what is saturated."""
  return rearranged.unstacked(jax.tree.map(lambda x: x * 0.6, laws.make_model(config, seed)))


def distance(actual, expected) -> float:
  """The largest error, as a part of the largest number."""
  return max(
    np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()
    for a, b in zip(actual, expected, strict=True)
  )


def check_numbers(config, length: int = 6, rows: int = 4, tolerance: float = 1e-5):
  """What bytes compute is what their numbers do; and it is not what the model did before."""
  with jax.set_mesh(on({})):
    model, run = born(config), everything(length, rows)
    small = BYTES(model)
    actual, expected, before = (run(x) for x in (small, jax.jit(numbers)(small), model))
  assert distance(actual, expected) < tolerance
  assert 1e-4 < distance(actual, before) < 0.5, 'bytes are another model, a near one'


@pytest.mark.slow
@pytest.mark.parametrize('name', [name if name in QUICK else slow(name) for name in FAMILIES])
def test_every_family_computes_with_the_numbers_of_its_bytes(name, monkeypatch):
  monkeypatch.setattr(quantised_matmul, 'FEW', 0)  # digits are rounded: see the next test
  check_numbers(config_of(name))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gpt2', slow('deepseek_v3'), slow('gpt_oss'), slow('t5')])
def test_few_rows_by_digits(name):
  check_numbers(config_of(name), 3, 2, 5e-3)


@pytest.mark.costly
@pytest.mark.parametrize('summed', [(-2,), (-1,)])
def test_the_gradient_of_few_rows_is_that_of_the_numbers(one_device, summed):
  """Digits are rounded, which has no slope: without a rule of their own it would be 0."""
  w, x = (jax.random.normal(jax.random.key(i), size) for i, size in enumerate([(6, 6), (3, 6)]))
  weight = int8.Int8.of(w, summed, (None, None))
  formula = 'BD,DF->BF' if summed == (-2,) else 'BD,FD->BF'

  def ours(x):
    return jnp.sin(weight.product(formula, x, 'float32')).sum()

  def exact(x):
    return jnp.sin(jnp.einsum(formula, x, weight.numbers('float32'))).sum()

  assert len(x) <= quantised_matmul.FEW
  np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(exact)(x), rtol=0, atol=2e-3)
  assert np.abs(jax.grad(exact)(x)).max() > 1


@pytest.mark.parametrize('dispatch', ['dense', slow('capacity')])
def test_every_dispatch(dispatch, monkeypatch):
  monkeypatch.setattr(quantised_matmul, 'FEW', 0)
  config = config_of('mixtral')
  moe = dataclasses.replace(config.moe, dispatch=dispatch, capacity_factor=100.0)
  check_numbers(dataclasses.replace(config, moe=moe))


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', slow('float16')])
def test_other_compute_dtypes_round_once_more(dtype, monkeypatch):
  monkeypatch.setattr(quantised_matmul, 'FEW', 0)
  config = config_of('mixtral').with_execution(dtype=dtype)
  # A step of rounding may send a token to another expert: all see all.
  config = dataclasses.replace(
    config, moe=dataclasses.replace(config.moe, per_token=config.moe.experts)
  )
  check_numbers(config, tolerance=0.05 if dtype == 'bfloat16' else 0.01)


@pytest.mark.costly
@pytest.mark.parametrize('name', FAMILIES)
def test_which_parameters_become_bytes_and_how_near_they_are(name):
  """All matrices but routers; numbers err by half a step,
  which each expert's output has its own.
  """
  with jax.set_mesh(on({})):
    model = laws.make_model(config_of(name))
    small = parameters(BYTES(model))
  before, seen = parameters(model), set()
  for path, p in small.items():
    if summed(path) is None:
      assert not isinstance(p.get_value(), Weight), path
      np.testing.assert_array_equal(p[...], before[path][...])
      continue
    value = p.get_value()
    assert isinstance(value, Int8) and value.values.dtype == jnp.int8, path
    source = before.get(path, before['embedding.tokens'])
    x = np.asarray(source[...], np.float64)
    scale = np.abs(x).max(summed(path), keepdims=True) / 127
    np.testing.assert_allclose(value.scale, scale, rtol=1e-6)
    actual = np.asarray(value.values, np.float64) * scale
    assert (np.abs(actual - x) <= scale * (0.5 + 1e-5)).all(), path
    assert value.axes == p.axes and isinstance(read(p), Int8)
    seen.add(path.split('.')[-1])
  rest = {path.split('.')[-1] for path in small.keys()} - seen
  assert not rest & {'q', 'k', 'v', 'o', 'gate', 'up', 'down', 'dense', 'kv_down', 'rope_key'}
  assert 'tokens' in seen and ('router' in rest) == bool(config_of(name).moe.experts)


@pytest.mark.parametrize('name', ['gpt2', 'mixtral', 'deepseek_v3', 't5'])
def test_bytes_that_a_step_reads(name):
  """One of each number, four of each scale, and what stays as it was; of experts, a token's."""
  with jax.set_mesh(on({})):
    model = laws.make_model(config_of(name))
    small = BYTES(model)
  moe, expected = model.config.moe, 0.0
  for path, p in parameters(small).items():
    if path.startswith(('embedding.', 'encoder.')):
      continue
    shape, nbytes = p.get_value().shape, 0
    if summed(path) is None:
      nbytes = 4 * np.prod(shape)
    else:
      outputs = [n for i, n in enumerate(shape) if i - len(shape) not in summed(path)]
      nbytes = np.prod(shape) + 4 * np.prod(outputs)
    routed = 'experts' in p.axes
    expected += nbytes * (moe.per_token / moe.experts if routed else 1)
  # A router's biases, E numbers, are counted as if they were experts'.
  assert weight_bytes(small) == pytest.approx(expected, rel=2e-3)
  assert weight_bytes(small) < 0.5 * weight_bytes(model)


MESHES = [
  slow('deepseek_v3', {'tensor': 2}),
  slow('deepseek_v3', {'fsdp': 2}),
  ('deepseek_v3', {'expert': 2}),
  ('mixtral', {'tensor': 2, 'fsdp': 2}),
  slow('mixtral', {'expert': 2}),
  slow('gpt_oss', {'expert': 2, 'fsdp': 2}),
  slow('gpt2', {'tensor': 2}),
  ('gpt2', {'fsdp': 2}),
  slow('gpt2', {'expert': 2}),
  slow('t5', {'tensor': 2, 'fsdp': 2}),
  slow('bert', {'tensor': 2, 'fsdp': 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize('name, sizes', MESHES, ids=str)
def test_meshes_are_one_device(name, sizes, monkeypatch):
  """Experts over fsdp come in two pieces."""
  monkeypatch.setattr(quantised_matmul, 'FEW', 0)
  monkeypatch.setattr(moe_module, '_pieces', lambda *_: 2)
  outputs = []
  for mesh in ({}, sizes):
    with jax.set_mesh(on(mesh)):
      small = BYTES(born(config_of(name)))
      outputs.append([np.asarray(x) for x in everything()(small)])
  assert distance(outputs[1], outputs[0]) < 1e-5


@pytest.mark.slow
def test_stages_gather_bytes_ahead(monkeypatch):
  """Over stages layers stay stacked, and what one keeps whole for its microbatches is bytes."""
  monkeypatch.setattr(quantised_matmul, 'FEW', 0)
  config = laws.make_config('llama', vocabulary=48, execution=ExecutionConfig(remat='none'))
  outputs = []
  for mesh in ({}, {'stage': 2, 'fsdp': 2}):
    with jax.set_mesh(on(mesh)):
      small = BYTES(laws.make_model(config))
      outputs.append([np.asarray(x) for x in everything()(small)])
  assert distance(outputs[1], outputs[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('reduce, kind', [(False, Plain), (True, Gathered)])
def test_gathered_ahead(reduce, kind):
  """Matrices whose shards were gathered ahead, plain ones and bytes, are the same model."""
  config = laws.make_config('llama', vocabulary=48)
  with jax.set_mesh(on({'fsdp': 2})):
    run = everything()
    for model, expected in (
      (laws.make_model(config), kind),
      (BYTES(laws.make_model(config)), Int8),
    ):
      ahead = joined(model, gathered(model, config.execution.dtype), reduce)
      assert isinstance(read(ahead.stack.blocks[0].attention.q), expected)
      assert isinstance(read(ahead.embedding.tokens), Plain)
      assert distance(run(ahead), run(model)) < 1e-6


# Generation.


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mixtral', slow('deepseek_v3'), 't5', slow('gpt2')])
def test_prompts_and_steps_of_a_generator(name):
  """Experts, MLA, an encoder, a tied table: it writes what the model of the numbers would."""
  config = dataclasses.replace(config_of(name), vocabulary=260)
  with jax.set_mesh(on({})):
    model = jax.tree.map(lambda x: x * 0.6, laws.make_model(config))
  small = Generator(model, ByteTokenizer(), on({}), weights='int8')
  plain = Generator(model, ByteTokenizer(), on({}))
  plain.model = numbers(small.model)
  options = dict(max_new_tokens=6, temperature=0.0)
  actual, expected = (g(['def main(', 'x'], **options) for g in (small, plain))
  for one, other in zip(actual, expected, strict=True):
    assert one.ids == other.ids and len(one.ids) > 2
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=0.05)
  assert small.report.read_bytes < 0.5 * plain.report.read_bytes


# Faults.


def without_scale(self, rows, groups):
  return int8_grouped(dataclasses.replace(self, scale=jnp.ones_like(self.scale)), rows, groups)


def of_the_next_expert(self, rows, groups):
  other = (groups.of_row + 1) % self.shape[0]
  return int8_grouped(self, rows, dataclasses.replace(groups, of_row=other))


def product_without_scale(self, formula, x, dtype, axes=None):
  weight = dataclasses.replace(self, scale=jnp.ones_like(self.scale))
  return int8_product(weight, formula, x, dtype, axes)


int8_grouped, int8_product = Int8.grouped, Int8.product


@pytest.mark.costly
@pytest.mark.parametrize(
  'method, fault, name',
  [
    slow('grouped', without_scale, 'mixtral'),
    ('grouped', of_the_next_expert, 'mixtral'),
    ('product', product_without_scale, 'gpt2'),
  ],
  ids=lambda x: getattr(x, '__name__', x),
)
def test_planted_faults_break_the_law(method, fault, name, monkeypatch):
  monkeypatch.setattr(quantised_matmul, 'FEW', 0)
  monkeypatch.setattr(Int8, method, fault)
  with pytest.raises(AssertionError):
    check_numbers(config_of(name))


def test_numbers_in_bfloat16_are_rounded_once():
  """What a byte and its scale stand for, and not a byte times a rounded scale."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
  weight = int8.Int8.of(x, (0,), (None, None))
  numbers = np.asarray(weight.values, np.float64) * np.asarray(weight.scale, np.float64)
  nearest = jnp.asarray(numbers, jnp.float32).astype(jnp.bfloat16)
  np.testing.assert_array_equal(weight.numbers(jnp.bfloat16), nearest)
