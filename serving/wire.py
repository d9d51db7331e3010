"""What does a request of OpenAI's form ask for? Its fields become calls; one that is not known, or
not supported, is refused by its name, and none is passed over.

    reader = Reader(service, Served(name='chat'))
    asked = reader.chat(parsed(body), key='')     # or completion; Denied, with the field
"""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from data.chat import ChatTemplate, quoted
from decode.options import LAW, TABLE, Options
from decode.sampling import seed_of
from serving import tools as tool_calls
from serving.call import Call
from serving.fields import (
  Check,
  Denied,
  boolean,
  json_object,
  mapping,
  number,
  one_of,
  only,
  several,
  shown,
  text,
  whole,
  wrong,
)
from serving.service import Service

COMPLETION_TOKENS = 16  # of a completion that does not say how many; OpenAI's number
PROMPTS = 64  # of one request
MESSAGES = 4096
SECONDS = 86_400.0
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
LAST = 2**31 - 1

# What clients know, and why there is none of it here.
REFUSED = {
  'best_of': 'ask for n, and choose by logprobs',
  'suffix': 'the model writes behind a prompt, not within a text',
  'user': 'keys say who asks; for prefixes that others do not share give cache_salt',
  'metadata': 'nothing is kept of a request',
  'service_tier': 'a server has one',
  'prediction': 'what drafts is a setting of the server',
  'functions': 'give tools',
  'function_call': 'give tool_choice',
  'modalities': 'the model writes text',
  'audio': 'the model writes text',
  'reasoning_effort': 'say it in a message',
  'verbosity': 'say it in a message',
  'web_search_options': 'the server fetches nothing',
  'prompt_logprobs': 'of the prompt no log-probabilities are given',
  'min_tokens': 'give ignore_eos, with max_tokens',
  'use_beam_search': 'a search is of no server; use generate.py',
  'safety_identifier': 'nothing is kept of a request',
  'prompt_cache_key': 'prefixes are shared by themselves; to keep them apart give cache_salt',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
  """What a server says of itself.

  Attributes:
    name: of the model, as requests have it. defaults: options of requests that do not give them.
    created: when it was made, in seconds since 1970.
  """

  name: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  created: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedCall:
  """A request.

  Attributes:
    chat: whether it is a chat's. model: as it named it. calls: one of each prompt.
    stream, include_usage, echo: as they were asked for. ids: whether ids are to be in the answer.
    logprobs: alternatives of each token, or -1 for no log-probabilities at all.
    tools: how calls of tools are read from the text; None where they are not.
  """

  chat: bool
  model: str
  calls: tuple[Call, ...]
  stream: bool = False
  include_usage: bool = False
  echo: bool = False
  ids: bool = False
  logprobs: int = -1
  tools: tool_calls.Tools | None = None

  @property
  def seed(self) -> int:
    """That gives the same again."""
    return self.calls[0].options.seed


def _law(name: str) -> Check:
  """Of a number that the law of sampling reads."""
  row = TABLE[name]
  if row.type.__name__.startswith(('int', 'uint')):
    return whole(0, LAST if name == 'top_k' else 2**32 - 1)
  return number(row.range.must, row.range.holds)


def _bias(name: str, value: Any) -> dict[int, float]:
  if not isinstance(value, dict):
    raise wrong(name, value, 'an object of ids and numbers, as {"13": -1.5}')
  biases = {}
  for key, each in value.items():
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
      raise Denied(f'{name} has the name {shown(key)}, which is no id of a token', name)
    biases[int(key)] = number('must be in [-100, 100]', lambda x: abs(x) <= 100)(
      f'{name}.{key}', each
    )
  return biases


def _stop(name: str, value: Any) -> list[str]:
  stops = [value] if isinstance(value, str) else several(text, 0, 1024)(name, value)
  if '' in stops:
    raise Denied(f'{name} has an empty text, at which all would end', name)
  return stops


def _prompt(name: str, value: Any) -> list[str | list[int]]:
  """One prompt, text or ids, or several of either."""
  ids = several(whole(0, LAST), 1, 2**24)
  if isinstance(value, str):
    return [value]
  if isinstance(value, list) and value and not isinstance(value[0], (list, str)):
    return [ids(name, value)]
  one = lambda place, each: each if isinstance(each, str) else ids(place, each)  # noqa: E731
  return several(one, 1, PROMPTS)(name, value)


def _content(name: str, value: Any) -> str:
  """A text, or parts of it, which stand in lines of their own."""
  if isinstance(value, str):
    return value
  if not isinstance(value, list):
    raise wrong(name, value, 'a string, or an array of parts of text')
  return '\n'.join(_part(f'{name}[{i}]', part) for i, part in enumerate(value))


def _part(name: str, value: Any) -> str:
  kind = value.get('type') if isinstance(value, dict) else None
  if kind not in ('text', None):
    raise Denied(f'{name}: a part of type {shown(kind)}, and the model reads text alone', name)
  part = mapping({'type': one_of('text'), 'text': text}, ('type', 'text'))(name, value)
  return part['text']


_MESSAGE = mapping(
  {
    'role': one_of(*ROLES),
    'content': _content,
    'name': text,
    'reasoning_content': text,
    'tool_calls': several(tool_calls.check_call, 1, 128),
    'tool_call_id': text,
  },
  ('role',),
  {'function_call': 'give tool_calls', 'audio': 'the model reads text', 'refusal': 'give content'},
)


def _message(name: str, value: Any) -> dict:
  message = _MESSAGE(name, value)
  if 'content' not in message and 'tool_calls' not in message:
    raise Denied(f'{name}.content is missing', f'{name}.content')
  if message['role'] == 'developer':  # OpenAI's newer name of it, which no template has
    message['role'] = 'system'
  return message


_FORMAT = mapping(
  {
    'type': one_of('text', 'json_object', 'json_schema'),
    'json_schema': mapping(
      {'name': text, 'schema': json_object, 'strict': boolean},
      ('name', 'schema'),
      {'description': 'the model is not shown it; say it in a message'},
    ),
  },
  ('type',),
)
COMMON: dict[str, Check] = {
  'model': text,
  'n': whole(1, 2**14),
  'stop': _stop,
  'logit_bias': _bias,
  'stream': boolean,
  'stream_options': mapping(
    {'include_usage': boolean, 'include_obfuscation': only(False)},
  ),
  'response_format': _FORMAT,
  'max_tokens': whole(1, 2**24),
  'store': only(False),
  # Beyond OpenAI's.
  'regex': text,
  'sample_index': whole(0, 2**14),
  'stop_token_ids': several(whole(0, LAST), 0, 1024),
  'ignore_eos': boolean,
  'return_token_ids': boolean,
  'priority': whole(0, 100),
  'seconds': number('must be positive, and at most a day', lambda x: 0 < x <= SECONDS),
  'cache_salt': text,
} | {name: _law(name) for name in LAW if name != 'logit_bias'}
COMPLETION = mapping(
  COMMON | {'prompt': _prompt, 'logprobs': whole(0, 1000), 'echo': boolean},
  ('prompt',),
  REFUSED,
)
CHAT = mapping(
  COMMON
  | {
    'messages': several(_message, 1, MESSAGES),
    'logprobs': boolean,
    'top_logprobs': whole(0, 1000),
    'max_completion_tokens': whole(1, 2**24),
    'tools': several(tool_calls.check_tool, 1, 128),
    'tool_choice': tool_calls.check_choice,
    'parallel_tool_calls': boolean,
  },
  ('messages',),
  REFUSED,
)


def _nested(depth: int) -> dict:
  """The schema of any value with so many objects or arrays within one another."""
  plain = {'type': ['string', 'number', 'boolean', 'null']}
  if not depth:
    return plain
  inner = _nested(depth - 1)
  arrays = {'type': 'array', 'items': inner}
  return {'anyOf': [plain, arrays, {'type': 'object', 'additionalProperties': inner}]}


# No regular expression nests without end; so deep is what json_object writes.
ANY_OBJECT = {'type': 'object', 'additionalProperties': _nested(2)}


class Reader:
  """Makes calls of requests, for a service. Any thread may."""

  def __init__(self, service: Service, served: Served):
    self._service, self._served = service, served
    self.template: ChatTemplate | None = None
    if service.tokenizer.chat_templates:
      self.template = ChatTemplate.of(service.tokenizer)

  @property
  def models(self) -> list[str]:
    """Names that a request may have for its model: the server's, and its adapters'."""
    return [self._served.name, *self._service.adapters]

  def completion(self, values: dict, key: str = '') -> AskedCall:
    """Raises Denied."""
    given = COMPLETION('', values)
    prompts, logprobs = given['prompt'], given.get('logprobs', -1)
    if given.get('echo') and logprobs >= 0:
      raise Denied('logprobs with echo: of a prompt none are given; leave out one', 'logprobs')
    return self._asked(
      given, key, prompts, logprobs, given.get('max_tokens'), COMPLETION_TOKENS, chat=False
    )

  def chat(self, values: dict, key: str = '') -> AskedCall:
    """Raises Denied."""
    given = CHAT('', values)
    most = [given[name] for name in ('max_tokens', 'max_completion_tokens') if name in given]
    if len(most) == 2 and most[0] != most[1]:
      raise Denied('max_tokens and max_completion_tokens differ; give the latter', 'max_tokens')
    if 'top_logprobs' in given and not given.get('logprobs'):
      raise Denied('top_logprobs without logprobs; give logprobs=true', 'top_logprobs')
    logprobs = given.get('top_logprobs', 0) if given.get('logprobs') else -1
    tools = tool_calls.Tools.of(given, self.template)
    variables = {} if tools is None else tools.variables
    prompt = self.chat_ids(given['messages'], **variables)
    new = most[0] if most else None
    return self._asked(given, key, [prompt], logprobs, new, None, chat=True, tools=tools)

  def chat_ids(self, messages: Sequence[Mapping], **variables) -> list[int]:
    """What the model reads that is to answer these messages."""
    tokenizer = self._service.tokenizer
    if self.template is None:
      raise Denied(
        'this model has no chat template: it may be a base model; ask /v1/completions', 'messages'
      )
    try:
      content = self.template.render(
        quoted(tool_calls.readable(messages), tokenizer),
        add_generation_prompt=True,
        **quoted(variables, tokenizer),
      )
      return list(tokenizer.encode(content, special=True))
    except ValueError as error:
      raise Denied(f'messages: {error}', 'messages') from error

  def adapter(self, given: Mapping[str, Any]) -> str:
    """Which adapter a request's model is; '' for none."""
    model = given.get('model', self._served.name)
    if model not in self.models:
      raise Denied(
        f'the model {shown(model)} is not served here; there is {", ".join(self.models)}',
        'model',
        status=404,
        code='model_not_found',
      )
    return '' if model == self._served.name else model

  def _asked(self, given, key, prompts, logprobs, new, default, *, chat, tools=None) -> AskedCall:
    adapter, options = self.adapter(given), self._options(given)
    most, name = self._service.alternatives, 'top_logprobs' if chat else 'logprobs'
    if logprobs > most:
      raise Denied(f'{name}={logprobs}, of at most {most}; ask for fewer', name)
    rows, limit = options['num_samples'] * len(prompts), self._service.limits.samples
    if len(prompts) > 1 and rows > limit:
      raise Denied(
        f'{len(prompts)} prompts with n={options["num_samples"]} are {rows} texts, of at most '
        f'{limit} of one request; send several',
        'prompt',
      )
    seed = given.get('seed', secrets.randbits(32))
    keeps = self._keeps(given) if tools is None else tools.keeps(given)
    calls = []
    for i, prompt in enumerate(prompts):
      with refusing():
        ids = self._service.encoded(prompt)
        room = self._service.room(len(ids), adapter)
        # What was asked for is refused where there is no room; what was not is as much as there is.
        usual = self._served.defaults.get('max_new_tokens') or default or room
        most_new = new or min(usual, room)
        chosen = Options(
          **options,
          adapter=adapter,
          max_new_tokens=max(most_new, 1),
          logprobs=logprobs,
          seed=seed_of(seed, i),
        )
        calls.append(
          Call(
            prompt=prompt,
            options=chosen,
            sample_index=given.get('sample_index'),
            ignore_end=given.get('ignore_eos', False),
            key=key,
            priority=given.get('priority', 0),
            seconds=given.get('seconds'),
            # Keys do not share prefixes: by the time that an answer takes, one would hear what
            # another has asked.
            salt='\0'.join(filter(None, (key, given.get('cache_salt', '')))),
            **keeps,
          )
        )
    streams = given.get('stream', False)
    if 'stream_options' in given and not streams:
      raise Denied('stream_options without stream; give stream=true', 'stream_options')
    return AskedCall(
      chat=chat,
      model=given.get('model', self._served.name),
      calls=tuple(calls),
      stream=streams,
      include_usage=given.get('stream_options', {}).get('include_usage', False),
      echo=given.get('echo', False),
      ids=given.get('return_token_ids', False),
      logprobs=logprobs,
      tools=tools,
    )

  def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those that all prompts share."""
    options = {
      name: value
      for name, value in self._served.defaults.items()
      if name not in ('max_new_tokens', 'stop')
    }
    options |= {name: given[name] for name in LAW if name in given and name != 'seed'}
    stops = given['stop'] if 'stop' in given else self._served.defaults.get('stop', ())
    stops = [stops] if isinstance(stops, str) else stops
    options['stop'] = [*stops, *given.get('stop_token_ids', ())]
    options['num_samples'] = given.get('n', 1)
    return options

  def _keeps(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the text keeps to: regex or schema, as a Call has them."""
    kind = given.get('response_format', {}).get('type', 'text')
    schema = given.get('response_format', {}).get('json_schema')
    if (kind == 'json_schema') != (schema is not None):
      place = 'response_format.json_schema'
      raise Denied(f'{place} goes with type json_schema, and with that alone', place)
    if kind == 'text':
      return {'regex': given['regex']} if 'regex' in given else {}
    if 'regex' in given:
      raise Denied('regex and response_format are both given; leave out one', 'regex')
    return {'schema': ANY_OBJECT if schema is None else schema['schema']}


class refusing:
  """A block whose ValueError is a refusal: who asked can mend it. The names are ours there; those
  of OpenAI's that have others are the fields of NAMES.
  """

  def __enter__(self) -> None:
    pass

  def __exit__(self, kind, error, trace) -> None:
    if isinstance(error, ValueError):
      raise Denied(said(str(error)), param_of(str(error))) from error


# Fields, by the names that options have.
NAMES = {
  'max_new_tokens': 'max_tokens',
  'num_samples': 'n',
  'ids of a bias': 'logit_bias',
}


def said(message: str) -> str:
  """What an error of options says, with the names that requests have."""
  for ours, theirs in NAMES.items():
    message = message.replace(ours, theirs)
  return message


def param_of(message: str) -> str | None:
  """Which field an error of options is about, if it begins with that."""
  name = said(message).replace(':', '=').partition('=')[0]
  return name if name in COMMON or name == 'schema' else None


def tokens(values: dict) -> dict:
  """A request of /tokenize: a prompt, or messages. Raises Denied."""
  given = _TOKENIZE('', values)
  if ('prompt' in given) == ('messages' in given):
    raise Denied('give one of prompt and messages', 'prompt')
  return given


_TOKENIZE = mapping({'model': text, 'prompt': text, 'messages': several(_message, 1, MESSAGES)})
DETOKENIZE = mapping({'model': text, 'tokens': several(whole(0, LAST), 0, 2**24)}, ('tokens',))


def unsupported_path(path: str) -> Denied:
  """Of what OpenAI has, and this server does not."""
  return Denied(f'{path[:80]} is not served here', status=404, code='unknown_url')
