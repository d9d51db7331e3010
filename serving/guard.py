"""Who may ask what of a server that others can reach? Whoever calls it by a name that it has, from
no other page, with a key where there are keys, in JSON of bounded size, and in bounded time.

What is asked, and what is answered, is logged by no line, unless whoever serves wants that: only
who, what kind, how long, how much.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import pathlib
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.fields import Denied
from serving.pages import without_port

access = logging.getLogger('serving.access')
log = logging.getLogger(__name__)

LEAST_KEY = 16  # characters
# In which a body has to come, and a piece of an answer has to be taken.
TRANSFER_SECONDS = 60.0
AGAIN = 5.0  # seconds after which who was not served may try again
GONE = 499  # the status in the log of who went before there was an answer; nginx's word
# What balancers and clusters ask: without a key, and by an address instead of a name. Nothing of it
# is a secret.
PROBES = frozenset({'/health', '/ping', '/v2/health/ready', '/v2/health/live'})
READING = ('GET', 'HEAD')  # the methods of what anybody may see
OF_ALL_ANSWERS = {'X-Content-Type-Options': 'nosniff', 'Cache-Control': 'no-store'}
# A name or an address, perhaps with a port. What has more, a path for one, is read by some as a
# part of what is asked for.
HOST = re.compile(r'(\[[0-9a-f:.]+\]|[\w.-]*)(:[0-9]*)?', re.ASCII | re.IGNORECASE)


class Gone(Exception):
  """Nobody takes what is sent."""


class ApiKeys:
  """API keys of a file, one a line: `key` or `name key`; what begins with # says something to
  people. It is read anew when it has changed.
  """

  def __init__(self, path: str | os.PathLike):
    """Raises ValueError for a file without keys, or with a key that is too short, and OSError."""
    self._path = pathlib.Path(path)
    self._read()

  def name(self, given: str) -> str | None:
    """Whose key this is; None for nobody's. How long it takes says nothing of keys."""
    self._reread()
    digest, found = hashlib.sha256(given.encode()).digest(), None
    for name, known in self._known:
      if hmac.compare_digest(digest, known):
        found = name
    return found

  def _reread(self) -> None:
    try:
      if self._path.stat().st_mtime_ns != self._at:
        self._read()
        log.warning('API keys were read anew: %d', len(self._known))
    except (OSError, ValueError) as error:
      log.error('API keys stay as they were: %s', error)

  def _read(self) -> None:
    self._at = self._path.stat().st_mtime_ns
    known = []
    for number, line in enumerate(self._path.read_text(encoding='utf-8').splitlines(), 1):
      words = line.split()
      if not words or words[0].startswith('#'):
        continue
      if len(words) > 2 or len(words[-1]) < LEAST_KEY:
        raise ValueError(
          f'{self._path}, line {number}: a line is `key` or `name key`, and a key has {LEAST_KEY} '
          'characters at least'
        )
      digest = hashlib.sha256(words[-1].encode()).digest()
      known.append((words[0] if len(words) == 2 else digest.hex()[:8], digest))
    if not known:
      raise ValueError(f'{self._path} has no keys; write one a line')
    self._known = known


