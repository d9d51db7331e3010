"""What does a request of OpenAI's form ask for? Its fields (serving.wire) become calls.

reader = Reader(service, Served(name='chat'))
asked = reader.chat(parsed(body), key='')     # or completion; Denied, with the field
"""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from data.chat import ChatTemplate, quoted
from decode.options import LAW, Options
from decode.sampling import seed_of
from serving import parts, tools as tool_calls
from serving.call import Call
from serving.encoder import WRITES_NOTHING
from serving.fields import SHOWN, Check, Denied, shown
from serving.parts import ChatManner
from serving.service import Service
from serving.wire import ANY_OBJECT, CHAT, COMMON, COMPLETION, AskedCall, Served

COMPLETION_TOKENS = 16  # of a completion that does not say how many; OpenAI's number
RENDERED = ('messages', 'tools', 'add_generation_prompt')  # of a request's own fields


class Reader:
  """Makes calls of requests, for a service. Any thread may."""

  def __init__(self, service: Service, served: Served):
    self._service, self._served = service, served
    self.template: ChatTemplate | None = None
    if service.tokenizer.chat_templates:
      self.template = ChatTemplate.of(service.tokenizer)
    self._thinks = parts.thinks(served.reasoning, self.template, service.tokenizer)
    # A control token is no text, in which its name could be found.
    self._silent = {
      name: i
      for name, i in service.tokenizer.control_ids().items()
      if i < service.vocabulary and not service.tokenizer.decode_bytes([i])
    }
    self._call_form = parts.call_form(self.template, service.tokenizer.control_ids())

  @property
  def models(self) -> list[str]:
    """Names that a request may have for its model: the server's, and its adapters'."""
    return [self._served.name, *self._service.adapters]

  def completion(self, values: dict, key: str = '') -> AskedCall:
    """Raises Denied."""
    given = self._checked(COMPLETION, values)
    prompts, logprobs = given['prompt'], given.get('logprobs', -1)
    if given.get('echo') and logprobs >= 0:
      self._check_scores('logprobs', 'logprobs with echo', logprobs)
    return self._asked(
      given, key, prompts, logprobs, given.get('max_tokens'), COMPLETION_TOKENS, chat=False
    )

  def chat(self, values: dict, key: str = '') -> AskedCall:
    """Raises Denied."""
    given = self._checked(CHAT, values)
    most = [given[name] for name in ('max_tokens', 'max_completion_tokens') if name in given]
    if len(most) == 2 and most[0] != most[1]:
      raise Denied('max_tokens and max_completion_tokens differ; give the latter', 'max_tokens')
    if 'top_logprobs' in given and not given.get('logprobs'):
      raise Denied('top_logprobs without logprobs; give logprobs=true', 'top_logprobs')
    logprobs = given.get('top_logprobs', 0) if given.get('logprobs') else -1
    tools = tool_calls.Tools.of(given, self._call_form)
    variables = self._variables(given) | ({} if tools is None else tools.variables)
    prompt = self._rendered(given['messages'], **variables)
    new = most[0] if most else None
    asked = self._asked(
      given, key, [self._chat_encoded(prompt)], logprobs, new, None, chat=True, tools=tools
    )
    return dataclasses.replace(asked, manner=self._manner(asked.calls[0], prompt, tools))

  def _checked(self, fields: Check, values: dict) -> dict:
    if not self._service.writes:
      raise Denied(WRITES_NOTHING, status=404, code='unsupported')
    return fields('', values)

  def chat_ids(self, messages: Sequence[Mapping], **variables) -> list[int]:
    """What the model reads that is to answer these messages."""
    return self._chat_encoded(self._rendered(messages, **variables))

  def _chat_encoded(self, content: str) -> list[int]:
    try:
      return list(self._service.tokenizer.encode(content, special=True))
    except ValueError as error:
      raise Denied(f'messages: {error}', 'messages') from error

  def _manner(self, call: Call, prompt: str, tools: tool_calls.Tools | None) -> ChatManner | None:
    """How the text behind a prompt is told apart. One that keeps to something has no thoughts."""
    thinks = self._thinks and call.regex is None and call.schema is None
    if not thinks and tools is None:
      return None
    within = thinks and prompt.rstrip().endswith(parts.THINK[0])
    if tools is None:
      return ChatManner(thinks=thinks, within=within)
    return ChatManner(
      thinks=thinks, within=within, calls=tools.form, names=tools.names, several=tools.several
    )

  def _variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the template, that a request gives. Raises Denied for those that it does not read."""
    variables = given.get('chat_template_kwargs', {})
    read = () if self.template is None else self.template.reads
    for name in variables:
      place = f'chat_template_kwargs.{name}'
      if name in RENDERED or name not in read:
        raise Denied(f'{place[:SHOWN]}: the chat template reads no such variable', place[:SHOWN])
    return dict(variables)

  def _rendered(self, messages: Sequence[Mapping], **variables) -> str:
    tokenizer = self._service.tokenizer
    if self.template is None:
      raise Denied(
        'this model has no chat template: it may be a base model; ask /v1/completions', 'messages'
      )
    try:
      return self.template.render(
        quoted(tool_calls.readable(messages), tokenizer),
        add_generation_prompt=True,
        **quoted(variables, tokenizer),
      )
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
    scores = given.get('prompt_logprobs', -1)
    if scores >= 0:
      self._check_scores('prompt_logprobs', 'prompt_logprobs', scores)
      if given.get('stream'):
        raise Denied('prompt_logprobs with stream; leave out one', 'prompt_logprobs')
    limits, rows = self._service.limits, options['num_samples'] * len(prompts)
    limit = min(limits.samples, limits.waiting)
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
      prompt_logprobs=scores,
    )

  def _check_scores(self, name: str, what: str, alternatives: int) -> None:
    most = self._service.alternatives
    if not self._service.scores:
      raise Denied(
        f'{what}: this server scores no prompts; it has to be started with --prompt_logprobs', name
      )
    if alternatives > most:
      raise Denied(f'{name}={alternatives}, of at most {most}; ask for fewer', name)

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
    ids = [self._silent[stop] for stop in stops if stop in self._silent]
    options['stop'] = [*stops, *ids, *given.get('stop_token_ids', ())]
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
  'ignore_end': 'ignore_eos',
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
