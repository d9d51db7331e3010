"""Are log-probabilities, entropy and divergences those of the plain softmax, in little memory?"""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from model import logprobs as lp, vocabulary
from model.vocabulary import CHUNK, Law
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

BETA = 0.3
FUNCTIONS = ('logprobs', 'entropy', 'kl', 'jsd')
KL, JSD = jax.jit(lp.kl), jax.jit(lp.jsd, static_argnums=3)


def plain(law):
  """log p [B, T, V] by jax.nn.log_softmax of all the logits, in the widest dtype that there is."""
  x, head = (jnp.asarray(a, jnp.result_type(float)) for a in (law.hidden, law.head))
  logits = jnp.einsum('BTD,VD->BTV', x, head)
  if law.softcap:
    logits = law.softcap * jnp.tanh(logits / law.softcap)
  if law.temperature is not None:
    logits = logits / law.temperature[:, None, None]
  return jax.nn.log_softmax(logits[..., : law.vocabulary or None], -1)


def plain_value(name, p, q, targets, weights):
  log_p, log_q = plain(p), plain(q)
  if name == 'logprobs':
    value = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  elif name == 'entropy':
    value = -(jnp.exp(log_p) * log_p).sum(-1)
  elif name == 'kl':
    value = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
  else:
    log_m = jnp.log(BETA * jnp.exp(log_p) + (1 - BETA) * jnp.exp(log_q))
    value = BETA * (jnp.exp(log_p) * (log_p - log_m)).sum(-1)
    value += (1 - BETA) * (jnp.exp(log_q) * (log_q - log_m)).sum(-1)
  return jnp.where(weights != 0, value, 0)


def our_value(name, p, q, targets, weights, chunk=CHUNK):
  if name == 'logprobs':
    return lp.logprobs(p, targets, weights, chunk=chunk)
  if name == 'entropy':
    return lp.entropy(p, weights, chunk=chunk)
  if name == 'kl':
    return lp.kl(p, q, weights, chunk=chunk)
  return lp.jsd(p, q, weights, BETA, chunk=chunk)


def inputs(B=2, T=7, D=8, V=12, softcap=0.0, temperature=False, limit=0, dtype='float32', seed=0):
  """Two laws of different widths, targets, fractional weights, a direction for the results."""
  draw = np.random.default_rng(seed)
  warmth = np.linspace(0.5, 2, B) if temperature else None
  laws = (
    Law(
      *(jnp.asarray(draw.normal(size=shape), dtype) for shape in ((B, T, width), (V, width))),
      temperature=None if warmth is None else jnp.asarray(warmth, jnp.float32),
      softcap=softcap,
      vocabulary=limit,
    )
    for width in (D, 2 * D)
  )
  targets = jnp.asarray(draw.integers(0, limit or V, (B, T)), jnp.int32)
  weights = np.where(draw.random((B, T)) < 0.3, 0, draw.uniform(0.2, 2, (B, T)))
  direction = draw.normal(size=(B, T))
  return *laws, targets, *(jnp.asarray(a, jnp.float32) for a in (weights, direction))


def arrays(p, q):
  return (p.hidden, p.head), (q.hidden, q.head)


def with_gradients(value_of, names):
  """Jitted: ({name: values}, gradients of the values' weighted sum along the direction)."""

  def run(pairs, p, q, targets, weights, direction):
    laws = (dataclasses.replace(law, hidden=x, head=head) for law, (x, head) in zip((p, q), pairs))
    p, q = laws
    values = {name: value_of(name, p, q, targets, weights) for name in names}
    return sum((v * weights * direction).sum() for v in values.values()), values

  def both(p, q, *others):
    (_, values), gradients = jax.value_and_grad(run, has_aux=True)(arrays(p, q), p, q, *others)
    return values, gradients

  return jax.jit(both)


def oracle(names, given):
  """Values and gradients of `plain_value` in f64."""
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: jnp.asarray(np.asarray(x, np.float64)) if x.dtype != jnp.int32 else x, given
    )
    return jax.tree.map(np.asarray, with_gradients(plain_value, names)(*wide))


def agree(ours, expected, tolerance):
  values, gradients = ours
  for name, value in values.items():
    np.testing.assert_allclose(value, expected[0][name], atol=tolerance, rtol=tolerance)
  for ours, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), strict=True):
    ours = np.asarray(ours, np.float64)
    np.testing.assert_allclose(ours, wanted, atol=tolerance * max(np.abs(wanted).max(), 1e-9))


def chunked(chunk):
  return lambda *arguments: our_value(*arguments, chunk)


