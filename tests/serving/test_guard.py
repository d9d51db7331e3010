"""Does a hostile head, or body, get no more than an answer that refuses it?"""

import asyncio
import json
import time

import pytest
from starlette.datastructures import URL
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient

from serving import http
from serving.fields import MOST_DEEP, Denied, parsed
from serving.guard import PROBES, ApiKeys, ServerGuard, refusal
from serving.http import app, most_requests
from serving.listening import config
from serving.wire import Served
from tests.serving.test_http import CHAT, KEY, service


def guarded(tmp_path, hosts):
  """A client of a server with keys."""
  file = tmp_path / 'keys'
  file.write_text(f'ann {KEY}\n')
  made = app(service(), Served(name='m'), hosts=hosts, keys=ApiKeys(file))
  return TestClient(made, raise_server_exceptions=False)


@pytest.mark.parametrize('host', ['evil.example/health?', 'x/health#', '[', 'a b', 'x@y', '[::1'])
@pytest.mark.parametrize('hosts', [['testserver'], ['*']])
def test_a_host_that_is_no_name_is_refused(tmp_path, monkeypatch, host, hosts):
  """Also where Starlette makes a URL of it, as it did before 1.10."""
  url = property(lambda self: URL(f'http://{self.headers["host"]}{self.scope["path"]}'))
  monkeypatch.setattr(HTTPConnection, 'url', url)
  with guarded(tmp_path, hosts) as one:
    for path in ('/tokenize', '/health', '/nothing'):
      refused = one.post(path, json={'prompt': 'x'}, headers={'Host': host})
      assert refused.status_code == 400 and refused.headers['connection'] == 'close'
      assert 'is no name or address' in refused.json()['error']['message']


def test_what_is_asked_is_not_read_from_the_host(tmp_path, monkeypatch):
  monkeypatch.setattr(HTTPConnection, 'url', property(lambda self: URL('http://x/health')))
  with guarded(tmp_path, ['testserver']) as one:
    assert one.post('/tokenize', json={'prompt': 'x'}).status_code == 401
    keyed = {'Authorization': f'Bearer {KEY}'}
    assert '/nothing' in one.get('/nothing', headers=keyed).json()['error']['message']
    assert isinstance(one.get('/v2/models/x', headers=keyed).json()['error'], str)  # KServe's form
    for host in ('[::1]:80', 'TestServer', 'testserver:8000', ''):
      status = one.get('/v1/models', headers=keyed | {'Host': host}).status_code
      assert status == (200 if 'server' in host.lower() else 421)


def test_no_body_is_read_of_whom_nobody_knows(tmp_path):
  """What is open to all is read, and takes nothing: not even of one who says that he has much."""

  async def run():
    file = tmp_path / 'keys'
    file.write_text(f'ann {KEY}\n')
    made, said = app(service(), Served(name='m'), hosts=['*'], keys=ApiKeys(file)), {}

    async def receive():
      raise AssertionError('a body was read')

    for path in (*PROBES, '/', '/chat.js'):

      async def send(message, path=path):
        said.setdefault(path, message)

      headers = [(b'host', b'x'), (b'content-type', b'application/json')]
      scope = {'type': 'http', 'method': 'POST', 'path': path, 'headers': headers}
      await made(scope, receive, send)
    return said

  for path, start in asyncio.run(run()).items():
    assert start['status'] == 405 and (b'allow', b'GET, HEAD') in start['headers'], path


@pytest.mark.parametrize(
  'method, path, allow',
  [
    ('GET', '/v1/completions', 'POST'),
    ('GET', '/v2/models/m/infer', 'POST'),
    ('DELETE', '/v1/models', 'GET'),
    ('POST', '/health', 'GET'),
  ],
)
def test_a_method_that_is_none_hears_which_are(method, path, allow):
  with TestClient(app(service(), Served(name='m'), hosts=['testserver'])) as one:
    refused = one.request(method, path)
    assert refused.status_code == 405 and allow in refused.headers['allow'], refused.headers
    assert refused.json()['error']


def test_a_slash_too_much_is_another_path():
  """And no redirection to an address that only the server knows, behind a proxy."""
  with TestClient(app(service(), Served(name='m'), hosts=['testserver'])) as one:
    refused = one.post('/v1/completions/', json={'prompt': 'x'}, follow_redirects=False)
    assert refused.status_code == 404 and refused.json()['error']['code'] == 'unknown_url'


def test_a_body_is_read_in_time_that_grows_with_it():
  names = ','.join(f'"{i}":1' for i in range(60_000))
  began = time.process_time()
  with pytest.raises(Denied, match='"59999" is there twice'):
    parsed(f'{{{names},"59999":2}}'.encode())
  assert time.process_time() - began < 1


