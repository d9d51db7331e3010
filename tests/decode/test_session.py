"""Is a session what one call over its whole text would be, wherever it appends,
forks and takes back?
"""

import dataclasses

import numpy as np
import pytest

from tests.decode.small import config_of, generator_of

MODEL = config_of(96)
WINDOW = dataclasses.replace(MODEL, window=4, global_every=2, max_length=600)


@pytest.fixture(scope='module')
def generator():
  return generator_of(MODEL)


def whole(generator, ids, **options):
  return generator([ids], **options)[0].ids


def assert_scores_are_of_its_ids(session):
  np.testing.assert_allclose(
    session.logits, session._generator.session().append(session.ids).logits, atol=1e-5
  )


@pytest.mark.slow
def test_turns_are_one_text(generator):
  session = generator.session().append('def f(')
  first = session(max_new_tokens=5, temperature=0.0)
  assert (
    first.ids
    == whole(generator, generator.encoded('def f('), max_new_tokens=5, temperature=0.0)
    == session.ids[7:]
  )
  second = session('): ', max_new_tokens=6, seed=3)
  past = [*generator.encoded('def f('), *first.ids, *generator.tokenizer.encode('): ')]
  assert second.ids == whole(generator, past, max_new_tokens=6, seed=3)
  assert (
    session.ids == [*past, *second.ids] and ''.join(session.stream(max_new_tokens=4, seed=9)) != ''
  )
  np.testing.assert_allclose(
    second.logprobs, generator.score([session.ids])[0][len(past) - 1 :][:6], atol=1e-5
  )


def test_forks_go_their_own_ways(generator):
  session = generator.session().append('abc')
  other = session.fork()
  one, two = session(max_new_tokens=6, seed=1), other(max_new_tokens=6, seed=2)
  assert (
    one.ids != two.ids
    and other.fork()(max_new_tokens=3, seed=5).ids == other(max_new_tokens=3, seed=5).ids
  )
  assert one.ids == whole(generator, generator.encoded('abc'), max_new_tokens=6, seed=1)


@pytest.mark.parametrize('length', [0, 1, 5, 20, 21])
def test_what_is_taken_back_was_never_there(generator, length):
  session = generator.session().append('x' * 20)
  session.truncate(length).append('yz')
  expected = [
    *generator.encoded('x' * 20)[:length],
    *([] if length else [generator.tokenizer.bos]),
    *generator.tokenizer.encode('yz'),
  ]
  assert session.ids == expected
  np.testing.assert_allclose(session.logits, generator.session().append(expected).logits, atol=1e-5)


@pytest.mark.slow
def test_a_ring_is_read_again_where_it_has_turned():
  generator = generator_of(WINDOW)
  assert generator.session()._generator is generator
  session = generator.session().append(np.random.default_rng(0).integers(3, 259, 500).tolist())
  past = list(session.ids)
  assert session._state.cache.held[0].ring and not session._state.cache.held[1].ring
  # 400: what was taken back stays in the ring, and in that of a fork
  for length in (
    498,
    400,
    200,
    3,
  ):
    other = session.fork()
    for one in (session, other):
      assert one.truncate(length).ids == past[:length]
      assert_scores_are_of_its_ids(one)
  session.append(past[3:290])(
    max_new_tokens=300, temperature=0.0, logit_bias={2: -np.inf}, chunk=64
  )
  assert_scores_are_of_its_ids(session.truncate(295))


@pytest.mark.slow
def test_a_ring_is_read_again_just_where_its_window_is_written_over():
  """`back` tokens behind the furthest one, which is read again with the 4 that its window sees:
  up to slots - window of them the ring has.
  """
  generator = generator_of(WINDOW)
  session = generator.session().append(np.random.default_rng(1).integers(3, 259, 500).tolist())
  past, [ring, _] = list(session.ids), session._state.cache.held
  assert ring.ring and ring.slots < len(past)
  whole = generator.session().append(past)
  for back in range(ring.slots - 6, ring.slots + 2):
    other = whole.fork().truncate(len(past) + 1 - back)
    assert (other._state is None) == (back > ring.slots - 4), back
    assert_scores_are_of_its_ids(other)


def test_a_stop_string_and_a_listener_that_leaves(generator):
  free = generator.session().append('abc')(max_new_tokens=30, seed=4)
  stop = free.text[10:12]
  session = generator.session().append('abc')
  ended = session(max_new_tokens=30, seed=4, stop=stop, chunk=16)
  assert (
    ended.finish == 'stop'
    and ended.text == free.text[: free.text.index(stop)]
    and session.ids[4:] == ended.ids
  )
  assert_scores_are_of_its_ids(session)
  listening = session.stream(max_new_tokens=30, seed=4, chunk=2)
  next(listening)
  listening.close()
  assert_scores_are_of_its_ids(session)
  assert len(session.ids) < 4 + len(ended.ids) + 30


def test_a_turn_that_ends_within_a_chunk_leaves_the_scores_behind_it(generator):
  free = generator.session().append('abc')(max_new_tokens=20, seed=4)
  session = generator.session().append('abc')
  assert session(max_new_tokens=20, seed=4, stop=free.ids[5], chunk=16).ids == free.ids[:6]
  assert_scores_are_of_its_ids(session)


