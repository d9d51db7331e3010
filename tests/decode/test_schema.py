"""Is every text of a schema's expression JSON that the schema accepts,
and is nothing of a schema passed over?
"""

import json
import pathlib
import re

import pytest
from hypothesis import given, settings, strategies as st

from decode import ecma, schema as schemas
from tests.decode.automata import all_plain


def regex_of(schema, plain=all_plain):
  return schemas.to_regex(schema, plain)


def accepts(schema, value):
  """value: JSON text, or what is to become it."""
  return (
    re.fullmatch(regex_of(schema), value if isinstance(value, str) else json.dumps(value))
    is not None
  )


@given(
  st.none() | st.integers(-1200, 1200),
  st.none() | st.integers(0, 1500),
  st.lists(st.integers(-3000, 3000), max_size=40),
)
@settings(max_examples=300)
def test_integers_between_bounds(low, width, some):
  high = None if width is None else (low or 0) + width
  pattern = re.compile(schemas.integers(low, high))
  for n in {
    *some,
    *(b + d for b in (low, high, 0, 9, 99, 999) if b is not None for d in (-11, -1, 0, 1, 11)),
  }:
    assert (pattern.fullmatch(str(n)) is not None) == (
      (low is None or n >= low) and (high is None or n <= high)
    )
  assert not any(map(pattern.fullmatch, ['', '-', '-0', '00', '01', '+1', '1.0']))


PERSON = {
  'type': 'object',
  'required': ['name', 'age'],
  'properties': {
    'id': {'type': 'integer'},
    'name': {'type': 'string'},
    'nick': {'type': 'string'},
    'age': {'type': 'integer', 'minimum': 0},
    'x': {'type': 'null'},
  },
}


@pytest.mark.parametrize(
  'schema, valid, invalid',
  [
    (
      {'type': 'string'},
      ['""', '"é😀"', '"a\\"b\\\\c\\n"', '"\u2028"'],
      [1, None, '"a', '"a\nb"', '"\\x"'],
    ),
    ({'type': 'string', 'minLength': 2, 'maxLength': 3}, ['"é😀"', '"a\\"b"'], ['"a"', '"abcd"']),
    ({'type': 'string', 'pattern': '^[A-Z]{2}|x$'}, ['"AB"', '"x"'], ['"A"', '"ABx"']),
    ({'type': 'string', 'format': 'date'}, ['"2024-02-29"'], ['"2024-13-01"', '"24-01-01"']),
    (
      {'type': 'string', 'format': 'date-time'},
      ['"2024-02-29T23:59:59Z"', '"2024-02-29T00:00:00.5+01:00"'],
      ['"2024-02-29T24:00:00Z"', '"2024-02-29"'],
    ),
    (
      {'type': 'string', 'format': 'uuid'},
      ['"12345678-1234-1234-1234-123456789abc"'],
      ['"12345678"'],
    ),
    ({'type': 'integer', 'exclusiveMinimum': -3, 'maximum': 12}, [-2, 0, 12], [-3, 13, '1.0']),
    (
      {'type': 'number'},
      [0, -1.5, 1e30, '1E+5', '2e-7'],
      ['.5', '1.', '01', 'NaN', 'Infinity', '+1'],
    ),
    (
      {'type': ['integer', 'null', 'string'], 'minimum': 3, 'maxLength': 1},
      [3, None, '"a"'],
      [2, 'true', '"ab"'],
    ),
    ({'type': 'boolean'}, [True, False], ['True', '1']),
    (
      {'enum': ['a"b', 1, None, {'k': [1, 'é']}]},
      ['"a\\"b"', 1, None, '{"k": [1, "é"]}'],
      ['"a', 2],
    ),
    ({'type': 'integer', 'enum': [1, True, 'x']}, [1], [True, '"x"']),
    ({'const': 'a.b'}, ['"a.b"'], ['"axb"']),
    (
      {'type': 'array', 'items': {'type': 'boolean'}},
      [[], [True], [True, False]],
      ['[true,]', '[', '[1]'],
    ),
    (
      {'type': 'array', 'items': {'enum': [1, 2]}, 'minItems': 2, 'maxItems': 3},
      [[1, 2], [1, 1, 2], '[1,2]'],
      ['[1]', '[1, 1, 1, 1]', '[]'],
    ),
    ({'type': 'array', 'items': {'type': 'null'}, 'maxItems': 0}, [[]], ['[null]']),
    ({'type': 'array', 'items': {'type': 'null'}, 'maxItems': 1}, [[], [None]], ['[null, null]']),
    (
      PERSON,
      [
        {'name': 'a', 'age': 1},
        {'id': 1, 'name': 'a', 'age': 0},
        {'name': '', 'nick': '', 'age': 1, 'x': None},
      ],
      [
        {'name': 'a'},
        '{}',
        {'name': 'a', 'age': -1},
        '{,"name": "a", "age": 1}',
        '{"name": "a", "age": 1,}',
      ],
    ),
    (
      {
        'type': 'object',
        'properties': {'a': {'type': 'null'}, 'b"': {'type': 'null'}, 'c': {'type': 'null'}},
      },
      [{}, {'a': None}, {'b"': None}, {'a': None, 'c': None}, {'b"': None, 'c': None}],
      ['{"a": null,}', '{, "c": null}', '{"d": null}'],
    ),
    ({'type': 'object', 'properties': {}}, [{}], ['{"a": 1}']),
    ({'type': 'object', 'additionalProperties': False}, [{}], ['{"a": 1}']),
    (
      {'type': 'object', 'additionalProperties': {'type': 'integer'}},
      [{}, {'a': 1}, {'a': 1, '': 2}],
      ['{"a": "b"}', '{"a": 1,}'],
    ),
    (
      {
        'anyOf': [{'type': 'null'}, {'$ref': '#/$defs/a~1b'}],
        '$defs': {'a/b': {'type': 'array', 'items': {'type': 'null'}}},
      },
      [None, [None]],
      ['[1]'],
    ),
  ],
  ids=lambda x: json.dumps(x, ensure_ascii=True)[:60],
)
def test_what_is_accepted(schema, valid, invalid):
  for value in valid:
    assert accepts(schema, value), value
    json.loads(value if isinstance(value, str) else '0')
  for value in invalid:
    assert not accepts(schema, value), value


