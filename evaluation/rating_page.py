"""How does a person at a browser rate answers that a model wrote, which may hold anything? A page
of three files and three calls; what it is sent is text and stays text.

Whoever calls needs a Host that the server is known by, and the token where there is one; bodies are
bounded. Nothing is fetched from elsewhere.
"""

import hmac
import json
import pathlib
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from evaluation.ratings import PAIRS, PREFERENCE, TIE, Study, Unit, rater_of
from serving.pages import HEADERS, without_port

BODY = 16_384  # bytes
HERE = pathlib.Path(__file__).parent
PAGES = {
  '/': ('rating.html', 'text/html; charset=utf-8'),
  '/rating.js': ('rating.js', 'text/javascript; charset=utf-8'),
  '/rating.css': ('rating.css', 'text/css; charset=utf-8'),
}


class Refused(Exception):
  """What a caller may not, or cannot, do."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Guard:
  """Answers who asks for another host, from another page, or without the token, and puts HEADERS
  on all that is answered.
  """

  def __init__(self, app: ASGIApp, hosts: Sequence[str], token: str):
    self._app, self._token = app, token
    self._hosts = {host.lower() for host in hosts}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return

    async def with_headers(message):
      if message['type'] == 'http.response.start':
        more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
        message = message | {'headers': [*message['headers'], *more]}
      await send(message)

    try:
      self._check(Request(scope))
    except Refused as error:
      await _error(error.status, str(error))(scope, receive, with_headers)
      return
    await self._app(scope, receive, with_headers)

  def _check(self, request: Request) -> None:
    host = request.headers.get('host', '')
    if without_port(host) not in self._hosts:
      # Else a page elsewhere, whose name was made to point here, could read what is shown.
      raise Refused(421, f'{host[:80]!r} is no name of this server; add it with --hosts')
    if request.scope['path'] in PAGES:  # not of request.url, which is made of the Host header
      return
    origin = request.headers.get('origin')
    if origin is not None and origin.partition('://')[2] != host:
      raise Refused(403, 'another page calls')
    if self._token:
      given = request.headers.get('authorization', '').removeprefix('Bearer ')
      if not hmac.compare_digest(given.encode(), self._token.encode()):
        raise Refused(
          401, 'the token is missing or wrong: open the address that the server printed'
        )


def app(study: Study, hosts: Sequence[str], token: str = '') -> ASGIApp:
  """The server of a study. hosts: names that it may be called by; token: '' for none."""
  calls = {'/api/next': _next, '/api/rate': _rate, '/api/back': _back}

  def called(call):
    async def answer(request: Request) -> Response:
      try:
        values = await _body(request)
        return JSONResponse(call(study, _rater(values), values))
      except Refused as error:
        return _error(error.status, str(error))
      except ValueError as error:
        return _error(400, str(error))

    return answer

  def page(name, kind):
    content = (HERE / name).read_bytes()

    async def answer(request: Request) -> Response:
      return Response(content, headers={'Content-Type': kind})

    return answer

  routes = [Route(path, page(*PAGES[path])) for path in PAGES]
  routes += [Route(path, called(call), methods=['POST']) for path, call in calls.items()]
  return Guard(Starlette(routes=routes), hosts, token)


def _next(study: Study, rater: str, values: dict) -> dict:
  """The first unit that this rater has not rated."""
  done = {*study.done(rater)}
  left = [unit for unit in study.order(rater) if unit not in done]
  return _shown(study, rater, left[0] if left else None, len(done))


def _rate(study: Study, rater: str, values: dict) -> dict:
  """Saves a rating, and then shows the next."""
  unit, said = _unit(study, rater, values.get('unit')), values.get('values')
  if not isinstance(said, dict):
    raise Refused(400, 'a rating has values by criterion')
  if study.mode == PAIRS:
    left = study.left_of(rater, unit)
    outcome = {'left': left, 'right': 1 - left, 'tie': TIE}.get(str(said.get(PREFERENCE)))
    if outcome is None:
      raise Refused(400, "a preference is 'left', 'right' or 'tie'")
    said = {PREFERENCE: outcome}
  study.save(rater, unit, {name: said.get(name) for name in study.criteria})
  return _next(study, rater, values)


def _back(study: Study, rater: str, values: dict) -> dict:
  """The one before what is shown, of those that were rated; or what was rated last."""
  done = study.done(rater)
  names = [study.name_of(rater, unit) for unit in done]
  at = names.index(values['unit']) if values.get('unit') in names else len(done)
  return _shown(study, rater, done[at - 1], len(done)) if at else _next(study, rater, values)


def _shown(study: Study, rater: str, unit: Unit | None, done: int) -> dict:
  """What the page is told: texts, never whose they are."""
  state = {'done': done, 'total': len(study.order(rater)), 'mode': study.mode, 'unit': None}
  if unit is None:
    return state
  item, left, values = study.items[unit.item], study.left_of(rater, unit), study.values(rater, unit)
  answers = [item.answers[left]]
  if study.mode == PAIRS:
    answers.append(item.answers[1 - left])
    said = {left: 'left', 1 - left: 'right', TIE: 'tie'}
    values = {name: said[value] for name, value in values.items()}
  return state | {
    'unit': study.name_of(rater, unit),
    'prompt': item.prompt,
    'answers': answers,
    'criteria': study.criteria,
    'values': values,
  }


def _unit(study: Study, rater: str, name: object) -> Unit:
  for unit in study.order(rater):
    if study.name_of(rater, unit) == name:
      return unit
  raise Refused(404, 'this study does not have that; load the page again')


def _rater(values: dict) -> str:
  return rater_of(values.get('rater'))


async def _body(request: Request) -> dict:
  """Raises Refused for one that is too long, or no object."""
  if request.headers.get('content-type', '').partition(';')[0].strip() != 'application/json':
    raise Refused(415, 'a call is JSON: Content-Type: application/json')
  content = b''
  async for piece in request.stream():
    content += piece
    if len(content) > BODY:
      raise Refused(413, f'a body has at most {BODY} bytes')
  try:
    values = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise Refused(400, f'that is no JSON: {error}') from error
  if not isinstance(values, dict):
    raise Refused(400, 'a call is an object of JSON')
  return values


def _error(status: int, message: str) -> Response:
  return JSONResponse({'error': message}, status)
