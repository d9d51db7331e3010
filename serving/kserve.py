"""How is a model asked by KServe's Open Inference Protocol, version 2? By tensors of texts.

POST /v2/models/chat/infer
{"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["Once"]}],
 "parameters": {"max_tokens": 32}}
"""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from serving import call as calls
from serving.fields import (
  Denied,
  json_object,
  mapping,
  one_of,
  parsed,
  several,
  text,
  whole,
)
from serving.reader import Reader
from serving.service import Service
from serving.wire import COMMON, PROMPTS, AskedCall
from serving.written import ReadRequest

# A name may have slashes, as those of Hugging Face's hub have.
MODEL = '/v2/models/{name:path}'
INFER = f'{MODEL}/infer'
OUTPUTS = ('text', 'finish_reason')
BINARY = {'parameters': 'tensors are JSON here; binary_data is not'}

_INPUT = mapping(
  {
    'name': one_of('prompt'),
    'datatype': one_of('BYTES'),
    'shape': several(whole(1, PROMPTS), 1, 1),
    'data': several(text, 1, PROMPTS),
  },
  ('name', 'datatype', 'shape', 'data'),
  BINARY,
)
_FIELDS = mapping(
  {
    'id': text,
    'parameters': json_object,
    'inputs': several(_INPUT, 1, 1),
    'outputs': several(mapping({'name': one_of(*OUTPUTS)}, ('name',), BINARY), 1, len(OUTPUTS)),
  },
  ('inputs',),
)
# Of a completion's fields, those whose answers no tensor here has.
_NO_PARAMETERS = ('model', 'stream', 'stream_options', 'return_token_ids', 'prompt_logprobs')
PARAMETERS = tuple(name for name in COMMON if name not in _NO_PARAMETERS)


def reading(reader: Reader) -> Callable[[Scope], ReadRequest]:
  """How a request to infer is read."""

  def read(scope: Scope) -> ReadRequest:
    name, state = scope['path_params']['name'], scope['state']
    reader.adapter({'model': name})
    given = _FIELDS('', parsed(state['body']))
    (tensor,) = given['inputs']
    if tensor['shape'] != [len(tensor['data'])]:
      raise Denied(
        f'inputs[0].shape={tensor["shape"]}, and there are {len(tensor["data"])} data',
        'inputs[0].shape',
      )
    parameters = given.get('parameters', {})
    for each in parameters:
      if each not in PARAMETERS:
        raise Denied(
          f'parameters.{each[:80]} is not known here; known: {", ".join(PARAMETERS)}', 'parameters'
        )
    call = reader.completion(parameters | {'model': name, 'prompt': tensor['data']}, state['key'])
    names = [each['name'] for each in given.get('outputs', ())] or OUTPUTS
    return call, lambda answer: _inferred(answer, call, names, given.get('id'))

  return read


def _inferred(answer: dict, call: AskedCall, names: list[str], number: str | None) -> dict:
  """The answer of a completion as tensors: of each prompt its samples, one after another."""
  said: dict[str, Any] = {'model_name': call.model}
  if number is not None:
    said['id'] = number
  said['outputs'] = [
    {
      'name': name,
      'datatype': 'BYTES',
      'shape': [len(answer['choices'])],
      'data': [choice[name] for choice in answer['choices']],
    }
    for name in names
  ]
  return said | {'parameters': {'seed': answer['seed']}}


def routes(service: Service, reader: Reader) -> dict[str, Callable[[Request], Awaitable[Response]]]:
  """What it says of itself and its models, by paths; who is asked for health: serving.http."""

  async def server(request: Request) -> Response:
    return JSONResponse({'name': 'tandem', 'version': _version(), 'extensions': []})

  async def model(request: Request) -> Response:
    name = request.path_params['name']
    reader.adapter({'model': name})
    texts = {'datatype': 'BYTES', 'shape': [-1]}
    return JSONResponse(
      {
        'name': name,
        'platform': 'tandem',
        'inputs': [{'name': 'prompt'} | texts] if service.writes else [],
        'outputs': [{'name': each} | texts for each in OUTPUTS] if service.writes else [],
      }
    )

  async def ready(request: Request) -> Response:
    name = request.path_params['name']
    reader.adapter({'model': name})
    state = service.state
    said = {'name': name, 'ready': state == calls.READY}
    return JSONResponse(said, 200 if state == calls.READY else 503)

  async def infer(request: Request) -> Response:
    raise Denied(
      f'{request.method} {request.scope["path"][:80]}: POST it', status=405, allow='POST'
    )

  # The first that fits is asked: a model's own path fits all of them.
  return {'/v2': server, f'{MODEL}/ready': ready, INFER: infer, MODEL: model}


def _version() -> str:
  """Of the program, as its wheel has it; of a directory, none."""
  import importlib.metadata

  try:
    return importlib.metadata.version('tandem')
  except importlib.metadata.PackageNotFoundError:
    return ''