@pytest.mark.parametrize(
  'schema, words',
  [
    ({}, r'schema at # has keywords \[\], but none of type'),
    ({'type': 'array', 'items': True}, 'at #/items: True is not an object that names a type'),
    (
      {'type': 'integer', 'multipleOf': 3},
      r"schema at #: multipleOf=3 can't be kept; supported here: exclusiveMaximum, .*minimum",
    ),
    (
      {'type': 'array', 'items': {'type': 'string', 'minLenght': 3}},
      r"at #/items: minLenght=3 can't be kept",
    ),
    ({'type': 'number', 'minimum': 0}, r"minimum=0 can't be kept"),
    ({'oneOf': [{'type': 'null'}]}, r"has keywords \['oneOf'\], but none of"),
    ({'allOf': [{'type': 'null'}]}, r"has keywords \['allOf'\]"),
    ({'anyOf': [{'type': 'null'}], 'type': 'null'}, r"type='null' can't be kept"),
    ({'type': 'object', 'properties': {'a': {}}}, 'at #/properties/a has keywords'),
    ({'type': 'object'}, 'an object without properties holds anything'),
    ({'type': 'array'}, 'an array without items holds anything'),
    (
      {'type': 'object', 'properties': {'a': {'type': 'null'}}, 'required': ['b']},
      r"required=\['b'\] are not among properties=\['a'\]",
    ),
    (
      {
        'type': 'object',
        'properties': {'a': {'type': 'null'}},
        'additionalProperties': {'type': 'null'},
      },
      'beside properties is not supported',
    ),
    (
      {'type': 'object', 'properties': {'a': {'$ref': '#'}}},
      r"at #/properties/a: '#' refers to itself",
    ),
    (
      {'type': 'array', 'items': {'$ref': '#/$defs/x'}},
      r"\$ref='#/\$defs/x' is not a place of this document",
    ),
    ({'$ref': 'https://a/b'}, "is not a place of this document"),
    ({'type': 'strin'}, r"type='strin' is not known; known: string, integer"),
    (
      {'type': 'string', 'pattern': 'a'},
      r"pattern='a' may stand anywhere in a text; write \^...\$",
    ),
    (
      {'type': 'string', 'pattern': '^a$', 'minLength': 1},
      r"\['minLength', 'pattern'\] can't be kept together",
    ),
    ({'type': 'string', 'format': 'email'}, r"format='email' is not known; known: date, time"),
    (
      {'type': 'string', 'minLength': 3, 'maxLength': 2},
      r'minLength=3 and maxLength=2 allow nothing',
    ),
    (
      {'type': 'integer', 'minimum': 3, 'exclusiveMaximum': 3},
      r'no integer is at least 3 and at most 2',
    ),
    ({'type': 'integer', 'minimum': 0.5}, r'minimum=0.5 must be a whole number'),
    ({'type': 'string', 'enum': [1]}, r"none of \[1\] is of type 'string'"),
    ({'enum': []}, r'enum=\[\] must be a list with something in it'),
    ('{"type": ', 'is not JSON: .*; for a file, give a pathlib.Path'),
    ('[1]', r'schema at #: \[1\] is not an object'),
  ],
)
def test_what_cannot_be_kept_raises(schema, words):
  with pytest.raises(ValueError, match=words):
    regex_of(schema)


