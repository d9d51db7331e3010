"""Is every row multiplied by its group's matrix? The backends against a loop in numpy, values and
gradients.
"""

import functools
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import names
from analysis import aot
from kernels import grouped_blocks as blocks, grouped_matmul as gm, grouped_matmul_tpu as gt
from parallel.mesh import MeshConfig, make_mesh

SHAPES = [(1, 1), (3, 8), (90, 4), (300, 6), (600, 3)]  # rows, groups
INTERPRETED = [(3, 8), (200, 4), (150, 1)]
WIDTHS = {'pallas_tpu': (128, 512)}  # D, F; of others:
NARROW = (5, 7)
STEPS = {
  name: getattr(gt, name) for name in ('ROWS', 'CHUNK', 'BODY', 'OUTPUTS', 'OUTER', 'OUTER_CHUNK')
}


@pytest.fixture(autouse=True, scope='module')
def small_steps():
  """So that few rows are several tiles of several chunks, and few columns several parts."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in (('ROWS', 64), ('CHUNK', 16), ('OUTER_CHUNK', 32)):
      patch.setattr(gt, name, value)
    for name, value in (('OUTPUTS', 256), ('OUTER', 128), ('BODY', 16 * 128 * 128)):
      patch.setattr(gt, name, value)
    yield


def loop(x, w, dy, sizes):
  """The product and both gradients, group by group, in float64."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
  ends = np.cumsum(sizes)
  for e, (first, last) in enumerate(zip(ends - sizes, ends)):
    y[first:last], dx[first:last], dw[e] = (
      x[first:last] @ w[e],
      dy[first:last] @ w[e].T,
      x[first:last].T @ dy[first:last],
    )
  return y, dx, dw


@functools.partial(jax.jit, static_argnames='backend')
def run(x, w, dy, sizes, backend):
  y, pull = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, sizes, backend=backend), x, w)
  return y, *pull(dy)


def operands(M, E, dtype=jnp.float32, seed=0, backend=''):
  draw = np.random.default_rng(seed).normal
  D, F = WIDTHS.get(backend, NARROW)
  return [jnp.asarray(draw(size=shape), dtype) for shape in ((M, D), (E, D, F), (M, F))]


def check(M, E, sizes, backend):
  x, w, dy = operands(M, E, backend=backend)
  wanted = loop(x, w, dy, sizes)
  # Rows behind the last group may hold anything.
  unused = jnp.arange(M)[:, None] >= sizes.sum()
  x, dy = jnp.where(unused, jnp.nan, x), jnp.where(unused, jnp.nan, dy)
  for name, a, b in zip(
    ('y', 'dx', 'dw'), run(x, w, dy, jnp.asarray(sizes, jnp.int32), backend), wanted
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4, err_msg=f'{name} of sizes {sizes}')


def check_drawn(data, shape, backend):
  M, E = shape
  cuts = data.draw(st.lists(st.integers(0, M), min_size=E, max_size=E))
  check(M, E, np.diff(sorted(cuts), prepend=0), backend)


@pytest.mark.costly
@pytest.mark.parametrize('backend', ['reference', 'blocked'])
@given(st.data(), st.sampled_from(SHAPES))
@settings(max_examples=40)
def test_the_loop_over_groups(backend, data, shape):
  check_drawn(data, shape, backend)


@pytest.mark.slow
@given(st.data(), st.sampled_from(INTERPRETED))
@settings(max_examples=15)
def test_the_loop_over_groups_interpreted(data, shape):
  check_drawn(data, shape, 'pallas_tpu')


@pytest.mark.parametrize('backend', gm.BACKENDS)
@pytest.mark.parametrize(
  'sizes',
  [[0, 0, 0, 0], [90, 0, 0, 0], [0, 0, 0, 90], [0, 7, 0, 8], [8, 16, 24, 42], [1, 1, 1, 87]],
  ids=str,
)
def test_empty_groups_one_group_whole_blocks_and_a_ragged_tail(sizes, backend):
  check(90, 4, np.array(sizes), backend)