class ServerGuard:
  """Stands before an app. The app finds in scope['state'] who asks (`key`), the request's `id`, and
  `log`, to which it adds what the access log is to say.
  """

  def __init__(
    self,
    app: ASGIApp,
    *,
    hosts: Sequence[str],
    keys: ApiKeys | None = None,
    body: int = 2**20,
    pages: Sequence[str] = (),
    requests: int = 512,
    log_prompts: bool = False,
    answered: Callable[[int], None] = lambda status: None,
  ):
    """hosts: names that it may be called by; '*' is any. body: bytes of one. pages: paths that
    anybody may see. requests: that are answered at a time, besides PROBES. log_prompts: whether
    lines have what is asked and written, too. answered: hears the status of every answer.
    """
    self._answered = answered
    self._requests, self._now = requests, 0
    self._log_prompts = log_prompts
    self._app, self._keys, self._body = app, keys, body
    self._hosts = {host.lower() for host in hosts}
    self._open = PROBES | {*pages}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    began, said = time.monotonic(), {'status': 500}
    state = scope.setdefault('state', {})
    state |= {'key': '', 'id': f'req-{uuid.uuid4().hex}', 'log': said, 'body': b''}
    state['log_prompts'] = self._log_prompts

    async def answer(message):
      if message['type'] == 'http.response.start':
        said['status'] = message['status']
        names = {name.lower() for name, _ in message['headers']}
        more = {**OF_ALL_ANSWERS, 'x-request-id': state['id']}
        headers = [(name.lower().encode(), value.encode()) for name, value in more.items()]
        added = [(name, value) for name, value in headers if name not in names]
        message = message | {'headers': [*message['headers'], *added]}
      try:
        async with asyncio.timeout(TRANSFER_SECONDS):
          await send(message)
      except (TimeoutError, OSError) as error:
        said['status'] = GONE
        raise Gone from error

    # Who is asked whether it is well has to answer, most of all when there is much to do.
    counted = scope['path'] not in PROBES
    self._now += counted
    try:
      try:
        self._check(Request(scope), state)
        if scope['method'] == 'POST':
          state['body'] = await self._content(Request(scope, receive))
      except Denied as error:
        await refusal(error, scope['path'])(scope, receive, answer)
        return
      await self._app(scope, receive, answer)
    except (ClientDisconnect, Gone):
      said['status'] = GONE
    finally:
      self._now -= counted
      self._answered(said['status'])
      line = {
        'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        'id': state['id'],
        'key': state['key'],
        'method': scope['method'],
        'path': scope['path'][:200],
        'seconds': round(time.monotonic() - began, 4),
      }
      if self._log_prompts and state['body']:
        line['asked'] = state['body'].decode('utf-8', errors='replace')
      access.info('%s', json.dumps(line | said))

  def _check(self, request: Request, state: dict) -> None:
    _check_head(request)
    path = request.scope['path']  # and not that of request.url, which is made of the Host header
    if path in self._open and request.method not in READING:
      # A body of those whom nobody knows is not read.
      raise Denied(
        f'{request.method} {path}: Method Not Allowed', status=405, allow=', '.join(READING)
      )
    if path in PROBES:
      return
    if self._now > self._requests:
      raise Denied(
        f'{self._now - 1} requests are being answered, of at most {self._requests}; come again '
        'later',
        status=503,
        code='busy',
      )
    host = request.headers.get('host', '')
    if '*' not in self._hosts and without_port(host) not in self._hosts:
      # Else a page elsewhere, whose name was made to point here, could ask in a browser's name.
      raise Denied(
        f'{host[:80]!r} is no name of this server; add it with --hosts', status=421, code='host'
      )
    origin = request.headers.get('origin')
    if origin is not None and origin.partition('://')[2].lower() != host.lower():
      raise Denied('another page calls, and there is no sharing between', status=403)
    if self._keys is None or path in self._open:
      return
    scheme, _, given = request.headers.get('authorization', '').partition(' ')
    name = self._keys.name(given.strip()) if scheme.lower() == 'bearer' else None
    if name is None:
      raise Denied(
        'the API key is missing or wrong; send Authorization: Bearer KEY',
        status=401,
        code='invalid_api_key',
      )
    state['key'] = name

  async def _content(self, request: Request) -> bytes:
    """A body. Raises Denied for one that is no JSON, too long, or does not come."""
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind != 'application/json':
      # What a page elsewhere can send without asking is of another type.
      raise Denied('a request is JSON: send Content-Type: application/json', status=415)
    too_long = Denied(f'a body has at most {self._body} bytes', status=413)
    length = request.headers.get('content-length', '0')
    if length.isdecimal() and int(length[:20]) > self._body:
      raise too_long
    content = bytearray()
    try:
      async with asyncio.timeout(TRANSFER_SECONDS):
        async for piece in request.stream():
          content += piece
          if len(content) > self._body:
            raise too_long
    except TimeoutError:
      raise Denied(f'the body has not come within {TRANSFER_SECONDS:g} s', status=408) from None
    return bytes(content)


def _check_head(request: Request) -> None:
  """Raises Denied for a head that a proxy in front might read otherwise than this server: where a
  body ends, and for whom it is, is said once, and plainly.
  """
  lengths = request.headers.getlist('content-length')
  encodings = request.headers.getlist('transfer-encoding')
  if len(lengths) + len(encodings) > 1:
    raise Denied('Content-Length and Transfer-Encoding: give one of them, once', code='framing')
  hosts = request.headers.getlist('host')
  if len(hosts) > 1:
    raise Denied('Host is given more than once', code='framing')
  if hosts and not HOST.fullmatch(hosts[0]):
    raise Denied(
      f'Host: {hosts[0][:80]!r} is no name or address with a port or without; send one',
      code='framing',
    )


def refusal(error: Denied, path: str) -> JSONResponse:
  """As a client of OpenAI's reads it; on KServe's paths, as its clients do."""
  headers = {}
  after = error.retry_after
  if after is None and error.status == 503:
    after = AGAIN
  if after is not None:
    headers['Retry-After'] = str(max(1, round(after)))
  if error.allow:
    headers['Allow'] = error.allow
  if error.status == 401:
    headers['WWW-Authenticate'] = 'Bearer'
  if error.status in (408, 413) or error.code == 'framing':
    headers['Connection'] = 'close'  # what is left of the body is no request
  body = {'error': str(error)} if f'{path}/'.startswith('/v2/') else error.body()
  return JSONResponse(body, error.status, headers)
