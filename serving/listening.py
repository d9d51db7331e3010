"""How does a server listen, and how does it end? On one port, from when weights are read on: while
programs are compiled, /health says so. A signal drains it; a second one ends it now.
"""

import contextlib
import fcntl
import logging
import resource
import signal
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from decode.results import progress_bar
from serving import call as calls
from serving.http import most_requests
from serving.service import Service

# Connections at a time beyond those whose requests are answered (serving.http.most_requests): who
# keeps one without a request, or probes. Who comes beyond these is told so.
MORE_CONNECTIONS = 192
FILES = 256  # open, besides connections
HEAD_SECONDS = 30.0  # seconds in which the head of a request has to come
BEHIND = 2**16  # bytes behind a request, before its answer has ended
KEPT = 30  # seconds that a connection without a request is kept
TAKEN = 60.0  # seconds in which something of what waits to be sent has to be taken
ENDING = 5  # seconds that what is sent has to be taken, when all is written
SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL = 0.2


def bound(host: str, port: int) -> socket.socket:
  """A port that nobody else has, on which nobody is heard so far. Raises ValueError."""
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  opened = socket.socket(family, socket.SOCK_STREAM)
  opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    opened.bind((host, port))
  except OSError as error:
    raise ValueError(
      f'--host={host} --port={port}: {error.strerror}; give another --port (0: one that is free)'
    ) from error
  return opened


def config(app: ASGIApp, service: Service) -> uvicorn.Config:
  """How connections are treated."""
  return uvicorn.Config(
    app,
    http=_Impatient,
    ws='none',
    log_level='warning',
    access_log=False,
    server_header=False,
    limit_concurrency=most_requests(service) + MORE_CONNECTIONS,
    timeout_keep_alive=KEPT,
    timeout_graceful_shutdown=ENDING,
    lifespan='off',
  )


def listen(
  app: ASGIApp,
  service: Service,
  opened: socket.socket,
  drain_seconds: float,
  say: Callable[[str], None],
) -> None:
  """Until a signal has drained the service, or it has failed. say: what a person is to know."""
  server = _Server(config(app, service), service, drain_seconds, say)
  _allow_files(server.config.limit_concurrency + FILES, say)

  def end():
    service.closed()
    server.should_exit = True

  threading.Thread(target=end, daemon=True).start()
  threading.Thread(target=_say_progress, args=(service, say), daemon=True).start()
  server.run(sockets=[opened])


def _allow_files(count: int, say: Callable[[str], None]) -> None:
  """Of this process; a connection is one."""
  allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  if allowed == resource.RLIM_INFINITY or allowed >= count:
    return
  few = most != resource.RLIM_INFINITY and most < count
  resource.setrlimit(resource.RLIMIT_NOFILE, (most if few else count, most))
  if few:
    say(
      f'NOTE: this process may open {most} files, and for all its connections would need {count}: '
      'raise ulimit -n, or lower --waiting'
    )


class _Server(uvicorn.Server):
  """Which a signal drains first: who waits for an answer gets it, who comes is sent away."""

  def __init__(self, config, service: Service, drain_seconds: float, say: Callable[[str], None]):
    super().__init__(config)
    self._service, self._drain_seconds, self._say = service, drain_seconds, say

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    before = {number: signal.signal(number, self._drain) for number in SIGNALS}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def _drain(self, number, _) -> None:
    # Of another thread: whoever holds a lock of the service may be the one that was interrupted.
    threading.Thread(target=self._drained, args=(signal.Signals(number).name,), daemon=True).start()

  def _drained(self, name: str) -> None:
    service = self._service
    if service.state not in (calls.STARTING, calls.READY):
      self._say(f'{name} again: ends now')
      self.should_exit = self.force_exit = True
      return
    stats = service.stats()
    left = stats.rows - stats.free + stats.waiting
    self._say(
      f'{name}: takes no more requests; texts that are not at their end: {left}, which have '
      f'{self._drain_seconds:g} s'
    )
    service.drain(self._drain_seconds)
    # A program that is being compiled is not interrupted.
    if not service.closed(self._drain_seconds + ENDING):
      self.should_exit = self.force_exit = True


class _Impatient(H11Protocol):
  """Which closes connections whose request does not come, ends those whose peers take nothing of
  what is sent, and hears that a client has gone whatever it has sent behind its request.
  """

  _late = _looking = None
  _unsent = 0  # bytes, when it was last looked at

  def connection_made(self, transport) -> None:
    super().connection_made(transport)
    self._late = self.loop.call_later(HEAD_SECONDS, self._close)
    self._looking = self.loop.call_later(TAKEN, self._look)

  def resume_writing(self) -> None:
    self._unsent = 0
    super().resume_writing()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    asked = self.cycle is not None and not self.cycle.response_complete
    if asked:
      self._forget()
      behind = len(self.conn.trailing_data[0])
      if not self.cycle.more_body and behind:
        # uvicorn reads no further than to the next request, nor to the connection's end then: a row
        # would be written for nobody.
        self.flow.resume_reading()
        if behind > BEHIND:
          self._close()
    elif self._late is None:
      self._late = self.loop.call_later(HEAD_SECONDS, self._close)

  def connection_lost(self, exc) -> None:
    self._forget()
    self._looking.cancel()
    super().connection_lost(exc)

  def _look(self) -> None:
    """Closed, a connection is there until all is sent: for ever, where nobody takes it."""
    unsent = 0
    if self.flow.write_paused or self.transport.is_closing():  # and nothing more is written to it
      unsent = _unsent(self.transport)
    if unsent and unsent == self._unsent:
      self.transport.abort()
      return
    self._unsent = unsent
    self._looking = self.loop.call_later(TAKEN, self._look)

  def _forget(self) -> None:
    if self._late is not None:
      self._late.cancel()
      self._late = None

  def _close(self) -> None:
    if not self.transport.is_closing():
      self.transport.close()


def _unsent(transport) -> int:
  """Bytes that the peer has not got, those included that the system has taken, which it does by the
  megabyte; 0 where it has taken all.
  """
  waiting = transport.get_write_buffer_size()
  if not waiting:
    return 0
  count = bytearray(4)
  with contextlib.suppress(OSError):  # of a system that does not say so
    fcntl.ioctl(transport.get_extra_info('socket').fileno(), termios.TIOCOUTQ, count)
  return waiting + int.from_bytes(count, sys.byteorder)


def _say_progress(service: Service, say: Callable[[str], None]) -> None:
  """A bar at a terminal, and a line when it is ready."""
  began, before = time.monotonic(), 0
  with contextlib.ExitStack() as stack:
    moved = None
    while service.state == calls.STARTING:
      done, total = service.progress
      if total and moved is None:
        moved = stack.enter_context(progress_bar(total))
      if moved is not None and done > before:
        moved(done - before, 'compiling')
        before = done
      if service.ready(POLL):
        break
  if service.state == calls.READY:
    programs = service.progress[1]
    say(f'ready: {programs} programs compiled in {time.monotonic() - began:.1f} s')


def log_access() -> None:
  """Lines of the access log go to stderr, as they are."""
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter('%(message)s'))
  access = logging.getLogger('serving.access')
  access.handlers, access.propagate = [handler], False
  access.setLevel(logging.INFO)
