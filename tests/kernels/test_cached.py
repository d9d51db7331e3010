"""Does attention to a cache give what the oracle gives of the tokens that are held, whatever lies
in the other slots?
"""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import cached, reference
from kernels.cached import Held
from kernels.mask import Mask, Relative
from kernels.scoring import Scoring
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

B, N, H, LAYERS, LAYER, WINDOW, BLOCK = 4, 8, 6, 2, 1, 7, 8
TOLERANCE = {
  'float32': 1e-5,
  'int8': 1e-5,
  'bfloat16': 2e-2,
}  # of bfloat16: 8 bits of weights and of values


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(cached, 'BLOCK', BLOCK)


def draw(*shape):
  return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def in_slots(x, lengths, slots, ring, unused):
  """[LAYERS, B, K, S, ...] of the tokens [B, P, K, ...]: in one layer, where they belong; `unused`
  everywhere else.
  """
  buffer = np.full((LAYERS, B, x.shape[2], slots, *x.shape[3:]), unused, x.dtype)
  for row, length in enumerate(lengths):
    for position in range(length):
      buffer[LAYER, row, :, position % slots if ring else position] = x[row, position]
  return jnp.asarray(buffer)


def case(slots=8, T=1, K=2, ring=False, dtype='float32', value_width=0, unused=np.nan):
  """(what is held, lengths, queries, and the same keys and values [B, P, K, ...] in order, in f32
  as they were rounded).
  """
  most = 3 * slots + 5 if ring else slots - (T > 1)
  counts = np.minimum([T, max(T - 1, 1), 1, T], T)
  lengths = np.maximum([most, BLOCK + 1 if slots > BLOCK else 5, 1, most - 3], counts).astype(
    np.int32
  )  # full, ragged, a single token
  queries = (lengths - counts)[:, None] + np.arange(T, dtype=np.int32)[None]
  keys = draw(B, most, K, H)
  values = keys[..., :value_width] if value_width else draw(B, most, K, H + 2)
  to_hold = [keys, None if value_width else values]
  if dtype == 'int8':
    pairs = [
      (None, None) if x is None else map(np.asarray, jax.jit(cached.quantised)(x)) for x in to_hold
    ]
    (to_hold, scales) = zip(*pairs)
    keys, values = (
      None if x is None else x * scale[..., None] for x, scale in zip(to_hold, scales)
    )
    garbage = [127, 127]
  else:
    to_hold, scales = (
      [None if x is None else np.asarray(jnp.asarray(x, dtype)) for x in to_hold],
      (None, None),
    )
    keys, values = (None if x is None else x.astype(np.float32) for x in to_hold)
    garbage = [unused, unused]
  values = keys[..., :value_width] if value_width else values
  arrays = [
    None if x is None else in_slots(x, lengths, slots, ring, fill)
    for x, fill in zip((*to_hold, *scales), (*garbage, unused, unused))
  ]
  return Held(*arrays, ring=ring), lengths, queries, keys, values


def features(softcap=0.0, sinks=False, relative=False):
  table = Relative(table=jnp.asarray(draw(6, N)), bidirectional=False, max_distance=20)
  return {
    'softcap': softcap,
    'sinks': jnp.asarray(draw(N)) if sinks else None,
    'relative': table if relative else None,
    'scale': 0.7,
  }


def on_mesh(sizes, q, lengths, queries, sinks, relative, window, value_width, **how):
  """What is held -> attention to it, on a mesh of these sizes."""
  mesh = make_mesh(MeshConfig(**{'data': 1} | sizes), jax.devices()[: math.prod(sizes.values())])

  def place(x, *axes):
    return jax.device_put(x, ax.spec(*axes))

  attend = jax.jit(
    lambda held, layer, *arrays, **more: cached.attention(
      arrays[0],
      held,
      layer,
      *arrays[1:],
      Scoring(Mask(window=window), **how, **more),
      value_width=value_width,
    )
  )

  def run(held):
    with jax.set_mesh(mesh):
      held = jax.tree.map(lambda x, axes: place(x, *axes), held, held.axes())
      parts = 1 if held.ring else sizes.get('context', 1)
      assert all(
        x.addressable_shards[0].data.shape[3] * parts == x.shape[3] for x in jax.tree.leaves(held)
      )
      more = {
        'sinks': None if sinks is None else place(sinks, 'heads'),
        'relative': relative
        and dataclasses.replace(relative, table=place(relative.table, None, 'heads')),
      }
      arrays = (
        place(q, 'batch', None, 'heads', None),
        place(lengths, 'batch'),
        place(queries, 'batch', None),
      )
      return np.asarray(attend(held, jnp.int32(LAYER), *arrays, **more), np.float32)

  return run


