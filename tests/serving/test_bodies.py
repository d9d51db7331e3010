"""Are answers written while others are answered, and by nobody who has gone?"""

import asyncio
import json
import threading

import hypothesis
import pytest
from hypothesis import strategies as st

from serving import bodies
from serving.bodies import json_parts
from tests.serving.test_http import CHAT, COMPLETION, ask, service

JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
  | st.text(st.characters(exclude_categories=['Cs'])),
  lambda each: st.lists(each) | st.dictionaries(st.text(max_size=3), each),
)  # fmt: skip


@hypothesis.settings(max_examples=40)
@hypothesis.given(JSON, st.integers(0, 9))
def test_parts_together_are_the_value(value, levels):
  assert json.loads(''.join(json_parts(value, levels))) == value


def test_no_part_of_a_long_answer_is_long():
  """One call of the encoder keeps every other thread waiting."""
  token = {'token': 'a', 'logprob': -0.5, 'bytes': [97]}
  chat = {'logprobs': {'content': [token | {'top_logprobs': [token] * 20}] * 300}}
  top = {'top_logprobs': [{str(i): -0.5 for i in range(20)}] * 300}
  vectors = {'data': [{'embedding': [0.123456789] * 1024}] * 300}
  for answer in ({'choices': [chat, chat]}, {'choices': [{'logprobs': top}]}, vectors):
    parts = [*json_parts(answer)]
    assert max(map(len, parts)) < 16_000 and len("".join(parts)) > 50_000


INFER = {'inputs': [{'name': 'prompt', 'datatype': 'BYTES', 'shape': [1], 'data': ['a']}]}
CHAT_LOGPROBS = CHAT | {'logprobs': True}


@pytest.mark.parametrize(
  'path, body',
  [
    ('/v1/embeddings', {'input': [[5, 6]]}),
    ('/v1/completions', COMPLETION),
    ('/v1/chat/completions', CHAT_LOGPROBS),
    ('/invocations', CHAT_LOGPROBS),
    ('/v2/models/m/infer', INFER),
  ],
)
def test_the_loop_is_free_while_an_answer_is_written(monkeypatch, path, body):
  """Which waits here for what the loop does meanwhile."""

  async def run():
    loop, free = asyncio.get_running_loop(), threading.Event()

    def waiting(value, *levels):
      loop.call_soon_threadsafe(free.set)
      assert free.wait(20), 'the loop writes, and does nothing else'
      yield from json_parts(value, *levels)

    monkeypatch.setattr(bodies, 'json_parts', waiting)
    served = service()
    with served.by_itself():
      start, *rest = await ask(served, body, asyncio.Event(), path=path)
    return start['status'], json.loads(b''.join(each['body'] for each in rest)), free.is_set()

  status, answer, free = asyncio.run(run())
  assert status == 200 and free and answer.keys() & {'data', 'choices', 'outputs'}


@pytest.mark.parametrize('path', ['/v1/completions', '/v1/embeddings'])
def test_an_answer_for_who_has_gone_is_none(caplog, path):
  """The log says so, and nothing is written."""

  async def run():
    served, gone, sent = service(), asyncio.Event(), []
    body = COMPLETION if path == '/v1/completions' else {'input': 'a'}
    task = asyncio.create_task(ask(served, body, gone, path=path))
    while served.idle:
      await asyncio.sleep(0.001)
    gone.set()
    await asyncio.sleep(0.01)
    while not task.done():
      served.step()
      await asyncio.sleep(0.001)
    sent += task.result()
    return sent

  with caplog.at_level('INFO', 'serving.access'):
    sent = asyncio.run(run())
  (line,) = [json.loads(r.message) for r in caplog.records if r.name == 'serving.access']
  assert (line['status'], line['gone']) == (499, True)
  assert path == '/v1/embeddings' or not sent


def test_what_is_no_number_of_json_is_never_written():
  with pytest.raises(ValueError, match='not JSON compliant'):
    ''.join(json_parts({'a': [{'b': float('nan')}]}))
