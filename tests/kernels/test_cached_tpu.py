"""Does the TPU's kernel for caches give what the loop over blocks gives, interpreted, and does it
compile for the chips?
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis import aot
from kernels import cached, cached_tpu
from kernels.cached import Held
from kernels.mask import Mask
from kernels.scoring import Scoring
from parallel.mesh import MeshConfig, make_mesh

B, K, G, H = 3, 2, 2, 16


def made(T, S, dtype='float32', window=0, ring=False, latent=0, lengths=(37, 8, 64), poison=True):
  """Arguments of `blocks`: queries, what is held (with NaN in slots that are not used), layer,
  head, lengths and positions.
  """
  rng = np.random.default_rng(S + T)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), 'float32')

  lengths = jnp.asarray(np.maximum(lengths, T), jnp.int32)
  q, keys, values = (
    draw(B, K, G * T, H),
    draw(2, B, K, S, H),
    None if latent else draw(2, B, K, S, H),
  )
  scales = (None, None)
  if dtype == 'int8':
    pairs = [(None, None) if x is None else cached.quantised(x) for x in (keys, values)]
    (keys, first), (values, second) = pairs
    scales = first, second
  held = Held(keys, values, *scales, ring=ring)
  if poison and dtype != 'int8':
    used = np.asarray(cached.positions(held, jnp.arange(S), lengths))
    used = (used >= 0) & (used < np.asarray(lengths)[:, None])

    def spoil(x):
      return x if x is None else jnp.where(used[None, :, None, :, None], x, np.nan)

    held = Held(spoil(keys), spoil(values), ring=ring)
  queries = lengths[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None]
  return q, held, 1, 0, lengths, queries


def compare(T, S, window, softcap, latent, **how):
  q, held, layer, first, lengths, queries = made(T, S, window=window, latent=latent, **how)
  scoring = Scoring(Mask(window=window), softcap=softcap, scale=0.3)
  how = dict(scoring=scoring, Hv=latent or H)
  expected = jax.jit(functools.partial(cached.blocks, **how))(
    q, held, (layer, first), lengths, queries
  )
  kernel = functools.partial(cached_tpu.blocks, T=T, interpret=True, **how)
  found = jax.jit(kernel)(q, held, (layer, first), lengths, queries[:, 0])

  def mean(top, total, mixed):
    return mixed / jnp.where(total > 0, total, 1)[..., None]

  np.testing.assert_allclose(mean(*found), mean(*expected), rtol=1e-5, atol=1e-5)

  def lse(top, total, mixed):
    return top + jnp.log(total)

  np.testing.assert_allclose(lse(*found), lse(*expected), rtol=1e-5, atol=1e-5)


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(cached, 'BLOCK', 16)
  monkeypatch.setattr(cached_tpu, 'BLOCK', 32)


@pytest.mark.costly
@pytest.mark.parametrize('T, window, softcap', itertools.product((1, 3), (0, 5, 40), (0.0, 2.0)))
def test_the_kernel_is_the_loop(small_blocks, T, window, softcap):
  compare(T, 80, window, softcap, 0)


@pytest.mark.costly
@pytest.mark.parametrize(
  'how',
  [
    dict(latent=9),
    dict(dtype='int8'),
    dict(dtype='int8', latent=9),
    dict(window=30, ring=True, S=48, lengths=(37, 8, 200)),
    dict(window=30, ring=True, S=48, lengths=(47, 48, 49), dtype='int8'),
    dict(S=8, lengths=(3, 8, 5)),
    dict(lengths=(1, 2, 80)),
  ],
  ids=str,
)
def test_what_is_held_and_how(small_blocks, how):
  compare(2, **dict(S=80, window=0, softcap=0.0, latent=0) | how)


@pytest.mark.costly
@pytest.mark.parametrize('rows', [[1], [2, 0]])
def test_some_rows_of_a_buffer_are_looked_at(small_blocks, rows):
  q, held, layer, first, lengths, queries = made(2, 80, dtype='int8')
  how = dict(scoring=Scoring(Mask(), scale=0.3), Hv=H, T=2, interpret=True)
  starts, some = queries[:, 0], jnp.array(rows)
  expected = cached_tpu.blocks(q, held, (layer, first), lengths, starts, **how)
  found = cached_tpu.blocks(
    q[some], held, (layer, first), lengths[some], starts[some], named=some.astype(jnp.int32), **how
  )
  for part, whole in zip(found, expected):
    np.testing.assert_array_equal(part, whole[some])


@pytest.mark.slow
@pytest.mark.parametrize('how', [{}, dict(dtype='int8'), dict(latent=9)], ids=str)
def test_pages_are_the_slots_that_they_hold(how):
  """In any order, those of several rows between one another; others are NaN."""
  S, page = 80, 16
  q, held, layer, first, lengths, queries = made(2, S, **how)
  n = S // page
  table = np.random.default_rng(0).permutation(B * n + 3)[: B * n].reshape(B, n)

  def paged(x):
    if x is None:
      return None
    parts = x.reshape(*x.shape[:3], n, page, *x.shape[4:]).swapaxes(2, 3)
    parts = parts.reshape(x.shape[0], B * n, K, page, *x.shape[4:])
    none = np.nan if jnp.issubdtype(x.dtype, jnp.floating) else 99
    pages = jnp.full((x.shape[0], B * n + 3, *parts.shape[2:]), none, x.dtype)
    return pages.at[:, table.reshape(-1)].set(parts)

  arrays = map(paged, (held.keys, held.values, held.key_scales, held.value_scales))
  pages, table = Held(*arrays, paged=True), jnp.asarray(table, jnp.int32)
  how = dict(scoring=Scoring(Mask(), scale=0.3), Hv=how.get('latent') or H)
  run = jax.jit(functools.partial(cached.blocks, **how))
  expected = run(q, held, (layer, first), lengths, queries)
  found = run(q, pages, (layer, first), lengths, queries, named=table)
  jax.tree.map(np.testing.assert_array_equal, found, expected)

  how |= dict(T=2, interpret=True)
  kernel = cached_tpu.blocks(q, pages, (layer, first), lengths, queries[:, 0], named=table, **how)
  total = [mixed / total[..., None] for _, total, mixed in (kernel, expected)]
  np.testing.assert_allclose(*total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('fault', ['a row of slots too few', 'no rescaling'])
def test_planted_faults_break_it(small_blocks, fault, monkeypatch):
  if fault == 'no rescaling':
    monkeypatch.setattr(
      cached_tpu.jnp, 'exp', lambda x: jnp.ones_like(x) if x.shape[-1] == 1 else jax.lax.exp(x)
    )
  else:
    bounds = cached_tpu._bounds

    def short(*arguments):
      return lambda *given: (
        bounds(*arguments)(*given)[0],
        jnp.maximum(bounds(*arguments)(*given)[1] - 1, 0),
      )

    monkeypatch.setattr(cached_tpu, '_bounds', short)
  with pytest.raises(AssertionError):
    compare(1, 80, 0, 0.0, 0, lengths=(80, 70, 64))


CASES = {
  'llama': dict(H=128, M=4, S=8192),
  'rows of many': dict(H=128, M=512, S=2048),
  'narrow': dict(H=64, M=8, S=1024),
  'latent': dict(H=576, M=128, S=4096, Hv=512),
  'bytes': dict(H=128, M=4, S=4096, dtype='int8'),
  'ring': dict(H=256, M=2, S=1280, window=1024, ring=True),
  'some rows': dict(H=128, M=512, S=2048, of=32),
  'pages': dict(H=128, M=4, S=128, pages=64),
  'pages of bytes': dict(H=64, M=4, S=128, dtype='int8', pages=64),
  'pages of a latent': dict(H=576, M=128, S=256, Hv=512, pages=16),
}


@pytest.mark.costly
@pytest.mark.parametrize(
  'chip',
  [
    'v5e:1x1',
    pytest.param('v5p:1x1x1', marks=pytest.mark.slow),
    pytest.param('v6e:1x1', marks=pytest.mark.slow),
    pytest.param('tpu7x:1x1x1', marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize(
  'case',
  [pytest.param(case, marks=[pytest.mark.slow] * case.startswith('pages')) for case in CASES],
)
def test_it_compiles(chip, case):
  how = dict(dtype='bfloat16', Hv=0, window=0, ring=False, of=0, pages=0) | CASES[case]
  device = aot.topology(chip)[0]

  def shape(shape, dtype='bfloat16'):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

  S, H, M, B = how['S'], how['H'], how['M'], 8
  vector, number = (
    shape((1, how['of'] or how['pages'] * B or B, 1, S, H), how['dtype']),
    shape((1, how['pages'] * B or B, 1, S), 'float32') if how['dtype'] == 'int8' else None,
  )
  held = Held(
    vector, None if how['Hv'] else vector, number, number, how['ring'], bool(how['pages'])
  )
  run = functools.partial(
    cached_tpu.blocks,
    scoring=Scoring(Mask(window=how['window']), scale=0.1),
    T=1,
    Hv=how['Hv'] or H,
  )
  with jax.set_mesh(make_mesh(MeshConfig(), [device])):
    numbers = shape((B,), 'int32')
    given = shape((B, 1, M, H)), held, (0, 0), numbers, numbers
    named = numbers if how['of'] else None
    if how['pages']:
      named = shape((B, how['pages']), 'int32')
    text = jax.jit(run).lower(*given, named=named).compile().as_text()
  assert 'tpu_custom_call' in text
