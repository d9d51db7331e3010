"""Are codes the nearest, is a model in codes the model of their numbers, and is what does not fit
refused?
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st

from analysis import modes
from compression.quantise import METHODS, quantised, streamed, usual
from data.config import DataConfig
from data.tokenizers import ByteTokenizer
from decode.generating import generating_model
from decode.loaded import LoadedModel
from model import params, transformer
from model.adaptation import AdapterConfig
from model.config import ModelConfig
from model.weights import Weight, read
from model.weights.codes import Codes, blocks_of
from model.weights.doubled import Doubled
from model.weights.grids import GRIDS, TABLES, packed, unpacked
from model.weights.int8 import Int8
from model.weights.scheme import Scheme, check_asked, parsed, rule_of, stored
from parallel.mesh import MeshConfig, make_mesh
from tests.model import laws
from tests.model.test_weights import config_of, everything
from training import state as states
from training.config import Config
from workdir.compressed import lost

SCHEMES = (
  'int8:group=2',
  'int8:group=2:asymmetric',
  'int4:group=2',
  'int4:group=2:asymmetric',
  'nf4:group=2',
  'nf4:group=2:double',
  'mxfp4:group=2',
  'fp8',
  'fp8:tensor',
)


def coded(x, grid, group, symmetric=True, shrink=1.0):
  x = jnp.asarray(x, jnp.float32)
  blocks = blocks_of(x.shape, (-2,), group)
  return Codes.of(x, grid, blocks, -2, (None, None), symmetric, shrink)


def test_bytes_are_those_of_the_formats():
  """Two codes in a byte, the first half of a group in the low bits; -8 is 8, -1 is 15."""
  codes = jnp.int8([[-8, -7], [-1, 0], [1, 2], [6, 7]])
  made = packed(codes, -2, 4)
  assert made.dtype == jnp.uint8 and made.tolist() == [[0x18, 0x29], [0x6F, 0x70]]
  assert (unpacked(made, -2, 4, True) == codes).all()
  assert unpacked(jnp.uint8([[0x18]]), -1, 2, False).tolist() == [[8, 1]]


def test_values_by_hand():
  """The largest is 7 steps, or 127; a zero point holds both sides; fp8 saturates at 448."""
  x = [[0.7], [-0.3], [0.1], [-0.7]]
  made = coded(x, 'int4', 4)
  np.testing.assert_allclose(made.scale, [[0.1]], rtol=1e-6)
  assert unpacked(made.codes, -2, 4, True).ravel().tolist() == [7, -3, 1, -7]
  made = coded([[0.0], [1.5], [0.5], [1.0]], 'int4', 4, symmetric=False)
  np.testing.assert_allclose([made.scale.item(), made.zero.item()], [0.1, -8], rtol=1e-6)
  np.testing.assert_allclose(made.numbers('float32').ravel(), [0, 1.5, 0.5, 1], atol=1e-6)
  made = coded([[2.0], [-2.0], [0.1592], [0.0]], 'nf4', 4)
  assert unpacked(made.codes, -2, 4, False).ravel().tolist() == [15, 0, 8, 7]
  made = coded([[12.0], [-3.0], [0.9], [-11.5]], 'mxfp4', 4)  # by 2: the largest is 6
  assert made.scale.item() == 2
  assert unpacked(made.codes, -2, 4, False).ravel().tolist() == [7, 11, 1, 15]
  assert coded([[12.1], [0.0]], 'mxfp4', 2).scale.item() == 4
  clipped_ = coded([[896.0], [1.0]], 'fp8', 2, shrink=0.5)
  np.testing.assert_array_equal(clipped_.numbers('float32').ravel(), [448, 1])


@settings(max_examples=25)
@given(
  st.sampled_from(list(GRIDS)),
  st.sampled_from([2, 4, 8]),
  st.booleans(),
  st.integers(0, 2**32 - 1),
  st.floats(1e-3, 1e3),
)
def test_no_number_is_further_than_half_a_step(grid, group, symmetric, seed, size):
  """Brute force: of all numbers of the grid none is nearer."""
  x = np.random.default_rng(seed).normal(0, size, (8, 3)).astype(np.float32)
  symmetric |= not grid.startswith('int')
  made = coded(x, grid, group, symmetric)
  scale = np.repeat(np.asarray(made.scale), group, 0)
  if grid in TABLES:
    steps = np.float32(TABLES[grid])
  elif grid == 'fp8':
    steps = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    steps = steps[np.isfinite(steps)]
  else:
    steps = np.arange(GRIDS[grid].lowest, GRIDS[grid].highest + 1, dtype=np.float32)
  zero = 0 if made.zero is None else np.repeat(np.asarray(made.zero), group, 0)
  best = np.abs((steps[:, None, None] - zero) * scale - x).min(0)
  error = np.abs(np.asarray(made.numbers('float32')) - x)
  np.testing.assert_allclose(error, best, atol=2e-6 * np.abs(x).max())
  if grid.startswith('int'):
    assert (error <= scale * 0.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize('scheme', ['int4:group=64', 'nf4:group=64', 'mxfp4:group=64'])
def test_one_group_may_be_all_inputs(one_device, scheme):
  """Few rows and many, on a CPU alone, which takes a part of the inputs at a time."""
  draw = np.random.default_rng(0)
  made = Scheme.parse(scheme).of(jnp.asarray(draw.normal(size=(64, 6))), (-2,), (None, None))
  numbers = np.asarray(made.numbers('float32'), np.float64)
  run = jax.jit(lambda x, w: w.product('BD,DF->BF', x, 'float32'))
  for rows in (1, 40):
    x = draw.normal(size=(rows, 64)).astype(np.float32)
    # Few rows of int4 go by two digits of a byte.
    bound = np.abs(x).max() / (2 * 127 * 128) * np.abs(numbers).sum(0).max() + 1e-5
    np.testing.assert_allclose(run(x, made), x @ numbers, rtol=0, atol=bound)
  with pytest.raises(ValueError, match='is not cut into 2 pieces of 32; use smaller groups'):
    made.cut(-2, 2)


def test_scales_in_codes_are_near_to_what_they_were():
  """By half of a step of theirs; numbers by half of their own step, and what the largest loses."""
  draw = np.random.default_rng(0)
  x = jnp.asarray(draw.normal(size=(64, 512)) * np.exp(draw.normal(size=(1, 512))), jnp.float32)
  x = x.at[:32, 7].set(0)
  made, plain_ = (
    Scheme.parse(text).of(x, (-2,), (None, None))
    for text in ('int4:group=32:double', 'int4:group=32')
  )
  assert made.blocks == (1, 256) and made.base.scale.dtype == jnp.int8
  assert made.step.shape == (2, 2) and made.mean.shape == (1, 1)
  np.testing.assert_allclose(made.mean, plain_.scale.mean(keepdims=True), rtol=1e-5)
  apart = np.abs(plain_.scale - made.mean).reshape(2, 2, 256)
  np.testing.assert_allclose(made.step, apart.max(-1) / 127, rtol=1e-5)
  scale, lost = np.asarray(made.single().scale), np.repeat(np.asarray(made.step), 256, 1) / 2
  assert (np.abs(scale - plain_.scale) <= lost * 1.001).all()
  bound = np.repeat(scale / 2 + 7 * lost, 32, 0) * 1.001
  error = np.abs(np.asarray(made.numbers('float32')) - x)
  assert (error <= bound).all() and (np.asarray(made.numbers('float32'))[:32, 7] == 0).all()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
  assert size == 64 * 512 // 2 + 2 * 512 + 4 * 4 + 4


def test_groups_that_scales_in_codes_lose_are_named():
  """Of one group beside numbers a thousand times as large; of others nothing is said."""
  draw = np.random.default_rng(0)
  x = draw.normal(size=(64, 32)).astype(np.float32)
  small = x.copy()
  small[:32, 5] /= 1000
  scheme = Scheme.parse('nf4:group=32:double')

  def lines(x):
    p = nnx.Param(jnp.asarray(x), axes=(None, None), kind='matrix', inputs=1, wide=False)
    made = scheme.of(jnp.asarray(x), (-2,), (None, None))
    return lost({'w': p.replace(made), 'v': p})

  (line,) = lines(small)
  assert 'w: 1 of 64 groups' in line and 'without :double they are kept' in line
  assert not lines(x)


def test_squares_are_of_the_matrix_as_it_multiplies():
  """[D, N, H] and [N, H, D] with heads of 4: 8 outputs, or inputs, are two heads."""
  assert Scheme.parse('fp8:block=8').blocks((16, 6, 4), (-3,), 'q') == (8, 2, 4)
  assert Scheme.parse('fp8:block=8').blocks((6, 4, 16), (-3, -2), 'o') == (2, 4, 8)
  assert Scheme.parse('fp8:block=64').blocks((16, 6, 4), (-3,), 'q') == (16, 6, 4)
  assert Scheme.parse('int4:group=8').blocks((6, 4, 16), (-3, -2), 'o') == (2, 4, 1)


def test_clipping_is_nearer_where_it_is_chosen():
  """By its own sum of squares, and never further; one number among many is clipped."""
  x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  x[0] = 6
  model = {'w': nnx.Param(jnp.asarray(x), axes=(None, None), kind='matrix', inputs=1, wide=False)}

  def error(method, scheme='int4:group=32'):
    scheme = Scheme.parse(scheme)
    made = METHODS[method](scheme, model['w'].get_value(), (-2,), (None, None), 'w')
    return np.square(made.numbers('float32') - x).reshape(2, 32, 8).sum(1)

  rtn, mse = error('rtn'), error('mse')
  assert (mse <= rtn * (1 + 1e-6)).all() and mse[0].sum() < 0.9 * rtn[0].sum()
  rtn, mse = (error(method, 'int8').sum(0) for method in ('rtn', 'mse'))
  assert (mse <= rtn * (1 + 1e-6)).all()
  rtn, mse = error('rtn', 'fp8').sum(), error('mse', 'fp8').sum()  # a scale with room above it
  assert mse < 0.95 * rtn
  clipped = Scheme.parse('int8').of(jnp.asarray(x), (-2,), (None, None), 'w', 0.5)
  np.testing.assert_allclose(clipped.numbers('float32')[0], 3, rtol=1e-6)


def test_where_nobody_says_a_method_fp8_is_searched():
  assert usual(['*.down=keep', '*=fp8:block=8']) == 'mse'
  assert usual(['*=int4:group=8']) == usual(['head*=int8', '*=fp8']) == 'rtn'


def plain(model):
  """With the numbers of all codes."""

  def numbers(p):
    coded_ = isinstance(p.get_value(), Weight)
    return p.replace(read(p).numbers('float32')) if coded_ else p

  return jax.tree.map(numbers, model, is_leaf=_is_param)


def _is_param(x):
  return isinstance(x, nnx.Variable)


def check(family, sizes, *entries, least=5):
  """What a model in codes computes is what its numbers compute, on a mesh, too."""
  config = config_of(family).with_execution(stored=entries)
  mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: 8 if sizes else 1])
  with jax.set_mesh(mesh):
    model = jax.jit(functools.partial(transformer.init, config, 0))()
    kinds = [read(p) for p in jax.tree.leaves(model, is_leaf=_is_param)]
    assert sum(isinstance(kind, Codes | Doubled) for kind in kinds) >= least
    made, wanted = everything()(model), everything()(jax.jit(plain)(model))
  for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}
EXPERTS = {'data': 1, 'expert': 2, 'fsdp': 2, 'tensor': 2}


@pytest.mark.slow  # several formats in a model: tests/model/test_pairwise.py
@pytest.mark.parametrize(
  'family, sizes, scheme',
  [
    ('llama', MESH, 'int4:group=2:asymmetric:double'),
    *(
      (family, sizes, SCHEMES[i % len(SCHEMES)])
      for i, (family, sizes) in enumerate(
        (family, sizes)
        for family in ('qwen3_moe', 'deepseek_v3', 't5', 'gemma2', 'bert', 'gpt_oss', 'mixtral')
        for sizes in ({}, MESH, EXPERTS if family in ('qwen3_moe', 'mixtral') else MESH)
      )
    ),
  ],
  ids=str,
)
def test_a_model_in_codes_is_that_of_their_numbers(family, sizes, scheme):
  check(family, sizes, f'*={scheme}', f'head*={scheme}')


@pytest.mark.slow
def test_a_device_with_one_block_of_several_gathers_all_scales():
  """Of what an expert sums over two devices have a block each."""
  check('mixtral', EXPERTS, '*.gate=int8:group=16', '*.up=int4:group=16', least=2)


def test_patterns_place_schemes():
  rules = parsed(['*.down=keep', '*.attention.*=int8', '*=int4:group=64', 'head*=fp8'])
  matrix = nnx.Param(jnp.zeros((2, 2)), axes=(None, None), kind='matrix', inputs=1, wide=False)
  table = nnx.Param(jnp.zeros((2, 2)), axes=(None, None), kind='embedding', inputs=1, wide=False)
  router = nnx.Param(jnp.zeros((2, 2)), axes=(None, None), kind='matrix', inputs=1, wide=True)
  assert rule_of('stack.blocks.0.mlp.down', matrix, rules) == ('*.down', Scheme('keep'))
  assert rule_of('stack.blocks.0.attention.q', matrix, rules)[1] == Scheme('int8')
  assert rule_of('stack.blocks.0.mlp.up', matrix, rules)[1] == Scheme('int4', 64)
  assert rule_of('stack.blocks.0.moe.router', router, rules) is None
  assert rule_of('embedding.tokens', table, rules) is None
  assert rule_of('head.tokens', table, rules)[1] == Scheme('fp8')
  assert rule_of('head.tokens', table, parsed(['*=int8'])) is None


@pytest.mark.parametrize('family', ['deepseek_v3', 'mixtral'])
def test_a_pattern_places_experts_apart_from_dense_layers(family, one_device):
  """Whose matrices have the same names; what all tokens share is dense, too."""
  entries = ('*.experts.*=int4:group=2', '*=int8')
  config = config_of(family).with_execution(stored=entries)
  model = jax.eval_shape(functools.partial(transformer.init, config, 0))
  matrices = {
    name: p for name, p in params.by_name(model).items() if isinstance(read(p), Codes | Int8)
  }
  experts = {name for name, p in matrices.items() if 'experts' in p.axes}
  low = {name for name, p in matrices.items() if isinstance(read(p), Codes)}
  assert experts and low == experts
  dense = {name for name in matrices if '.feed_forward.' in name} - experts
  assert bool(dense) == (family == 'deepseek_v3')
  with pytest.raises(ValueError, match='holds of no matrix'):
    plain_ = config_of('llama').with_execution(stored=entries)
    jax.eval_shape(functools.partial(transformer.init, plain_, 0))


def test_a_tied_head_gets_codes_of_its_own_and_the_table_stays(one_device):
  config = ModelConfig(**laws.TINY | {'tie_embeddings': True})
  model = jax.jit(functools.partial(transformer.init, config, 0))()
  made = jax.jit(functools.partial(quantised, entries=('head*=int8:group=8',)))(model)
  table = np.asarray(made.embedding.tokens[...])
  np.testing.assert_array_equal(table, model.embedding.tokens[...])
  assert params.count(made) == params.count(model) + table.size
  head = read(made.head.tokens)
  assert isinstance(head, Codes) and head.blocks == (1, 8)
  np.testing.assert_allclose(head.numbers('float32'), table, atol=np.abs(table).max() / 253)


@pytest.mark.parametrize(
  'text, words',
  [
    ('int5', "'int5' is unknown; did you mean 'int8'|'int5' is unknown; did you mean 'int4'"),
    ('int4:grp=64', "'grp=64' is none of group=N"),
    ('int4:group=3', 'two codes share a byte'),
    ('int4:tensor', 'two codes share a byte'),
    ('nf4:group=64:asymmetric', 'only int8 and int4 have a zero point'),
    ('fp8:tensor:block=64', 'one of them'),
    ('fp8:double', 'use fp8:group=64:double'),
    ('mxfp4:group=32:double', 'scales are powers of two.*leave :double out'),
    ('2:4+mxfp4:double', 'scales are powers of two.*leave :double out'),
  ],
)
def test_schemes_that_mean_nothing(text, words):
  with pytest.raises(ValueError, match=words):
    Scheme.parse(text)


@pytest.mark.parametrize(
  'text',
  [
    'keep',
    'int8',
    'int8:group=32:asymmetric',
    'nf4:group=64:double',
    'fp8:tensor',
    'fp8:block=128:double',
    'int8:activations',
    'fp8:tensor:activations',
    '2:4',
    '2:4+int4:group=64',
  ],
)
def test_a_scheme_is_written_as_it_is_read(text):
  assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize(
  'stored_, asked',
  [
    (('*=int4:group=4',), 'int8'),
    (('*.down=keep', '*.q=int8', '*=int4:group=4'), 'int4:group=4'),
    (('*=2:4',), '2:4+int8'),
  ],
)
def test_codes_are_not_put_in_other_codes(stored_, asked, one_device):
  """At every door: what generates, a Generator, a plan, and an adapter's frozen base."""
  config = ModelConfig(**laws.TINY).with_execution(stored=stored_)
  words = f"weights='{re.escape(asked)}' of a model that is stored in .*; leave it out"
  run = Config(model=config, data=DataConfig(sequence_length=16))
  model = jax.eval_shape(lambda: transformer.init(config, 0))
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(lambda: generating_model(model, asked))
  with pytest.raises(ValueError, match=words):
    LoadedModel(model, ByteTokenizer(), one_device, asked)
  with pytest.raises(ValueError, match=words):
    modes.lower(run, one_device, 'decode', 1, 8, asked)
  adapted = dataclasses.replace(run, adapter=AdapterConfig(kind='lora', base=asked), init='base')
  with pytest.raises(ValueError, match=words):
    states.roles(adapted)


