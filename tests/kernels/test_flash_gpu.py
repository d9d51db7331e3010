"""Are the Hopper kernels attention? Values and gradients against the oracle, interpreted; and what
the assembler makes of them.
"""

import functools
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from rows import attends, documents, draw, positions, values_and_gradients

import kernels
from analysis import aot, ptxas
from kernels import cudnn, flash, flash_gpu, mosaic_gpu_compat as gpu, reference
from kernels.attention import attention
from kernels.blocks import Blocks
from kernels.mask import FULL, PARTIAL, SKIP, Mask
from kernels.scoring import Scoring
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

interpreted = pytest.mark.skipif(
  gpu.INTERPRETER is None,
  reason=f'jax {jax.__version__} cannot interpret kernels of Mosaic GPU; 0.12 can',
)
# T, S, N, K, H, Hv, the mask, softcap, sinks. Tiles are of 128, blocks of 64 or 128: lengths that
# fill them and that don't.
CASES = {
  'causal': (256, 256, 4, 2, 64, 64, {}, 0.0, False),
  'causal, wide heads': (256, 256, 2, 1, 128, 128, {}, 0.0, True),
  'causal, widest heads': (256, 256, 2, 1, 256, 256, {}, 0.0, False),
  'causal, soft cap, sinks': (300, 300, 2, 1, 64, 64, {}, 2.0, True),
  'window': (300, 300, 2, 1, 40, 64, {'window': 40}, 0.0, True),
  'wide window, packed': (
    300,
    300,
    2,
    2,
    64,
    64,
    {'window': 200} | documents(300, 300),
    2.0,
    False,
  ),
  'packed': (300, 300, 2, 1, 64, 64, documents(300, 300), 0.0, True),
  'full, packed': (200, 300, 2, 2, 64, 64, {'causal': False} | documents(200, 300), 2.0, False),
  'window on either side, packed': (
    300,
    300,
    2,
    1,
    64,
    64,
    {'causal': False, 'window': 90} | documents(300, 300),
    0.0,
    False,
  ),
  'full': (130, 300, 2, 1, 64, 24, {'causal': False}, 0.0, True),
  'prefix': (300, 300, 2, 1, 64, 64, {'prefix': np.array([200, 3], np.int32)}, 2.0, False),
  'prefix, window, packed': (
    300,
    300,
    2,
    2,
    64,
    64,
    {'prefix': np.array([200, 3], np.int32), 'window': 50} | documents(300, 300),
    0.0,
    False,
  ),
  'positions': (150, 300, 2, 1, 64, 64, {'window': 100} | positions(150, 300), 0.0, True),
  'positions, packed, prefix': (
    150,
    300,
    2,
    2,
    64,
    64,
    positions(150, 300) | documents(150, 300) | {'prefix': np.array([100, 3], np.int32)},
    2.0,
    True,
  ),
  'latent': (200, 200, 2, 2, 192, 128, {}, 0.0, False),
  'wide keys, narrow values': (140, 140, 2, 1, 192, 64, {}, 0.0, False),
  'narrow keys, wide values': (140, 140, 2, 1, 64, 256, {}, 0.0, True),
  'zigzag': (256, 256, 2, 2, 64, 64, {'zigzag': 4}, 0.0, False),
}
FAST = ('causal', 'packed', 'positions, packed, prefix')


def inputs_of(case, dtype):
  T, S, N, K, H, Hv, parts, softcap, sinks = CASES[case]
  q, k, v = (
    x.astype(dtype) for x in (draw(2, T, N, H), draw(2, S, K, H, seed=1), draw(2, S, K, Hv, seed=2))
  )
  return (q, k, v, draw(N) if sinks else None), oracle.mask(parts), softcap


class Rounded:
  """The kernels' contract kept by the oracle in 16 bits: what precision is lost by rounding what
  they round.
  """

  @staticmethod
  def forward(q, k, v, scoring, *, interpret, blocks):
    return reference.attention(q, k, v, scoring)

  @staticmethod
  def backward(q, k, v, *arguments, interpret, blocks, dtype=jnp.float32):
    found = reference.backward(q, k, v, *arguments)[:3]
    return tuple(x.astype(dtype or like.dtype) for x, like in zip(found, (q, k, v)))


