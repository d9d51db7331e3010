"""Is a field of a request what it has to be? Each is checked by one function, and what is not right
is refused with its name, the value and the remedy, in the form that OpenAI's clients read.
"""

import collections
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SHOWN = 80  # characters of a value that an error repeats
MOST_DEEP = 200  # levels of a body; beyond some hundreds what goes through them has no stack left
TOO_DEEP = f'the body is nested too deep: it has at most {MOST_DEEP} levels; make it flatter'

# What a field's check gives, of its name and its value.
Check = Callable[[str, Any], Any]

# How OpenAI calls kinds of errors.
KINDS = {401: 'authentication_error', 404: 'not_found_error', 429: 'rate_limit_error'}


class Denied(Exception):
  """What a server does not do for who asks.

  Attributes:
    status: of HTTP. param: the field, or None. code: a word for programs, or None.
    retry_after: seconds after which it may do so, or None. allow: methods that it takes.
  """

  def __init__(
    self,
    message: str,
    param: str | None = None,
    *,
    status: int = 400,
    code: str | None = None,
    retry_after: float | None = None,
    allow: str = '',
  ):
    super().__init__(message)
    self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
    self.allow = allow

  def body(self) -> dict:
    """As OpenAI's clients read it."""
    kind = KINDS.get(self.status, 'server_error' if self.status >= 500 else 'invalid_request_error')
    said = {'message': str(self), 'type': kind, 'param': self.param, 'code': self.code}
    return {'error': said}


def parsed(content: bytes) -> dict:
  """A body of JSON, an object. Raises Denied for what is something else, also for what Python
  takes and JSON does not have: NaN, names that are there twice, halves of characters.
  """
  try:
    text = content.decode('utf-8')
  except UnicodeDecodeError as error:
    raise Denied(f'the body is not UTF-8, from byte {error.start} on') from error
  try:
    values = json.loads(text, object_pairs_hook=_once, parse_constant=no_number)
    if '\\u' in text:
      json.dumps(values, ensure_ascii=False).encode()
  except RecursionError as error:
    raise Denied(TOO_DEEP) from error
  except UnicodeEncodeError as error:
    raise Denied('the body has half of a character (a lone surrogate): no text has that') from error
  except ValueError as error:
    raise Denied(f'the body is no JSON: {error}') from error
  if not isinstance(values, dict):
    raise Denied(f'the body is {type_of(values)}; give an object')
  check_deep(values)
  return values


def check_deep(values: Any) -> None:
  """Raises Denied for a value of JSON of more levels than MOST_DEEP."""
  level, deep = [values], 0
  while level := [each for each in level if isinstance(each, (dict, list))]:
    deep += 1
    if deep > MOST_DEEP:
      raise Denied(TOO_DEEP)
    inner = (each.values() if isinstance(each, dict) else each for each in level)
    level = [*itertools.chain.from_iterable(inner)]


def _once(pairs: Sequence[tuple[str, Any]]) -> dict:
  values = dict(pairs)
  if len(values) < len(pairs):
    counts = collections.Counter(name for name, _ in pairs)
    ((twice, _),) = counts.most_common(1)
    raise ValueError(f'{shown(twice)} is there twice')
  return values


def no_number(name: str) -> None:
  """Of what Python reads as a number, and JSON does not have. Raises ValueError."""
  raise ValueError(f'{name} is no number of JSON')


def type_of(value: Any) -> str:
  """What JSON calls it."""
  names = {dict: 'an object', list: 'an array', str: 'a string', bool: 'a boolean'}
  return 'null' if value is None else names.get(type(value), 'a number')


def shown(value: Any) -> str:
  """A value within an error: no more than its beginning."""
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= SHOWN else f'{text[:SHOWN]}...'


def wrong(name: str, value: Any, must: str) -> Denied:
  """What is said of a value that is not as it must be."""
  return Denied(f'{name}={shown(value)} must be {must}', name)


def boolean(name: str, value: Any) -> bool:
  if not isinstance(value, bool):
    raise wrong(name, value, 'true or false')
  return value


def text(name: str, value: Any) -> str:
  if not isinstance(value, str):
    raise wrong(name, value, 'a string')
  return value


def whole(least: int, most: int) -> Check:
  """Of integers in [least, most]."""

  def check(name, value):
    # A client may write 1.0, which JSON does not tell from 1.
    is_whole = type(value) is int or (type(value) is float and value.is_integer())
    if not is_whole or not least <= value <= most:
      raise wrong(name, value, f'an integer in [{least}, {most}]')
    return int(value)

  return check


def number(must: str, holds: Callable[[float], bool]) -> Check:
  """Of finite numbers. must: how an error says which."""

  def check(name, value):
    # An integer may be one that no float holds.
    try:
      right = type(value) in (int, float) and math.isfinite(value) and holds(float(value))
    except OverflowError:
      right = False
    if not right:
      raise Denied(f'{name}={shown(value)} {must}', name)
    return float(value)

  return check


def several(check: Check, least: int, most: int) -> Check:
  """Of arrays of so many, each checked."""

  def check_all(name, value):
    if not isinstance(value, list):
      raise wrong(name, value, 'an array')
    if not least <= len(value) <= most:
      raise Denied(f'{name} has {len(value)} parts, of [{least}, {most}]', name)
    return [check(f'{name}[{i}]', each) for i, each in enumerate(value)]

  return check_all


def one_of(*known: str) -> Check:
  def check(name, value):
    if not isinstance(value, str) or value not in known:
      raise wrong(name, value, f'one of {", ".join(known)}')
    return value

  return check


def only(value: Any) -> Check:
  """Of what a server does anyway."""

  def check(name, given):
    if given is not value and given != value:
      raise Denied(f'{name}={shown(given)} is not supported; leave it out', name)
    return value

  return check


def mapping(
  fields: Mapping[str, Check], needed: Sequence[str] = (), refused: Mapping[str, str] = {}
) -> Check:
  """Of objects that have these fields and no others; null is as if it were not there. refused:
  fields that clients know, and why there are none of them.
  """

  def check(name, value):
    if not isinstance(value, dict):
      raise wrong(name, value, 'an object')
    within = f'{name}.' if name else ''
    checked = {}
    for key, each in value.items():
      if each is None:
        continue  # as clients write what they leave out, whatever its name is
      place = f'{within}{key}' if len(key) <= SHOWN else f'{within}{key[:SHOWN]}...'
      if key in refused:
        raise Denied(f'{place} is not supported: {refused[key]}', place, code='unsupported')
      if key not in fields:
        known = ', '.join(fields)
        raise Denied(f'{place} is not known here; known: {known}', place, code='unknown_field')
      checked[key] = fields[key](place, each)
    for key in needed:
      if key not in checked:
        raise Denied(f'{within}{key} is missing', f'{within}{key}')
    return checked

  return check


def json_object(name: str, value: Any) -> dict:
  if not isinstance(value, dict):
    raise wrong(name, value, 'an object')
  return value
