"""Are the TPU kernels attention? Values and gradients against the oracle, interpreted; and programs
of the real compiler.
"""

import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from rows import attends, documents, draw, positions, values_and_gradients

import kernels
from analysis import aot
from kernels import attention as dispatch, flash, flash_tpu, flash_tpu_steps, reference
from kernels.attention import attention
from kernels.blocks import Blocks
from kernels.mask import Mask
from kernels.scoring import Scoring
from kernels.tuning import Tuning
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

# T, S, N, K, H, Hv, the mask, softcap, sinks. Blocks are of 128: lengths that fill them and that
# don't, one block and several.
CASES = {
  'causal': (256, 256, 4, 2, 8, 8, {}, 0.0, False),
  'causal, soft cap, sinks': (300, 300, 4, 2, 8, 6, {}, 2.0, True),
  'window': (300, 300, 4, 1, 64, 128, {'window': 40}, 0.0, True),
  'wide window, packed': (
    300,
    300,
    2,
    2,
    16,
    16,
    {'window': 200} | documents(300, 300),
    2.0,
    False,
  ),
  'packed': (300, 300, 6, 2, 16, 128, documents(300, 300), 0.0, True),
  'full, packed': (200, 300, 2, 2, 16, 16, {'causal': False} | documents(200, 300), 2.0, False),
  'window on either side, packed': (
    300,
    300,
    2,
    1,
    16,
    16,
    {'causal': False, 'window': 90} | documents(300, 300),
    0.0,
    False,
  ),
  'window on either side, positions': (
    150,
    300,
    4,
    2,
    16,
    16,
    {'causal': False, 'window': 100} | positions(150, 300),
    0.0,
    True,
  ),
  'full': (130, 300, 2, 1, 16, 24, {'causal': False}, 0.0, True),
  'prefix': (300, 300, 4, 2, 16, 16, {'prefix': np.array([200, 3], np.int32)}, 2.0, False),
  'prefix, window, packed': (
    300,
    300,
    2,
    2,
    8,
    8,
    {'prefix': np.array([200, 3], np.int32), 'window': 50} | documents(300, 300),
    0.0,
    False,
  ),
  'positions': (150, 300, 4, 2, 16, 16, {'window': 100} | positions(150, 300), 0.0, True),
  'positions, packed, prefix': (
    150,
    300,
    2,
    2,
    8,
    8,
    positions(150, 300) | documents(150, 300) | {'prefix': np.array([100, 3], np.int32)},
    2.0,
    True,
  ),
  'zigzag': (256, 256, 2, 2, 16, 16, {'zigzag': 4}, 0.0, False),
}
FAST = (
  'causal, soft cap, sinks',
  'window on either side, packed',
  'packed',
  'full, packed',
  'positions, packed, prefix',
  'prefix, window, packed',
)


def inputs_of(case):
  T, S, N, K, H, Hv, parts, softcap, sinks = CASES[case]
  q, k, v = draw(2, T, N, H), draw(2, S, K, H, seed=1), draw(2, S, K, Hv, seed=2)
  return (q, k, v, draw(N) if sinks else None), oracle.mask(parts), softcap


@pytest.fixture
def small_steps(monkeypatch):
  """Blocks of 128, two heads of a key in one, so that a few hundred tokens are several steps; as
  v6e sums weights.
  """
  monkeypatch.setattr(
    flash_tpu_steps, '_tuning', lambda direction, width: Tuning(256, 128, 64, True, 2**27)
  )


def assert_close(found, expected):
  """Sums of hundreds of products in f32, in another order; in a gradient they cancel."""
  for tolerance, a, b in zip((1e-5, 1e-4), found, expected, strict=True):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def check(case):
  arrays, mask, softcap = inputs_of(case)
  found = values_and_gradients(
    attends(Scoring(mask, softcap=softcap, scale=0.3), backend='pallas_tpu'),
    *arrays,
  )
  expected = values_and_gradients(
    attends(Scoring(mask, softcap=softcap, scale=0.3), backend='reference'),
    *arrays,
  )
  assert_close(found, expected)


@pytest.mark.costly
@pytest.mark.parametrize('case', FAST)
def test_it_is_attention(case, small_steps):
  check(case)