def test_the_scheme_that_a_model_is_stored_in_may_be_asked_for(one_device):
  config = ModelConfig(**laws.TINY).with_execution(stored=('*.down=keep', '*=int4:group=4'))
  for asked in ('int4:group=4', ''):
    check_asked(config, asked)
  made = jax.eval_shape(lambda: generating_model(transformer.init(config, 0), 'int4:group=4'))
  down = read(params.by_name(made)['stack.blocks.0.feed_forward.down'])
  assert isinstance(down, Codes) and down.grid == 'int4'  # what was kept is what is left to ask for


def test_what_does_not_fit_is_said(one_device):
  model = jax.jit(functools.partial(transformer.init, ModelConfig(**laws.TINY), 0))()
  with pytest.raises(ValueError, match='blocks of 48 do not divide.*use 16, or leave it out'):
    jax.eval_shape(functools.partial(stored, entries=('*=int8:group=48',)), model)
  with pytest.raises(ValueError, match="'\\*.nowhere' of .* holds of no matrix"):
    jax.eval_shape(functools.partial(stored, entries=('*.nowhere=int8',)), model)
  with pytest.raises(ValueError, match="'\\*.down' of .* patterns before it match first"):
    jax.eval_shape(functools.partial(stored, entries=('*=int8', '*.down=fp8')), model)
  with pytest.raises(ValueError, match="'int8' is no PATTERN=SCHEME"):
    parsed(['int8'])


@pytest.mark.slow
def test_parameter_by_parameter_is_the_same():
  """As of a checkpoint that is never in memory as a whole."""
  schemes = {'q': '2:4', 'down': '2:4+int8', 'up': 'int4:group=4:double', '': 'int8:activations'}
  config, entries = config_of('llama'), tuple(f'*{name}={of}' for name, of in schemes.items())
  model = jax.jit(lambda: transformer.init(config, 0))()
  whole = jax.jit(lambda m: quantised(m, entries, 'mse'))(model)
  copied = jax.tree.map(jnp.copy, params.by_name(model))
  made = streamed(model, entries, 'mse', lambda name, p: copied[name])
  assert jax.tree.structure(made) == jax.tree.structure(whole)
  for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(whole), strict=True):
    assert (one == other).all()