def check(sizes={}, window=0, softcap=0.0, sinks=False, relative=False, **kind):
  """Against the oracle; and that other numbers in unused slots change nothing, bitwise."""
  held, lengths, queries, keys, values = case(**kind)
  how, value_width, dtype = (
    features(softcap, sinks, relative),
    kind.get('value_width', 0),
    kind.get('dtype', 'float32'),
  )
  q = draw(B, queries.shape[1], N, H)
  q = q if dtype == 'int8' else np.asarray(jnp.asarray(q, dtype))
  attend = on_mesh(sizes, q, lengths, queries, window=window, value_width=value_width, **how)
  found = attend(held)
  np.testing.assert_array_equal(attend(case(**kind, unused=0.0)[0]), found)
  index = jnp.broadcast_to(jnp.arange(keys.shape[1], dtype=jnp.int32)[None], keys.shape[:2])
  mask = Mask(window=window, query_positions=jnp.asarray(queries), key_positions=index)
  expected = jax.jit(lambda *x: reference.attention(*x)[0])(
    q.astype(np.float32), keys, values, Scoring(mask, **how)
  )
  own = queries < lengths[:, None]
  np.testing.assert_allclose(
    found[own], np.asarray(expected)[own], rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max()
  )


PLACES = {'slots': {}, 'window': {'window': WINDOW}, 'ring': {'window': WINDOW, 'ring': True}}
ONE, SEVERAL = BLOCK, 5 * BLOCK


