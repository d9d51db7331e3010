"""How is a service asked over HTTP, in the words of OpenAI's API, SageMaker's and KServe's?

uvicorn.run(app(service, Served(name='chat'), hosts=['localhost']))
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from serving import call as calls, chat, kserve, metrics, wire
from serving.bodies import json_response
from serving.call import NotReady, QueueFull
from serving.embeddings import AskedEmbeddings
from serving.fields import Denied, parsed
from serving.guard import GONE, ApiKeys, Gone, ServerGuard, refusal
from serving.pages import HEADERS
from serving.reader import Reader, refusing
from serving.service import Service
from serving.wire import AskedCall, Served
from serving.written import ReadRequest, WrittenEndpoint, came, unserved, watched

BODY = 2**20  # bytes of a request, and of each token that a row holds so many more
BODY_TOKEN = 16
BRIEF = 64  # requests at a time that wait for nothing


def app(
  service: Service,
  served: Served,
  *,
  hosts: Sequence[str],
  keys: ApiKeys | None = None,
  watching: metrics.Metrics | None = None,
  traced: Callable[[ASGIApp], ASGIApp] = lambda inner: inner,
  log_prompts: bool = False,
) -> ASGIApp:
  """The server. hosts: names that it may be called by; '*' is any. keys: None for no keys.
  watching: what /metrics says; None for metrics of its own. traced: puts serving.tracing.Traced
  before it. log_prompts: whether the access log has what is asked, and written.
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
    **kserve.routes(service, api.reader),
  }.items():
    routes.append(Route(path, called(call)))
  for path, call in {
    '/tokenize': api.tokenize,
    '/detokenize': api.detokenize,
    '/v1/embeddings': api.embeddings,
  }.items():
    routes.append(Route(path, called(call), methods=['POST']))
  infer = kserve.INFER, kserve.reading(api.reader)
  for path, read in (*api.written.items(), infer):
    endpoint = WrittenEndpoint(service, api.watching, read)
    routes.append(Route(path, endpoint, methods=['POST']))
  inner = Starlette(
    routes=routes, exception_handlers={HTTPException: _not_found, Exception: _failed}
  )
  inner.router.redirect_slashes = False  # to an address that is not this one behind a proxy
  return ServerGuard(
    traced(inner),
    hosts=hosts,
    keys=keys,
    body=BODY + BODY_TOKEN * service.longest(),
    pages=[*files],
    requests=most_requests(service),
    log_prompts=log_prompts,
    answered=api.watching.answered,
  )


def most_requests(service: Service) -> int:
  """Answered at a time: those that have a row, that wait for one, or to be read, and brief ones."""
  return service.stats().rows + 2 * service.limits.waiting + BRIEF


def called(call: Callable[[Request], Awaitable[Response]]):
  """The same, whose refusals are answers."""

  async def answer(request: Request) -> Response:
    try:
      return await call(request)
    except Denied as error:
      return refusal(error, request.scope['path'])

  return answer


async def _not_found(request: Request, error: HTTPException) -> Response:
  path = request.scope['path']
  if error.status_code == 404:
    return refusal(wire.unsupported_path(path), path)
  refused = Denied(
    f'{request.method} {path[:80]}: {error.detail}',
    status=error.status_code,
    allow=(error.headers or {}).get('Allow', ''),
  )
  return refusal(refused, path)


async def _failed(request: Request, error: Exception) -> Response:
  refused = Denied('a fault of the server; its log says more', status=500)
  return refusal(refused, request.scope['path'])


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
    return await asyncio.to_thread(self._tokenized, request.state.body)

  def _tokenized(self, body: bytes) -> Response:
    given = wire.tokens(parsed(body))
    adapter = self.reader.adapter(given)
    with refusing():
      if 'messages' in given:
        ids = self.reader.chat_ids(given['messages'])
      else:
        ids = self.service.encoded(given['prompt'])
    most = self.service.longest(adapter)
    return JSONResponse({'tokens': ids, 'count': len(ids), 'max_model_len': most})

  async def detokenize(self, request: Request) -> Response:
    return await asyncio.to_thread(self._detokenized, request.state.body)

  def _detokenized(self, body: bytes) -> Response:
    given = wire.DETOKENIZE('', parsed(body))
    self.reader.adapter(given)
    with refusing():
      return JSONResponse({'prompt': self.service.tokenizer.decode(given['tokens'])})

  async def embeddings(self, request: Request) -> Response:
    """Vectors of texts."""
    state, service = request.state, self.service

    def read() -> AskedEmbeddings:
      return AskedEmbeddings(parsed(state.body), service, self.reader)

    asked = await asyncio.to_thread(read)
    try:
      with refusing():
        vectors = await asyncio.to_thread(service.embed, asked.texts, asked.adapter, state.key)
      async with watched(request.receive, [vectors], state.log):
        made = await came(vectors, service)
        state.log['prompt_tokens'] = asked.tokens
        return await json_response(lambda: asked.answer(made))
    except (NotReady, QueueFull) as error:
      raise unserved(error) from error
    except Gone:
      raise Denied('whoever asked has gone', status=GONE) from None

  @property
  def written(self) -> dict[str, Callable[[Scope], ReadRequest]]:
    """How requests of texts are read, by their paths."""
    completion, chat = self.reader.completion, self.reader.chat

    def invoked(values: dict, key: str) -> AskedCall:
      if ('messages' in values) == ('prompt' in values):
        raise Denied('give one of messages (a chat) and prompt (a completion)', 'messages')
      return (chat if 'messages' in values else completion)(values, key)

    def reading(call_of: Callable[[dict, str], AskedCall]) -> Callable[[Scope], ReadRequest]:
      def read(scope: Scope) -> ReadRequest:
        state = scope['state']
        return call_of(parsed(state['body']), state['key']), lambda answer: answer

      return read

    paths = {'/v1/completions': completion, '/v1/chat/completions': chat, '/invocations': invoked}
    return {path: reading(call_of) for path, call_of in paths.items()}

  def _card(self, name: str) -> dict:
    adapter = '' if name == self.served.name else name
    return {
      'id': name,
      'object': 'model',
      'created': self.served.created,
      'owned_by': 'tandem',
      'max_model_len': self.service.longest(adapter),
    } | ({'parent': self.served.name} if adapter else {})
