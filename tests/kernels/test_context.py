"""Do devices that share a row attend as one does?
Values, gradients, balance and collectives of every strategy.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention as dispatch, context, ring
from kernels.attention import attention
from kernels.mask import Mask, Relative, zigzag
from kernels.scoring import Scoring
from kernels.strategies import STRATEGIES
from model import transformer
from model.config import ModelConfig
from model.execution import ExecutionConfig
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

B, T, N, K, H = 2, 32, 4, 2, 4
PREFIX = np.array([20, 3], np.int32)
HEADS = ('batch', 'length', 'heads', None)


def inputs(kv_heads=K, value_width=H, dtype=np.float32):
  """By name; the last two are what outputs and log-sum-exps are multiplied with."""

  def draw(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(dtype)

  return {
    'q': draw(B, T, N, H),
    'k': draw(B, T, kv_heads, H),
    'v': draw(B, T, kv_heads, value_width),
    'sinks': draw(N),
    'table': draw(8, N),
    'out': draw(B, T, N, value_width),
    'lse': draw(B, T, N),
  }


AXES = {
  'q': HEADS,
  'k': HEADS,
  'v': HEADS,
  'sinks': ('heads',),
  'table': (None, 'heads'),
  'out': HEADS,
  'lse': HEADS[:3],
}


def tokens(name, order, high):
  """[B, T] small numbers for segments (in runs) or positions, in the order of the tokens."""
  ids = np.random.default_rng(len(name)).integers(0, high, (B, T)).astype(np.int32)
  return (np.sort(ids, 1) if name == 'segments' else ids)[:, order]


def run(
  arrays,
  order,
  parts,
  *,
  strategy='ring',
  softcap=0.0,
  sinks=False,
  relative=False,
  backend='auto',
  segments=False,
  positions=False,
  **mask,
):
  """(out, log-sum-exp, gradients by name) of a projection of both; rows stand in `order`, as
  zigzag(T, parts) is. positions: that are drawn, so many times.
  """

  def rows(name, high):
    return jnp.asarray(tokens(name, order, high))

  mask = dict(mask)
  if segments:
    mask |= {'query_segments': rows('segments', 3), 'key_segments': rows('segments', 3)}
  if positions:
    places = {'query_positions': rows('queries', T), 'key_positions': rows('keys!', T)}
    mask |= {name: int(positions) * x for name, x in places.items()}
  if 'prefix' in mask:
    mask['prefix'] = jnp.asarray(mask['prefix'])
  mask = Mask(zigzag=parts, **mask)

  def loss(x):
    bias = (
      Relative(table=x['table'], bidirectional=not mask.causal, max_distance=12)
      if relative
      else None
    )
    out, lse = attention(
      x['q'],
      x['k'],
      x['v'],
      Scoring(
        mask,
        softcap=softcap,
        sinks=x['sinks'] if sinks else None,
        relative=bias,
        scale=0.7,
      ),
      backend=backend,
      context=strategy,
    )
    # A query that sees nothing has a log-sum-exp of -inf, without a gradient.
    finite = jnp.where(jnp.isfinite(lse), lse, 0)
    return jnp.sum(out * x['out']) + jnp.sum(jnp.sin(finite) * x['lse']), (out, lse)

  (_, (out, lse)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
  return {'out': out, 'lse': lse} | {
    f'd_{name}': gradients[name] for name in ('q', 'k', 'v', 'sinks', 'table')
  }


def check(
  strategy,
  sizes,
  in_order=False,
  kv_heads=K,
  value_width=H,
  backend='auto',
  dtype=np.float64,
  sinkless=(),
  **features,
):
  """The strategy on a mesh of these sizes against the reference on one device,
  in f64: what differs then is no rounding.
  """
  arrays, tolerance = inputs(kv_heads, value_width, dtype), 1e-5 if dtype == np.float32 else 1e-11
  arrays['sinks'][list(sinkless)] = -np.inf
  expected = run(arrays, np.arange(T), 1, backend='reference', **features)
  with jax.set_mesh(
    make_mesh(MeshConfig(**{'data': 1} | sizes), jax.devices()[: np.prod(list(sizes.values()))])
  ):
    parts = 1 if in_order else context.groups(strategy, N, kv_heads)
    order = zigzag(T, parts)
    placed = {
      name: jax.device_put(x[:, order] if AXES[name][0] == 'batch' else x, ax.spec(*AXES[name]))
      for name, x in arrays.items()
    }
    found = run(placed, order, parts, strategy=strategy, backend=backend, **features)
  for name, wanted in expected.items():
    a = np.asarray(found[name])
    a = a[:, np.argsort(order)] if a.ndim > 2 else a
    wanted = np.asarray(wanted)
    largest = np.abs(wanted[np.isfinite(wanted)]).max()
    np.testing.assert_allclose(a, wanted, rtol=tolerance, atol=tolerance * largest, err_msg=name)


ALL = {'segments': True, 'softcap': 2.0, 'sinks': True, 'value_width': 6}


def slow(*case):
  return pytest.param(*case, marks=pytest.mark.slow)


CASES = [
  ('ring', {'context': 4}, ALL),
  # Looks into two chunks before its own
  ('ring', {'context': 4}, {'window': 5, 'segments': True, 'sinks': True}),
  ('ring', {'context': 2, 'tensor': 2}, {'window': 14, 'softcap': 2.0}),
  (
    'ring',
    {'data': 2, 'context': 4},
    {'causal': False, 'segments': True, 'sinks': True, 'value_width': 2},
  ),
  ('ring', {'context': 4}, {'in_order': True, 'window': 10}),
  ('ring', {'context': 4}, {'causal': False, 'window': 5, 'segments': True}),
  ('ring', {'context': 2}, {'relative': True, 'segments': True}),
  (
    'ring',
    {'context': 2},
    {'positions': True, 'prefix': PREFIX, 'window': 7, 'backend': 'reference'},
  ),
  ('gather', {'context': 4}, ALL),
  slow('gather', {'context': 2, 'tensor': 2}, {'window': 5, 'relative': True}),
  ('gather', {'context': 4}, {'in_order': True, 'prefix': PREFIX, 'segments': True}),
  ('ulysses', {'context': 4}, ALL | {'relative': True}),
  ('ulysses_ring', {'context': 8}, ALL),
  slow('ulysses_ring', {'context': 4, 'tensor': 2}, {'window': 5, 'kv_heads': 4, 'sinks': True}),
]


@pytest.mark.costly
@pytest.mark.parametrize('strategy, sizes, features', CASES, ids=str)
def test_devices_that_share_a_row_are_one(strategy, sizes, features):
  with jax.enable_x64(True):
    check(strategy, sizes, **features)


def test_a_window_as_long_as_the_row_is_one_where_positions_are_further_apart():
  with jax.enable_x64(True):
    check('ring', {'context': 2}, positions=5, window=T)


def test_queries_that_see_no_key_of_heads_with_a_sink_and_without():
  with jax.enable_x64(True):
    check('ring', {'context': 2}, positions=True, window=2, sinks=True, sinkless=[1, 2])


@pytest.mark.parametrize('strategy', ['ring', slow('gather')])
def test_float32_loses_no_more_than_a_rounding(strategy):
  check(strategy, {'context': 4}, dtype=np.float32, segments=True, sinks=True)


MASKS = [
  {},
  {'causal': False},
  {'causal': False, 'window': 6},
  {'window': 2},
  {'window': 6},
  {'window': 27},
  {'window': 40},
]


@pytest.mark.slow
@pytest.mark.parametrize(
  'strategy, mask, index',
  [(*case, i) for i, case in enumerate(itertools.product(STRATEGIES, MASKS))],
  ids=str,
)
def test_every_strategy_honours_every_feature(strategy, mask, index):
  """Every mask, in order or not, positions as data or not; the other features take turns."""

  def bit(n):
    return bool((index * 11 + index // 7) >> n & 1)

  sizes = {'context': 8 if index % 2 and strategy != 'ulysses' else 4}
  for in_order, relative, positions in (
    (False, False, False),
    (True, bit(0), bit(1)),
    (False, True, False),
  ):
    with jax.enable_x64(True):
      check(
        strategy,
        sizes,
        in_order=in_order,
        relative=relative,
        positions=positions,
        segments=bit(2),
        softcap=2.0 * bit(3),
        sinks=bit(4),
        value_width=6 if bit(1) else H,
        kv_heads=4 if bit(3) else 2,
        **mask,
      )


@pytest.mark.parametrize('R', [2, 3, 8])
def test_zigzag_work_is_the_same_on_all_devices(R):
  """All pairs of chunks that causality lets see each other, each computed once,
  and 2R + 1 of them by each device.
  """
  computed = []
  for mine in range(R):
    late = 2 * R - 1 - mine
    own = [(mine, mine), (late, mine), (late, late)]  # the device's own tokens, in order
    for other in set(range(R)) - {mine}:
      hop = ring._pairs(mine, other)

      def chunks(i):
        return jnp.array([[i, 2 * R - 1 - i]])

      own += zip(
        hop.queries(chunks(mine)).ravel().tolist(), hop.keys(chunks(other)).ravel().tolist()
      )
    assert len(own) == 2 * R + 1
    computed += own
  assert sorted(computed) == [(a, b) for a in range(2 * R) for b in range(a + 1)]


def test_laying_out_is_the_order_of_the_mask():
  batch = {'a': jnp.arange(2 * 24).reshape(2, 24)}
  with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
    found = jax.jit(lambda x: context.lay_out(x, 4))(
      jax.tree.map(lambda x: jax.device_put(x, ax.spec('batch', 'length')), batch)
    )
    assert found['a'].sharding.spec == ax.spec('batch', 'length')
  np.testing.assert_array_equal(found['a'], np.asarray(batch['a'])[:, zigzag(24, 4)])
  assert context.lay_out(batch, 1) is batch
  with pytest.raises(
    ValueError, match='24 tokens do not split into 10 chunks, two for each of 5 parts'
  ):
    context.lay_out(batch, 5)


def compiled(strategy, P, T=T, gradient=False, **mask):
  shapes = [
    jax.ShapeDtypeStruct((B, T, heads, H), jnp.float32, sharding=ax.out(*HEADS))
    for heads in (N, K, K)
  ]
  parts = context.groups(strategy, N, K)

  def function(q, k, v):
    return attention(q, k, v, Scoring(Mask(zigzag=parts, **mask)), context=strategy)[0]

  run = jax.grad(lambda *x: jnp.sum(function(*x) ** 2), (0, 1, 2)) if gradient else function
  return jax.jit(run).lower(*shapes).compile()


KINDS = {
  'ring': {'collective-permute'},
  'gather': {'all-gather'},
  'ulysses': {'all-to-all'},
  'ulysses_ring': {'all-to-all', 'collective-permute'},
}


@pytest.mark.parametrize('strategy', KINDS)
def test_collectives_are_those_of_the_strategy(strategy):
  with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])):
    text = compiled(strategy, 4).as_text()
    kinds = 'all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all'
    assert set(re.findall(rf' ({kinds})(?:-start)?\(', text)) == KINDS[strategy]
    assert 'conditional(' not in text, 'who sees whom in zig-zag order is known when it is compiled'
    # Of keys and values: early to early, late to late, early to late; nothing else moves
    if strategy == 'ring':
      assert (
        len(
          re.findall(r' collective-permute(?:-start)?\(', compiled(strategy, 4, window=4).as_text())
        )
        == 6
      )


@pytest.mark.parametrize('names, transfers', [((), 18), (('attention',), 14)], ids=str)
def test_remat_goes_around_the_ring_again_only_where_nothing_is_kept(names, transfers):
  """4 transfers are written down for a forward pass (2 of them in a loop),
  10 for a backward pass.
  """
  policy = jax.checkpoint_policies.save_only_these_names(*names)
  run = jax.checkpoint(
    lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, Scoring(Mask(zigzag=4)))[0])), policy=policy
  )
  with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])):
    shapes = [
      jax.ShapeDtypeStruct((B, T, heads, H), jnp.float32, sharding=ax.out(*HEADS))
      for heads in (N, K, K)
    ]
    assert str(jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(*shapes)).count('ppermute[') == transfers


def test_memory_is_that_of_a_part(monkeypatch):
  monkeypatch.setattr(dispatch, 'BLOCK', 64)

  def temporary_bytes(P):
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=P), jax.devices()[:P])):
      return compiled('ring', P, T=512, gradient=True).memory_analysis().temp_size_in_bytes

  assert temporary_bytes(8) < temporary_bytes(1) / 3


def test_what_does_not_split_is_refused():
  x = {name: jnp.asarray(a) for name, a in inputs().items()}
  with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
    placed = [jax.device_put(x[name], ax.spec(*HEADS)) for name in 'qkv']
    with pytest.raises(ValueError, match='30 queries do not split over mesh.context=4'):
      attention(x['q'][:, :30], x['k'], x['v'], Scoring(Mask(causal=False)))
    with pytest.raises(
      ValueError,
      match="model.execution.context='ulysses' splits heads: 2 .* is not a multiple of "
      "mesh.context=4.*'ulysses_ring'",
    ):
      attention(x['q'][:, :, :2], x['k'], x['v'], Scoring(), context='ulysses')
    with pytest.raises(
      ValueError, match="'ulysses_ring': 1 key heads .* no common divisor.*use 'ring'"
    ):
      attention(x['q'], x['k'][:, :, :1], x['v'][:, :, :1], Scoring(), context='ulysses_ring')
    with pytest.raises(
      NotImplementedError,
      match="'xla' gives no log-sum-exp at no extra cost.*"
      r"\['reference', 'blocked', 'pallas_tpu', 'pallas_gpu'\].*'gather'",
    ):
      attention(*placed, Scoring(), backend='xla')
    with pytest.raises(
      NotImplementedError, match="'blocked' does not honour .*'prefix'.*'reference'"
    ):
      attention(*placed, Scoring(Mask(prefix=jnp.asarray(PREFIX))), backend='blocked')
    with pytest.raises(
      NotImplementedError, match='an encoder-decoder does not split its rows: mesh.context=4'
    ):
      jax.eval_shape(lambda: transformer.init(ModelConfig(vocabulary=8, encoder_layers=1), 0))
  with jax.set_mesh(make_mesh(MeshConfig(data=1, context=2, tensor=4))):
    with pytest.raises(
      ValueError, match='2 key heads do not split over mesh.tensor=4; repeat them first'
    ):
      attention(x['q'], x['k'], x['v'], Scoring())
  with pytest.raises(
    ValueError, match="model.execution.context='rign' is unknown; did you mean 'ring'"
  ):
    ModelConfig(execution=ExecutionConfig(context='rign'))


def test_a_query_that_sees_nothing_has_no_part_in_anything():
  x = {name: jnp.asarray(a) for name, a in inputs().items()}
  segments = jnp.zeros((B, T), jnp.int32).at[:, 5].set(7)
  mask = Mask(zigzag=4, query_segments=segments, key_segments=jnp.zeros_like(segments))
  with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])):

    def rows(name):
      return jax.device_put(x[name], ax.spec(*HEADS))

    def loss(q, k, v):
      out, lse = attention(q, k, v, Scoring(mask))
      return jnp.sum(out**2), (out, lse)

    (_, (out, lse)), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
      rows('q'), rows('k'), rows('v')
    )
  lse = np.asarray(lse)
  assert np.isneginf(lse[:, 5]).all() and np.isfinite(np.delete(lse, 5, 1)).all()
  assert (
    not np.asarray(out)[:, 5].any()
    and all(np.isfinite(g).all() for g in gradients)
    and not np.asarray(gradients[0])[:, 5].any()
  )


def test_scores_far_below_zero_stay_finite_where_a_window_reaches_before_the_row():
  """Keys that are not there would otherwise outweigh, as zeros,
  a log-sum-exp of -400 by more than f32 holds.
  """
  with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])):
    q, k, v = (
      jax.device_put(jnp.full((B, T, heads, H), value), ax.spec(*HEADS))
      for heads, value in ((N, 10.0), (K, -20.0), (K, 1.0))
    )

    def run(q, k, v):
      return jnp.sum(attention(q, k, v, Scoring(Mask(window=5, zigzag=4)))[0] ** 2)

    value, gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2)))(q, k, v)
  np.testing.assert_allclose(value, B * T * N * H, rtol=1e-6)
  assert all(np.isfinite(g).all() for g in gradients)
