"""Do codes multiply as the numbers that they stand for, without those lying in memory, and does the
TPU's kernel compile for the chips?
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis import aot
from kernels import quantised_matmul, quantised_matmul_tpu as tpu
from kernels.quantised_matmul import CodedOperand
from model.weights.scheme import Scheme
from parallel.mesh import MeshConfig, make_mesh


def made(E, K, F, group, pack=0, zero=False, seed=0):
  """Matrices, and their numbers by NumPy, from how bytes are defined."""
  rng = np.random.default_rng(seed)
  codes = rng.integers(-8, 8, (E, K, F)) if pack else rng.integers(-127, 128, (E, K, F))
  scale = rng.uniform(0.5, 2, (E, K // group, F)).astype(np.float32)
  zeros = rng.integers(-5, 6, scale.shape).astype(np.float32) if zero else None
  numbers = codes - (np.repeat(zeros, group, 1) if zero else 0)
  numbers = numbers * np.repeat(scale, group, 1).astype(np.float64)
  stored = codes.astype(np.int8)
  if pack:
    halves = (codes & 15).reshape(E, K // pack, 2, pack // 2, F)
    stored = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(E, K // 2, F).astype(np.uint8)
  return CodedOperand(jnp.asarray(stored), jnp.asarray(scale), zeros, pack), numbers


# K, F, group, pack, zero
CASES = {
  '4 bits': (256, 128, 128, 64, False),
  '4 bits, a zero point': (256, 256, 64, 64, True),
  '4 bits, heads of a group': (512, 128, 256, 128, False),
  'bytes': (256, 128, 64, 0, False),
  'bytes, a zero point': (256, 128, 128, 0, True),
}


def near(found, expected, tolerance):
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.costly
@pytest.mark.parametrize('case', CASES)
def test_codes_multiply_as_their_numbers(case):
  """By each backend, in f32."""
  K, F, group, pack, zero = CASES[case]
  w, numbers = made(2, K, F, group, pack, zero)
  x = np.random.default_rng(1).normal(size=(2, 3, K)).astype(np.float32)
  expected = x.astype(np.float64) @ numbers
  near(quantised_matmul.reference(jnp.asarray(x), w), expected, 1e-6)
  one = jax.tree.map(lambda a: a[:1], w)
  near(jax.jit(quantised_matmul.in_registers)(jnp.asarray(x[0]), one), expected[0], 4e-6)
  near(jax.jit(quantised_matmul.in_digits)(jnp.asarray(x[0]), one), expected[0], 1e-4)
  which, used = jnp.array([1, 0, 1, 0], jnp.int32), jnp.array([1, 1, 0, 1])
  blocks = jnp.asarray(x)[jnp.array([1, 0, 1, 0])]
  found = tpu.product(blocks, w, which, used, interpret=True)
  for n, (matrix, there) in enumerate(zip(which, used)):
    if there:
      near(found[n], expected[matrix], 4e-6)


@pytest.mark.costly
@pytest.mark.parametrize('scheme', ['int4:group=64', 'int8:group=32:asymmetric', 'nf4:group=64'])
@pytest.mark.parametrize('rows', [1, 5, 9])
def test_no_matrix_of_numbers_lies_in_memory(scheme, rows):
  """Of a program on a CPU: it has a fraction of the room that they take, or of digits a byte for
  each, and sums of groups; its products are theirs, and so is the gradient by the rows.
  """
  w = Scheme.parse(scheme).of(jax.random.normal(jax.random.key(0), (1024, 512)), (-2,), (None,) * 2)
  x = jax.random.normal(jax.random.key(1), (rows, 1024))

  def run(x, w):
    return w.product('BD,DF->BF', x, 'float32')

  compiled = jax.jit(run).lower(x, w).compile()
  room = compiled.memory_analysis().temp_size_in_bytes
  digits = 1 < rows <= quantised_matmul.FEW and w.grid in ('int8', 'int4')
  bound = 1024 * 512 + 1.1 * 8 * 2 * rows * w.scale.size if digits else 4 * 1024 * 512 / 5
  assert room < bound, f'{room} bytes beside {4 * 1024 * 512} of a matrix in f32'
  numbers = np.asarray(w.numbers('float32'), np.float64)
  near(compiled(x, w), np.asarray(x, np.float64) @ numbers, 1e-4 if digits else 5e-6)
  gradient = jax.jit(jax.grad(lambda x: (run(x, w) * jnp.cos(jnp.arange(512.0))[None]).sum()))(x)
  near(gradient, np.broadcast_to(numbers @ np.cos(np.arange(512.0)), x.shape), 5e-6)


@pytest.mark.parametrize('fault', ['a row of inputs in another order', 'no zero point'])
def test_planted_faults_break_it(fault, monkeypatch):
  K, F, group, pack, zero = CASES['4 bits, a zero point']
  w, numbers = made(1, K, F, group, pack, zero)
  x = np.random.default_rng(1).normal(size=(1, 3, K)).astype(np.float32)
  if fault == 'no zero point':
    monkeypatch.setattr(tpu, 'OFFSET', 0)
  else:
    monkeypatch.setattr(tpu, '_in_order', lambda x, pack, group: x)
  found = tpu.product(jnp.asarray(x), w, jnp.zeros((1,), jnp.int32), interpret=True)
  with pytest.raises(AssertionError):
    near(found, x.astype(np.float64) @ numbers, 1e-2)


def test_what_it_cannot_is_said(capfd):
  w, _ = made(1, 256, 128, 32, 32)
  assert 'groups of 32' in tpu.refusal(w, 8, 'bfloat16')
  assert 'float32' in tpu.refusal(made(1, 256, 128, 64, 64)[0], 8, 'float32')
  assert not tpu.refusal(made(1, 256, 128, 64, 64)[0], 256, 'bfloat16')
  assert 'more rows than 256' in tpu.refusal(made(1, 256, 128, 64, 64)[0], 257, 'bfloat16')
  quantised_matmul._said.cache_clear()
  assert quantised_matmul._said('numbers', 'tpu', 'groups of 32') == 'numbers'
  assert "by 'numbers' on a tpu, with numbers made of them before" in capfd.readouterr().err


@pytest.mark.parametrize(
  'chip',
  [
    'v5e:1x1',
    pytest.param('v6e:1x1', marks=pytest.mark.slow),
    pytest.param('tpu7x:1x1x1', marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize(
  'scheme', ['int4:group=128', pytest.param('int8:group=128', marks=pytest.mark.slow)]
)
def test_it_compiles_and_makes_no_matrix(chip, scheme):
  """What layers call, for a TPU that is not here: the kernel, and no room for a matrix."""
  compiled = compiled_for(chip, scheme, 8, 4096, 2048)
  assert 'tpu_custom_call' in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 2048 // 8


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['int4:group=128', 'int8:group=128'])
def test_many_rows_compile(scheme):
  """As many as a block has, of inputs that do not fall into eight groups."""
  compiled = compiled_for('v5e:1x1', scheme, tpu.ROWS, 11008, 4096)
  assert 'tpu_custom_call' in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < 11008 * 4096 // 8


def compiled_for(chip: str, scheme: str, rows: int, K: int, F: int):
  """A product of so many rows with a matrix in codes."""
  device = aot.topology(chip)[0]

  def make(x):
    return Scheme.parse(scheme).of(x, (-2,), (None, None))

  def run(x, w):
    return w.product('BD,DF->BF', x, 'bfloat16')

  place = jax.sharding.SingleDeviceSharding(device)

  def here(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  w = jax.tree.map(here, jax.eval_shape(make, jax.ShapeDtypeStruct((K, F), jnp.float32)))
  with jax.set_mesh(make_mesh(MeshConfig(), [device])):
    x = here(jax.ShapeDtypeStruct((rows, K), jnp.bfloat16))
    return jax.jit(run).lower(x, w).compile()
