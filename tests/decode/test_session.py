"""Is a session what one call over its whole text would be, wherever it appends, forks and takes back?"""
import dataclasses

import jax
import numpy as np
import pytest

from data.tokenizer import ByteTokenizer
from decode.generator import Generator
from model import transformer
from model.config import ModelConfig
from parallel.mesh import MeshConfig, make_mesh

MODEL = ModelConfig(vocabulary=259, width=16, layers=2, heads=2, feed_forward=24, max_length=96, init_scale=1.0)
WINDOW = dataclasses.replace(MODEL, window=4, global_every=2, max_length=600)


def make(config, devices=1, **sizes):
  mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
  with jax.set_mesh(mesh):
    return Generator(jax.jit(transformer.init, static_argnums=(0, 1))(config, 0), ByteTokenizer(), mesh)


@pytest.fixture(scope='module')
def generator():
  return make(MODEL)


def whole(generator, ids, **options):
  return generator([ids], **options)[0].ids


def test_turns_are_one_text(generator):
  session = generator.session().append('def f(')
  first = session(max_new_tokens=5, temperature=0.0)
  assert first.ids == whole(generator, generator.encoded('def f('), max_new_tokens=5, temperature=0.0) == session.ids[7:]
  second = session('): ', max_new_tokens=6, seed=3)
  past = [*generator.encoded('def f('), *first.ids, *generator.tokenizer.encode('): ')]
  assert second.ids == whole(generator, past, max_new_tokens=6, seed=3)
  assert session.ids == [*past, *second.ids] and ''.join(session.stream(max_new_tokens=4, seed=9)) != ''
  np.testing.assert_allclose(second.logprobs, generator.score([session.ids])[0][len(past) - 1:][:6], atol=1e-5)


def test_forks_go_their_own_ways(generator):
  session = generator.session().append('abc')
  other = session.fork()
  one, two = session(max_new_tokens=6, seed=1), other(max_new_tokens=6, seed=2)
  assert one.ids != two.ids and other.fork()(max_new_tokens=3, seed=5).ids == other(max_new_tokens=3, seed=5).ids
  assert one.ids == whole(generator, generator.encoded('abc'), max_new_tokens=6, seed=1)


@pytest.mark.parametrize('length', [0, 1, 5, 20, 21])
def test_what_is_taken_back_was_never_there(generator, length):
  session = generator.session().append('x' * 20)
  session.truncate(length).append('yz')
  expected = [*generator.encoded('x' * 20)[:length], *([] if length else [generator.tokenizer.bos]), *generator.tokenizer.encode('yz')]
  assert session.ids == expected
  np.testing.assert_allclose(session.logits, generator.session().append(expected).logits, atol=1e-5)


def test_a_ring_is_read_again_where_it_has_turned():
  generator = make(WINDOW)
  assert generator.session()._generator is generator
  session = generator.session().append(np.random.default_rng(0).integers(3, 259, 500).tolist())
  past = list(session.ids)
  assert session._state.cache.held[0].ring and not session._state.cache.held[1].ring
  for length in (498, 400, 100, 3):
    assert session.truncate(length).ids == past[:length]
    np.testing.assert_allclose(session.logits, generator.session().append(past[:length]).logits, atol=1e-5)


def test_a_stop_string_and_a_listener_that_leaves(generator):
  free = generator.session().append('abc')(max_new_tokens=30, seed=4)
  stop = free.text[10:12]
  session = generator.session().append('abc')
  ended = session(max_new_tokens=30, seed=4, stop=stop, chunk=16)
  assert ended.finish == 'stop' and ended.text == free.text[:free.text.index(stop)] and session.ids[4:] == ended.ids
  np.testing.assert_allclose(session.logits, generator.session().append(session.ids).logits, atol=1e-5)
  listening = session.stream(max_new_tokens=30, seed=4, chunk=2)
  next(listening)
  listening.close()
  np.testing.assert_allclose(session.logits, generator.session().append(session.ids).logits, atol=1e-5)
  assert len(session.ids) < 4 + len(ended.ids) + 30


def test_a_full_cache_says_so(generator):
  session = generator.session(capacity=12).append('abc')
  found = session(max_new_tokens=30, temperature=0.0, logit_bias={2: -np.inf})
  assert found.finish == 'cache full' and len(session.ids) == 12
  assert session(max_new_tokens=3).finish == 'cache full'
  with pytest.raises(ValueError, match='1 more tokens pass capacity=12 of a session that has 12'):
    session.append('x')


def test_sessions_on_a_mesh():
  session = make(dataclasses.replace(MODEL, vocabulary=260), 4, data=2, tensor=2).session().append('abc')
  alone = make(dataclasses.replace(MODEL, vocabulary=260))
  assert session(max_new_tokens=6, temperature=0.0).ids == alone.session().append('abc')(max_new_tokens=6, temperature=0.0).ids


@pytest.mark.parametrize('call, words', [
    (lambda g: g.session(capacity=97), 'pass model.max_length=96'),
    (lambda g: g.session()(max_new_tokens=3), 'has read nothing cannot go on'),
    (lambda g: g.session().logits, 'has read nothing has no scores'),
    (lambda g: g.session().append('a').truncate(3), r'length=3 must be in \[0, 2\]'),
    (lambda g: g.session().append('a')(num_samples=2), 'num_samples=2: a session has one row'),
    (lambda g: g.session().append([300]), r'the id 300; this model has ids in \[0, 259\)'),
])
def test_bad_use_raises(generator, call, words):
  with pytest.raises(ValueError, match=words):
    call(generator)
