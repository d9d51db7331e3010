"""Are chosen blocks taken exactly, change nothing that attention gives, and refused where they do
not fit?
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from rows import attends, documents, draw, values_and_gradients

from analysis import aot, ptxas
from kernels import (
  blocks as block_sizes,
  flash,
  flash_gpu,
  flash_tpu_steps,
  mosaic_gpu_compat as gpu,
)
from kernels.attention import attention
from kernels.blocks import Blocks
from kernels.mask import Mask
from kernels.scoring import Scoring
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

interpreted = pytest.mark.skipif(
  gpu.INTERPRETER is None,
  reason=f'jax {jax.__version__} cannot interpret kernels of Mosaic GPU; 0.12 can',
)
# Per backend: dtype, N, K, H, the blocks, and what a mask is then asked for, forward and backward.
# On a TPU queries are of all heads of a step.
CHOSEN = {
  'tpu': (
    'pallas_tpu',
    'float32',
    4,
    2,
    16,
    Blocks(forward_queries=256, forward_keys=128, backward_queries=512, backward_keys=256),
    (128, 128),
    (256, 256),
  ),
  'tpu, three heads a key': (
    'pallas_tpu',
    'float32',
    3,
    1,
    16,
    Blocks(forward_queries=384, backward_keys=128),
    (128, 512),
    (256, 128),
  ),
  'gpu, fewer keys': (
    'pallas_gpu',
    'float16',
    4,
    2,
    64,
    Blocks(forward_queries=128, forward_keys=64, backward_queries=64, backward_keys=128),
    (128, 64),
    (64, 128),
  ),
  'gpu, more keys': (
    'pallas_gpu',
    'float16',
    2,
    1,
    40,
    Blocks(forward_keys=256),
    (128, 256),
    (64, 128),
  ),
  'gpu, wide': (
    'pallas_gpu',
    'float16',
    2,
    1,
    136,
    Blocks(forward_keys=64, backward_queries=32, backward_keys=128),
    (128, 64),
    (32, 128),
  ),
}
SLOW = ('gpu, fewer keys', 'gpu, wide')
T = 450  # filled up to 512


@pytest.mark.costly
@pytest.mark.parametrize(
  'case',
  [
    pytest.param(case, marks=[interpreted] * ('gpu' in case) + [pytest.mark.slow] * (case in SLOW))
    for case in CHOSEN
  ],
)
def test_chosen_blocks_are_taken_and_change_nothing(case, monkeypatch):
  """Packed rows, values and gradients; of 16 bits as near to the oracle as the table's blocks
  are.
  """
  backend, dtype, N, K, H, blocks, forward, backward = CHOSEN[case]
  monkeypatch.setattr(flash_gpu, '_processors', lambda: 3)
  parts = {
    name: np.concatenate([x, x[:, : T - 300] + 5], 1) for name, x in documents(300, 300).items()
  }
  (q, k, v), mask = (
    (
      draw(2, T, N, H).astype(dtype),
      draw(2, T, K, H).astype(dtype),
      draw(2, T, K, H, seed=1).astype(dtype),
    ),
    oracle.mask(parts),
  )
  asked, run = [], Mask.blocks
  monkeypatch.setattr(
    Mask, 'blocks', lambda self, T, S, *sizes: asked.append(sizes) or run(self, T, S, *sizes)
  )
  attend = attends(Scoring(mask, scale=0.2))
  found = values_and_gradients(
    functools.partial(attend, backend=backend, blocks=blocks), q, k, v, None
  )
  assert asked[0] == forward and asked[-1] == backward
  exact = values_and_gradients(
    functools.partial(attend, backend='reference'),
    *(x.astype(jnp.float32) for x in (q, k, v)),
    None,
  )
  if dtype == 'float32':
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    return
  np.testing.assert_allclose(found[0][1], exact[0][1], rtol=1e-5, atol=1e-5)
  tables = values_and_gradients(functools.partial(attend, backend=backend), q, k, v, None)

  def error(a, b):
    return np.sqrt(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())

  for name, ours, theirs, right in zip(
    ('out', 'q', 'k', 'v'), *((tree[0][0], *tree[1]) for tree in (found, tables, exact))
  ):
    assert error(ours, right) <= 1.2 * error(theirs, right), (
      f'{name}: error {error(ours, right)}, in the blocks of the table {error(theirs, right)}'
    )


@pytest.mark.slow
def test_devices_that_share_a_row_keep_to_the_blocks(monkeypatch):
  """Each works on a quarter, zig-zag, so on two chunks of 128 queries."""
  q, k, v = (draw(2, 1024, heads, 8) for heads in (2, 1, 1))
  asked, run = [], Mask.blocks
  monkeypatch.setattr(
    Mask, 'blocks', lambda self, T, S, *sizes: asked.append(sizes) or run(self, T, S, *sizes)
  )
  attend = attends(Scoring(), backend='pallas_tpu')
  chosen = functools.partial(
    attend,
    blocks=Blocks(forward_queries=128, forward_keys=128, backward_queries=256, backward_keys=128),
  )
  expected = values_and_gradients(attends(Scoring(), backend='reference'), q, k, v, None)
  with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])):
    placed = [jax.device_put(x, ax.spec('batch', 'length', None, None)) for x in (q, k, v)]
    found = values_and_gradients(chosen, *placed, None)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert set(asked) == {(128, 128)}
    with pytest.raises(
      ValueError,
      match=r'attention_blocks.forward_keys=512 make no whole blocks of a row of \d+ keys',
    ):
      values_and_gradients(
        functools.partial(attend, blocks=Blocks(forward_keys=512)), *placed, None
      )


def test_blocks_that_a_row_has_not_raise():
  q, k = draw(1, 300, 6, 8), draw(1, 300, 2, 8)

  def run(**sizes):
    return jax.grad(
      lambda q: attention(q, k, k, Scoring(), backend='pallas_tpu', blocks=Blocks(**sizes))[0].sum()
    )(q)

  for sizes, words in (
    (
      {'forward_queries': 512},
      'forward_queries=512, of 3 heads a key or fewer, make no whole blocks of a row of '
      r'300 queries, filled up to 384; choose one of \[128, 384\], or 0',
    ),
    ({'backward_queries': 256}, 'backward_queries=256, of 3 heads'),
    (
      {'forward_keys': 256},
      'forward_keys=256 make no whole blocks of a row of 300 keys, filled up to 384; '
      r'choose one of \[128\], or 0',
    ),
    ({'backward_keys': 1024}, 'attention_blocks.backward_keys=1024 make no whole blocks'),
  ):
    with pytest.raises(ValueError, match=words):
      run(**sizes)


@pytest.mark.parametrize('backend', ['auto', 'reference', 'blocked', 'xla'])
def test_a_backend_without_blocks_to_choose_names_those_that_have(backend):
  q = draw(1, 4, 2, 8)
  with pytest.raises(
    NotImplementedError,
    match=f"chooses {{'forward_keys': 128}}, and model.execution.attention='{backend}' is no "
    r".*\['pallas_tpu', 'pallas_gpu'\]",
  ):
    attention(q, q, q, Scoring(), backend=backend, blocks=Blocks(forward_keys=128))


def test_what_may_be_cudnn_is_not_deterministic():
  for backend in ('auto', 'xla'):
    with pytest.raises(
      NotImplementedError,
      match=f"deterministic=True: model.execution.attention='{backend}' may be cuDNN.*"
      'set it to one of',
    ):
      block_sizes.check(Blocks(deterministic=True), backend, 64)
  for backend in ('pallas_gpu', 'pallas_tpu', 'blocked', 'reference'):
    block_sizes.check(Blocks(deterministic=True), backend, 64)


@pytest.mark.parametrize(
  'backend, sizes, width, words',
  [
    (
      'pallas_tpu',
      {'forward_queries': 100},
      64,
      r'forward_queries=100: backend pallas_tpu has \[128, 256, .*1024\] for heads 64 wide; '
      'choose one of them, or 0',
    ),
    (
      'pallas_tpu',
      {'backward_keys': 2048},
      64,
      r'backward_keys=2048: backend pallas_tpu has \[128, 256, 512, 1024\]',
    ),
    ('pallas_tpu', {'forward_keys': -128}, 64, r'forward_keys=-128: backend pallas_tpu has'),
    (
      'pallas_gpu',
      {'forward_keys': 256},
      128,
      r'forward_keys=256: backend pallas_gpu has \[64, 128\] for heads 128 wide',
    ),
    (
      'pallas_gpu',
      {'backward_queries': 64},
      192,
      r'backward_queries=64: backend pallas_gpu has \[32\] for heads 192 wide',
    ),
    (
      'pallas_gpu',
      {'backward_queries': 128},
      64,
      r'backward_queries=128: backend pallas_gpu has \[64\]',
    ),
    (
      'pallas_gpu',
      {'forward_queries': 256},
      40,
      r'forward_queries=256: backend pallas_gpu has \[128\]',
    ),
    (
      'pallas_gpu',
      {'forward_queries': 128},
      300,
      r'forward_queries=128: backend pallas_gpu has \[\] for heads 300 wide',
    ),
  ],
)
def test_sizes_that_a_backend_has_not_raise(backend, sizes, width, words):
  with pytest.raises(ValueError, match=r'model.execution.attention_blocks.' + words):
    block_sizes.check(Blocks(**sizes), backend, width)


def test_the_tables_sizes_can_be_chosen():
  """Whatever a table says, saying it again in a config changes no step."""
  for direction in ('forward', 'backward'):
    for width, forward in flash_gpu.FORWARD.items():
      table = forward if direction == 'forward' else flash_gpu.KEYS[width]
      queries, keys = (
        (2 * table.queries, table.keys)
        if direction == 'forward'
        else (table.queries, 2 * table.keys)
      )
      block_sizes.check(
        Blocks(**{f'{direction}_queries': queries, f'{direction}_keys': keys}), 'pallas_gpu', width
      )
    q, k = (jax.ShapeDtypeStruct((1, 4096, heads, 128), 'bfloat16') for heads in (8, 2))
    table = flash_tpu_steps.shape_of(q, k, k, Scoring(), direction)
    chosen = Blocks(**{f'{direction}_queries': table.R, f'{direction}_keys': table.bk})
    again = flash_tpu_steps.shape_of(q, k, k, Scoring(), direction, chosen)
    assert (
      (again.G, again.bq, again.bk, again.chunk) == (table.G, table.bq, table.bk, table.chunk)
      and again.chosen
      and not table.chosen
    )


SEGMENTS = {f'{x}_segments': np.zeros((2, 1024), np.int32) for x in ('query', 'key')}
MASKS = {
  'causal': (Mask(), 0.0),
  'packed, window': (Mask(window=512, **SEGMENTS), 0.0),
  'packed, window, soft cap': (Mask(window=512, **SEGMENTS), 50.0),
  'positions, prefix': (
    Mask(
      query_positions=SEGMENTS['query_segments'],
      key_positions=SEGMENTS['key_segments'],
      window=512,
      prefix=np.array([7, 9], np.int32),
    ),
    0.0,
  ),
}
OTHERS = [
  (width, name, size)
  for width, sizes in block_sizes.GPU.items()
  for name in ('forward_keys', 'backward_queries')
  for size in sizes[name]
  if size
  != (flash_gpu.FORWARD[width].keys if name == 'forward_keys' else flash_gpu.KEYS[width].queries)
]


@pytest.mark.slow
@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('width, name, size', OTHERS)
def test_every_size_compiles_for_an_h100_without_a_spill(
  width, name, size, mask, monkeypatch, tmp_path
):
  """Of those that are not the table's, which the kernels' own tests compile."""
  try:
    mesh = make_mesh(MeshConfig(), aot.topology('h100:1x1x1'))
  except ImportError as error:
    pytest.skip(
      f'an H100 cannot be compiled for: {error}; make test-gpu-aot installs what is missing'
    )
  for variable, value in ptxas.environment(str(tmp_path)).items():
    monkeypatch.setenv(variable, value)
  spec, softcap = MASKS[mask]
  with jax.set_mesh(mesh):

    def shape(heads):
      return jax.ShapeDtypeStruct(
        (2, 1024, heads, width), 'bfloat16', sharding=jax.NamedSharding(mesh, jax.P())
      )

    def loss(*x):
      return jnp.sum(
        attention(
          *x, Scoring(spec, softcap=softcap), backend='pallas_gpu', blocks=Blocks(**{name: size})
        )[0],
        dtype=jnp.float32,
      )

    jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape(4), shape(2), shape(2)).compile()
  found = ptxas.reports(str(tmp_path))
  assert found and not {
    name: report for name, report in found.items() if report.spilled or report.warnings
  }


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v4:1x1x1', 'v5e:1x1', 'v5p:1x1x1', 'v6e:1x1', 'tpu7x:1x1x1'])
def test_chosen_steps_compile_for_a_tpu(topology):
  try:
    mesh = make_mesh(MeshConfig(), aot.topology(topology)[:1])
  except ImportError as error:
    pytest.skip(f'{topology} cannot be compiled for: {error}')
  blocks = Blocks(forward_queries=512, forward_keys=256, backward_queries=256, backward_keys=512)
  with jax.set_mesh(mesh), jax.default_matmul_precision('default'):

    def shape(heads):
      return jax.ShapeDtypeStruct(
        (1, 2048, heads, 128), 'bfloat16', sharding=jax.NamedSharding(mesh, jax.P())
      )

    def loss(*x):
      return jnp.sum(
        attention(*x, Scoring(), backend='pallas_tpu', blocks=blocks)[0], dtype=jnp.float32
      )

    program = (
      jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape(4), shape(2), shape(2)).compile().as_text()
    )
  assert 'flash_forward_512x256' in program and 'flash_backward_256x512' in program


def test_every_kernel_of_ours_has_blocks_to_choose():
  assert set(block_sizes.SIZES) == set(flash.KERNELS)