def test_sixteen_bits_lose_what_rounding_loses(small_steps):
  """As a TPU multiplies them: beside attention in f32, an error as large as the oracle's in
  bfloat16, whose weights alone are rounded.

  Ours also rounds scaled queries, as who calls splash does; keys' gradients are made of those.
  """
  q, k, v = (
    x.astype(jnp.bfloat16)
    for x in (draw(2, 256, 4, 64), draw(2, 256, 2, 64, seed=1), draw(2, 256, 2, 64, seed=2))
  )

  def run(backend, *arrays):
    return values_and_gradients(attends(Scoring(), backend=backend), *arrays, None)

  exact = run('reference', *(x.astype(jnp.float32) for x in (q, k, v)))
  with jax.default_matmul_precision('default'):
    ours, oracles = run('pallas_tpu', q, k, v), run('reference', q, k, v)
  assert ours[1][0].dtype == jnp.bfloat16
  np.testing.assert_allclose(
    ours[0][1], exact[0][1], atol=2**-8
  )  # log-sum-exp, of scores of rounded queries

  def error(x, right):
    return np.sqrt(np.square(np.asarray(x, np.float64) - np.asarray(right, np.float64)).mean())

  for name, most, *found in zip(
    ('out', 'q', 'k', 'v'),
    (1.2, 1.3, 1.5, 1.3),
    *((tree[0][0], *tree[1]) for tree in (ours, oracles, exact)),
  ):
    a, b, right = found
    assert error(a, right) <= most * error(b, right), (
      f'{name}: {error(a, right) / error(b, right):.2f} times that of the oracle'
    )


@pytest.mark.slow
def test_sums_by_lane_are_sums(monkeypatch):
  """What v5e does: several lanes' worth of keys a step, and a sink that is one in all lanes
  together.
  """
  monkeypatch.setattr(
    flash_tpu_steps, '_tuning', lambda direction, width: Tuning(256, 256, 128, False, 2**27)
  )
  check('causal')
  check('causal, soft cap, sinks')


@pytest.mark.slow
@pytest.mark.parametrize('case', [case for case in CASES if case not in FAST])
def test_every_mask_is_attention(case, small_steps):
  check(case)


@pytest.mark.slow
@pytest.mark.parametrize('case', ['packed', 'window'])
def test_in_the_steps_of_a_v5e(case):
  check(case)


