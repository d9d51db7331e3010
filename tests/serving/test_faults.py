"""What do people get where something breaks: a device without memory, readers that do not read,
clocks that jump? Their own error, and others what they asked for. On a service whose engine writes
what it is told to.
"""

import asyncio
import dataclasses
import json

import pytest
from starlette.testclient import TestClient

from serving import call as calls
from serving.fake import SIZES, FakeService
from serving.http import app
from serving.wire import Served
from tests.serving.test_http import COMPLETION, TOKENIZER, ChatTokenizer, ask, service


def writes_on(request):
  while True:
    yield 100


def long_service(**limits):
  sizes = dataclasses.replace(SIZES, capacity=4096)
  return FakeService(ChatTokenizer(), writes_on, sizes=sizes, limits=calls.Limits(**limits))


@pytest.mark.parametrize('at', ['join', 'read', 'decode', 'taken'])
def test_a_device_without_memory_ends_who_had_a_row_and_no_one_else(at):
  """Also where it is as one joins; who waits is served by the engine that has begun anew."""
  served = service(rows=1)

  async def run():
    gone = asyncio.Event()
    sent = [asyncio.create_task(ask(served, COMPLETION, gone)) for _ in range(2)]
    while served.stats().waiting < 2:
      await asyncio.sleep(0.001)
    break_at(served.engine, at)
    while not all(task.done() for task in sent):
      served.step()
      await asyncio.sleep(0)
    return [task.result() for task in sent]

  first, second = asyncio.run(run())
  assert sorted(sent[0]['status'] for sent in (first, second)) == [200, 500]
  failed = next(sent for sent in (first, second) if sent[0]['status'] == 500)
  assert json.loads(failed[1]['body'])['error']['code'] == calls.DEVICE
  assert served.stats().free == 1 and served.engine.calls.count('reset') == 1


def break_at(engine, name):
  """The next call of this name finds no memory."""
  before = getattr(engine, name)

  def broken(*given):
    setattr(engine, name, before)
    before(*given)
    raise RuntimeError('RESOURCE_EXHAUSTED: out of memory')

  setattr(engine, name, broken)


def test_who_leaves_too_much_unread_is_ended_and_told_so():
  """What waits for a slow reader is bounded: beyond that his text ends, with an error behind what
  he has had.
  """
  served = long_service(unread=64)

  async def run():
    taken, gone, sent = asyncio.Event(), asyncio.Event(), []

    async def slow(message):
      sent.append(message)
      if len(sent) == 3:
        await taken.wait()

    asked = COMPLETION | {'max_tokens': 4000, 'stream': True}
    task = asyncio.create_task(ask(served, asked, gone, slow))
    while not served.stats().finished:
      served.step()
      await asyncio.sleep(0)
    taken.set()
    await task
    return sent

  sent = asyncio.run(run())
  stats = served.stats()
  assert stats.errors == {calls.SLOW: 1} and stats.generated_tokens < 200
  last = sent[-1]['body'].decode()
  assert '"code":"slow"' in last and 'of at most 64' in last and not sent[-1]['more_body']


@pytest.mark.parametrize(
  'path, body', [('/v1/embeddings', {'input': 'a'}), ('/tokenize', {'prompt': 'a'})]
)
def test_nobody_keeps_a_place_by_not_taking_his_answer(monkeypatch, caplog, path, body):
  """Whatever it is an answer to."""
  monkeypatch.setattr('serving.guard.TRANSFER_SECONDS', 0.05)

  async def run():
    async def never(message):
      await asyncio.Event().wait()

    served = service()
    with served.by_itself():
      await asyncio.wait_for(ask(served, body, asyncio.Event(), never, path), 20)

  with caplog.at_level('INFO', 'serving.access'):
    asyncio.run(run())
  (line,) = [json.loads(r.message) for r in caplog.records if r.name == 'serving.access']
  assert line['status'] == 499


def test_who_does_not_take_what_is_sent_is_given_up(monkeypatch):
  served = long_service()
  monkeypatch.setattr('serving.guard.TRANSFER_SECONDS', 0.05)

  async def run():
    async def never(message):
      await asyncio.Event().wait()

    asked = COMPLETION | {'max_tokens': 4000, 'stream': True}
    task = asyncio.create_task(ask(served, asked, asyncio.Event(), never))
    while not task.done():
      served.step()
      await asyncio.sleep(0.001)
    served.run()

  asyncio.run(run())
  assert served.stats().finished == {calls.CANCELLED: 1}
  assert served.stats().free == served.stats().rows


def test_clocks_that_jump_move_deadlines_alone(monkeypatch):
  """That of the day decides nothing; one that goes on while the process was stopped ends what has
  had its time, and makes no later chunk shorter for long.
  """
  served = long_service()
  ticks = iter([5e9, -5e9] * 1000)
  monkeypatch.setattr('time.time', lambda: next(ticks))
  asked = [COMPLETION | {'max_tokens': 400}, COMPLETION | {'max_tokens': 400, 'seconds': 60}]

  async def run():
    tasks = [asyncio.create_task(ask(served, each, asyncio.Event())) for each in asked]
    while served.stats().waiting < 2:
      await asyncio.sleep(0.001)
    counts = []
    decode = served.engine.decode

    def counted(count, alternatives):
      served.clock.advance(0.01)
      counts.append(count)
      return decode(count, alternatives)

    served.engine.decode = counted
    for _ in range(10):
      served.step()
    served.clock.advance(1e6)
    while not all(task.done() for task in tasks):
      served.step()
      await asyncio.sleep(0)
    return [json.loads(task.result()[1]['body']) for task in tasks], counts

  (whole, late), counts = asyncio.run(run())
  assert whole['usage']['completion_tokens'] == 400
  assert late['choices'][0]['stop_reason'] == calls.DEADLINE
  assert late['usage']['completion_tokens'] < 400 and 1 in counts and counts[-2] == SIZES.steps


def test_a_prompt_that_is_not_scored_in_time_is_said_to_be():
  served = FakeService(TOKENIZER, scores=True)  # which nobody steps
  with TestClient(app(served, Served(name='m'), hosts=['*'])) as client:
    asked = COMPLETION | {'prompt_logprobs': 1, 'seconds': 0.05}
    response = client.post('/v1/completions', json=asked)
    assert response.status_code == 408 and response.json()['error']['param'] == 'seconds'
    served.run()
    assert served.idle and served.stats().free == served.stats().rows


def test_keys_take_turns_for_what_is_read_beside():
  served = FakeService(TOKENIZER, embeds=True)
  order = []
  for key in 'aaab':
    made = served.embed([[3]], '', key)
    made.add_done_callback(lambda _, key=key: order.append(key))
  served.run()
  assert ''.join(order) == 'abaa'
  served = FakeService(TOKENIZER, embeds=True, limits=calls.Limits(waiting=1))
  first = served.embed([[3]], '')
  with pytest.raises(calls.QueueFull, match='of at most 1'):
    served.embed([[3]], '')
  assert first.cancel()
  served.run()
  assert served.idle
  last = served.embed([[3]], '')
  served.close()
  with pytest.raises(Exception, match='the server ends'):
    last.result(0)