def test_penalties_look_at_what_the_text_has(generator):
  """All of it as a prompt, what earlier turns wrote included, and nothing that was taken back."""
  options = dict(max_new_tokens=8, temperature=0.0, repetition_penalty=3.0, presence_penalty=2.0)
  session = generator.session().append('abc')
  session(max_new_tokens=20, temperature=0.0)
  for length in (len(session.ids), 14):
    past = list(session.truncate(length).ids)
    assert session(**options).ids == whole(generator, past, **options)


@pytest.mark.parametrize(
  'use',
  [
    lambda session: session.append('x'),
    lambda session: session.truncate(5),
    lambda session: session.fork(),
    lambda session: session.logits,
    lambda session: session(max_new_tokens=2, seed=1),
    lambda session: next(session.stream(max_new_tokens=2, seed=1)),
  ],
  ids=['append', 'truncate', 'fork', 'logits', 'call', 'stream'],
)
def test_other_use_ends_a_stream_that_is_under_way(generator, use):
  session = generator.session().append('abc')
  listening = session.stream(max_new_tokens=30, seed=1, chunk=2)
  next(listening)
  use(session)
  assert_scores_are_of_its_ids(session)
  assert (
    session.ids[:5]
    == generator.encoded('abc') + generator.session().append('abc')(max_new_tokens=1, seed=1).ids
  )
  with pytest.raises(ValueError, match='this stream has ended before its text.* fork the session'):
    next(listening)
  assert_scores_are_of_its_ids(session)


@pytest.mark.parametrize('number', [1, 2, 3])
@pytest.mark.parametrize('before', [False, True], ids=['given away', 'not given away'])
def test_an_interrupted_turn_leaves_what_there_is(generator, monkeypatch, number, before):
  how = dict(max_new_tokens=30, seed=1, chunk=4)
  expected = generator.session().append('abc')(**how)
  session, calls, advance = generator.session().append('abc'), [], generator.advance

  def interrupted(*arguments):
    calls.append(1)
    found = None if before and len(calls) == number else advance(*arguments)
    if len(calls) == number:
      raise KeyboardInterrupt
    return found

  with monkeypatch.context() as patch:
    patch.setattr(generator, 'advance', interrupted)
    if number < 3:  # nothing was read so far
      with pytest.raises(KeyboardInterrupt):
        session(**how)
    else:
      found = session(**how)
      assert (
        found.finish == 'interrupted'
        and found.ids == expected.ids[: len(found.ids)] == session.ids[4:]
      )
  assert len(session.ids) == 4 + (number == 3)
  assert_scores_are_of_its_ids(session)
  left = 30 - len(session.ids) + 4
  assert session(**how | {'max_new_tokens': left}).ids == expected.ids[-left:], (
    'it goes on as if nothing had been'
  )


def test_interrupted_reading_reads_nothing(generator, monkeypatch):
  session, append = generator.session().append('abcdef'), generator.append

  def interrupted(*arguments):
    append(*arguments)
    raise KeyboardInterrupt

  for use, kept in ((lambda: session.append('gh'), 7), (lambda: session.truncate(4), 4)):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(generator, 'append', interrupted)
      use()
    assert session.ids == generator.encoded('abcdef')[:kept]
    assert_scores_are_of_its_ids(session)


def test_a_turn_is_reported(generator):
  session = generator.session().append('abc')
  found = session('def', max_new_tokens=9, seed=3)
  report = generator.report
  assert (report.rows, report.prompt_tokens, report.new_tokens) == (
    1,
    7,
    len(found.ids),
  ) and 0 < report.first_token <= report.seconds


@pytest.mark.slow
def test_a_full_cache_says_so(generator):
  session = generator.session(capacity=12).append('abc')
  found = session(max_new_tokens=30, temperature=0.0, logit_bias={2: -np.inf})
  assert found.finish == 'cache full' and len(session.ids) == 12
  assert session(max_new_tokens=3).finish == 'cache full'
  with pytest.raises(ValueError, match='1 more tokens pass capacity=12 of a session that has 12'):
    session.append('x')


@pytest.mark.slow
def test_sessions_on_a_mesh():
  config = dataclasses.replace(MODEL, vocabulary=260)
  session = generator_of(config, data=2, tensor=2).session().append('abc')
  alone = generator_of(config)
  assert (
    session(max_new_tokens=6, temperature=0.0).ids
    == alone.session().append('abc')(max_new_tokens=6, temperature=0.0).ids
  )


@pytest.mark.parametrize(
  'call, words',
  [
    (lambda g: g.session(capacity=97), 'pass model.max_length=96'),
    (lambda g: g.session()(max_new_tokens=3), 'has read nothing cannot go on'),
    (lambda g: g.session().logits, 'has read nothing has no scores'),
    (lambda g: g.session().append('a').truncate(3), r'length=3 must be in \[0, 2\]'),
    (lambda g: g.session().append('a')(num_samples=2), 'num_samples=2: a session has one row'),
    (lambda g: g.session().append([300]), r'the id 300; this model has ids in \[0, 259\)'),
  ],
)
def test_bad_use_raises(generator, call, words):
  with pytest.raises(ValueError, match=words):
    call(generator)