def check(case, dtype=jnp.float16):
  """As near to the oracle in f32 as its twin in `dtype` is; what is not rounded to that, the
  log-sum-exp, much nearer.
  """
  (q, k, v, sinks), mask, softcap = inputs_of(case, dtype)
  scoring = Scoring(mask, softcap=softcap, scale=0.2)
  found = values_and_gradients(attends(scoring, backend='pallas_gpu'), q, k, v, sinks)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flash, '_module', lambda backend: Rounded)
    rounded = values_and_gradients(attends(scoring, backend='pallas_gpu'), q, k, v, sinks)
  exact = values_and_gradients(
    attends(scoring, backend='reference'),
    *(x.astype(jnp.float32) for x in (q, k, v)),
    sinks,
  )
  np.testing.assert_allclose(found[0][1], exact[0][1], rtol=1e-5, atol=1e-5)

  def error(x, y):
    return np.sqrt(np.square(np.asarray(x, np.float64) - np.asarray(y, np.float64)).mean())

  for name, ours, twin, right in zip(
    ('out', 'q', 'k', 'v'),
    (found[0][0], *found[1]),
    (rounded[0][0], *rounded[1]),
    (exact[0][0], *exact[1]),
  ):
    assert error(ours, right) <= 1.1 * error(twin, right), (
      f'Not equal: {name}, error {error(ours, right)}, in 16 bits {error(twin, right)}'
    )
  if sinks is not None:  # a handful of numbers, no statistics
    np.testing.assert_allclose(
      found[1][3],
      exact[1][3],
      atol=16 * float(jnp.finfo(dtype).eps) * float(jnp.abs(exact[1][3]).max()),
    )


@pytest.fixture(autouse=True)
def no_traces():
  """Of a kernel that failed, which the interpreter would find."""
  yield
  if gpu.INTERPRETER is not None:
    from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state

    reset_gpu_interpret_mode_state()


@pytest.fixture
def few_processors(monkeypatch):
  """So that each takes several tiles."""
  monkeypatch.setattr(flash_gpu, '_processors', lambda: 3)


@pytest.mark.costly
@interpreted
@pytest.mark.parametrize('case', FAST)
def test_it_is_attention(case, few_processors):
  check(case)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize('case', [case for case in CASES if case not in FAST])
def test_every_mask_is_attention(case, few_processors):
  check(case)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize('case', ['causal', 'packed', 'causal, widest heads'])
def test_in_bfloat16(case):
  check(case, jnp.bfloat16)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize('case', ['packed', 'causal, widest heads', 'latent'])
