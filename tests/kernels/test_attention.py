"""Is every attention backend the oracle, and the oracle attention? Values and gradients over a
product of features.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType

from analysis import aot
from kernels import attention as dispatch, reference
from kernels.attention import HONOURS, attention
from kernels.mask import Mask, Relative
from kernels.scoring import Scoring
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

PREFIX = np.array([4, 1], np.int32)
MASKS = {
  'full': {'causal': False},
  'causal': {},
  'window': {'window': 3},
  'wide window': {'window': 99},
  'window on either side': {'causal': False, 'window': 3},
  'prefix': {'prefix': PREFIX},
  'prefix and window': {'prefix': PREFIX, 'window': 3},
}
SHAPES = [
  (4, 4, 4, 4, None),
  (4, 2, 6, 6, 0.3),
  (6, 1, 4, 8, None),
  (2, 2, 6, 2, 1.7),
]  # N, K, H, Hv, scale


def inputs(T, S, N, K, H, Hv, dtype=np.float32, B=2, seed=0):
  def draw(*shape):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)

  return draw(B, T, N, H), draw(B, S, K, H), draw(B, S, K, Hv), draw(N)


def mask_parts(name, segments, positions, T, S, B=2):
  """Mask's keywords; with segments or positions some queries see nothing."""

  def draw(high, *shape):
    return np.random.default_rng([high, *shape]).integers(0, high, shape).astype(np.int32)

  parts = dict(MASKS[name])
  if segments:
    parts |= {'query_segments': draw(3, B, T), 'key_segments': draw(3, B, S)}
    parts['query_segments'][0, 1] = 9  # of no key
  if positions:
    parts |= {'query_positions': draw(T, B, T), 'key_positions': draw(T, B, S)}
  return parts


# Every pair and triple of features meets; of all products every other one, so that half as many
# programs compile.
CASES = [
  case
  for case in itertools.product(MASKS, (False, True), (False, True), (0.0, 2.0), (False, True))
  if sum(map(bool, case[1:])) % 2
]


@pytest.mark.parametrize('index', range(len(CASES)), ids=[str(case) for case in CASES])
def test_reference_is_attention(index):
  name, segments, positions, softcap, sinks = CASES[index]
  N, K, H, Hv, scale = SHAPES[index % 3]
  T, S = (5, 7) if positions else (6, 6)
  q, k, v, sink = inputs(T, S, N, K, H, Hv)
  parts = mask_parts(name, segments, positions, T, S)
  options = {'softcap': softcap, 'sinks': sink if sinks else None, 'scale': scale}
  out, lse = attention(q, k, v, Scoring(oracle.mask(parts), **options), backend='reference')
  expected_out, expected_lse = oracle.attention(q, k, v, parts, **options)
  np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_the_cases_hold_queries_that_see_nothing():
  parts = mask_parts('window', True, True, 5, 7)
  _, lse = oracle.attention(*inputs(5, 7, 2, 2, 4, 4)[:3], parts)
  assert np.isneginf(lse).any() and np.isfinite(lse).any()


def values_and_gradients(backend, q, k, v, sinks, mask, softcap, scale):
  """(out, lse), and gradients with respect to (q, k, v, sinks) of a random projection of `out`."""
  weights = np.random.default_rng(5).normal(size=(*q.shape[:3], v.shape[-1])).astype(q.dtype)

  def loss(q, k, v, sinks):
    scoring = Scoring(mask, softcap=softcap, sinks=sinks, scale=scale)
    out, lse = attention(q, k, v, scoring, backend=backend)
    return jnp.sum(out * weights), (out, lse)

  arguments = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
  (_, values), gradients = jax.jit(jax.value_and_grad(loss, arguments, has_aux=True))(
    q, k, v, sinks
  )
  return values, gradients


def check_backend(backend, q, k, v, sinks, mask, tolerance, softcap=0.0, scale=None):
  expected = values_and_gradients('reference', q, k, v, sinks, mask, softcap, scale)
  found = values_and_gradients(backend, q, k, v, sinks, mask, softcap, scale)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# Every pair of features meets, in half of a half of all products.
