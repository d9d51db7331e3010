"""How does a model call tools? It writes a call as JSON, because it has to (a schema), or because
its template taught it how (<tool_call>..</tool_call>); what it wrote is then read.

A constraint has a name and arguments of one call: {"name": .., "arguments": {..}}.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from data.chat import ChatTemplate
from serving.fields import Denied, boolean, json_object, mapping, one_of, text, wrong

OPEN, CLOSE = '<tool_call>', '</tool_call>'
NO_PARAMETERS = {'type': 'object', 'properties': {}, 'additionalProperties': False}

check_tool = mapping(
  {
    'type': one_of('function'),
    'function': mapping(
      {'name': text, 'description': text, 'parameters': json_object, 'strict': boolean}, ('name',)
    ),
  },
  ('type', 'function'),
)
check_call = mapping(
  {
    'id': text,
    'type': one_of('function'),
    'function': mapping({'name': text, 'arguments': text}, ('name', 'arguments')),
  },
  ('type', 'function'),
)
_NAMED = mapping(
  {'type': one_of('function'), 'function': mapping({'name': text}, ('name',))},
  ('type', 'function'),
)


def check_choice(name: str, value: Any) -> Any:
  """One of none, auto and required, or the name of a tool, as {'name': ..}."""
  if isinstance(value, str):
    return one_of('none', 'auto', 'required')(name, value)
  if not isinstance(value, dict):
    raise wrong(name, value, 'none, auto, required, or an object that names a function')
  return _NAMED(name, value)['function']


def readable(messages: Sequence[Mapping]) -> list[dict]:
  """Messages as templates read them: arguments of a call are an object there. Raises Denied."""
  return [
    {**message, 'tool_calls': [_call(i, call) for call in message['tool_calls']]}
    if 'tool_calls' in message
    else dict(message)
    for i, message in enumerate(messages)
  ]


def _call(i: int, call: Mapping) -> dict:
  place = f'messages[{i}].tool_calls'
  try:
    arguments = json.loads(call['function']['arguments'])
  except (ValueError, RecursionError) as error:
    raise Denied(f'{place}: arguments are no JSON: {error}', place) from error
  return {**call, 'function': {**call['function'], 'arguments': arguments}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
  """Of a request.

  Attributes:
    tools: as the template reads them. forced: names of those of which it has to call one; () where
      it may write what it likes. several: whether there may be several calls.
  """

  tools: tuple[Mapping, ...]
  forced: tuple[str, ...]
  several: bool

  @classmethod
  def of(cls, given: Mapping[str, Any], template: ChatTemplate | None) -> 'Tools | None':
    """None where no tool is to be called. Raises Denied."""
    tools, choice = given.get('tools'), given.get('tool_choice')
    if not tools:
      for name in ('tool_choice', 'parallel_tool_calls'):
        if name in given and choice != 'none':
          raise Denied(f'{name} without tools', name)
      return None
    choice = 'auto' if choice is None else choice
    names = [tool['function']['name'] for tool in tools]
    if len({*names}) < len(names):
      raise Denied('two of tools have one name', 'tools')
    if choice == 'none':
      return None
    source = '' if template is None else template.source
    if choice == 'auto':
      if 'tools' not in source or OPEN not in source:
        raise Denied(
          'tool_choice=auto: the chat template of this model shows it no tools, or does not teach '
          f'it to write {OPEN}; give tool_choice=required, or the name of a tool, and describe it '
          'in a message',
          'tool_choice',
        )
      forced = ()
    elif choice == 'required':
      forced = tuple(names)
    elif choice['name'] not in names:
      raise Denied(f'tool_choice: {choice["name"]!r} is none of tools', 'tool_choice')
    else:
      forced = (choice['name'],)
    if forced and given.get('parallel_tool_calls'):
      raise Denied(
        'parallel_tool_calls with a call that is forced, which is one; leave it out',
        'parallel_tool_calls',
      )
    several = given.get('parallel_tool_calls', True)
    return cls(tools=tuple(tools), forced=forced, several=several)

  @property
  def variables(self) -> dict[str, Any]:
    """For the template."""
    return {'tools': list(self.tools)}

  def keeps(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the text keeps to, as a Call has it. Raises Denied."""
    for name in ('regex', 'response_format'):
      if name in given:
        raise Denied(f'{name} with tools; leave out one, or give tool_choice=none', name)
    if not self.forced:
      return {}
    calls = [
      {
        'type': 'object',
        'properties': {
          'name': {'const': tool['function']['name']},
          'arguments': tool['function'].get('parameters', NO_PARAMETERS),
        },
        'required': ['name', 'arguments'],
        'additionalProperties': False,
      }
      for tool in self.tools
      if tool['function']['name'] in self.forced
    ]
    return {'schema': calls[0] if len(calls) == 1 else {'anyOf': calls}}

  def read(self, content: str) -> tuple[str, list[dict]]:
    """What was written beside calls, and the calls as answers have them. What is no whole call, as
    where max_tokens has cut it off, stays text.
    """
    if self.forced:
      call = _written(content)
      return ('', [call]) if call else (content, [])
    beside, calls, rest = '', [], content
    while OPEN in rest:
      before, _, after = rest.partition(OPEN)
      inner, closed, after = after.partition(CLOSE)
      call = _written(inner) if closed else None
      if call is None or (calls and not self.several):
        break
      beside, rest = beside + before, after
      calls.append(call)
    beside += rest
    return (beside.strip() if calls else content), calls


def _written(content: str) -> dict | None:
  try:
    call = json.loads(content)
    name, arguments = call['name'], call['arguments']
  except (ValueError, RecursionError, KeyError, TypeError):
    return None
  if not isinstance(name, str) or not isinstance(arguments, dict):
    return None
  function = {'name': name, 'arguments': json.dumps(arguments, ensure_ascii=False)}
  return {'id': f'call_{secrets.token_hex(12)}', 'type': 'function', 'function': function}
