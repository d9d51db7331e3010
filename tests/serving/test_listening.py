"""Is a request that can be read in two ways refused, on a real connection, and does one that never
comes keep none?
"""

import contextlib
import re
import socket
import threading
import time

import pytest
import uvicorn

from serving import listening, metrics
from serving.http import app
from serving.listening import bound, config
from serving.wire import Served
from tests.serving.test_http import service

HEAD = b'POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n'


@contextlib.contextmanager
def served(one=None, kept=None):
  """Where a server listens. kept: gets its set of connections."""
  one, opened = one or service(), bound('127.0.0.1', 0)
  server = uvicorn.Server(config(app(one, Served(name='m'), hosts=['127.0.0.1']), one))
  if kept is not None:
    kept.append(server.server_state.connections)
  thread = threading.Thread(target=server.run, kwargs={'sockets': [opened]}, daemon=True)
  with one.by_itself():
    opened.listen()
    thread.start()
    yield opened.getsockname()
    server.should_exit = True
    thread.join()


@pytest.fixture(scope='module')
def address():
  with served() as where:
    yield where


def answered(address, sent: bytes) -> bytes:
  """All that comes back until the server ends the connection."""
  with socket.create_connection(address) as connection:
    connection.sendall(sent)
    connection.settimeout(60)
    return b''.join(iter(lambda: connection.recv(4096), b''))


@pytest.mark.parametrize(
  'rest',
  [
    b'Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\n',
    b'Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde',
    b'Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n',
    b'Content-Length: +4\r\n\r\nabcd',
    b'Content-Length : 4\r\n\r\nabcd',
    b'Host: evil\r\nContent-Length: 4\r\n\r\nabcd',
    b'Transfer-Encoding: chunked\r\n\r\nZZ\r\nab\r\n0\r\n\r\n',
  ],
)
def test_a_request_has_one_meaning(address, rest):
  """What a proxy may read otherwise is one 400, and behind it nothing is read."""
  said = answered(address, HEAD + rest)
  assert said.count(b'HTTP/1.1 ') == 1 and said.startswith(b'HTTP/1.1 400'), said


@pytest.mark.parametrize('sent', [b'', HEAD])
def test_a_head_that_does_not_come_ends_its_connection(monkeypatch, sent):
  monkeypatch.setattr(listening, 'HEAD_SECONDS', 0.2)
  with served() as address:
    assert answered(address, sent) == b''


@pytest.mark.parametrize('behind', [1, listening.BEHIND + 1])
def test_who_has_gone_is_not_written_for_whatever_came_behind_his_request(behind):
  """And who sends without end has gone, too."""
  begun, go = threading.Event(), threading.Event()

  def write(request):
    begun.set()
    go.wait(60)
    while True:
      yield 100

  one = service(write)
  body = b'{"prompt": "a", "max_tokens": 200}'
  with served(one) as address, socket.create_connection(address) as connection:
    connection.settimeout(30)
    connection.sendall(HEAD + b'Content-Length: %d\r\n\r\n' % len(body) + body)
    assert begun.wait(60)
    connection.sendall(b'G' * behind)
    if behind == 1:
      connection.close()
    until = time.monotonic() + 60
    while not one._scheduler._cancelled and time.monotonic() < until:
      time.sleep(0.001)
    go.set()
    while not one.idle:
      time.sleep(0.001)
  assert one.stats().finished == {'cancelled': 1}


def connected_slowly(address):
  """Whose end takes little that nobody reads."""
  connection = socket.socket()
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
  connection.connect(address)
  connection.settimeout(30)
  return connection


LONG = 2**23  # bytes, more than what lies between two ends takes


def long_answer(monkeypatch):
  monkeypatch.setattr(metrics.Metrics, 'text', lambda self: b'x' * LONG)


@pytest.mark.parametrize('pipelined', [1, 40])
def test_who_takes_nothing_keeps_no_connection(monkeypatch, pipelined):
  """Neither while something is to be sent, nor behind its end, when the connection is closed."""
  long_answer(monkeypatch)
  monkeypatch.setattr('serving.guard.TRANSFER_SECONDS', 0.1)
  monkeypatch.setattr(listening, 'TAKEN', 0.2)
  monkeypatch.setattr(listening, 'KEPT', 0.1)
  kept = []
  with served(kept=kept) as address, connected_slowly(address) as connection:
    connection.sendall(b'GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n' * pipelined)
    until = time.monotonic() + 30
    while not kept[0] and time.monotonic() < until:
      time.sleep(0.001)
    while kept[0] and time.monotonic() < until:
      time.sleep(0.01)
    assert not kept[0]


def test_who_takes_it_slowly_gets_all_of_it(monkeypatch):
  long_answer(monkeypatch)
  monkeypatch.setattr(listening, 'TAKEN', 0.5)
  with served() as address, connected_slowly(address) as connection:
    connection.sendall(b'GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n')
    count, began = 0, time.monotonic()
    while piece := connection.recv(2**16):
      count += len(piece)
      if time.monotonic() - began < 1.2:
        time.sleep(0.02)
    assert count > LONG


@pytest.mark.parametrize(
  'limits, count, asked, says',
  [
    ((1024, 4096), 900, None, ''),
    ((1024, 4096), 2000, (2000, 4096), ''),
    ((1024, -1), 2000, (2000, -1), ''),
    ((1024, 1500), 2000, (1500, 1500), 'may open 1500 files, and .* need 2000: raise ulimit'),
    ((-1, -1), 2000, None, ''),
  ],
)
def test_connections_have_files_or_a_person_is_told(monkeypatch, limits, count, asked, says):
  given, said = [], []
  monkeypatch.setattr(listening.resource, 'getrlimit', lambda kind: limits)
  monkeypatch.setattr(listening.resource, 'setrlimit', lambda kind, both: given.append(both))
  listening._allow_files(count, said.append)
  assert given == [asked] * (asked is not None) and len(said) == bool(says)
  assert re.search(says, ''.join(said))
