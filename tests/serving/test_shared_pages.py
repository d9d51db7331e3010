"""Are a request's bytes the same where rows share pages, beginnings of prompts, too little room?
With NaN in every page that is no one's.
"""

import collections
import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.paged import PagedEngine
from decode.pool import BACK, COPY, OUT
from decode.sizes import Sizes, check
from parallel.mesh import MeshConfig, make_mesh
from tests.decode.small import config_of
from tests.serving.test_drafts import DRAFTS, REPEATING
from tests.serving.test_serving import (
  ASKED,
  BLOCK,
  SIZES,
  SYSTEM,
  apart,
  call,
  check_company,
  generator,
  result,
  running,
)

FEW = dict(pages=9, host_pages=12)  # a row has 7 of 8 tokens at most, and there are 3


@pytest.fixture
def moved(monkeypatch):
  """How many pages were moved, by how; what is no one's is NaN whenever rows have left."""
  count, move, release = collections.Counter(), PagedEngine._move, PagedEngine.release

  def counting(self, kind, part, moves):
    count[kind] += len(moves)
    move(self, kind, part, moves)

  def ruining(self, rows):
    release(self, rows)
    free = np.zeros(self.sizes.pages, bool)
    for part, pool in enumerate(self._pools):
      free[[part * pool.places + place for place in pool._free]] = True

    def spoil(x):
      none = np.nan if jnp.issubdtype(x.dtype, jnp.floating) else 77
      spoilt = np.where(free.reshape(1, -1, *(1,) * (x.ndim - 2)), none, np.asarray(x))
      return jax.device_put(spoilt.astype(x.dtype), x.sharding)

    cache = self.state.cache
    held = tuple(jax.tree.map(spoil, held) if held.paged else held for held in cache.held)
    self.state = dataclasses.replace(self.state, cache=dataclasses.replace(cache, held=held))

  monkeypatch.setattr(PagedEngine, '_move', counting)
  monkeypatch.setattr(PagedEngine, 'release', ruining)
  return count


def slots(asked=ASKED, *model, mesh=None, **sizes):
  """What rows of their own give."""
  with running(generator(*model, **mesh or {}), **sizes) as served:
    return [result(served.submit(apart(one, i))) for i, one in enumerate(asked)]


def check_pages(expected, moved, *model, mesh=None, asked=ASKED, **sizes):
  """As with rows of their own, in any company, where pages are too few for all."""
  with running(generator(*model, **mesh or {}), **FEW | sizes) as served:
    assert check_company(served, asked) == expected
    stats = served.stats()
    assert stats.preempted and moved[OUT] and moved[BACK] and moved[COPY]
    assert stats.prefix_hits and stats.free == stats.rows
    pools = served._engine._engine._pools
    served.drain(60.0)
    assert served.closed(60)
    assert not any(pool.used for pool in pools)
    assert {pool.places - len(pool._free) for pool in pools} == {len(pool._kept) for pool in pools}


def test_who_waits_writes_what_he_would_have_written(moved):
  """Three that fill the pool together, one after another and at once."""
  asked = [ASKED[0], call(SYSTEM + 'When?', 17, seed=4), call('b' * 30, 24, seed=6)]
  with running(generator(), **FEW) as served:
    alone = [result(served.submit(apart(one, i))) for i, one in enumerate(asked)]
    tickets = [served.submit(one) for one in asked]
    together = [result(ticket) for ticket in tickets]
    stats = served.stats()
  assert alone == together
  assert stats.preempted and moved[OUT] and moved[BACK]
  assert tickets[1].usage.cached == len(SYSTEM) // BLOCK * BLOCK


@pytest.mark.slow
@pytest.mark.parametrize(
  'model, sizes',
  [
    (('llama', 'float32'), {}),
    pytest.param(('windows', 'float32'), {}, marks=pytest.mark.long),
    pytest.param(('latent', 'bfloat16'), {}, marks=pytest.mark.long),
    pytest.param(('llama', 'bfloat16'), dict(cache_dtype='int8'), marks=pytest.mark.long),
  ],
  ids=str,
)
def test_pages_are_slots_bit_for_bit(model, sizes, moved):
  check_pages(slots(ASKED, *model, **sizes), moved, *model, **sizes)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'model, mesh',
  [
    (('llama', 'float32'), {}),
    (('windows', 'bfloat16'), {}),
    (('llama', 'float32'), dict(data=2)),
  ],
  ids=str,
)
def test_drafts_lie_in_pages_as_they_lie_in_slots(model, mesh, moved):
  """The same ones are kept, also of rows that have waited."""
  many = {'rows': 4, 'pages': 14, 'host_pages': 24} if mesh else {}
  expected = slots(REPEATING, *model, mesh=mesh, **DRAFTS, rows=many.get('rows', 3))
  check_pages(expected, moved, *model, mesh=mesh, asked=REPEATING, **DRAFTS, **many)