CASES = [  # 1, 2, 7 and 12 chunks of the 12 or 13 ids of 14 tokens
  (dict(), CHUNK),
  (dict(softcap=2.0, temperature=True), 14 * 6),
  (dict(V=13, temperature=True, limit=10), 14 * 2),
  (dict(softcap=3.0, limit=5), 14),
]


@pytest.mark.costly
@pytest.mark.parametrize('options, chunk', CASES, ids=str)
@pytest.mark.parametrize('name', FUNCTIONS)
def test_values_and_gradients_are_those_of_the_softmax(name, options, chunk):
  given = inputs(**options)
  rows = chunk if name in FUNCTIONS[:2] else 2 * chunk  # two laws share a chunk
  agree(with_gradients(chunked(rows), (name,))(*given), oracle((name,), given), 1e-5)


@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('float16', marks=pytest.mark.slow)])
def test_in_half_precision(dtype):
  given = inputs(softcap=2.0, temperature=True, dtype=dtype)
  values, gradients = with_gradients(chunked(14 * 6), FUNCTIONS)(*given)
  assert all(value.dtype == jnp.float32 for value in values.values())
  assert all(g.dtype == dtype for g in jax.tree.leaves(gradients))
  agree((values, gradients), oracle(FUNCTIONS, given), 2e-2)


@pytest.mark.parametrize('scale', [1e-7, 1e3])
def test_float16_holds_gradients_of_any_cotangent(scale):
  """Of which the slopes alone would be 0; the gradient by the head is still one of f16."""
  *given, direction = inputs(dtype='float16')
  (_, d_head), _ = with_gradients(chunked(14 * 6), ('logprobs',))(*given, direction)[1]
  scaled = with_gradients(chunked(14 * 6), ('logprobs',))(*given, direction * scale)[1][0][1]
  wanted = np.asarray(d_head, np.float64) * scale
  np.testing.assert_allclose(np.asarray(scaled, np.float64), wanted, rtol=2e-2, atol=6e-8)
  assert np.abs(np.asarray(scaled)).max() > 0


@pytest.mark.costly
@pytest.mark.parametrize('name', FUNCTIONS)
def test_gradients_are_slopes(name):
  p, q, targets, weights, direction = inputs(T=5, softcap=2.0, temperature=True)

  def run(x, head, other_x, other_head):
    laws = (
      dataclasses.replace(p, hidden=x, head=head),
      dataclasses.replace(q, hidden=other_x, head=other_head),
    )
    return (our_value(name, *laws, targets, weights, 80) * weights * direction).sum()

  jax.test_util.check_grads(
    jax.jit(run),
    (p.hidden, p.head, q.hidden, q.head),
    order=1,
    modes=['rev'],
    atol=1e-2,
    rtol=1e-2,
    eps=1e-2,
  )


MESHES = [
  {'tensor': 4, 'data': 2},
  {'fsdp': 8, 'data': 1},
  {'data': 8},
  {'data': 2, 'fsdp': 2, 'tensor': 2},
  {'fsdp': 2, 'context': 2, 'tensor': 2, 'data': 1},
]


def placed(law):
  return dataclasses.replace(
    law,
    hidden=jax.device_put(law.hidden, ax.spec('batch', 'length')),
    head=jax.device_put(law.head, ax.spec('vocab', 'embed')),
    temperature=jax.device_put(law.temperature, ax.spec('batch')),
  )


@functools.cache
def whole():
  """Inputs of which some devices have no id, and what the oracle says of them."""
  given = inputs(B=8, T=6, softcap=2.0, temperature=True, limit=5)
  return given, oracle(FUNCTIONS, given)


@pytest.mark.costly
@pytest.mark.parametrize(
  'sizes, kind',
  [
    *((MESHES[i], 'Explicit') for i in (0, 1, 4)),
    (MESHES[4], 'Auto'),
    *(pytest.param(MESHES[i], 'Explicit', marks=pytest.mark.slow) for i in (2, 3)),
  ],
  ids=str,
)
def test_split_over_devices(sizes, kind):
  given, expected = whole()
  mesh = make_mesh(MeshConfig(**sizes), axis_type=getattr(jax.sharding.AxisType, kind))
  with jax.set_mesh(mesh):
    p, q, *tokens = given
    p, q = map(placed, (p, q))
    tokens = [jax.device_put(a, ax.spec('batch', 'length')) for a in tokens]
    values, gradients = with_gradients(chunked(14 * 4), FUNCTIONS)(p, q, *tokens)
  agree((values, gradients), expected, 1e-5)
  for gradient, primal in zip(jax.tree.leaves(gradients), jax.tree.leaves(arrays(p, q))):
    assert gradient.sharding.is_equivalent_to(primal.sharding, primal.ndim)