HALVES = [
  ((0, 0, 0), (1, 1, 1)),
  ((0, 0, 1), (1, 1, 0)),
  ((0, 1, 0), (1, 0, 1)),
  ((1, 0, 0), (0, 1, 1)),
]
BLOCKED = [
  (name, bool(segments), 2.0 * softcap, bool(sinks))
  for name, half in zip(('full', 'causal', 'window', 'wide window'), HALVES)
  for segments, softcap, sinks in half
]
LENGTHS = [10, 8, 3, 9]  # of queries, in blocks of 4


@pytest.mark.costly
@pytest.mark.parametrize('index', range(len(BLOCKED)), ids=[str(case) for case in BLOCKED])
def test_blocked_is_the_reference(index, monkeypatch):
  monkeypatch.setattr(dispatch, 'BLOCK', 4)
  name, segments, softcap, sinks = BLOCKED[index]
  T, (N, K, H, Hv, scale) = LENGTHS[(index + index // 4) % 4], SHAPES[index % 4]
  with jax.enable_x64(True):
    q, k, v, sink = inputs(T, T, N, K, H, Hv, np.float64)
    mask = oracle.mask(mask_parts(name, segments, False, T, T))
    check_backend('blocked', q, k, v, sink if sinks else None, mask, 1e-12, softcap, scale)


@pytest.mark.costly
@pytest.mark.parametrize(
  'backend, parts, softcap, relative',
  [
    ('blocked', {'window': 5, 'segments': True}, 2.0, False),
    ('blocked', {'positions': True}, 0.0, True),
    ('reference', {'causal': False, 'segments': True}, 2.0, True),
  ],
  ids=str,
)
def test_gradients_of_parts_add_up_to_those_of_the_whole(
  backend, parts, softcap, relative, monkeypatch
):
  """Keys in two parts; the gradient of each from the whole's log-sum-exp and delta."""
  monkeypatch.setattr(dispatch, 'BLOCK', 4)
  T, S, options = 6, 7, {'softcap': softcap, 'scale': 0.4}
  parts = {**mask_parts('full', parts.get('segments', False), True, T, S), 'causal': True} | parts
  mask = oracle.mask(
    {name: x for name, x in parts.items() if name not in ('segments', 'positions')}
  )

  def gradients(q, k, v, bias, d_out, d_lse):
    def whole(q, k, v, bias):
      return reference.attention(q, k, v, Scoring(mask, relative=bias, **options))

    (out, lse), pull = jax.vjp(whole, q, k, v, bias)
    d_lse = jnp.where(jnp.isfinite(lse), d_lse, 0)
    delta, found, values = (d_out * out).sum(-1) - d_lse, [], []
    for keys in (slice(0, 3), slice(3, S)):
      scoring = Scoring(mask.block(slice(0, T), keys), relative=bias, **options)
      arguments = q, k[:, keys], v[:, keys], scoring
      values.append(
        (
          dispatch.part(*arguments, backend=backend),
          reference.attention(*arguments),
        )
      )
      found.append(dispatch.part_backward(*arguments, lse, delta, d_out, backend=backend))
    (dq, dk, dv, dr), (dq2, dk2, dv2, dr2) = found
    return (
      values,
      pull((d_out, d_lse)),
      (
        dq + dq2,
        jnp.concatenate([dk, dk2], 1),
        jnp.concatenate([dv, dv2], 1),
        jax.tree.map(jnp.add, dr, dr2),
      ),
    )

  with jax.enable_x64(True):

    def draw(*shape):
      return jnp.asarray(np.random.default_rng(shape).normal(size=shape))

    bias = Relative(table=draw(6, 4), bidirectional=True, max_distance=9) if relative else None
    values, expected, found = jax.jit(gradients)(
      *inputs(T, S, 4, 2, 6, 5, np.float64)[:3], bias, draw(2, T, 4, 5), draw(2, T, 4)
    )
  for a, b in [
    *((a, b) for pair in values for a, b in zip(*pair)),
    *zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True),
  ]:
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_pallas_tpu_attends_to_another_sequence():
  """Queries and keys of different lengths, with padding and without; few queries, which fill no
  block.
  """
  q, k, v, _ = inputs(9, 140, 4, 2, 8, 8)
  check_backend('pallas_tpu', q, k, v, None, Mask(causal=False), 1e-5)
  segments = {
    'query_segments': np.ones((2, 9), np.int32),
    'key_segments': (np.arange(140)[None] < [[3], [131]]).astype(np.int32),
  }
  check_backend('pallas_tpu', q, k, v, None, oracle.mask({'causal': False} | segments), 1e-5)
  with pytest.raises(ValueError, match='9 queries and 140 keys need explicit positions'):
    attention(q, k, v, Scoring(), backend='pallas_tpu')


@pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto], ids=str)
def test_pallas_tpu_on_a_mesh(axis_type):
  """Rows over fsdp, heads over tensor; padding without segments."""
  q, k, v, _ = inputs(5, 7, 4, 2, 8, 8)
  expected = values_and_gradients('reference', q, k, v, None, Mask(causal=False), 0.0, None)
  with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4], axis_type)):
    heads = ax.spec('batch', 'length', 'heads', 'head_width')
    found = values_and_gradients(
      'pallas_tpu',
      *(jax.device_put(x, heads) for x in (q, k, v)),
      None,
      Mask(causal=False),
      0.0,
      None,
    )
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype, precision', [('bfloat16', 'highest'), ('float16', None)])
def test_pallas_tpu_compiles_for_a_tpu_in_every_precision(dtype, precision):
  try:
    mesh = make_mesh(MeshConfig(), aot.topology('v5e:2x2')[:1])
  except ImportError as error:
    pytest.skip(f'v5e:2x2 cannot be compiled for: {error}')
  with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
    x = jax.ShapeDtypeStruct(
      (1, 128, 1, 128),
      dtype,
      sharding=jax.NamedSharding(mesh, ax.spec('batch', 'length', 'heads', None)),
    )
    gradients = jax.jit(
      jax.grad(
        lambda *x: jnp.sum(attention(*x, Scoring(), backend='pallas_tpu')[0], dtype=jnp.float32),
        (0, 1, 2),
      )
    )
    compiled = gradients.lower(x, x, x).compile()
  assert 'tpu_custom_call' in compiled.as_text() and {x.dtype.name for x in compiled.out_info} == {
    dtype
  }