def test_a_pattern_that_json_must_escape_raises():
  with pytest.raises(ValueError, match=r"pattern='\^\.\*\$' accepts"):
    regex_of(
      {'type': 'string', 'pattern': '^.*$'},
      plain=lambda regexes: [each != ecma.to_rust('.*') for each in regexes],
    )


def test_patterns_are_asked_for_once_together():
  asked = []

  def plain(regexes):
    asked.append(list(regexes))
    return [each != 'c' for each in regexes]

  texts = [{'type': 'string', 'pattern': f'^{letter}$'} for letter in 'abacab']
  with pytest.raises(ValueError, match=r"at #/anyOf/3: pattern='\^c\$' accepts"):
    regex_of({'anyOf': texts}, plain)
  assert asked == [['a', 'b', 'c']]


def doubled(levels, double):
  """A schema of few characters, and what stands in it 2 to the power of levels times."""
  schema = {'type': 'null'}
  for _ in range(levels):
    schema = double(schema)
  return schema


def referred(levels):
  """The same by references, of which none leads back."""
  names = [f'#/$defs/{i}' for i in range(levels + 1)]
  each = {str(i): {'anyOf': [{'$ref': names[i + 1]}] * 2} for i in range(levels)}
  return {'$ref': names[0], '$defs': each | {str(levels): {'type': 'null'}}}


NULL = {'type': 'null'}
LONG = [
  doubled(30, lambda inner: {'type': 'object', 'properties': {'a': NULL, 'b': inner}}),
  doubled(30, lambda inner: {'type': 'array', 'items': inner}),
  doubled(30, lambda inner: {'type': 'object', 'additionalProperties': inner}),
  referred(30),
  {'type': 'object', 'properties': {str(i): NULL for i in range(2000)}},
]


@pytest.mark.parametrize('schema', LONG, ids=range(len(LONG)))
def test_what_takes_too_much_to_write_is_refused_as_it_is_written(monkeypatch, schema):
  monkeypatch.setattr(schemas, 'MOST_WRITTEN', 2**17)
  with pytest.raises(ValueError, match=r'by here .* more than 131,072 characters .*require them'):
    regex_of(schema)


def test_a_schema_with_an_id_is_a_document_of_its_own():
  def within(color):
    parts = {'p': {'$ref': '#/$defs/P'}, 'q': {'$ref': '#/properties/p'}}
    own = {'type': 'object', 'properties': parts, 'required': ['p', 'q']}
    return own | {'$id': 'x', '$defs': {'P': {'enum': [color]}}}

  places = {'p': {'$ref': '#/$defs/P'}, 'a': within('red'), 'b': within('blue')}
  schema = {'type': 'object', 'properties': places, 'required': ['p', 'a', 'b']}
  schema['$defs'] = {'P': NULL}
  value = {'p': None, 'a': {'p': 'red', 'q': 'red'}, 'b': {'p': 'blue', 'q': 'blue'}}
  assert accepts(schema, value) and not accepts(schema, value | {'b': value['a']})
  places['a']['$defs']['P'] = {'$ref': '#/properties/q'}
  with pytest.raises(ValueError, match="at #/properties/a/properties/p: .*refers to itself"):
    regex_of(schema)


def test_what_is_required_is_names():
  with pytest.raises(ValueError, match=r'required has \[1\], which is no name; give texts'):
    regex_of({'type': 'object', 'properties': {'a': NULL}, 'required': [[1]]})


def test_a_schema_comes_as_dict_text_or_file(tmp_path):
  path = pathlib.Path(tmp_path) / 'schema.json'
  path.write_text(json.dumps(PERSON))
  assert regex_of(PERSON) == regex_of(json.dumps(PERSON)) == regex_of(path)