@pytest.mark.slow
@pytest.mark.long
def test_pages_of_a_mesh(moved):
  """Each part of it has its own."""
  mesh = dict(data=2, tensor=2)
  expected = slots(mesh=mesh, rows=4)
  check_pages(expected, moved, mesh=mesh, rows=4, pages=14, host_pages=24)


@pytest.mark.slow
@pytest.mark.long
def test_every_row_has_its_adapter(moved, monkeypatch):
  """Nobody goes on from what another adapter has read, whoever waits."""
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / 'decode')
  from test_several_adapters import models_of

  made = models_of().together()
  names = ['', 'orders', 'tables', 'lengths'] * 2
  asked = [call(SYSTEM, 20, adapter=name, seed=i) for i, name in enumerate(names)]
  with running(made) as served:
    expected = [result(served.submit(one)) for one in asked]
  with running(made, **FEW) as served:
    for order in (asked, asked[::-1]):
      found = [result(ticket) for ticket in [served.submit(one) for one in order]]
      assert (found if order is asked else found[::-1]) == expected
    assert served.stats().preempted and moved[OUT]


@pytest.mark.slow
def test_hundreds_of_calls_leave_no_row_no_page_and_no_ticket():
  """The soak of tests/serving/test_serving.py in short, with pages that are too few."""
  draw = np.random.default_rng(0)
  with running(generator(), **FEW) as served:
    for _ in range(2):
      tickets = []
      for i in draw.integers(0, 1000, 100):
        new = int(draw.choice([1, 3, 8]))
        salt = '' if i % 2 else str(i)  # what is shared takes no room
        asked = call(SYSTEM[: draw.integers(1, 30)], new, seed=int(i), salt=salt)
        tickets.append(served.submit(dataclasses.replace(asked, key='cd'[i % 2])))
        if draw.random() < 0.1:
          tickets[-1].cancel()
      for ticket in tickets:
        result(ticket)
    until = time.monotonic() + 60
    while not served.idle or served.stats().tokens:
      assert time.monotonic() < until, served.stats()
      time.sleep(0.001)
    stats, scheduler = served.stats(), served._scheduler
    assert sum(stats.finished.values()) == 200 and stats.finished['cancelled'] and not stats.errors
    assert (stats.free, stats.waiting) == (stats.rows, 0)
    assert not scheduler._waiting.total() and not len(scheduler._queue) and not scheduler._arrived
    assert stats.preempted and stats.prefix_hits
    for pool in served._engine._engine._pools:
      places = [*pool._free, *(page.place for page in pool._kept)]
      assert sorted(places) == [*range(pool.places)], 'a page is lost, or there twice'
      assert not pool._rows and {*pool._marked.values()} == {*pool._kept}


@pytest.mark.parametrize(
  'mesh, sizes, words',
  [
    ({}, dict(pages=6), 'pages=6 of 8 tokens do not hold a row of capacity=56 .* at least 7'),
    ({}, dict(host_pages=4), 'host_pages=4 of an engine without pages'),
    ({}, dict(pages=9, block=0), 'pages=9 of an engine are of block=0 tokens'),
    (dict(data=2), dict(pages=15), 'pages=15 .* do not split over the 2 parts of the mesh'),
    (dict(context=2), dict(pages=9), 'pages over mesh.context=2'),
  ],
  ids=str,
)
def test_what_cannot_be_is_said_at_once(mesh, sizes, words):
  devices = jax.devices()[: 2 if mesh else 1]
  with jax.set_mesh(make_mesh(MeshConfig(**{'data': 1} | mesh), devices)):
    with pytest.raises((ValueError, NotImplementedError), match=words):
      check(config_of(64), Sizes(**SIZES | dict(rows=4) | sizes))