@pytest.mark.parametrize('backend', ['blocked', 'pallas_tpu'])
def test_the_matrix_of_a_group_without_rows_changes_nothing(backend):
  """Not even NaN: no block is its own, and those left over, which fall to the last group, write
  nothing.
  """
  x, w, dy = operands(90, 4, backend=backend)
  sizes = np.array([0, 50, 30, 0])
  poisoned = jnp.where(jnp.asarray(sizes == 0)[:, None, None], jnp.nan, w)
  for a, b in zip(
    run(x, poisoned, dy, jnp.asarray(sizes, jnp.int32), backend), loop(x, w, dy, sizes)
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def check_chained(M, sizes, dtype):
  """Two products of the same rows, which are for something else besides."""
  of_one, of_other = (operands(M, 4, dtype, seed, 'pallas_tpu') for seed in range(2))
  (x, one, dy), (beside, other, dz) = of_one, of_other
  unused = jnp.arange(M)[:, None] >= sizes.sum()
  chained = names.imported('kernels.grouped_matmul_tpu.chained')

  @jax.jit
  def run(x, one, other, dy, dz, beside):
    def both(x, one, other):
      y, again = chained(x, one, jnp.asarray(sizes, jnp.int32), M)
      z, again = chained(again, other, jnp.asarray(sizes, jnp.int32), M)
      return y, z, again

    results, pull = jax.vjp(both, x, one, other)
    return *results, *pull((dy, dz, beside))

  # Behind the last group there may be anything.
  poisoned = [jnp.where(unused, jnp.nan, a) for a in (x, dy, dz)]
  y, z, again, dx, d_one, d_other = run(poisoned[0], one, other, *poisoned[1:], beside)
  (wanted_y, dx_y, wanted_one), (wanted_z, dx_z, wanted_other) = (
    loop(x, w, d, sizes) for w, d in ((one, dy), (other, dz))
  )
  assert y.dtype == dx.dtype == dtype
  # Sums of bfloat16 are rounded behind each product, to 1/4 at most where they come to 64.
  close = {'rtol': 1e-5, 'atol': 1e-4} if dtype == 'float32' else {'rtol': 2**-7, 'atol': 0.25}
  of_all = dx_y + dx_z + np.asarray(beside, np.float64)
  for name, a, b in (
    ('y', y, wanted_y),
    ('z', z, wanted_z),
    ('dx', dx, of_all),
    ('one', d_one, wanted_one),
    ('other', d_other, wanted_other),
  ):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, **close, err_msg=name)
  np.testing.assert_array_equal(again, poisoned[0])


@pytest.mark.parametrize(
  'sizes', [[0, 0, 0, 0], [90, 0, 0, 0], [0, 7, 0, 8], [8, 16, 24, 42], [30, 0, 50, 10]], ids=str
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradients_of_products_of_the_same_rows_are_added_in_the_kernel(sizes, dtype):
  check_chained(90, np.array(sizes), dtype)


@pytest.mark.costly
@pytest.mark.parametrize('backend', gm.BACKENDS)
def test_half_precision_is_summed_in_f32(backend):
  """All terms positive, so that one rounding is all that may separate the result from the exact
  one.
  """
  M, sizes = (400, np.array([300, 90])) if backend in WIDTHS else (4000, np.array([3000, 900]))
  x, w, dy = (abs(a) for a in operands(M, 2, jnp.bfloat16, backend=backend))
  for name, a, b in zip(
    ('y', 'dx', 'dw'), run(x, w, dy, jnp.asarray(sizes, jnp.int32), backend), loop(x, w, dy, sizes)
  ):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, err_msg=name)


@pytest.mark.parametrize(
  'M, E', [(16384, 8), (16384, 64), (16384, 128), (131072, 128), (4000, 60), (256, 8)]
)
def test_padding_stays_within_a_quarter(M, E):
  """Whatever the sizes: the number of blocks is static."""
  b = blocks.block_rows(M, E)
  D, F = NARROW
  abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((M, D), (E, D, F))]
  jaxpr = jax.make_jaxpr(lambda x, w, s: blocks.blocked(x, w, s))(
    *abstract, jax.ShapeDtypeStruct((E,), jnp.int32)
  )
  lengths = [int(found) for found in re.findall(r'length=(\d+)', str(jaxpr))]
  assert len(lengths) == 1 and M <= lengths[0] * b <= 1.25 * M


