"""Does a request get the same bits where another has read the beginning of its prompt before? And
is nothing shared that was not read, or is not the same?
"""

import dataclasses
import functools
import inspect
import textwrap

import jax
import numpy as np
import pytest
from test_engine import (
  IDS,
  bits,
  compilations,
  model_of,
  one_device,
  poison,
  prompt,
  to_its_end,
  traced_anew,  # noqa: F401
)

from decode import bulk, loop, prefixes
from decode.engine import Engine, Request, Sizes
from decode.paged import PagedEngine
from decode.prefixes import Prefixes
from decode.sampling import make_sampling
from model import begun

C, CAPACITY = 8, 56
SIZES = Sizes(
  rows=3, capacity=CAPACITY, read_tokens=C, steps=5, bias=12, ends=4, states=70, classes=64, block=C
)


@functools.cache
def engine_of(name, dtype='float32', **sizes):
  model = model_of(name, dtype)
  if name == 'bytes':
    sizes['cache_dtype'] = 'int8'
  engine = Engine(model.config, one_device(), dataclasses.replace(SIZES, **sizes), vocabulary=IDS)
  engine.compile(model)
  return engine


def asked(ids, new=6, adapter=0, salt='', **options):
  options = {'seed': 3, 'repetition_penalty': 1.7} | options
  sampling = make_sampling(1, vocabulary=IDS, **options)
  return Request(ids, new, sampling, adapter=adapter, salt=salt)


def run(engine, model, row, request, leave=True):
  """What a row writes, and how much of its prompt was there."""
  engine.join(row, request)
  while engine.reading:
    engine.read(model)
  written, cached = bulk.Written(), engine.cached(row)
  to_its_end(engine, model, request, row, written)
  if leave:
    engine.release([row])
  return bits(written), cached


def missed(engine, model, request):
  engine.reset()
  poison(engine)
  written, cached = run(engine, model, 0, request)
  assert cached == 0
  return written


LONG = prompt(45)
AFTER = [*LONG[:37], 3, 4, 5, 6, 7, 8, 9, 10, 11]


def check_hits(engine, model):
  """Of whole blocks, from a row that is there or has left, into it or into another; twice."""
  same, other = asked(LONG), asked(AFTER, temperature=0.7)
  expected = missed(engine, model, same), missed(engine, model, other)
  assert expected[0] != expected[1]
  for source, row, leave in [(1, 2, True), (1, 1, True), (2, 0, False)]:
    engine.reset()
    poison(engine)
    run(engine, model, source, asked(LONG, new=1, seed=9), leave)
    assert run(engine, model, row, same) == (expected[0], 40)
  # Of a ring, which has turned meanwhile, there is less.
  rings = any(held.ring for held in engine.state.cache.held)
  assert run(engine, model, 1, other) == (expected[1], 0 if rings else 32)
  assert run(engine, model, 0, other) == (expected[1], 0 if rings else 40)


REST = [('windows', 'bfloat16'), ('bytes', 'bfloat16'), ('latent', 'bfloat16')]


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, dtype',
  [('llama', 'float32'), *(pytest.param(*pair, marks=pytest.mark.long) for pair in REST)],
)
def test_a_hit_is_a_miss_bit_for_bit(name, dtype):
  check_hits(engine_of(name, dtype), model_of(name, dtype))


def check_what_differs(engine, model):
  """By its salt, its adapter, or the first of its tokens: then nothing is the same."""
  engine.reset()
  run(engine, model, 0, asked(LONG))
  for request in (
    asked(LONG, salt='theirs'),
    asked([(LONG[0] + 1) % IDS, *LONG[1:]]),
    asked(LONG[1:]),
    asked(LONG[:8]),  # whose last token is to be read
  ):
    assert run(engine, model, 1, request)[1] == 0
  # Nor is it what has been written, though the text goes on behind it.
  (ids, *_), _ = run(engine, model, 2, asked(LONG[:18], new=20))
  goes_on = asked([*LONG[:18], *ids], new=4)
  expected = missed(engine, model, goes_on)
  engine.reset()
  run(engine, model, 2, asked(LONG[:18], new=20))
  assert run(engine, model, 1, goes_on) == (expected, 16)


@pytest.mark.slow
@pytest.mark.parametrize('sharing', [False, True])
def test_a_ring_that_begins_from_another_has_nothing_before(sharing):
  """Of what its own window does not see: who shares less of the prompt finds nothing there; where
  both read it together, all of the ring is there.
  """
  engine, model = engine_of('windows'), model_of('windows')
  other = asked([*LONG[:33], 3, 4, 5, 6])
  expected = missed(engine, model, other)
  engine.reset()
  poison(engine)
  run(engine, model, 1, asked(LONG[:41], new=1), leave=True)
  engine.join(1, asked(LONG[:41]))
  if not sharing:
    while engine.reading:
      engine.read(model)
    assert engine.cached(1) == 40
  engine.join(2, other)
  while engine.reading:
    engine.read(model)
  written = bulk.Written()
  to_its_end(engine, model, other, 2, written)
  assert bits(written) == expected


