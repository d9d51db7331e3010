"""Which tools may a chat's model call, and what does its text keep to where it has to? What it then
writes is read by serving.parts.

A constraint has a name and arguments of one call: {"name": .., "arguments": {..}}, or of several
calls an array of such.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.fields import (
  TOO_DEEP,
  Denied,
  boolean,
  check_deep,
  json_object,
  mapping,
  no_number,
  one_of,
  text,
  wrong,
)
from serving.parts import CALL, FORCED

SEVERAL = 8  # calls that a text which has to be calls holds at most
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
    arguments = json.loads(call['function']['arguments'], parse_constant=no_number)
    check_deep(arguments)
  except RecursionError as error:
    raise Denied(TOO_DEEP, place) from error
  except ValueError as error:
    raise Denied(f'{place}: arguments are no JSON: {error}', place) from error
  return {**call, 'function': {**call['function'], 'arguments': arguments}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tools:
  """Of a request.

  Attributes:
    tools: as the template reads them. forced: names of those of which it has to call one; () where
      it may write what it likes. form: how calls are written, see serving.parts.
    several: whether there may be several calls.
  """

  tools: tuple[Mapping, ...]
  forced: tuple[str, ...]
  form: str
  several: bool

  @classmethod
  def of(cls, given: Mapping[str, Any], form: str) -> 'Tools | None':
    """None where no tool is to be called. form: in which the model calls them by itself; '' where
    it does not. Raises Denied.
    """
    tools, choice = given.get('tools'), given.get('tool_choice')
    if not tools:
      for name in ('tool_choice', 'parallel_tool_calls'):
        if name in given and choice != 'none':
          raise Denied(f'{name} without tools', name)
      return None
    choice = 'auto' if choice is None else choice
    names = tuple(tool['function']['name'] for tool in tools)
    if len({*names}) < len(names):
      raise Denied('two of tools have one name', 'tools')
    if choice == 'none':
      return None
    if choice == 'auto':
      for i, tool in enumerate(tools):
        if tool['function'].get('strict'):
          place = f'tools[{i}].function.strict'
          raise Denied(
            f'{place} with tool_choice=auto, where a text may be what it likes and calls are not '
            'kept to parameters; give tool_choice=required, or leave strict out',
            place,
          )
      if not form:
        raise Denied(
          'tool_choice=auto: the chat template of this model shows it no tools, or writes calls in '
          f'a form that is not read here ({CALL[0]}, or an object with name and parameters); give '
          'tool_choice=required, or the name of a tool, and describe it in a message',
          'tool_choice',
        )
      several = given.get('parallel_tool_calls', True)
      return cls(tools=tuple(tools), forced=(), form=form, several=several)
    if choice == 'required':
      forced = names
    elif choice['name'] not in names:
      raise Denied(f'tool_choice: {choice["name"]!r} is none of tools', 'tool_choice')
    else:
      forced = (choice['name'],)
    # An array is what a model has to be asked for: one that may be of any length need not end.
    several = given.get('parallel_tool_calls', False)
    return cls(tools=tuple(tools), forced=forced, form=FORCED, several=several)

  @property
  def names(self) -> tuple[str, ...]:
    """Of those that may be called."""
    return self.forced or tuple(tool['function']['name'] for tool in self.tools)

  @property
  def variables(self) -> dict[str, Any]:
    """For the template."""
    return {'tools': list(self.tools)}

  def keeps(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the text keeps to, as a Call has it. Raises Denied."""
    for name, nothing in (('regex', None), ('response_format', {'type': 'text'})):
      if given.get(name, nothing) != nothing:
        raise Denied(f'{name} with tools; leave out one, or give tool_choice=none', name)
    if not self.forced:
      return {}
    calls = [
      {
        'type': 'object',
        'properties': {
          'name': {'const': tool['function']['name']},
          # A document of its own, in which its references are looked up.
          'arguments': tool['function'].get('parameters', NO_PARAMETERS) | {'$id': 'parameters'},
        },
        'required': ['name', 'arguments'],
        'additionalProperties': False,
      }
      for tool in self.tools
      if tool['function']['name'] in self.forced
    ]
    one = calls[0] if len(calls) == 1 else {'anyOf': calls}
    if self.several:
      return {'schema': {'type': 'array', 'items': one, 'minItems': 1, 'maxItems': SEVERAL}}
    return {'schema': one}