def test_a_precision_that_pallas_tpu_does_not_have_raises():
  q, k, v, _ = inputs(4, 4, 2, 2, 4, 4)
  with (
    jax.default_matmul_precision('high'),
    pytest.raises(NotImplementedError, match="jax_default_matmul_precision='high'; use one of"),
  ):
    attention(q, k, v, Scoring(), backend='pallas_tpu')


XLA = list(
  zip(MASKS, (False, True, False, True, False, True), (False, True, True, False, False, True))
)


@pytest.mark.costly
@pytest.mark.parametrize('index', range(len(XLA)), ids=[str(case) for case in XLA])
def test_xla_is_the_reference(index):
  name, segments, positions = XLA[index]
  T, S = (5, 7) if positions else (6, 6)
  N, K, H, _, scale = SHAPES[index % 3]
  q, k, v, _ = inputs(T, S, N, K, H, H)
  check_backend(
    'xla', q, k, v, None, oracle.mask(mask_parts(name, segments, positions, T, S)), 3e-5, 0.0, scale
  )


# Of f32; the others have tests of their own.
EXACT = [backend for backend, honoured in HONOURS.items() if 'float32' in honoured]


@pytest.mark.costly
@pytest.mark.parametrize('backend', EXACT)
def test_low_precision_inputs_keep_a_precise_log_sum_exp(backend):
  q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(9, 9, 4, 2, 8, 8))
  out, lse = attention(q, k, v, Scoring(Mask(window=4)), backend=backend)
  expected_out, expected_lse = oracle.attention(
    *(x.astype(np.float32) for x in (q, k, v)), {'window': 4}
  )
  assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
  np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(out.astype(np.float32), expected_out, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize('backend', EXACT)
def test_the_log_sum_exp_has_the_same_gradient_everywhere(backend):
  q, k, v, _ = inputs(6, 6, 4, 2, 4, 4)

  def gradient(backend):
    return jax.grad(lambda q: jnp.sum(jnp.sin(attention(q, k, v, Scoring(), backend=backend)[1])))(
      q
    )

  np.testing.assert_allclose(gradient(backend), gradient('reference'), atol=1e-5)


INDEX = np.arange(4, dtype=np.int32)[None]
FEATURES = {
  'causal': {},
  'window': {'window': 2},
  'prefix': {'prefix': np.array([1], np.int32)},
  'segments': {'query_segments': INDEX // 2, 'key_segments': INDEX // 2},
  'positions': {'query_positions': INDEX, 'key_positions': INDEX + 1},
}


@pytest.mark.parametrize('backend', EXACT)
@pytest.mark.parametrize('feature', (*FEATURES, 'softcap', 'sinks', 'value_width'))
def test_a_backend_honours_a_feature_or_names_those_that_do(backend, feature):
  q, k, v, sinks = inputs(4, 4, 2, 1, 4, 2 if feature == 'value_width' else 4, B=1)
  options = (
    {'softcap': 3.0} if feature == 'softcap' else {'sinks': sinks} if feature == 'sinks' else {}
  )
  scoring = Scoring(oracle.mask(FEATURES.get(feature, {})), **options)
  run = functools.partial(attention, q, k, v, scoring, backend=backend)
  if feature in HONOURS[backend]:
    expected, _ = oracle.attention(q, k, v, FEATURES.get(feature, {}), **options)
    np.testing.assert_allclose(run()[0], expected, atol=1e-5)
  else:
    able = [name for name, honoured in HONOURS.items() if {'causal', feature} <= honoured]
    with pytest.raises(
      NotImplementedError, match=f"'{backend}' does not honour .*'{feature}'.*{able[0]}"
    ):
      run()


def test_bad_arguments_raise():
  q, k, v, _ = inputs(4, 4, 3, 2, 4, 4)
  with pytest.raises(ValueError, match='3 query heads are not a multiple of 2 key/value heads'):
    attention(q, k, v, Scoring())
  with pytest.raises(ValueError, match="'refrence' is unknown; did you mean 'reference'"):
    attention(q[:, :, :2], k, v, Scoring(), backend='refrence')
  with pytest.raises(ValueError, match='4 queries and 2 keys do not align'):
    attention(q[:, :, :2], k[:, :2], v[:, :2], Scoring(), backend='blocked')


SEGMENTS = jnp.zeros((2, 4), jnp.int32)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'q': (2, 4, 4)}, r'q\[2, 4, 4\] must be \[B, T, N, H\], and not empty'),
    ({'q': (2, 0, 4, 8)}, r'q\[2, 0, 4, 8\] must be'),
    ({'k': (2, 4, 2, 6)}, r'q\[2, 4, 4, 8\], k\[2, 4, 2, 6\] and v\[2, 4, 2, 8\] must be'),
    ({'v': (2, 3, 2, 8)}, r'v\[2, 3, 2, 8\] must be'),
    ({'k': (1, 4, 2, 8), 'v': (1, 4, 2, 8)}, r'k\[1, 4, 2, 8\]'),
    ({'v': (2, 4, 1, 8)}, r'v\[2, 4, 1, 8\]'),
    ({'dtype': 'bfloat16'}, 'q, k and v are bfloat16, float32 and float32; cast them to one type'),
    ({'sinks': jnp.zeros(2)}, r'sinks\[2\] must be \[4\], one for each query head'),
    ({'softcap': -1.0}, r'softcap=-1.0 must be positive, or 0'),
    (
      {'mask': Mask(query_segments=SEGMENTS[:, :3], key_segments=SEGMENTS)},
      r'mask.query_segments\[2, 3\] must be \[2, 4\]',
    ),
    ({'mask': Mask(prefix=SEGMENTS[:1, 0])}, r'mask.prefix\[1\] must be \[2\], one for each row'),
  ],
)
def test_operands_that_do_not_go_together_raise(change, words):
  """Without annotations, which only tests look at."""
  shapes = {'q': (2, 4, 4, 8), 'k': (2, 4, 2, 8), 'v': (2, 4, 2, 8)} | {
    name: change[name] for name in 'qkv' if name in change
  }
  q, k, v = (jnp.zeros(shape) for shape in shapes.values())
  with pytest.raises(ValueError, match=words):
    dispatch._check(
      q.astype(change.get('dtype', 'float32')),
      k,
      v,
      Scoring(**{name: change[name] for name in ('mask', 'softcap', 'sinks') if name in change}),
    )


