r"""Which texts does a JSON schema allow, as one regular expression (of Rust's regex crate, see
decode.constrain)?

Every text that the expression accepts is valid JSON that the schema accepts. Not every such JSON is
written: properties come in the schema's order, only those that it names, characters stand for
themselves (no \u escapes), and one space at most follows ':' and ','. A keyword that could not be
kept raises; none is passed over. A format is kept by its shape: 2023-02-29 is a date to it. A
pattern is ECMA-262's, see decode.ecma. A schema with an $id is a document of its own, wherever it
stands: references in it are to its own places.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from decode import ecma

# They say nothing about what is valid.
ANNOTATIONS = {
  '$schema',
  '$id',
  '$comment',
  '$defs',
  'definitions',
  'title',
  'description',
  'default',
  'examples',
  'deprecated',
  'readOnly',
  'writeOnly',
}
CHARACTER = r'(?:[^"\\\x00-\x1F]|\\["\\/bfnrt])'
NUMBER = r'-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?'
_DATE = '[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])'
_HOURS = r'(?:[01][0-9]|2[0-3]):[0-5][0-9]'
_TIME = rf'{_HOURS}:[0-5][0-9](?:\.[0-9]+)?(?:Z|[+-]{_HOURS})'
FORMATS = {
  'date': _DATE,
  'time': _TIME,
  'date-time': f'{_DATE}T{_TIME}',
  'uuid': '[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}',
}
MOST_DIGITS = 100  # of a bound: an expression of all integers below it grows with their square
# Characters that are written for a schema, those of what stands within another one again. What
# decode.constrain.MOST_PLACES lets through has some 100,000 in its end.
MOST_WRITTEN = 2**21
EACH = 16  # characters that one takes at least, so that short ones have an end, too
TYPES = {  # the keywords of each type, and the Python types that json reads it as
  'string': ({'minLength', 'maxLength', 'pattern', 'format'}, (str,)),
  'integer': ({'minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum'}, (int,)),
  'number': (set(), (int, float)),
  'boolean': (set(), (bool,)),
  'null': (set(), (type(None),)),
  'array': ({'items', 'minItems', 'maxItems'}, (list,)),
  'object': ({'properties', 'required', 'additionalProperties'}, (dict,)),
}


def to_regex(
  schema: Mapping[str, Any] | str | os.PathLike,
  plain: Callable[[Sequence[str]], Sequence[bool]],
) -> str:
  """The regular expression of a schema.

  Args:
    schema: as a dict, as JSON text, or as the path (a PathLike, not text) of a file of it.
    plain: whether each of some regular expressions accepts only texts that stand for themselves
      within a JSON string, for all that are a `pattern`: it is asked once.

  Raises:
    ValueError: a file that can't be read, no JSON, a schema that can't be kept, or whose expression
      is too long: it names the place, what stands there, and what can.
  """
  if isinstance(schema, Mapping):
    root = schema
  else:
    try:
      text = schema if isinstance(schema, str) else pathlib.Path(schema).read_text(encoding='utf-8')
      root = json.loads(text)
    except OSError as error:
      raise ValueError(
        f'schema={str(schema)!r}: {error.strerror}; give a file of JSON, or the JSON itself'
      ) from error
    except (ValueError, RecursionError) as error:
      raise ValueError(
        f'schema={str(schema)[:200]!r} is not JSON: {error}; for a file, give a pathlib.Path'
      ) from error
  writer = _Writer(root)
  try:
    regex = writer.any(root, '#', ())
  except RecursionError as error:
    raise ValueError(
      'the schema is nested deeper than it can be followed; write it flatter'
    ) from error
  writer.check_patterns(plain)
  return regex


class _Writer:
  """Writes one document's schemas; `where` is a place in it, `inside` the references that led
  there.
  """

  def __init__(self, root: Any):
    self.root, self.base = root, '#'  # the document that references are to, and where it begins
    self.written = 0  # characters, of what stands within another one again
    self.patterns: dict[str, tuple[str, str]] = {}  # in Rust's syntax, to where, and as it stands

  def any(self, schema: Any, where: str, inside: Sequence[str]) -> str:
    document = self.root, self.base
    if schema is not self.root and _is_document(schema):
      # What led there is of another document, whose places have the same names.
      self.root, self.base, inside = schema, where, ()
    text = self.one(schema, where, inside)
    self.root, self.base = document
    self.count(len(text) + EACH, where)
    return text

  def count(self, characters: int, where: str) -> None:
    """Raises ValueError where more has been written than may be, before it takes all memory: each
    level may double what is within it.
    """
    self.written += characters
    if self.written > MOST_WRITTEN:
      raise ValueError(
        f'schema at {where[:200]}: by here its expression takes more than {MOST_WRITTEN:,} '
        'characters to write, for each place has a copy of what it holds or refers to, and of '
        'properties that may be left out several: require them, nest fewer levels, or refer to '
        'less'
      )

  def check_patterns(self, plain: Callable[[Sequence[str]], Sequence[bool]]) -> None:
    """Raises ValueError for a pattern whose texts a JSON string must escape."""
    if not self.patterns:
      return
    for (where, pattern), right in zip(self.patterns.values(), plain([*self.patterns])):
      if not right:
        raise ValueError(
          f'schema at {where}: pattern={pattern!r} accepts \'"\', \'\\\' or control characters, '
          'which a JSON string must '
          r'escape; leave them out, for example by [^"\\\x00-\x1F] for .'
        )

  def one(self, schema: Any, where: str, inside: Sequence[str]) -> str:
    if isinstance(schema, bool):
      means = 'anything, texts without end' if schema else 'nothing'
      raise ValueError(
        f'schema at {where}: {schema!r} is not an object that names a type: it allows {means}; '
        'name one, or leave it out'
      )
    if not isinstance(schema, Mapping):
      raise ValueError(
        f'schema at {where}: {schema!r} is not an object that names a type; give one'
      )
    if '$ref' in schema:
      _only(schema, where, {'$ref'})
      return self.reference(schema['$ref'], where, inside)
    if 'anyOf' in schema:
      _only(schema, where, {'anyOf'})
      options = _list(schema, 'anyOf', where)
      return _either(
        self.any(option, f'{where}/anyOf/{i}', inside) for i, option in enumerate(options)
      )
    if 'enum' in schema or 'const' in schema:
      return _constants(schema, where)
    if 'type' not in schema:
      raise ValueError(
        f'schema at {where} has keywords {sorted(schema)}, but none of type, enum, const, anyOf '
        'and $ref, so that texts without end would be valid; name a type'
      )
    types = _types(schema, where)
    _only(schema, where, {'type'}.union(*(TYPES[kind][0] for kind in types)))
    return _either(getattr(self, kind)(schema, where, inside) for kind in types)

  def reference(self, name: Any, where: str, inside: Sequence[str]) -> str:
    if name in inside:
      raise ValueError(
        f'schema at {where}: {name!r} refers to itself, and no regular expression nests without '
        'end; write out as many levels as are needed'
      )
    target = self.root
    try:
      if not name.startswith('#'):
        raise KeyError(name)
      for part in name.split('/')[1:]:
        target = target[part.replace('~1', '/').replace('~0', '~')]
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f'schema at {where}: $ref={name!r} is not a place of this document, such as #/$defs/name'
      ) from error
    return self.any(target, f'{self.base}{name[1:]}', (*inside, name))

  def string(self, schema: Mapping[str, Any], where: str, inside: Sequence[str]) -> str:
    if len(given := TYPES['string'][0] & schema.keys()) > 1 and given != {'minLength', 'maxLength'}:
      raise ValueError(
        f'schema at {where}: {sorted(given)} can\'t be kept together; leave one, or say it all in '
        'pattern'
      )
    if 'format' in schema:
      if schema['format'] not in [*FORMATS]:
        raise ValueError(
          f'schema at {where}: format={schema["format"]!r} is not known; known: '
          f'{", ".join(FORMATS)}; or use pattern'
        )
      return f'"{FORMATS[schema["format"]]}"'
    if 'pattern' in schema:
      pattern = schema['pattern']
      if not (
        isinstance(pattern, str)
        and pattern.startswith('^')
        and pattern.endswith('$')
        and not pattern.endswith(r'\$')
      ):
        raise ValueError(
          f'schema at {where}: pattern={pattern!r} may stand anywhere in a text; write ^...$ for a '
          'whole one'
        )
      try:
        translated = ecma.to_rust(pattern[1:-1])
      except ValueError as error:
        raise ValueError(f'schema at {where}: pattern={pattern!r}: {error}') from error
      self.patterns.setdefault(translated, (where, pattern))
      return f'"(?:{translated})"'
    return f'"{CHARACTER}{_times(schema, "minLength", "maxLength", where)}"'

  def integer(self, schema: Mapping[str, Any], where: str, inside: Sequence[str]) -> str:
    def bound(key, step=0):
      return [_whole(schema, key, where) + step] if key in schema else []

    low = max(bound('minimum') + bound('exclusiveMinimum', 1), default=None)
    high = min(bound('maximum') + bound('exclusiveMaximum', -1), default=None)
    if low is not None and high is not None and low > high:
      raise ValueError(
        f'schema at {where}: no integer is at least {low} and at most {high}; widen the bounds'
      )
    return integers(low, high)

  def number(self, schema: Mapping[str, Any], where: str, inside: Sequence[str]) -> str:
    return NUMBER

  def boolean(self, schema: Mapping[str, Any], where: str, inside: Sequence[str]) -> str:
    return 'true|false'

  def null(self, schema: Mapping[str, Any], where: str, inside: Sequence[str]) -> str:
    return 'null'

  def array(self, schema: Mapping[str, Any], where: str, inside: Sequence[str]) -> str:
    if 'items' not in schema:
      raise ValueError(
        f'schema at {where}: an array without items holds anything; say what its items are'
      )
    item = f'(?:{self.any(schema["items"], f"{where}/items", inside)})'
    return rf'\[{_separated(item, *_counts(schema, "minItems", "maxItems", where))}\]'

  def object(self, schema: Mapping[str, Any], where: str, inside: Sequence[str]) -> str:
    more = schema.get('additionalProperties', True)
    required = _names(schema, 'required', where) if 'required' in schema else {}
    if 'properties' not in schema:
      return self.dictionary(more, required, where, inside)

    properties = schema['properties']
    if not isinstance(properties, Mapping):
      raise ValueError(f'schema at {where}: properties={properties!r} must be an object of names')
    if unknown := [name for name in required if name not in properties]:
      raise ValueError(
        f'schema at {where}: required={unknown} are not among properties={list(properties)}; add '
        'them there'
      )
    if never := [name for name in required if properties[name] is False]:
      raise ValueError(
        f'schema at {where}: required={never} are False in properties, which allows no value; '
        'leave them out of one of the two'
      )
    if not isinstance(more, bool):
      raise ValueError(
        f'schema at {where}: additionalProperties={more!r} beside properties is not supported; '
        'leave one of the two'
      )
    pairs = [
      f'{_text(name, where)}: ?(?:{self.any(value, f"{where}/properties/{name}", inside)})'
      for name, value in properties.items()
      if value is not False
    ]
    needed = [name in required for name in properties if properties[name] is not False]
    if not any(needed):
      # Of each pair there is a copy behind each that may come first.
      self.count(sum(i * len(pair) for i, pair in enumerate(pairs)), where)
    return _in_order(pairs, needed)

  def dictionary(
    self, more: Any, required: Collection[str], where: str, inside: Sequence[str]
  ) -> str:
    """An object of any names, with values of one schema: `more`; False: of none."""
    if more is True:
      raise ValueError(
        f'schema at {where}: an object without properties holds anything; name them, or give the '
        'schema of additionalProperties'
      )
    if required:
      raise ValueError(
        f'schema at {where}: required={[*required]} without properties; name them there'
      )
    if more is False:
      return r'\{\}'
    value = self.any(more, f'{where}/additionalProperties', inside)
    return rf'\{{{_separated(f"{_quoted(CHARACTER)}: ?(?:{value})", 0, None)}\}}'


def _in_order(pairs: Sequence[str], needed: Sequence[bool]) -> str:
  """An object of these pairs of name and value in their order, of which those not needed may be
  left out.
  """

  # A comma stands between two: before all that follow the first property that is there, whichever
  # that is.
  def after(i):
    return ''.join(
      f', ?{pair}' if must else f'(?:, ?{pair})?' for pair, must in zip(pairs[i:], needed[i:])
    )

  if any(needed):
    first = needed.index(True)
    before = ''.join(f'(?:{pair}, ?)?' for pair in pairs[:first])
    return rf'\{{{before}{pairs[first]}{after(first + 1)}\}}'
  return rf'\{{(?:{"|".join(pair + after(i + 1) for i, pair in enumerate(pairs))})?\}}'


def integers(low: int | None, high: int | None) -> str:
  """A regular expression of the integers from low to high, both included; None: no bound."""
  if low is None or low < 0:
    most = -1 if high is None else min(high, -1)
    negative = f'-(?:{_natural(-most, None if low is None else -low)})'
    return negative if high is not None and high < 0 else f'{negative}|{_natural(0, high)}'
  return _natural(low, high)


def _natural(low: int, high: int | None) -> str:
  """The numbers from low >= 0 to high, by their lengths."""
  digits = len(str(low))
  if high is None:
    return f'{_natural(low, 10**digits - 1)}|[1-9][0-9]{{{digits},}}'
  spans = (
    (max(low, 10 ** (n - 1) if n > 1 else 0), min(high, 10**n - 1))
    for n in range(digits, len(str(high)) + 1)
  )
  return '|'.join(_span(str(a), str(b)) for a, b in spans)


def _span(a: str, b: str) -> str:
  """Numbers of one length from a to b: those that begin as a, then those between, then those that
  begin as b.
  """
  if not a or a == b:
    return a
  if a[0] == b[0]:
    return f'{a[0]}(?:{_span(a[1:], b[1:])})'
  rest = len(a) - 1
  between = (
    f'|[{int(a[0]) + 1}-{int(b[0]) - 1}][0-9]{{{rest}}}' if int(b[0]) - int(a[0]) > 1 else ''
  )
  return f'{a[0]}(?:{_span(a[1:], "9" * rest)}){between}|{b[0]}(?:{_span("0" * rest, b[1:])})'


def _is_document(schema: Any) -> bool:
  """Whether a schema has references of its own: an $id that is one, and no older anchor."""
  name = schema.get('$id') if isinstance(schema, Mapping) else None
  return isinstance(name, str) and not name.startswith('#')


def _constants(schema: Mapping[str, Any], where: str) -> str:
  _only(schema, where, {'enum', 'type'} if 'enum' in schema else {'const', 'type'})
  values = _list(schema, 'enum', where) if 'enum' in schema else [schema['const']]
  types = _types(schema, where) if 'type' in schema else list(TYPES)
  # By type() and not isinstance: to Python, true is an integer.
  fitting = [value for value in values if any(type(value) in TYPES[kind][1] for kind in types)]
  if not fitting:
    raise ValueError(
      f'schema at {where}: none of {values} is of type {schema.get("type")!r}; give one that is'
    )
  return _either(_text(value, where) for value in fitting)


def _types(schema: Mapping[str, Any], where: str) -> list[str]:
  types = schema['type'] if isinstance(schema['type'], list) else [schema['type']]
  if not types or not all(kind in [*TYPES] for kind in types):
    raise ValueError(
      f'schema at {where}: type={schema["type"]!r} is not known; known: {", ".join(TYPES)}'
    )
  return types


def _only(schema: Mapping[str, Any], where: str, known: set[str]) -> None:
  if rest := schema.keys() - known - ANNOTATIONS:
    raise ValueError(
      f'schema at {where}: {", ".join(f"{key}={schema[key]!r}" for key in sorted(rest))} can\'t be '
      f'kept; supported here: {", ".join(sorted(known))}. Leave it out, or write what is wanted '
      'with those'
    )


def _list(schema: Mapping[str, Any], key: str, where: str) -> list:
  if not isinstance(schema[key], list) or (not schema[key] and key != 'required'):
    raise ValueError(
      f'schema at {where}: {key}={schema[key]!r} must be a list with something in it'
    )
  return schema[key]


def _names(schema: Mapping[str, Any], key: str, where: str) -> dict[str, None]:
  """In their order; a set, in which each is looked up."""
  for name in (names := _list(schema, key, where)):
    if not isinstance(name, str):
      raise ValueError(f'schema at {where}: {key} has {name!r}, which is no name; give texts')
  return dict.fromkeys(names)


def _whole(schema: Mapping[str, Any], key: str, where: str) -> int:
  if type(schema[key]) is not int:
    raise ValueError(f'schema at {where}: {key}={schema[key]!r} must be a whole number')
  if abs(schema[key]) >= 10**MOST_DIGITS:
    raise ValueError(f'schema at {where}: {key} has more than {MOST_DIGITS} digits; leave it out')
  return schema[key]


def _counts(schema: Mapping[str, Any], least: str, most: str, where: str) -> tuple[int, int | None]:
  low = _whole(schema, least, where) if least in schema else 0
  high = _whole(schema, most, where) if most in schema else None
  if low < 0 or (high is not None and high < low):
    raise ValueError(
      f'schema at {where}: {least}={low} and {most}={high} allow nothing; have 0 <= {least} <= '
      f'{most}'
    )
  return low, high


def _times(schema: Mapping[str, Any], least: str, most: str, where: str) -> str:
  low, high = _counts(schema, least, most, where)
  return f'{{{low},{"" if high is None else high}}}'


def _separated(item: str, low: int, high: int | None) -> str:
  if high == 0:
    return ''
  some = f'{item}(?:, ?{item}){{{max(low - 1, 0)},{"" if high is None else high - 1}}}'
  return some if low else f'(?:{some})?'


def _either(options) -> str:
  return '|'.join(f'(?:{option})' for option in options)


def _quoted(character: str) -> str:
  return f'"{character}*"'


def _text(value: Any, where: str) -> str:
  """An expression of a value's JSON."""
  try:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'schema at {where}: {str(value)[:60]!r} can\'t be written as JSON: {error}; NaN, infinities '
      'and halves of surrogate pairs have no form there'
    ) from error
  return re.escape(text)