@pytest.mark.costly
@pytest.mark.parametrize('options, chunk', CASES, ids=str)
def test_the_likeliest_ids_and_what_given_ones_get(options, chunk):
  """Ids, log-probabilities, and slopes by the law of a sum of those of given ids."""
  p, _, _, weights, direction = inputs(**options)
  log_p = np.where((weights != 0)[..., None], plain(p), 0)
  K = 4
  ids, logs = jax.jit(lambda p: lp.likeliest(p, weights, K, chunk=chunk))(p)
  counted = np.asarray(weights) != 0
  order = np.argsort(-log_p, -1)[..., :K]
  np.testing.assert_array_equal(np.asarray(ids)[counted], order[counted])
  picked = np.take_along_axis(log_p, order, -1)
  np.testing.assert_allclose(np.asarray(logs)[counted], picked[counted], atol=1e-5)

  slope = direction[..., None] * jnp.arange(1.0, K + 1)[None, None]

  def ours(p):
    return (lp.logprobs_of(p, ids, weights, chunk) * slope).sum()

  def theirs(p):
    at = jnp.take_along_axis(plain(p), ids, -1)
    return jnp.where(counted[..., None], at * slope, 0).sum()

  (a, ours), (b, theirs) = (
    jax.jit(jax.value_and_grad(f, allow_int=True))(p) for f in (ours, theirs)
  )
  np.testing.assert_allclose(a, b, rtol=1e-5)
  for name in ('hidden', 'head'):
    np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('sizes', [MESHES[0], pytest.param(MESHES[4], marks=pytest.mark.slow)])
def test_the_likeliest_ids_over_devices(sizes):
  p, _, _, weights, _ = inputs(B=8, T=6, softcap=2.0, temperature=True, limit=5)

  def run(p, weights):
    ids, logs = lp.likeliest(p, weights, 3)

    def total(p):
      return (lp.logprobs_of(p, ids, weights) * weights[..., None]).sum()

    return ids, logs, jax.grad(total)(p).head

  expected = jax.jit(run)(p, weights)
  with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
    p, weights = placed(p), jax.device_put(weights, ax.spec('batch', 'length'))
    ids, logs, slope = jax.jit(run)(p, weights)
  counted = np.asarray(weights) != 0
  np.testing.assert_array_equal(np.asarray(ids)[counted], np.asarray(expected[0])[counted])
  np.testing.assert_allclose(np.asarray(logs)[counted], np.asarray(expected[1])[counted], atol=1e-5)
  np.testing.assert_allclose(slope, expected[2], atol=1e-5)


def test_a_law_diverges_from_itself_by_nothing():
  p, q, _, weights, _ = inputs(softcap=2.0, temperature=True)
  assert (KL(p, p, weights) == 0).all()
  assert (KL(p, q, weights)[weights != 0] > 0).all()
  np.testing.assert_allclose(JSD(p, p, weights), 0, atol=1e-6)


@pytest.mark.parametrize('step', [1e-4, 1e-3, 1e-2])
def test_divergences_of_close_laws_are_not_negative(step):
  p, _, _, weights, _ = inputs(T=64)
  q = dataclasses.replace(p, head=p.head + step)
  for value in (KL(p, q, weights), KL(q, p, weights), JSD(p, q, weights)):
    assert (value >= 0).all() and value.max() < 1


def test_a_law_of_nan_diverges_by_nan():
  """Not by 0, which XLA of a CPU takes for the larger of both where it adds many up."""
  draw = np.random.default_rng(0)
  hidden, head = (draw.normal(size=shape).astype(np.float32) for shape in ((1, 8, 16), (1000, 16)))
  laws = Law(hidden, head), Law(np.where(np.arange(8)[:, None] == 0, np.nan, hidden), head)
  for p, q in (laws, laws[::-1]):
    apart = KL(*jax.tree.map(jnp.float32, (p, q)), jnp.ones((1, 8)))
    assert np.isnan(apart[0, 0]) and (apart[0, 1:] == 0).all()


def test_entropy_of_the_uniform_law_is_that_of_its_ids():
  p, _, _, weights, _ = inputs(V=13)
  for limit, ids in ((0, 13), (5, 5)):
    law = dataclasses.replace(p, head=0 * p.head, vocabulary=limit)
    entropy = lp.entropy(law, weights, chunk=14 * 2)
    np.testing.assert_allclose(entropy, np.where(weights != 0, np.log(ids), 0), rtol=1e-6)