@pytest.mark.parametrize('backend', ['reference', 'pallas_tpu'])
def test_key_heads_that_devices_cannot_share_raise(backend):
  """Each device would take its queries' keys to be those of the first ones."""
  q, k, v, _ = inputs(4, 4, 8, 2, 4, 4)
  with jax.set_mesh(make_mesh(MeshConfig(data=1, tensor=4), jax.devices()[:4])):
    with pytest.raises(
      ValueError, match='2 key heads do not split over mesh.tensor=4; repeat them first'
    ):
      attention(q, k, v, Scoring(), backend=backend)


def test_what_our_kernels_cannot_differentiate_raises():
  q, k, v, _ = inputs(4, 4, 2, 2, 4, 4)
  once = jax.grad(lambda q: jnp.sum(attention(q, k, v, Scoring(), backend='pallas_tpu')[0] ** 2))
  with pytest.raises(
    NotImplementedError,
    match="'pallas_tpu' is differentiated once; "
    'second derivatives are of reference, blocked or xla',
  ):
    jax.grad(lambda q: jnp.sum(once(q)))(q)
  with pytest.raises(
    NotImplementedError,
    match='pallas_tpu is compiled for one scale.*multiply q by it, or use blocked',
  ):
    jax.jit(
      lambda scale: dispatch.flash.attention(
        'pallas_tpu',
        q,
        k,
        v,
        Scoring(scale=scale),
        blocks=dispatch.Blocks(),
      )
    )(2.0)