def test_rows_wait_for_pages_while_others_write():
  """Three prompts of five pages each and answers, of seven that there are."""
  model = model_of('llama')
  requests = [asked([i, *LONG[:39]]) for i in range(5, 8)]
  sizes = dataclasses.replace(SIZES, pages=7, host_pages=21)
  engine = PagedEngine(model.config, one_device(), sizes, vocabulary=IDS)
  found = {i: bits(written)[0] for i, written in bulk.complete(engine, model, requests)}
  engine = engine_of('llama')
  engine.reset()
  alone = {i: bits(written)[0] for i, written in bulk.complete(engine, model, requests)}
  assert found == alone and len(found) == 3


def test_what_differs_is_not_shared():
  check_what_differs(engine_of('llama'), model_of('llama'))


@pytest.mark.slow
def test_who_comes_while_a_prompt_is_read_has_what_was_read_by_then():
  """It is looked up when a row begins to read, not as it joins; nothing is compiled for it."""
  engine, model = engine_of('llama'), model_of('llama')
  expected = [missed(engine, model, each) for each in (asked(LONG), asked(AFTER))]
  engine.reset()
  with compilations() as names:
    for row, ids in enumerate((LONG, AFTER)):
      engine.join(row, asked(ids))
    while engine.reading:
      engine.read(model)
    assert engine.cached(0) == 0 and engine.cached(1) == 32
    chunks = [jax.tree.map(np.asarray, engine.decode(model)) for _ in range(2)]
  assert not names
  for row, (ids, *_) in enumerate(expected):
    written = bulk.Written()
    [written.add(chunk, row, asked(LONG)) for chunk in chunks]
    assert written.ids == ids
  engine.release([0, 1])


@pytest.mark.slow
def test_other_weights_share_nothing():
  engine, model, other = engine_of('llama'), model_of('llama'), model_of('llama', seed=1)
  expected = missed(engine, other, asked(LONG))
  engine.reset()
  run(engine, model, 0, asked(LONG))
  assert run(engine, other, 1, asked(LONG)) == (expected, 0)
  engine.forget(1)
  assert run(engine, other, 2, asked(LONG)) == (expected, 0)


def test_what_is_of_least_use_goes_first():
  held = Prefixes(4, 2)
  a, b, c = ([asked([n, n, n, n, 5])] for n in (1, 2, 3))
  for row, (request,) in enumerate((a, b, c)):
    held.begin(row, request, 4)
  parts = [range(4)]
  assert held.choose(b[0], [0, 1, 2, 3], parts) == 3, 'what holds nothing'
  assert held.choose(asked([9, 9, 9]), [0, 1, 2], parts) == 0
  assert held.choose(b[0], [0, 1, 2], parts) in (0, 1), 'another, or the row itself'
  held.use(0)
  assert held.choose(asked([9, 9, 9]), [0, 1, 2], parts) == 1
  assert held.choose(c[0], [2], parts) == 2
  # On another part of the mesh nothing is found.
  assert held.find(b[0], [2, 3]) == (0, -1) and held.find(b[0], [0, 1]) == (4, 1)
  assert held.choose(b[0], [0, 2, 3], [[0, 1], [2, 3]]) == 0
  assert held.choose(asked([9, 9, 9]), [1, 2, 3], [[0, 1], [2, 3]]) in (2, 3), 'where less is done'


def test_a_block_is_a_whole_number_of_parts():
  with pytest.raises(ValueError, match='block=12 of an engine must be a multiple of read_tokens=8'):
    dataclasses.replace(SIZES, block=12)


FAULTS = {
  'a token more': (
    loop,
    'resume',
    'sources, rows, counts, windows',
    'sources, rows, counts + 1, windows',
  ),
  'penalties forget the beginning': (
    loop,
    'resume',
    'with_rows(history.prompt, rows, prompt)',
    'history.prompt',
  ),
  'from another row': (begun, '_moved', 'sources[j], 0, at', '(sources[j] + 1) % 3, 0, at'),
  'a block too few': (begun, '_moved', '-(-counts.max() // block)', 'counts.max() // block'),
  'salts are alike': (prefixes.Prefixes, 'marks', '{request.salt}', ''),
  'a ring is taken for whole': (
    prefixes.Prefixes,
    '_find',
    'behind <= self._slack',
    'True',
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  'fault',
  [name if i == 0 else pytest.param(name, marks=pytest.mark.long) for i, name in enumerate(FAULTS)],
)
def test_planted_faults_are_noticed(fault, monkeypatch, traced_anew):  # noqa: F811
  owner, name, old, new = FAULTS[fault]
  function = inspect.unwrap(getattr(owner, name))
  text = textwrap.dedent(inspect.getsource(function))
  assert text.count(old) == 1, f'{old!r} is not what it says any more'
  names = dict(vars(inspect.getmodule(function)))
  exec(text.replace(old, new), names)
  monkeypatch.setattr(owner, name, names[name])
  model = 'windows' if 'ring' in fault else 'llama'
  engine, model = engine_of.__wrapped__(model), model_of(model)
  with pytest.raises(AssertionError):
    check_hits(engine, model)
    check_what_differs(engine, model)