def test_jsd_is_symmetric_at_a_half_and_becomes_kl_at_its_ends():
  p, q, _, weights, _ = inputs()
  np.testing.assert_allclose(JSD(p, q, weights), JSD(q, p, weights), rtol=1e-5, atol=1e-6)
  assert (JSD(p, q, weights) <= np.log(2)).all()
  q = dataclasses.replace(p, head=p.head + 0.2 * jnp.roll(p.head, 1, 0))  # its limits are near
  for beta, limit in ((1e-3, KL(p, q, weights)), (1 - 1e-3, KL(q, p, weights))):
    scaled = JSD(p, q, weights, beta) / min(beta, 1 - beta)
    np.testing.assert_allclose(scaled, limit, rtol=3e-2, atol=1e-3)


def test_temperature_is_that_of_each_row():
  p, _, targets, weights, _ = inputs(temperature=True)
  whole = lp.logprobs(p, targets, weights)
  for row, warmth in enumerate(p.temperature):
    alone = Law(p.hidden[row : row + 1] / warmth, p.head)
    expected = lp.logprobs(alone, targets[row : row + 1], weights[row : row + 1])
    np.testing.assert_allclose(whole[row : row + 1], expected, rtol=1e-5, atol=1e-6)


def test_an_id_that_the_law_has_not_is_impossible():
  p, _, targets, _, _ = inputs(limit=5)
  ones = jnp.ones(targets.shape)
  logprobs = lp.logprobs(p, targets.at[0, 0].set(5).at[0, 1].set(-1), ones)
  assert np.isneginf(logprobs[0, :2]).all() and np.isfinite(logprobs[1]).all()