@pytest.mark.slow
def test_wide_counting_changes_nothing_and_wide_numbers_are_refused():
  q, k, v, _ = inputs(140, 140, 2, 1, 8, 8)
  mask = oracle.mask(mask_parts('causal', True, False, 140, 140))
  expected = values_and_gradients('pallas_tpu', q, k, v, None, mask, 0.0, None)
  with jax.enable_x64(True):
    found = values_and_gradients('pallas_tpu', q, k, v, None, mask, 0.0, None)
    with pytest.raises(
      NotImplementedError, match="'pallas_tpu' does not honour .*'float64'.*blocked"
    ):
      attention(*(x.astype('float64') for x in (q, k, v)), Scoring(mask), backend='pallas_tpu')
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_sink_of_nothing_has_no_gradient_where_nothing_is_seen():
  q, k, v, _ = inputs(4, 4, 2, 2, 4, 4)
  nothing = Mask(query_segments=SEGMENTS, key_segments=SEGMENTS + 1)
  gradient = jax.grad(
    lambda sinks: jnp.sum(
      attention(q, k, v, Scoring(nothing, sinks=sinks), backend='pallas_tpu')[0]
    )
  )(jnp.full(2, -jnp.inf))
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.slow
def test_memory_of_blocked_follows_the_mask(monkeypatch):
  monkeypatch.setattr(dispatch, 'BLOCK', 256)
  T, N, layers = 1024, 4, 3
  shapes = [jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32) for heads in (N, 2, 2)]

  def temporary_bytes(backend, mask):
    def loss(q, k, v):
      def layer(x, _):
        return (x + attention(x, k, v, Scoring(mask), backend=backend)[0], None)

      return jnp.sum(jax.lax.scan(layer, q, None, length=layers)[0] ** 2)

    return (
      jax.jit(jax.grad(loss, (0, 1, 2)))
      .lower(*shapes)
      .compile()
      .memory_analysis()
      .temp_size_in_bytes
    )

  scores = 4 * N * T * T
  reference, causal = temporary_bytes('reference', Mask()), temporary_bytes('blocked', Mask())
  assert reference > layers * scores, 'the oracle keeps the scores of every layer'
  assert causal < reference / 4 and causal < 2.5 * scores, (
    'blocks of one layer, half of which the mask skips'
  )
  assert temporary_bytes('blocked', Mask(window=64)) < 0.7 * causal