@pytest.mark.parametrize('deterministic', [False, True])
def test_no_warpgroup_reads_what_another_writes(case, deterministic, few_processors):
  """Races are looked for, and barriers that nobody waits for raise."""
  (q, k, v, sinks), mask, softcap = inputs_of(case, jnp.float16)
  scoring = Scoring(mask, softcap=softcap, sinks=sinks, scale=0.2)
  interpret = gpu.INTERPRETER(detect_races=True)
  out, lse = flash_gpu.forward(q, k, v, scoring, interpret=interpret)
  expected, expected_lse = reference.attention(q, k, v, scoring)
  np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(out, expected, atol=4e-3)  # of weights in f16
  delta = (out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
  found = flash_gpu.backward(
    q,
    k,
    v,
    scoring,
    lse,
    delta,
    out,
    interpret=interpret,
    blocks=Blocks(deterministic=deterministic),
  )
  wanted = reference.backward(
    *(x.astype(jnp.float32) for x in (q, k, v)),
    scoring,
    lse,
    delta,
    out.astype(jnp.float32),
  )
  for a, b in zip(found, wanted):
    np.testing.assert_allclose(a, b, atol=4e-3 * float(jnp.abs(b).max()))


def test_on_a_mesh(monkeypatch):
  """Rows over fsdp, heads over tensor; and keys in a ring over context, by their log-sum-exp.

  The kernels' twin: they are interpreted alone.
  """
  monkeypatch.setattr(flash, '_module', lambda backend: Rounded)
  q, k, v = (
    x.astype(jnp.float16)
    for x in (draw(2, 256, 4, 64), draw(2, 256, 2, 64), draw(2, 256, 2, 64, seed=1))
  )
  mask = oracle.mask(documents(256, 256))
  expected = values_and_gradients(attends(Scoring(mask), backend='pallas_gpu'), q, k, v, None)
  for sizes in ({'fsdp': 2, 'tensor': 2}, {'context': 2, 'tensor': 2}):
    with jax.set_mesh(make_mesh(MeshConfig(data=1, **sizes), jax.devices()[:4], AxisType.Explicit)):

      def at(x, *axes):
        return jax.device_put(x, ax.spec(*axes))

      heads = 'batch', 'length', 'heads', 'head_width'
      split = Mask(
        **{name: at(jnp.asarray(x), 'batch', 'length') for name, x in documents(256, 256).items()}
      )
      found = values_and_gradients(
        attends(Scoring(split), backend='pallas_gpu'),
        *(at(x, *heads) for x in (q, k, v)),
        None,
      )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      finite = np.isfinite(np.asarray(b, np.float32))
      np.testing.assert_allclose(
        np.where(finite, a, 0),
        np.where(finite, b, 0),
        atol=5e-3 * float(np.abs(np.asarray(b)[finite]).max()),
      )


def test_a_plan_has_every_block_once_and_the_longest_tiles_first():
  kinds = np.array([[[FULL, PARTIAL, SKIP], [SKIP, SKIP, SKIP], [PARTIAL, FULL, FULL]]], np.int32)
  for given in (kinds, jnp.asarray(kinds)):
    order, steps = flash_gpu.plan(given)
    assert order.tolist() == [2, 0, 1]
    assert steps[:, :2].tolist() == [[1, 2], [0, 1], [2, 3]], (
      'a tile that sees nothing goes through one masked block, to write zeros'
    )
    assert (
      steps[0, 2:4].tolist() == [0, 1] and steps[1, 2] == 0 and steps[2, 2:].tolist() == [1, 2, 0]
    )


def test_what_it_cannot_raises(monkeypatch):
  q = jnp.zeros((1, 4, 2, 320), jnp.bfloat16)
  with pytest.raises(
    NotImplementedError,
    match=r"'pallas_gpu' does not honour \['wide_heads'\]; these do: \['reference', 'blocked'",
  ):
    attention(q, q, q, Scoring(), backend='pallas_gpu')
  with pytest.raises(NotImplementedError, match=r"'pallas_gpu' does not honour \['float32'\]"):
    attention(*[q[..., :64].astype(jnp.float32)] * 3, Scoring(), backend='pallas_gpu')
  monkeypatch.setattr(cudnn, 'capability', lambda: (8, 0))
  with pytest.raises(
    NotImplementedError,
    match=r'for Hopper GPUs, of compute capability 9, not \(8, 0\); use xla or blocked',
  ):
    flash_gpu.forward(*[q[..., :64]] * 3, Scoring(scale=1.0), interpret=False)
  if gpu.INTERPRETER is None:
    with pytest.raises(
      NotImplementedError,
      match='cannot interpret kernels of Mosaic GPU; use jax >= 0.12 or a Hopper GPU',
    ):
      attention(*[q[..., :64]] * 3, Scoring(), backend='pallas_gpu')


SEGMENTS = {f'{x}_segments': np.zeros((2, 2048), np.int32) for x in ('query', 'key')}
POSITIONS = {f'{x}_positions': np.zeros((2, 2048), np.int32) for x in ('query', 'key')}
COMPILED = {
  'causal': ((1, 4096, 4096, 8, 2, 128, 128, jnp.bfloat16), Mask(), 0.0),
  'causal, own keys': ((1, 4096, 4096, 8, 8, 128, 128, jnp.bfloat16), Mask(), 0.0),
  'full': ((1, 4096, 4096, 8, 2, 128, 128, jnp.bfloat16), Mask(causal=False), 0.0),
  'narrow': ((1, 4096, 4096, 8, 8, 64, 64, jnp.bfloat16), Mask(), 0.0),
  'widest': ((1, 4096, 4096, 4, 2, 256, 256, jnp.bfloat16), Mask(), 0.0),
  'window, f16': ((1, 4096, 4096, 8, 8, 128, 128, jnp.float16), Mask(window=1024), 0.0),
  'soft cap': ((1, 4096, 4096, 8, 4, 128, 128, jnp.bfloat16), Mask(), 50.0),
  'soft cap, window, widest': (
    (1, 2048, 2048, 4, 2, 256, 256, jnp.bfloat16),
    Mask(window=512),
    50.0,
  ),
  'packed': ((2, 2048, 2048, 8, 2, 128, 128, jnp.bfloat16), Mask(**SEGMENTS), 0.0),
  'packed, own keys': ((2, 2048, 2048, 8, 8, 128, 128, jnp.bfloat16), Mask(**SEGMENTS), 0.0),
  'packed, window, own keys': (
    (2, 2048, 2048, 8, 8, 128, 128, jnp.bfloat16),
    Mask(window=512, **SEGMENTS),
    0.0,
  ),
  'packed, window, many heads of a key': (
    (2, 2048, 2048, 8, 1, 128, 128, jnp.bfloat16),
    Mask(window=512, **SEGMENTS),
    0.0,
  ),
  'window on either side': (
    (1, 4096, 4096, 8, 8, 128, 128, jnp.bfloat16),
    Mask(causal=False, window=1024),
    0.0,
  ),
  'packed, window on either side': (
    (2, 2048, 2048, 8, 2, 128, 128, jnp.bfloat16),
    Mask(causal=False, window=512, **SEGMENTS),
    0.0,
  ),
  'packed, full': (
    (2, 2048, 2048, 8, 2, 128, 128, jnp.bfloat16),
    Mask(causal=False, **SEGMENTS),
    0.0,
  ),
  'positions': ((2, 2048, 2048, 8, 4, 128, 128, jnp.bfloat16), Mask(**POSITIONS), 0.0),
  'packed, window, narrow': (
    (2, 2048, 2048, 8, 2, 64, 64, jnp.bfloat16),
    Mask(window=512, **SEGMENTS),
    0.0,
  ),
  'packed, widest': ((2, 2048, 2048, 4, 4, 256, 256, jnp.bfloat16), Mask(**SEGMENTS), 0.0),
  'positions, prefix': (
    (2, 1024, 2048, 8, 2, 128, 128, jnp.bfloat16),
    Mask(
      query_positions=np.zeros((2, 1024), np.int32),
      prefix=np.array([7, 9], np.int32),
      key_positions=np.zeros((2, 2048), np.int32),
      window=512,
    ),
    0.0,
  ),
  'latent': ((1, 2048, 2048, 4, 4, 192, 128, jnp.bfloat16), Mask(), 0.0),
  'wide keys, narrow values': ((1, 2048, 2048, 4, 2, 192, 64, jnp.bfloat16), Mask(), 0.0),
  'narrow keys, wide values': ((1, 2048, 2048, 4, 2, 64, 256, jnp.bfloat16), Mask(), 0.0),
  'ragged, packed': (
    (2, 1000, 1500, 8, 8, 128, 128, jnp.float16),
    Mask(
      causal=False,
      query_segments=np.zeros((2, 1000), np.int32),
      key_segments=np.zeros((2, 1500), np.int32),
    ),
    0.0,
  ),
  'ragged': ((1, 1000, 1500, 8, 8, 80, 80, jnp.float16), Mask(causal=False), 0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', COMPILED)
def test_it_compiles_for_an_h100_without_a_spill(case, monkeypatch, tmp_path):
  """Shared memory beyond 227 KiB raises; products that the assembler serializes are warned of."""
  (B, T, S, N, K, H, Hv, dtype), mask, softcap = COMPILED[case]
  try:
    mesh = make_mesh(MeshConfig(), aot.topology('h100:1x1x1'))
  except ImportError as error:
    pytest.skip(
      f'an H100 cannot be compiled for: {error}; make test-gpu-aot installs what is missing'
    )
  for name, value in ptxas.environment(str(tmp_path)).items():
    monkeypatch.setenv(name, value)
  with jax.set_mesh(mesh):

    def abstract(*shape):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    def loss(deterministic, q, k, v):
      out, lse = attention(
        q,
        k,
        v,
        Scoring(mask, softcap=softcap),
        backend='pallas_gpu',
        blocks=Blocks(deterministic=deterministic),
      )
      return jnp.sum(out, dtype=jnp.float32) + lse.sum()

    for deterministic in (False, True):
      jax.jit(jax.grad(functools.partial(loss, deterministic), (0, 1, 2))).lower(
        abstract(B, T, N, H), abstract(B, S, K, H), abstract(B, S, K, Hv)
      ).compile()
  found = ptxas.reports(str(tmp_path))
  assert len(found) >= 3, 'forward, of keys, of queries'
  assert not {name: report for name, report in found.items() if report.spilled or report.warnings}


@pytest.mark.slow
@pytest.mark.parametrize('save', [None, ('attention',)])
def test_a_scanned_layer_runs_each_kernel_once(save):
  """XLA makes a kernel part of the write into a loop's stack of kept values, and would run it again
  for the rest of the layer.
  """
  try:
    mesh = make_mesh(MeshConfig(), aot.topology('h100:1x1x1'))
  except ImportError as error:
    pytest.skip(
      f'an H100 cannot be compiled for: {error}; make test-gpu-aot installs what is missing'
    )

  def loss(w, x):
    def layer(x, w):
      q = (x @ w).reshape(2, 512, 4, 128)
      out, _ = attention(q, q, q, Scoring(), backend='pallas_gpu')
      return x + out.reshape(x.shape) @ w, None

    if save:
      layer = jax.checkpoint(
        layer, policy=jax.checkpoint_policies.save_only_these_names(*save), prevent_cse=False
      )
    return jnp.sum(jax.lax.scan(layer, x, w)[0], dtype=jnp.float32)

  with jax.set_mesh(mesh):

    def abstract(*shape):
      return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P()))

    program = (
      jax.jit(jax.grad(loss))
      .lower(abstract(4, 512, 512), abstract(2, 512, 512))
      .compile()
      .as_text()
    )
  assert program.count('custom_call_target="mosaic_gpu') == 2, 'forward, and backward'


FAULTS = {
  'wrong diagonal': ('hide(scores, lax.ge, q, before)', 'hide(scores, lax.gt, q, before)'),
  'dropped rescale': ('acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])', 'acc = acc'),
  'a block is skipped that is needed': (
    'count = (kinds == FULL).sum(1), (kinds != SKIP).sum(1)',
    'count = (kinds == FULL).sum(1), np.maximum(1, (kinds != SKIP).sum(1) - 1)',
  ),
  'a partial block is not masked': (
    'scores = shape.mask(scores, ',
    'shape.mask(scores, ',
  ),
  'the sinks are forgotten': ('jnp.where(sink > NOTHING, 1.0, 0.0)', '0.0'),
  'the cap has no slope': ('weights * (1 - bent * bent)', 'weights'),
  'a tile is taken twice': ('place(turn)\n', 'block\n'),
  'memory is rewritten that is still read': (
    '    plgpu.barrier_wait(free[of].at[slot])\n',
    '    pass\n',
  ),
  'what is read has not come': (
    "    plgpu.barrier_wait(self.ready['k'].at[slot])\n    queries = ",
    '    queries = ',
  ),
}


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
def test_a_planted_fault_is_caught(fault, monkeypatch):
  old, new = FAULTS[fault]
  sources = {
    name: pathlib.Path(sys.modules[name].__file__).read_text()
    for name in (
      'kernels.flash_gpu_tiles',
      'kernels.flash_gpu_forward',
      'kernels.flash_gpu_backward',
      'kernels.flash_gpu',
    )
  }
  assert sum(source.count(old) for source in sources.values()) == 1, (
    f'{old!r} is not there once: plant the fault where it is now'
  )
  for name, source in sources.items():  # in the order that they import each other
    mutant = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, mutant)
    monkeypatch.setattr(kernels, name.removeprefix('kernels.'), mutant)
    exec(compile(source.replace(old, new), name, 'exec'), mutant.__dict__)
  mutant._processors = lambda: 7  # an odd number of whole rounds, and a rest
  with pytest.raises(Exception, match='Not equal|Mismatch|not close|Out-of-bounds|arrier'):
    check('causal, soft cap, sinks')
