"""How is a service asked over HTTP, in the words of OpenAI's API?

    uvicorn.run(app(service, Served(name='chat'), hosts=['localhost']))

Requests are read on other threads, for a long prompt takes time; what comes of them reaches clients
from the event loop. Who goes away, or does not take what is sent, is not written for any more.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from decode.scorer import PromptScores
from serving import call as calls, chat, metrics, wire
from serving.answers import HttpAnswer, failure
from serving.call import Event, NotReady, QueueFull
from serving.fields import Denied, parsed
from serving.guard import GONE, PATIENCE, ApiKeys, ServerGuard, refusal
from serving.pages import HEADERS
from serving.reader import Reader, refusing
from serving.scoring import ScoringFailed
from serving.service import Service
from serving.ticket import Ticket
from serving.wire import AskedCall, Served

AGAIN = 5.0  # seconds after which who was not served may try again
BODY = 2**20  # bytes of a request, and of each token that a row holds so many more
BODY_TOKEN = 16


def app(
  service: Service,
  served: Served,
  *,
  hosts: Sequence[str],
  keys: ApiKeys | None = None,
  watching: metrics.Metrics | None = None,
) -> ASGIApp:
  """The server. hosts: names that it may be called by; '*' is any. keys: None for no keys.
  watching: what /metrics says; None for metrics of its own.
  """
  api = Api(service, served, watching or metrics.Metrics(service, served.name))
  files = chat.routes()

  def page(kind: str, content: bytes):
    async def answer(request: Request) -> Response:
      return Response(content, headers={'Content-Type': kind, **HEADERS})

    return answer

  routes = [Route(path, page(*files[path])) for path in files]
  for path, call in {
    '/health': api.health,
    '/ping': api.health,
    '/v2/health/ready': api.health,
    '/v2/health/live': api.live,
    '/metrics': api.metrics,
    '/v1/models': api.models,
    '/v1/models/{name:path}': api.model,
  }.items():
    routes.append(Route(path, called(call)))
  for path, call in {
    '/tokenize': api.tokenize,
    '/detokenize': api.detokenize,
  }.items():
    routes.append(Route(path, called(call), methods=['POST']))
  for path in ('/v1/completions', '/v1/chat/completions', '/invocations'):
    routes.append(Route(path, WrittenEndpoint(api, path), methods=['POST']))
  inner = Starlette(
    routes=routes, exception_handlers={HTTPException: _not_found, Exception: _failed}
  )
  return ServerGuard(
    inner,
    hosts=hosts,
    keys=keys,
    body=BODY + BODY_TOKEN * service.room(0),
    pages=[*files],
  )


def called(call: Callable[[Request], Awaitable[Response]]):
  """The same, whose refusals are answers."""

  async def answer(request: Request) -> Response:
    try:
      return await call(request)
    except Denied as error:
      return refusal(error)

  return answer


async def _not_found(request: Request, error: HTTPException) -> Response:
  if error.status_code == 404:
    return refusal(wire.unsupported_path(request.url.path))
  refused = Denied(f'{request.method} {request.url.path[:80]}: {error.detail}')
  refused.status = error.status_code
  return refusal(refused)


async def _failed(request: Request, error: Exception) -> Response:
  return refusal(Denied('a fault of the server; its log says more', status=500))


class Api:
  """Answers that are there at once."""

  def __init__(self, service: Service, served: Served, watching: metrics.Metrics):
    self.service, self.served, self.watching = service, served, watching
    self.reader = Reader(service, served)

  async def health(self, request: Request) -> Response:
    """Whether it takes requests."""
    done, total = self.service.progress
    said = {'status': self.service.state, 'compiled': done, 'programs': total}
    return JSONResponse(said, 200 if self.service.state == calls.READY else 503)

  async def live(self, request: Request) -> Response:
    """Whether the process answers; what starts, or drains, is no reason to kill it."""
    return JSONResponse({'status': self.service.state})

  async def metrics(self, request: Request) -> Response:
    return Response(self.watching.text(), media_type=metrics.TYPE)

  async def models(self, request: Request) -> Response:
    return JSONResponse({'object': 'list', 'data': [self._card(n) for n in self.reader.models]})

  async def model(self, request: Request) -> Response:
    name = request.path_params['name']
    self.reader.adapter({'model': name})
    return JSONResponse(self._card(name))

  async def tokenize(self, request: Request) -> Response:
    """Ids of a text, or of a chat, as a model reads them."""
    given = wire.tokens(parsed(request.state.body))
    self.reader.adapter(given)

    def ids():
      if 'messages' in given:
        return self.reader.chat_ids(given['messages'])
      return self.service.encoded(given['prompt'])

    made = await asyncio.to_thread(ids)
    most = self.service.room(0, self.reader.adapter(given))
    return JSONResponse({'tokens': made, 'count': len(made), 'max_model_len': most})

  async def detokenize(self, request: Request) -> Response:
    given = wire.DETOKENIZE('', parsed(request.state.body))
    self.reader.adapter(given)
    with refusing():
      return JSONResponse({'prompt': self.service.tokenizer.decode(given['tokens'])})

  def _card(self, name: str) -> dict:
    adapter = '' if name == self.served.name else name
    return {
      'id': name,
      'object': 'model',
      'created': self.served.created,
      'owned_by': 'tandem',
      'max_model_len': self.service.room(0, adapter),
    } | ({'parent': self.served.name} if adapter else {})


class WrittenEndpoint:
  """An endpoint whose answers the model writes."""

  def __init__(self, api: Api, path: str):
    self._api, self._path = api, path

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    tickets: list[Ticket] = []
    scores: list[Future] = []
    state = scope['state']
    try:
      try:
        if self._api.service.state != calls.READY:
          raise NotReady(self._api.service.state)
        asked = await asyncio.to_thread(self._asked, state)
        await self._submit(asked, tickets, scores)
        answer = HttpAnswer(asked, tickets, self._api.service.tokenizer)
        async with _watched(receive, [*tickets, *scores], state['log']):
          answer.scores = await self._scored(scores)
          if asked.stream:
            await self._stream(asked, answer, tickets, scope, receive, _patient(send))
          else:
            body = await self._whole(answer, tickets)
            await JSONResponse(body)(scope, receive, _patient(send))
      except (NotReady, QueueFull) as error:
        raise _unserved(error) from error
    except Denied as error:
      await refusal(error)(scope, receive, send)
    except _Gone:
      state['log']['status'] = GONE
    finally:
      for each in [*tickets, *scores]:
        each.cancel()
      self._note(state['log'], tickets)

  def _asked(self, state: dict) -> AskedCall:
    values, reader = parsed(state['body']), self._api.reader
    chats = self._path == '/v1/chat/completions'
    if self._path == '/invocations':
      if ('messages' in values) == ('prompt' in values):
        raise Denied('give one of messages (a chat) and prompt (a completion)', 'messages')
      chats = 'messages' in values
    return (reader.chat if chats else reader.completion)(values, state['key'])

  async def _submit(self, asked: AskedCall, tickets: list[Ticket], scores: list[Future]) -> None:
    service = self._api.service
    for call in asked.calls:
      with refusing():
        tickets.append(await asyncio.to_thread(service.submit, call))
        if asked.scores >= 0:
          known = call.prompt, call.options.adapter, asked.scores
          scores.append(await asyncio.to_thread(service.score, *known))

  async def _scored(self, scores: Sequence[Future]) -> list[PromptScores]:
    """Of each prompt; its text is written meanwhile."""
    try:
      return [await asyncio.wrap_future(each) for each in scores]
    except ScoringFailed as error:
      status = 500 if self._api.service.state == calls.READY else 503
      raise Denied(str(error), status=status, code=calls.DEVICE) from error
    except asyncio.CancelledError:
      if any(each.cancelled() for each in scores):
        raise _Gone from None
      raise

  async def _whole(self, answer: HttpAnswer, tickets: Sequence[Ticket]) -> dict:
    async with contextlib.aclosing(merged(tickets)) as events:
      async for prompt, event in events:
        self._api.watching.heard(answer.since(prompt, event), event)
        _check(event)
        for _ in answer.add(prompt, event):
          pass
    _check_served(answer, tickets)
    return answer.whole()

  async def _stream(self, asked, answer, tickets, scope, receive, send) -> None:
    """Pieces, as events of server-sent ones. What goes wrong before the first is an answer like any
    other; behind it, an event is all that can say it.
    """
    begun = False

    async def say(content: bytes, more: bool = True) -> None:
      nonlocal begun
      if not begun:
        begun = True
        headers = [(b'content-type', b'text/event-stream; charset=utf-8')]
        headers += [(b'cache-control', b'no-cache'), (b'x-accel-buffering', b'no')]
        await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
      await send({'type': 'http.response.body', 'body': content, 'more_body': more})

    try:
      async with contextlib.aclosing(merged(tickets)) as events:
        async for prompt, event in events:
          self._api.watching.heard(answer.since(prompt, event), event)
          _check(event)
          if not begun and event.finish == calls.DRAINED:
            _check_served(answer, tickets, event)
          pieces = b''.join(map(sse, answer.add(prompt, event)))
          if pieces:
            await say(pieces)
    except Denied as error:
      if not begun:
        raise
      await say(sse(error.body()), more=False)
      return
    last = sse(answer.last()) if asked.include_usage else b''
    await say(last + b'data: [DONE]\n\n', more=False)

  def _note(self, log: dict, tickets: Sequence[Ticket]) -> None:
    """For the access log, and the metrics."""
    if not tickets:
      return
    usages = [ticket.usage for ticket in tickets]
    log['prompt_tokens'] = sum(usage.prompt for usage in usages)
    log['cached_tokens'] = sum(usage.cached for usage in usages)
    log['completion_tokens'] = sum(usage.completion for usage in usages)
    for ticket in tickets:
      self._api.watching.ended(ticket)


class _Gone(Exception):
  """Nobody takes what is sent."""


def _check(event: Event) -> None:
  """Raises Denied for a sample that has failed."""
  if event.finish == calls.FAILED:
    raise failure(event)


def _check_served(
  answer: HttpAnswer, tickets: Sequence[Ticket], event: Event | None = None
) -> None:
  """Raises Denied where all that there is of an answer is that the server stops."""
  finishes = [event.finish] if event is not None else answer.finishes
  written = sum(ticket.usage.completion for ticket in tickets)
  if not written and all(finish == calls.DRAINED for finish in finishes):
    raise _unserved(NotReady(calls.DRAINING))


def _unserved(error: NotReady | QueueFull) -> Denied:
  if isinstance(error, QueueFull):
    return Denied(str(error), status=429, code='queue_full', retry_after=error.retry_after)
  return Denied(str(error), status=503, code=error.state, retry_after=AGAIN)


def sse(said: dict) -> bytes:
  """A server-sent event. What is not ASCII is escaped: U+2028 ends a line for some clients."""
  return f'data: {json.dumps(said, separators=(",", ":"), allow_nan=False)}\n\n'.encode()


async def merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Event]]:
  """Events of several tickets, as they come, each with its ticket's number. They wait until they
  are taken.
  """
  if len(tickets) == 1:
    async with contextlib.aclosing(aiter(tickets[0])) as events:
      async for event in events:
        yield 0, event
    return
  queue: asyncio.Queue = asyncio.Queue(1)

  async def pump(number, ticket):
    async with contextlib.aclosing(aiter(ticket)) as events:
      async for event in events:
        await queue.put((number, event))
    await queue.put((number, None))

  pumps = [asyncio.create_task(pump(i, ticket)) for i, ticket in enumerate(tickets)]
  try:
    left = len(tickets)
    while left:
      number, event = await queue.get()
      if event is None:
        left -= 1
      else:
        yield number, event
  finally:
    for task in pumps:
      task.cancel()
    await asyncio.gather(*pumps, return_exceptions=True)


@contextlib.asynccontextmanager
async def _watched(
  receive: Receive, asked: Sequence[Ticket | Future], log: dict
) -> AsyncIterator[None]:
  """A block in which a client that goes away cancels what it has asked for."""

  async def watch():
    while (await receive())['type'] != 'http.disconnect':
      pass
    log['gone'] = True
    for each in asked:
      each.cancel()

  watching = asyncio.create_task(watch())
  try:
    yield
  finally:
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


def _patient(send: Send) -> Send:
  """The same, which raises _Gone where what is sent is not taken in time."""

  async def within(message) -> None:
    try:
      async with asyncio.timeout(PATIENCE):
        await send(message)
    except (TimeoutError, OSError) as error:
      raise _Gone from error

  return within