@pytest.mark.parametrize(
  'M, E, rows', [(1, 64, 1), (6, 2, 6), (100, 64, 8), (16384, 64, 64), (10**6, 8, blocks.MOST)]
)
def test_blocks_are_neither_tiny_nor_huge(M, E, rows):
  assert blocks.block_rows(M, E) == rows


@pytest.mark.parametrize('backend', ['blocked', 'pallas_tpu'])
def test_bytes_multiply_as_the_numbers_that_they_are(backend):
  """Forward and in the gradient of rows; bytes have none."""
  x, w, dy = operands(90, 4, backend=backend)
  w, sizes = jnp.round(40 * w).astype(jnp.int8), np.array([20, 0, 41, 9])

  @jax.jit
  def run(x, dy):
    y, pull = jax.vjp(lambda x: gm.grouped_matmul(x, w, jnp.asarray(sizes), backend=backend), x)
    return y, *pull(dy)

  for a, b in zip(run(x, dy), loop(x, w, dy, sizes)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-2)


def test_auto_is_the_kernel_on_tpus_for_what_it_takes(monkeypatch, capsys):
  monkeypatch.setattr(gm.mesh, 'platform', lambda: 'tpu')
  gm._said.cache_clear()
  x, w, _ = operands(90, 4, jnp.bfloat16, backend='pallas_tpu')
  assert gm.chosen(x, w, 'auto') == 'pallas_tpu'
  assert gm.chosen(x.astype(jnp.float32), w.astype(jnp.float32), 'auto') == 'blocked'
  assert gm.chosen(x[:, :96], w[:, :96], 'auto') == 'blocked'
  said = capsys.readouterr().err
  assert "'pallas_tpu'" in said and 'rows in float32' in said and '96 x 512' in said
  monkeypatch.setattr(gm.mesh, 'platform', lambda: 'gpu')
  assert gm.chosen(x, w, 'auto') == gm.chosen(x, w, 'auto') == 'blocked'
  assert capsys.readouterr().err == "experts: 'auto' is 'blocked' on a gpu for want of a kernel\n"
  monkeypatch.setattr(gm.mesh, 'platform', lambda: 'cpu')
  assert gm.chosen(x, w, 'auto') == 'blocked' and capsys.readouterr().err == ''
  gm._said.cache_clear()


@pytest.mark.parametrize(
  'kind, K, N, refused',
  [
    # Mixtral's and Llama 4's matrices: Mixtral's first ones fit a v4 forward, and not backward.
    ('TPU v4', 4096, 14336, 'of whose 14336 outputs the gradient'),
    ('TPU v4', 14336, 4096, '14336 inputs, of which 128 outputs'),
    ('TPU v4', 5120, 8192, 'of whose 8192 outputs the gradient'),
    ('TPU v4', 4096, 1792, ''),
    ('TPU v5', 4096, 14336, ''),
    ('TPU v5', 4096, 28672, 'of whose 28672 outputs the gradient'),
    ('TPU v6 lite', 4096, 28672, ''),
  ],
)
def test_what_could_not_be_differentiated_is_refused(kind, K, N, refused, monkeypatch):
  """By vector memory: of 512 rows and of 128 columns of a matrix, each twice, of the results,
  twice, and of a chunk of 256 of these in f32, no more than 7/8 are there.
  """
  for name, value in STEPS.items():
    monkeypatch.setattr(gt, name, value)
  monkeypatch.setattr(gt.target, 'kind', lambda: kind)
  x = jax.ShapeDtypeStruct((16384, K), jnp.bfloat16)
  w = jax.ShapeDtypeStruct((2, K, N), jnp.bfloat16)
  why = gt.refusal(x, w, automatic=True)
  assert refused in why and bool(why) == bool(refused)

  def least(inputs, of_results=1):
    return 2 * 2 * (512 * inputs + 128 * (inputs + of_results * 512)) + 4 * 256 * 128

  memory = {'TPU v4': 16, 'TPU v5': 64, 'TPU v6 lite': 128}[kind] << 20
  # A gradient of rows may be added to another one.
  assert (max(least(K), least(N, 2)) <= memory * 7 / 8) == (not refused)
  if not refused:
    dy = jax.ShapeDtypeStruct((16384, N), jnp.bfloat16)
    assert gt.steps_of(x, w) and gt.steps_of(dy, w, transposed=True)