def of_levels(count):
  return '[' * count + ']' * count


TOOL = '{"type": "function", "function": {"name": "f", "parameters": {"a": %s}}}'
CALL = '{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", '
CALL += '"arguments": "%s"}}]}'
MESSAGES = json.dumps(CHAT['messages'])


@pytest.mark.parametrize('levels', [MOST_DEEP + 1, 960, 980, 985, 5000])
@pytest.mark.parametrize(
  'path, body',
  [
    ('/v1/completions', '{"prompt": %s}'),
    ('/v1/completions', '{"prompt": "x", "foo": %s}'),
    ('/tokenize', '{"prompt": %s}'),
    ('/detokenize', '{"tokens": %s}'),
    ('/v1/embeddings', '{"input": %s}'),
    ('/v2/models/m/infer', '{"inputs": %s}'),
    ('/v1/chat/completions', f'{{"messages": {MESSAGES}, "chat_template_kwargs": {{"m": %s}}}}'),
    ('/v1/chat/completions', f'{{"messages": {MESSAGES}, "tools": [{TOOL}]}}'),
    ('/v1/chat/completions', f'{{"messages": [{CALL}]}}'),
  ],
)
def test_a_body_of_too_many_levels_is_refused(path, body, levels):
  served = service()
  made = app(served, Served(name='m'), hosts=['testserver'])
  with served.by_itself(), TestClient(made, raise_server_exceptions=False) as one:
    headers = {'Content-Type': 'application/json'}
    refused = one.post(path, content=body % of_levels(levels), headers=headers)
    assert refused.status_code == 400 and 'at most 200 levels' in refused.text, refused.text


def test_a_call_of_a_message_has_arguments_of_json():
  served = service()
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['testserver'])) as one:
    asked = CHAT | {'messages': [json.loads(CALL % '[NaN]')]}
    refused = one.post('/v1/chat/completions', json=asked)
    assert refused.status_code == 400 and 'NaN is no number' in refused.text


@pytest.mark.parametrize(
  'path, body',
  [
    ('/tokenize', {'prompt': 'x'}),
    ('/detokenize', {'tokens': [70]}),
    ('/v1/embeddings', {'input': [[5, 6]]}),
    ('/v1/completions', {'prompt': 'x', 'max_tokens': 1}),
  ],
)
def test_bodies_are_read_beside_the_event_loop(monkeypatch, path, body):
  def in_thread(content):
    with pytest.raises(RuntimeError, match='no running'):
      asyncio.get_running_loop()
    return parsed(content)

  monkeypatch.setattr(http, 'parsed', in_thread)
  served = service()
  with served.by_itself(), TestClient(app(served, Served(name='m'), hosts=['testserver'])) as one:
    assert one.post(path, json=body).status_code == 200


def test_who_is_not_served_now_hears_when_to_come_again():
  """Whatever it is that ends: a call, an embedding, a score."""
  assert refusal(Denied('the server ends', status=503, code='device'), '/v1').headers['retry-after']
  assert 'retry-after' not in refusal(Denied('no', status=500), '/v1').headers


def test_requests_at_a_time_are_bounded_and_probes_are_none_of_them():
  """Else a cluster would take a busy server for a dead one."""

  async def run():
    go = asyncio.Event()

    async def inner(scope, receive, send):
      if scope['path'] not in PROBES:
        await go.wait()
      await send({'type': 'http.response.start', 'status': 200, 'headers': []})
      await send({'type': 'http.response.body', 'body': b''})

    guard = ServerGuard(inner, hosts=['*'], requests=2)

    async def ask(path):
      sent = []

      async def send(message):
        sent.append(message)

      scope = {'type': 'http', 'method': 'GET', 'path': path, 'headers': []}
      await guard(scope, None, send)
      return sent[0]['status'], b''.join(each.get('body', b'') for each in sent)

    first = [asyncio.create_task(ask('/v1/models')) for _ in range(2)]
    await asyncio.sleep(0)
    status, body = await ask('/v1/models')
    assert status == 503 and b'2 requests are being answered, of at most 2' in body
    assert [(await ask(path))[0] for path in sorted(PROBES)] == [200] * 4
    go.set()
    assert [(await each)[0] for each in first] == [200, 200]
    assert (await ask('/v1/models'))[0] == 200

  asyncio.run(run())


@pytest.mark.parametrize('waiting', [1, 4000])
def test_as_many_may_be_connected_as_may_wait(waiting):
  """Whatever --waiting is, its 429 is met first."""
  served = service(waiting=waiting)
  assert waiting + served.stats().rows < most_requests(served)
  made = app(served, Served(name='m'), hosts=['*'])
  assert most_requests(served) < config(made, served).limit_concurrency
