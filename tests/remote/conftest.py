"""A server of S3's protocol in this process, a bucket of it, and what stands between and fails."""

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
from remote import system


@pytest.fixture(scope='session')
def server():
  """The port of a server that is empty in the beginning."""
  moto = pytest.importorskip('moto.server')
  pytest.importorskip('s3fs')
  running = moto.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  running.start()
  yield running.get_host_and_port()[1]
  running.stop()


class Proxy(http.server.ThreadingHTTPServer):
  """Hands requests on to a server, but for those that `faults` names a fault of: a status, 'reset'
  (the connection breaks once the request is read) or 'stall' (no answer for a while).
  """

  daemon_threads = True

  def __init__(self, port: int):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.to, self.seen = port, []
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
def proxy(server):
  made = Proxy(server)
  yield made
  made.shutdown()


_numbers, _reached = itertools.count(), {}


@pytest.fixture
def bucket(request, server, monkeypatch, tmp_path):
  """An empty bucket, as an Address; reached through `proxy` by tests that have it, too."""
  port = server
  if 'proxy' in request.fixturenames:
    proxy = request.getfixturevalue('proxy')
    port = proxy.server_address[1]
    proxy.faults, proxy.seen, proxy.stall = lambda method, path: None, [], 0.0
  settings = {
    'AWS_ENDPOINT_URL': f'http://127.0.0.1:{port}',
    'AWS_ACCESS_KEY_ID': 'key',
    'AWS_SECRET_ACCESS_KEY': 'secret',
    'AWS_DEFAULT_REGION': 'us-east-1',
    'TANDEM_CACHE': str(tmp_path / 'kept'),
    'AWS_CONFIG_FILE': os.devnull,
  }
  for name, value in settings.items():
    monkeypatch.setenv(name, value)
  pause = 'botocore.retries.standard.ExponentialBackoff.delay_amount'
  monkeypatch.setattr(pause, lambda self, context: 0.0)
  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  if _reached.get('port') != port:  # else its clients, which take a second to make, are kept
    system.forget()
    _reached['port'] = port
  name = f'bucket-{next(_numbers)}'
  system.of('s3').mkdir(name)
  yield files.place(f's3://{name}')


@pytest.fixture
def anew():
  """For who changes how it is asked."""
  system.forget()
  yield
  _reached.clear()