FAULTS = {
  'a group writes over another one': (
    'jnp.where(mine, product.astype(y.dtype), y[at, columns])',
    'product.astype(y.dtype)',
  ),
  'what no group has is left as it was': (
    'y[...] = onto[...] if adds else jnp.zeros_like(y)',
    'pass',
  ),
  'what a gradient is added to is lost': (
    'product += onto[at, columns].astype(jnp.float32)',
    'pass',
  ),
  'of rows that no group has what they are added to is lost': ('onto[...] if adds else ', ''),
  'sums do not begin anew': ('sums[...] = jnp.zeros_like(sums)', 'pass'),
  'rows behind the groups are in a gradient': ('if masked:', 'if False:'),
  'groups without rows have no gradient': ('int(every)', '0'),
  'the last chunk of a group is left out': (
    'behind = pl.cdiv(high, steps.chunk)',
    'behind = high // steps.chunk',
  ),
  'the last row of a group is left out': ('(row < high)', '(row < high - 1)'),
}


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
def test_a_planted_fault_is_caught(fault, monkeypatch):
  old, new = FAULTS[fault]
  source = pathlib.Path(gt.__file__).read_text()
  assert source.count(old) == 1, f'{old!r} is not there once: plant the fault where it is now'
  mutant = types.ModuleType(gt.__name__)
  monkeypatch.setitem(sys.modules, gt.__name__, mutant)
  exec(compile(source.replace(old, new), gt.__name__, 'exec'), mutant.__dict__)
  for name in STEPS:
    monkeypatch.setattr(mutant, name, getattr(gt, name))
  run.clear_cache()
  with pytest.raises(AssertionError, match='Not equal|Mismatch|not close'):
    for sizes in ([0, 0, 0, 0], [8, 16, 24, 42], [1, 0, 1, 5]):
      check(90, 4, np.array(sizes), 'pallas_tpu')
      check_chained(90, np.array(sizes), 'float32')
  run.clear_cache()


@pytest.mark.slow
@pytest.mark.parametrize('numbers', ['bfloat16', 'int8'])
@pytest.mark.parametrize('topology', ['v4:1x1x1', 'v5e:1x1', 'v5p:1x1x1', 'v6e:1x1', 'tpu7x:1x1x1'])
def test_it_compiles(topology, numbers, monkeypatch):
  """Forward and backward, for TPUs that are not here, in the steps that they have."""
  for name, value in STEPS.items():
    monkeypatch.setattr(gt, name, value)
  device, M, E = aot.topology(topology)[0], 3000, 4
  place = jax.sharding.SingleDeviceSharding(device)

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def run(x, w, dy, sizes):
    # Of bytes by rows only.
    given = (x,) if numbers == 'int8' else (x, w)

    def products(x, w=w):
      if numbers == 'int8':
        return gm.grouped_matmul(x, w, sizes)
      y, again = gt.chained(x, w, sizes, len(x))
      return y + gm.grouped_matmul(again, 2 * w, sizes)

    y, pull = jax.vjp(products, *given)
    return y, pull(dy)

  with jax.set_mesh(make_mesh(MeshConfig(), [device])):
    x, dy = array('bfloat16', M, 2048), array('bfloat16', M, 768)
    compiled = jax.jit(run).lower(x, array(numbers, E, 2048, 768), dy, array('int32', E)).compile()
  # Behind the derivative that it is of.
  kernels = set(re.findall(r'%\w*?(grouped_[a-z]+)', compiled.as_text()))
  wanted = {'grouped_forward', 'grouped_rows'}
  assert kernels == (wanted if numbers == 'int8' else wanted | {'grouped_matrices'})


def test_what_is_not_honoured_raises():
  x, w, _ = operands(4, 2)
  sizes = jnp.array([1, 2], jnp.int32)
  with pytest.raises(ValueError, match="did you mean 'blocked'.*reference"):
    gm.grouped_matmul(x, w, sizes, backend='block')
  with pytest.raises(ValueError, match='bfloat16 and matrices float32'):
    gm.grouped_matmul(x.astype(jnp.bfloat16), w, sizes)
  with pytest.raises(NotImplementedError, match="5 x 7, not multiples of 128; use 'blocked'"):
    gm.grouped_matmul(x, w, sizes, backend='pallas_tpu')