@pytest.mark.parametrize('behind', [np.nan, np.inf])
def test_what_weighs_nothing_does_not_leak(behind):
  p, q, targets, weights, direction = inputs(softcap=2.0, temperature=True)
  weights = weights.at[1].set(0)
  spoilt = (
    dataclasses.replace(
      law,
      hidden=jnp.where(weights[..., None] != 0, law.hidden, behind),
      temperature=law.temperature.at[1].set(0),
    )
    for law in (p, q)
  )
  run = with_gradients(chunked(14 * 6), FUNCTIONS)
  direction = jnp.where(weights != 0, direction, 3)
  values, gradients = run(p, q, targets, weights, direction)
  for a, b in zip(
    jax.tree.leaves(run(*spoilt, targets, weights, direction)),
    jax.tree.leaves((values, gradients)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  for value in values.values():
    assert ((value == 0) == (weights == 0)).all()
  for d_x, _ in gradients:
    assert ((d_x == 0).all(-1) == (weights == 0)).all()


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_weight_of_nothing_hides_a_cotangent_that_is_not_a_number(dtype):
  p, _, targets, weights, direction = inputs(dtype=dtype)
  _, pull = jax.vjp(
    lambda x: lp.logprobs(dataclasses.replace(p, hidden=x), targets, weights), p.hidden
  )
  clean, spoilt = (pull(jnp.where(weights != 0, direction, value))[0] for value in (0, np.nan))
  np.testing.assert_array_equal(clean, spoilt)


def test_sums_of_segments():
  _, _, _, weights, values = inputs(B=3, T=9)
  segments = jnp.asarray([[1, 1, 2, 2, 2, 3, 0, 0, 0], [1] * 9, [0] * 9], jnp.int32)
  expected = np.zeros((3, 4))
  for row in range(3):
    for t in range(9):
      if segments[row, t]:
        expected[row, segments[row, t] - 1] += values[row, t] * weights[row, t]
  spoilt = jnp.where(weights != 0, values, jnp.nan)
  run = jax.jit(lp.segment_sums, static_argnums=3)
  np.testing.assert_allclose(run(spoilt, weights, segments, 4), expected, atol=1e-5)
  slopes = jax.grad(lambda v, w: (run(v, w, segments, 4) ** 2).sum() / 2, (0, 1))(spoilt, weights)
  at = np.concatenate([np.zeros((3, 1)), expected], 1)[np.arange(3)[:, None], segments]
  np.testing.assert_allclose(slopes[0], at * weights, atol=1e-5)
  np.testing.assert_allclose(slopes[1], at * np.where(weights != 0, values, 0), atol=1e-5)


def test_sums_of_segments_over_devices():
  _, _, _, weights, values = inputs(B=8, T=8)
  segments = jnp.asarray(np.random.default_rng(0).integers(0, 4, (8, 8)), jnp.int32)
  run = jax.jit(jax.value_and_grad(lambda v: (lp.segment_sums(v, weights, segments, 3) ** 2).sum()))
  expected = run(values)
  with jax.set_mesh(make_mesh(MeshConfig(data=2, context=2, tensor=2))):
    weights, values, segments = (
      jax.device_put(a, ax.spec('batch', 'length')) for a in (weights, values, segments)
    )
    actual = jax.jit(
      jax.value_and_grad(lambda v: (lp.segment_sums(v, weights, segments, 3) ** 2).sum())
    )(values)
  for a, b in zip(actual, expected):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_a_divergence_refuses():
  p, q, _, weights, _ = inputs()
  for beta in (0.0, 1.0, -0.1, 1.5):
    with pytest.raises(ValueError, match=f'beta={beta}.*between 0 and 1'):
      lp.jsd(p, q, weights, beta)
  for K in (0, 13):
    with pytest.raises(ValueError, match=f'likeliest {K} of 12 ids: give at least 1, and at most'):
      lp.likeliest(p, weights, K)
  with pytest.raises(ValueError, match='12 and 11 rows'):
    lp.kl(p, dataclasses.replace(q, head=q.head[:11]), weights)
  with pytest.raises(ValueError, match='vocabulary=0 and 9'):
    lp.kl(p, dataclasses.replace(q, vocabulary=9), weights)


# Memory and work, of compiled programs.

B, T, D, V, ROWS = 4, 1024, 32, 8192, 2**21


def compiled(name, trained=()):
  """The program of a function's value, or of its gradients by the laws that are trained."""

  def struct(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  laws = [(struct((B, T, D)), struct((V, D)))] * 2
  warmth, targets, weights = struct((B,)), struct((B, T), jnp.int32), struct((B, T))

  def run(p, q, warmth, targets, weights):
    laws = (Law(*pair, temperature=warmth, softcap=20.0) for pair in (p, q))
    return (our_value(name, *laws, targets, weights, ROWS) * weights).sum()

  run = jax.grad(run, trained) if trained else run
  return jax.jit(run).lower(*laws, warmth, targets, weights).compile()


@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize('gradients', [False, True])
def test_memory_is_that_of_a_few_chunks(name, gradients):
  logits, chunk = 4 * B * T * V, 4 * ROWS
  trained = () if not gradients else (0, 1) if name in FUNCTIONS[2:] else (0,)
  temporary = compiled(name, trained).memory_analysis().temp_size_in_bytes
  # Besides chunks: of each law hidden states, their gradient and the head's, in f32.
  others = 4 * (3 * B * T * D + 3 * V * D) * (2 if name in FUNCTIONS[2:] else 1)
  assert temporary < logits / 3 and temporary < 4 * chunk + others


def products(program):
  return len(re.findall(r' = \S+ (?:dot\(|custom-call\(.*matmul)', program.as_text()))


@pytest.mark.parametrize('name', FUNCTIONS[2:])
def test_a_frozen_law_costs_no_gradient(name):
  student, both = (products(compiled(name, trained)) for trained in ((1,), (0, 1)))
  # Of both: two passes and a third, two products of each for their gradients.
  assert student == both - 2


# Planted faults: the laws above must see them.


@contextlib.contextmanager
def fault(monkeypatch, module, name, wrong):
  with monkeypatch.context() as patch:
    patch.setattr(module, name, wrong)
    jax.clear_caches()
    yield
  jax.clear_caches()


def without_the_slope_of_the_cap(part, logits, d_logits):
  return d_logits if part.temperature is None else d_logits / part.temperature


FAULTS = {
  'temperature': (vocabulary, 'tempered', lambda part, logits: logits),
  'temperature of slopes': (vocabulary, 'uncapped', lambda part, logits, d_logits: d_logits),
  'softcap slope': (vocabulary, 'uncapped', without_the_slope_of_the_cap),
  'weight': (lp, '_where_scored', lambda weights, value: value),
  'other ids': (vocabulary, 'hits', lambda targets, ids: targets[..., None] - 1 == ids[None, None]),
}


@pytest.mark.parametrize('name', FAULTS)
@pytest.mark.slow
def test_planted_faults_are_seen(monkeypatch, name):
  given = inputs(softcap=2.0, temperature=True)
  expected = oracle(FUNCTIONS, given)
  agree(with_gradients(our_value, FUNCTIONS)(*given), expected, 1e-5)
  with fault(monkeypatch, *FAULTS[name]):
    wrong = with_gradients(our_value, FUNCTIONS)(*given)
    with pytest.raises(AssertionError):
      agree(wrong, expected, 1e-5)