@pytest.mark.costly
@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('slots', [ONE, SEVERAL])
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_what_is_held_is_attended_to_as_the_oracle_does(place, slots, dtype):
  """The other features take turns."""
  turn = list(PLACES).index(place) * 6 + (slots > ONE) * 3 + list(TOLERANCE).index(dtype)
  latent = turn % 4 == 0
  check(
    slots=slots,
    T=1 + turn % 2,
    dtype=dtype,
    K=1 if latent else (2, N)[turn % 3 > 0],
    value_width=4 if latent else 0,
    softcap=1.5 * (turn // 2 % 2),
    sinks=turn % 5 < 2,
    relative=turn % 3 == 1,
    **PLACES[place],
  )


def test_more_tokens_than_a_block():
  check(slots=SEVERAL, T=13, relative=True)
  check(slots=SEVERAL, T=13, window=WINDOW, sinks=True)


def check_rows(window=0, **kind):
  """Some rows of the buffers, in another order: what all of them give, but for rounding, as another
  number of rows is another program.
  """
  held, lengths, queries, *_ = case(**kind)
  q = jnp.asarray(draw(B, queries.shape[1], N, H), held.keys.dtype)
  scoring = Scoring(Mask(window=window), scale=0.7)

  @jax.jit
  def attend(q, lengths, queries, rows=None):
    return cached.attention(q, held, LAYER, lengths, queries, scoring, rows=rows)

  expected = np.asarray(attend(q, lengths, queries), np.float32)
  for rows in ([2], [3, 0, 1], [1, B]):  # the last of which is none
    some = np.minimum(rows, B - 1)
    found = attend(q[some], lengths[some], queries[some], jnp.array(rows, jnp.int32))
    for row, mixed in zip(rows, np.asarray(found, np.float32)):
      if row < B:
        np.testing.assert_allclose(mixed, expected[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize('kind', [dict(slots=SEVERAL, T=2), dict(window=WINDOW, ring=True)])
def test_some_rows_of_a_buffer_are_looked_at(kind):
  check_rows(**kind)


@pytest.mark.parametrize('slots', [5, 20, 40])
def test_steps_of_a_cpu_are_of_fewer_slots_where_rows_are_many(slots, monkeypatch):
  """Whatever they are; of pages as of slots that lie side by side, bit for bit."""
  monkeypatch.setattr(cached, 'BLOCK', 512)
  monkeypatch.setattr(cached, 'NEAR', slots * B * 2 * H)
  monkeypatch.setattr(cached, 'FEWEST', 1)
  check(slots=SEVERAL, T=2)
  check(slots=SEVERAL, T=3, window=WINDOW, dtype='int8')

  held, lengths, queries, *_ = case(slots=SEVERAL, T=2)
  q, lengths, queries = jnp.asarray(draw(B, 2, N, H)), *map(jnp.int32, (lengths, queries))
  table, size = jnp.int32(np.random.default_rng(0).permutation(2 * B).reshape(B, 2)), SEVERAL // 2

  def paged(x):
    pages = x.reshape(LAYERS, B, 2, 2, size, -1).swapaxes(2, 3).reshape(LAYERS, 2 * B, 2, size, -1)
    return jnp.zeros_like(pages).at[:, table.reshape(-1)].set(pages)

  pages = Held(paged(held.keys), paged(held.values), paged=True)

  @jax.jit
  def attend(held, table=None):
    scoring = Scoring(Mask(), scale=0.7)
    return cached.attention(q, held, LAYER, lengths, queries, scoring, table=table)

  np.testing.assert_array_equal(attend(held), attend(pages, table))
  programs = [attend.lower(*each).compile().as_text() for each in ((held,), (pages, table))]
  steps = SEVERAL // slots
  loop = f'/{cached.FILLED}{steps}/while' if steps > 1 else 'jit(attend)/'
  assert all(loop in program and ('/while' in program) == (steps > 1) for program in programs)


MESHES = [
  ({'data': 4}, {'ring': True, 'window': WINDOW}),
  ({'tensor': 8}, {'K': 2, 'sinks': True, 'relative': True}),  # four devices share a key head
  ({'tensor': 4}, {'K': 1, 'value_width': 4}),
  ({'tensor': 2, 'data': 2}, {'K': 2, 'sinks': True, 'dtype': 'int8'}),
  ({'context': 2}, {'T': 3, 'relative': True, 'sinks': True}),
  ({'context': 4, 'data': 2}, {'slots': 64, 'window': WINDOW, 'softcap': 2.0, 'T': 2}),
  ({'context': 2, 'tensor': 4}, {'slots': 64, 'K': 2, 'dtype': 'int8'}),
  ({'context': 2}, {'ring': True, 'window': WINDOW}),  # whole on every device
]


@pytest.mark.costly
@pytest.mark.parametrize('sizes, kind', MESHES, ids=str)
def test_devices_that_share_a_cache_are_one(sizes, kind):
  check(sizes, **{'slots': 4 * BLOCK} | kind)


CONTEXT = dict(sizes={'context': 4}, slots=64)
FAULTS = {
  'ring off by one': (
    'positions',
    'lengths[:, None] - 1',
    'lengths[:, None]',
    dict(ring=True, window=WINDOW, T=2),
  ),
  'ring never turns': ('positions', 'not held.ring', 'True', dict(ring=True, window=WINDOW)),
  'mask dropped': (
    '_scores',
    'used & (where <= queries[..., None])',
    'used & (where <= queries[..., None] + 9)',
    dict(T=2),
  ),
  'window off by one': ('_scores', '< window)', '<= window)', dict(window=WINDOW, slots=SEVERAL)),
  'first block of a window skipped': (
    'blocks',
    '0) // block\n',
    '0) // block + 1\n',
    dict(window=WINDOW, slots=SEVERAL),
  ),
  'last block skipped': (
    'blocks',
    '-(-filled // block)',
    'filled // block',
    dict(slots=SEVERAL, T=2),
  ),
  'rescale of values dropped': (
    'blocks',
    'mixed * shrink[..., None] + new',
    'mixed + new',
    dict(slots=SEVERAL),
  ),
  'rescale of the sum dropped': (
    'blocks',
    'total * shrink + weights',
    'total + weights',
    dict(slots=SEVERAL),
  ),
  'unused values in the sum': ('blocks', 'jnp.where(used[..., None], values, 0)', 'values', {}),
  'unused scales in the sum': (
    'blocks',
    'jnp.where(used, cut(scales, start), 0)',
    'cut(scales, start)',
    dict(dtype='int8'),
  ),
  'scales of keys dropped': ('_scores', 'scales is not None', 'False', dict(dtype='int8')),
  'sink without a value': ('_local', 'jnp.exp(sink - highest)', '0', dict(sinks=True)),
  'another layer': ('_cut', '(layer, 0, *behind', '(layer * 0, 0, *behind', {}),
  'another head': (
    '_local',
    'query_axes) * K // groups',
    'query_axes) * 0',
    dict(sizes={'tensor': 4}, K=2),
  ),
  'parts of slots at the same positions': (
    'blocks',
    'start + offset + jnp',
    'start + jnp',
    CONTEXT,
  ),
  'parts put together without their scale': ('_local', 'jax.lax.pmax(top, parts)', 'top', CONTEXT),
  'a part left out': ('_local', 'jax.lax.psum(total * shrink, parts)', 'total * shrink', CONTEXT),
}


@pytest.mark.costly
@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_caught(fault, monkeypatch):
  """Each is planted in the kernel's own text."""
  function, old, new, kind = FAULTS[fault]
  text, names = inspect.getsource(getattr(cached, function)), dict(vars(cached))
  assert text.count(old) == 1, f'{old!r} is not what the kernel says any more'
  exec(text.replace(old, new), names)  # it finds the module's other functions, and they find it
  monkeypatch.setattr(cached, function, names[function])
  with pytest.raises(AssertionError):
    check(**kind)


def test_dropout_is_refused():
  held, lengths, queries, *_ = case()
  arguments = jnp.zeros((B, 1, N, H)), held, 0, jnp.asarray(lengths), jnp.asarray(queries)
  with pytest.raises(NotImplementedError, match='leaves no weights out'):
    cached.attention(*arguments, Scoring(dropout=object()))


def test_heads_that_do_not_go_together_raise():
  held, lengths, queries, *_ = case(K=3)
  with jax.set_mesh(make_mesh(MeshConfig(data=1, tensor=4), jax.devices()[:4])):
    with pytest.raises(
      NotImplementedError,
      match='8 query heads and 3 key heads do not go together over mesh.tensor=4: it must divide',
    ):
      cached.attention(
        jnp.zeros((B, 1, N, H)), held, 0, jnp.asarray(lengths), jnp.asarray(queries), Scoring()
      )