@pytest.mark.slow
@pytest.mark.long
def test_no_step_reads_what_another_writes(small_steps):
  """TPU semantics, with races looked for: forward and backward of a packed row."""
  (q, k, v, _), mask, _ = inputs_of('packed')
  scoring, interpret = Scoring(mask, scale=0.3), pltpu.InterpretParams(detect_races=True)

  def run(q, k, v):
    return flash.flash(('pallas_tpu', interpret, Blocks()), q, k, v, scoring)[0]

  out, pull = jax.vjp(run, q, k, v)
  expected, pull_expected = jax.vjp(
    lambda q, k, v: attention(q, k, v, scoring, backend='reference')[0], q, k, v
  )
  assert_close((out, pull(out)), (expected, pull_expected(out)))
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize(
  'parts', [positions(150, 300), {}, {'zigzag': 2}], ids=['positions', 'in order', 'zigzag']
)
def test_keys_go_through_in_parts_where_they_do_not_fit(parts, monkeypatch):
  """A VMEM in which the gradients of 128 keys find place."""
  monkeypatch.setattr(
    flash_tpu_steps, '_tuning', lambda direction, width: Tuning(256, 128, 128, False, 2**15)
  )
  T = 150 if 'query_positions' in parts else 300
  q, k, v = draw(2, T, 4, 8), draw(2, 300, 2, 8), draw(2, 300, 2, 8, seed=1)
  scoring = Scoring(oracle.mask(parts), scale=0.3)
  out, lse = reference.attention(q, k, v, scoring)
  arguments = q, k, v, scoring, lse, (out * out).sum(-1), out
  found = flash_tpu.backward(*arguments, interpret=True)
  for a, b in zip(found, reference.backward(*arguments)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('case', ['packed', 'causal, soft cap, sinks'])
def test_calls_for_ranges_of_blocks_are_one_call(case, small_steps, monkeypatch):
  """Two rows of 3 x 3 blocks. With tables of nine steps a call has a row's, or a part of the
  queries of both; with four, one block of queries, or a part of the keys, whose sums are added.
  """
  (q, k, v, sinks), mask, softcap = inputs_of(case)
  calls = []
  monkeypatch.setattr(
    flash_tpu,
    'ranges_of',
    lambda *arguments, **more: (
      calls.append(flash_tpu_steps.ranges_of(*arguments, **more)) or calls[-1]
    ),
  )

  def run(table):
    monkeypatch.setattr(flash_tpu_steps, 'TABLE', table)
    attend = attends(Scoring(mask, softcap=softcap, scale=0.3), backend='pallas_tpu')
    return values_and_gradients(attend, q, k, v, sinks)

  whole = run(flash_tpu_steps.TABLE)
  assert not calls
  for table, turns in ((9, {2}), (4, {6, 2})):
    calls.clear()
    parts = run(table)
    assert {call.turns for call in calls} == turns
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
  with pytest.raises(NotImplementedError, match='3 steps of .* and 2 fit .*mesh.context'):
    run(2)


@pytest.mark.costly
@pytest.mark.parametrize(
  'parts, T, steps',
  [
    ({}, 300, 6),
    (documents(300, 300), 300, 6),
    ({'window': 40}, 300, 5),
    (positions(150, 300), 150, 3),
    ({'prefix': np.array([200, 3], np.int32)}, 300, 9),
  ],
  ids=['causal', 'packed', 'window', 'positions', 'prefix'],
)
def test_what_a_kernel_declares_follows_the_mask(parts, T, steps, small_steps):
  """Of a row of 3 x 3 blocks, of positions 2 x 3; where arrays decide, as many as there may be, by
  positions half of them.
  """
  q, k, mask = draw(2, T, 4, 8), draw(2, 300, 2, 8), oracle.mask(parts)
  shape = flash_tpu_steps.shape_of(q, k, k, Scoring(mask), 'forward')
  made = flash_tpu_steps.steps_of(mask.blocks(T, 300, shape.bq, shape.bk), 2)
  assert flash_tpu_steps.expected(made, mask, shape) == 2 * steps
  assert int(made.count) <= 2 * steps or 'query_positions' in parts


@pytest.mark.slow
def test_on_a_mesh(small_steps):
  """Rows over fsdp, heads over tensor, keys in a ring over context, by their log-sum-exp; with
  documents.
  """
  q, k, v = draw(2, 256, 4, 8), draw(2, 256, 2, 8), draw(2, 256, 2, 8, seed=1)
  mask = oracle.mask(documents(256, 256))
  expected = values_and_gradients(attends(Scoring(mask), backend='reference'), q, k, v, None)
  for sizes in ({'fsdp': 2, 'tensor': 2}, {'context': 2, 'tensor': 2}):
    with jax.set_mesh(make_mesh(MeshConfig(data=1, **sizes), jax.devices()[:4], AxisType.Explicit)):

      def at(x, *axes):
        return jax.device_put(x, ax.spec(*axes))

      heads = 'batch', 'length', 'heads', 'head_width'
      split = Mask(
        **{name: at(jnp.asarray(x), 'batch', 'length') for name, x in documents(256, 256).items()}
      )
      found = values_and_gradients(
        attends(Scoring(split), backend='pallas_tpu'),
        *(at(x, *heads) for x in (q, k, v)),
        None,
      )
    assert_close(found, expected)


COMPILED = {
  'causal': ((1, 4096, 4096, 8, 2, 128, 128, jnp.bfloat16), Mask(), 0.0),
  'window, soft cap': ((1, 4096, 4096, 8, 8, 64, 64, jnp.bfloat16), Mask(window=1024), 30.0),
  'packed': (
    (2, 2048, 2048, 8, 2, 128, 128, jnp.bfloat16),
    Mask(**{f'{x}_segments': np.zeros((2, 2048), np.int32) for x in ('query', 'key')}),
    0.0,
  ),
  'positions': (
    (2, 1024, 2048, 8, 2, 128, 128, jnp.bfloat16),
    Mask(
      query_positions=np.zeros((2, 1024), np.int32),
      key_positions=np.zeros((2, 2048), np.int32),
      window=512,
    ),
    0.0,
  ),
  'latent': ((1, 2048, 2048, 4, 4, 192, 128, jnp.bfloat16), Mask(), 0.0),
  'f32': ((1, 1024, 1024, 4, 4, 256, 256, jnp.float32), Mask(prefix=np.array([7], np.int32)), 0.0),
  'ragged': ((1, 1000, 1500, 8, 8, 80, 80, jnp.float16), Mask(causal=False), 0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v4:1x1x1', 'v5e:1x1', 'v5p:1x1x1', 'v6e:1x1', 'tpu7x:1x1x1'])
@pytest.mark.parametrize('case', COMPILED)
def test_it_compiles(case, topology):
  (B, T, S, N, K, H, Hv, dtype), mask, softcap = COMPILED[case]
  try:
    mesh = make_mesh(MeshConfig(), aot.topology(topology)[:1])
  except ImportError as error:
    pytest.skip(f'{topology} cannot be compiled for: {error}')
  with jax.set_mesh(mesh), jax.default_matmul_precision('default'):

    def abstract(*shape):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    def loss(q, k, v):
      out, lse = attention(q, k, v, Scoring(mask, softcap=softcap), backend='pallas_tpu')
      return jnp.sum(out, dtype=jnp.float32) + lse.sum()

    program = (
      jax.jit(jax.grad(loss, (0, 1, 2)))
      .lower(abstract(B, T, N, H), abstract(B, S, K, H), abstract(B, S, K, Hv))
      .compile()
      .as_text()
    )
  assert (
    'flash_forward' in program
    and 'flash_backward' in program
    and dispatch.HONOURS['pallas_tpu'] >= mask.fields()
  )


# B, T, N, K, of heads 128 wide, and whether documents are packed: tables of more than 1 MiB.
LONG = {
  '131,072 packed, 64 heads': (1, 131_072, 64, 8, True),
  '8 x 65,536 packed, 32 heads': (8, 65_536, 32, 8, True),
  '262,144': (1, 262_144, 32, 8, False),
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('case', LONG)
def test_long_rows_compile(case):
  """Forward and backward, as the tables of their steps go to scalar memory in parts."""
  B, T, N, K, packed = LONG[case]
  try:
    mesh = make_mesh(MeshConfig(), aot.topology('v5p:1x1x1')[:1])
  except ImportError as error:
    pytest.skip(f'v5p cannot be compiled for: {error}')
  with jax.set_mesh(mesh), jax.default_matmul_precision('default'):

    def abstract(*shape, dtype=jnp.bfloat16):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    def loss(q, k, v, segments):
      mask = Mask(query_segments=segments, key_segments=segments) if packed else Mask()
      out, lse = attention(q, k, v, Scoring(mask), backend='pallas_tpu')
      return jnp.sum(out, dtype=jnp.float32) + lse.sum()

    keys = abstract(B, T, K, 128)
    program = (
      jax.jit(jax.grad(loss, (0, 1, 2)))
      .lower(abstract(B, T, N, 128), keys, keys, abstract(B, T, dtype=jnp.int32))
      .compile()
      .as_text()
    )
  assert 'flash_forward' in program and 'flash_backward' in program


FAULTS = {
  'wrong diagonal': ('compare(jnp.greater_equal, q, k)', 'compare(jnp.greater, q, k)'),
  'dropped rescale': ('acc[rows] = acc[rows] * over_lanes(shrink, Hv)', 'acc[rows] = acc[rows]'),
  'a block is skipped that is needed': (
    'active = ((kinds != SKIP) | blind)',
    'active = ((kinds == FULL) | blind)',
  ),
  'a partial block is not masked': (
    '(kinds.reshape(-1)[order] != FULL) * MASKED',
    '(kinds.reshape(-1)[order] == SKIP) * MASKED',
  ),
  'gradients of the keys begin anew': ('first_of_row * FIRST_OF_ROW', 'first * FIRST_OF_ROW'),
  'gradients of the queries do not begin anew': ('sum_q[...] = jnp.zeros_like(sum_q)', 'pass'),
  'the sinks are forgotten': ('jnp.where(sink > NOTHING, share, 0.0)', 'jnp.zeros_like(sink)'),
  'the cap has no slope': ('d_scores = d_scores * (1 - bent * bent)', 'pass'),
}


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
def test_a_planted_fault_is_caught(fault, monkeypatch):
  old, new = FAULTS[fault]
  sources = {
    name: pathlib.Path(sys.modules[name].__file__).read_text()
    for name in ('kernels.flash_tpu_steps', 'kernels.flash_tpu_bodies', 'kernels.flash_tpu')
  }
  assert sum(source.count(old) for source in sources.values()) == 1, (
    f'{old!r} is not there once: plant the fault where it is now'
  )
  for name, source in sources.items():  # in the order that they import each other
    mutant = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, mutant)
    monkeypatch.setattr(kernels, name.removeprefix('kernels.'), mutant)
    exec(compile(source.replace(old, new), name, 'exec'), mutant.__dict__)
    if name == 'kernels.flash_tpu_steps':
      mutant._tuning = lambda direction, width: Tuning(256, 128, 64, True, 2**27)
  with pytest.raises(AssertionError, match='Not equal|Mismatch|not close'):
    check('causal, soft cap, sinks')
