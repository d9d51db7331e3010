"""Which fields has a request of OpenAI's form, and of what kind is each? One that is not known, or
not supported, is refused by its name, and none is passed over.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from decode.options import LAW, TABLE
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
from serving.parts import ChatManner

PROMPTS = 64  # of one request
MESSAGES = 4096
SECONDS = 86_400.0
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
LAST = 2**31 - 1
ID = re.compile('0|[1-9][0-9]{0,8}')

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
  'min_tokens': 'give ignore_eos, with max_tokens',
  'beams': 'a search is of no server; use generate.py',
  'num_beams': 'a search is of no server; use generate.py',
  'length_penalty': 'a search is of no server; use generate.py',
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
    reasoning: one of serving.parts.REASONING.
  """

  name: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  created: int = 0
  reasoning: str = 'auto'


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedCall:
  """A request.

  Attributes:
    chat: whether it is a chat's. model: as it named it. calls: one of each prompt.
    stream, include_usage, echo: as they were asked for. ids: whether ids are to be in the answer.
    logprobs: alternatives of each token, or -1 for no log-probabilities at all.
    prompt_logprobs: the same, of the prompt's, in vLLM's form. scores: as many alternatives as
      either that, or an echo with logprobs, takes of a prompt; -1 for none.
    manner: how the parts of a chat's text are told apart; None where there are none.
  """

  chat: bool
  model: str
  calls: tuple[Call, ...]
  stream: bool = False
  include_usage: bool = False
  echo: bool = False
  ids: bool = False
  logprobs: int = -1
  prompt_logprobs: int = -1
  manner: ChatManner | None = None

  @property
  def scores(self) -> int:
    return max(self.prompt_logprobs, self.logprobs if self.echo else -1)

  @property
  def seed(self) -> int:
    """That gives the same again."""
    return self.calls[0].options.seed


# Beyond these a score, times or over one for each token, may be no number of 32 bits any more.
BOUNDS = {
  'repetition_penalty': (0.01, 100.0),
  'presence_penalty': (-100.0, 100.0),
  'frequency_penalty': (-100.0, 100.0),
}


def _law(name: str) -> Check:
  """Of a number that the law of sampling reads."""
  row = TABLE[name]
  if name in BOUNDS:
    low, high = BOUNDS[name]
    return number(f'must be in [{low:g}, {high:g}]', lambda x: low <= x <= high)
  if row.type.__name__.startswith(('int', 'uint')):
    return whole(0, LAST if name == 'top_k' else 2**32 - 1)
  return number(row.range.must, row.range.holds)


def _bias(name: str, value: Any) -> dict[int, float]:
  if not isinstance(value, dict):
    raise wrong(name, value, 'an object of ids and numbers, as {"13": -1.5}')
  biases = {}
  for key, each in value.items():
    if not ID.fullmatch(key):  # as it is written alone, so that none is there twice
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


def prompts_of(most: int) -> Check:
  """One prompt, text or ids, or several of either."""
  ids = several(whole(0, LAST), 1, 2**24)

  def one(name: str, value: Any) -> str | list[int]:
    return value if isinstance(value, str) else ids(name, value)

  def check(name: str, value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
      return [value]
    if isinstance(value, list) and value and not isinstance(value[0], (list, str)):
      return [ids(name, value)]
    return several(one, 1, most)(name, value)

  return check


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
    'tool_calls': several(tool_calls.check_call, 0, 128),
    'tool_call_id': text,
  },
  ('role',),
  {'function_call': 'give tool_calls', 'audio': 'the model reads text', 'refusal': 'give content'},
)


def _message(name: str, value: Any) -> dict:
  message = _MESSAGE(name, value)
  # An answer of ours is a message, too: one that calls nothing, or was cut off amid its thoughts.
  if not message.get('tool_calls', True):
    del message['tool_calls']
  if message['role'] == 'assistant' and 'reasoning_content' in message:
    message.setdefault('content', '')
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
  'prompt_logprobs': whole(0, 1000),
  'priority': whole(0, 100),
  'seconds': number('must be positive, and at most a day', lambda x: 0 < x <= SECONDS),
  'cache_salt': text,
} | {name: _law(name) for name in LAW if name != 'logit_bias'}
COMPLETION = mapping(
  COMMON | {'prompt': prompts_of(PROMPTS), 'logprobs': whole(0, 1000), 'echo': boolean},
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
    'chat_template_kwargs': json_object,
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
