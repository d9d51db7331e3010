"""What becomes of a text that comes to the end of the model's context? It ends there, and says so,
whoever asked for it.
"""

import dataclasses
import sys

import numpy as np
import pytest

from decode.bulk import complete
from decode.engine import Engine, Request, Sizes
from decode.sampling import make_sampling
from tests.decode.small import config_of, generator_of

LIMIT = 32
MODEL = config_of(LIMIT)
GOES_ON = {'logit_bias': {2: -np.inf}}  # the end of the text never comes
SHORT, LONG = 'ab', 'x' * 28


@pytest.fixture(scope='module')
def generator():
  return generator_of(MODEL)


def assert_ended_by_context(completion):
  length = len(completion.prompt_ids)
  assert length + len(completion.ids) == LIMIT
  assert completion.finish == 'length'
  for said in ('context', 'model.max_length=32', f'{length} tokens', 'max_new_tokens='):
    assert said in completion.note


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [{'chunk': 3}, {'lookup': 1}, {'temperature': 0.0, 'early_exit': 1}],
  ids=str,
)
def test_by_default_and_asked_for_more_each_row_ends_at_the_context(generator, options):
  """max_new_tokens is 128, the context 32; the rows of a batch end at lengths of their own."""
  for more in ({}, {'max_new_tokens': 1000}):
    found = generator([SHORT, LONG], seed=3, **GOES_ON, **options, **more)
    for completion in found:
      assert_ended_by_context(completion)
    assert len(generator.report.notes) == 2
  alone = generator(LONG, seed=4, max_new_tokens=LIMIT - len(found[1].prompt_ids), **GOES_ON)[0]
  if not {"lookup", "temperature"} & {*options}:
    assert alone.ids == found[1].ids, 'what is written before is the same'
  assert alone.finish == 'length' and alone.note == '', 'as it was asked for'
  assert generator.report.notes == ()


@pytest.mark.slow
def test_rows_that_end_themselves_say_nothing(generator):
  stopped, cut = generator([SHORT, LONG], seed=3, logit_bias=[{2: 1e9}, GOES_ON['logit_bias']])
  assert stopped.finish == 'stop' and stopped.note == ''
  assert_ended_by_context(cut)


@pytest.mark.slow
def test_a_stop_as_the_very_last_token_is_a_stop(generator):
  (free,) = generator(SHORT, seed=3, **GOES_ON)
  last = free.ids[-1]
  (stopped,) = generator(SHORT, seed=3, stop=[last], **GOES_ON)
  if last not in free.ids[:-1]:
    assert (stopped.finish, stopped.note) == ('stop', '') and stopped.ids == free.ids


@pytest.mark.slow
def test_a_search_ends_at_the_context(generator):
  found = generator([SHORT, LONG], beams=3, num_samples=2, **GOES_ON)
  assert len(found) == 4
  for completion in found:
    assert_ended_by_context(completion)
  (fits,) = generator(SHORT, beams=3, max_new_tokens=LIMIT - 3, **GOES_ON)
  assert fits.ids == found[0].ids and fits.note == ''


@pytest.mark.slow
def test_a_draft_with_the_same_context(generator):
  found = generator([SHORT, LONG], draft=generator_of(MODEL, seed=1), temperature=0.0, **GOES_ON)
  plain = generator([SHORT, LONG], temperature=0.0, **GOES_ON)
  for completion, expected in zip(found, plain, strict=True):
    assert_ended_by_context(completion)
    assert completion.ids == expected.ids


def test_streams_and_ids_end_there_too(generator):
  (whole,) = generator(SHORT, seed=3, **GOES_ON)
  assert ''.join(generator.stream(SHORT, seed=3, **GOES_ON)) == whole.text
  assert generator.report.notes == (whole.note,)
  pieces = list(generator.ids(SHORT, seed=3, **GOES_ON))
  assert [i for (row,) in pieces for i in row] == whole.ids
  assert generator.report.notes == (whole.note,)


@pytest.mark.slow
def test_a_session_ends_there_and_its_own_capacity_is_told_apart(generator):
  session = generator.session().append(SHORT)
  completion = session(seed=3, **GOES_ON)
  assert_ended_by_context(completion)
  assert len(session.ids) == LIMIT
  again = session(max_new_tokens=3)
  assert (again.finish, again.ids) == ('length', []) and 'context' in again.note

  small = generator.session(capacity=12).append(SHORT)
  completion = small(**GOES_ON)
  assert completion.finish == 'cache full' and 'capacity=12' in completion.note
  assert small.truncate(5)(max_new_tokens=7, **GOES_ON).note == ''


@pytest.mark.slow
def test_rows_of_an_engine_end_where_they_are_full(generator):
  sizes = Sizes(rows=2, capacity=LIMIT, read_tokens=16, bias=4)
  engine = Engine(generator.model.config, generator.mesh, sizes, vocabulary=generator.vocabulary)
  sampling = make_sampling(1, vocabulary=259, seed=3, **GOES_ON)
  ids = generator.encoded(SHORT)

  def request(new):
    return Request(ids, new, sampling)

  requests = [request(128), request(LIMIT - len(ids)), request(2**30), request(4)]
  written = dict(complete(engine, generator.model, requests))
  assert [len(written[i].ids) for i in range(4)] == [29, 29, 29, 4]
  assert [written[i].full for i in range(4)] == [True, False, True, False]
  assert written[0].ids == written[1].ids == written[2].ids


@pytest.mark.slow
def test_a_model_without_an_end_has_none():
  endless = generator_of(dataclasses.replace(MODEL, max_length=0))
  assert endless.context == sys.maxsize
  (completion,) = endless(SHORT, **GOES_ON)
  assert len(completion.ids) == 128 and completion.note == ''


def test_a_prompt_that_leaves_no_room_is_refused(generator):
  for prompt in ('x' * 31, 'x' * 40):
    with pytest.raises(ValueError, match='leaves no room .* model.max_length=32; shorten'):
      generator(['a', prompt])
