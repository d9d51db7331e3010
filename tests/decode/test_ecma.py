"""Does a translated pattern accept what ECMA-262 says, in the engine that gets it?"""

import pytest

from data import tokenizers
from decode import automaton, constrain, schema as schemas
from decode.constrain import Constraint
from tests.decode.automata import all_plain, made_here

BYTES = tokenizers.ByteTokenizer()


@pytest.fixture(autouse=True, scope='module')
def here():
  with made_here():
    yield


# pattern, texts that node's /^...$/u accepts, texts that it does not
CASES = [
  (r'\d+', ['0', '42'], ['٣', 'a', '']),
  (r'\w', ['a', '_', '7'], ['é', 'ß', '-']),
  (r'\s', [' ', '\u00a0', '\ufeff', '\u2028'], ['a', '\u0085', '\u200b']),
  (r'[^\d\s]', ['a', '٣'], ['3', ' ']),
  (r'\D', ['٣'], ['3']),
  (r'[\w.-]+', ['a.b-c'], ['é', '']),
  (r'[a&&b]', ['a', '&', 'b'], ['c']),
  (r'[[a]', ['[', 'a'], [']', 'b']),
  (r'[a~~b#]', ['~', '#'], ['c']),
  (r'[\]x-]', [']', 'x', '-'], ['y']),
  (r'[+\--/]', ['+', '-', '.', '/'], ['0']),
  (r'[^a]', ['b', '\u2028'], ['a']),
  (r'a\/b', ['a/b'], ['ab']),
  (r'\u0041\x42\u{43}\cJ?', ['ABC'], ['ABc']),
  (r'\uD83D\uDE00', ['😀'], ['a']),
  (r'(?<year>\d{4})-(\d\d)', ['2024-01'], ['2024-1']),
  (r'a{2,3}?b+?', ['aab', 'aaabb'], ['ab']),
  (r'\p{Lu}\.', ['É.'], ['é.']),
  (r'a|bc|', ['a', 'bc', ''], ['b']),
]


def accepts(constraint, text):
  state = 0
  for index in BYTES.encode(text):
    state = constraint.next[state, constraint.classes[index]]
    if state < 0:
      return False
  return bool(constraint.next[state, constraint.classes[BYTES.eos]] >= 0)


@pytest.mark.parametrize('pattern, valid, invalid', CASES, ids=lambda x: str(x)[:20])
def test_patterns_mean_what_ecma_says(pattern, valid, invalid, monkeypatch):
  monkeypatch.setattr(automaton, 'plain', all_plain)  # \n stands for itself here
  constraint = Constraint(BYTES, schema={'type': 'string', 'pattern': f'^{pattern}$'})
  for text in valid:
    assert accepts(constraint, f'"{text}"'), text
  for text in invalid:
    assert not accepts(constraint, f'"{text}"'), text


@pytest.mark.parametrize(
  'pattern, words',
  [
    ('(?i)a', 'a flag'),
    ('(?P<n>a)', 'a flag'),
    ('(?=a)b', 'look-ahead'),
    ('(?<!a)b', 'look-behind'),
    (r'(a)\1', 'a reference'),
    (r'\k<n>', 'a reference'),
    (r'a\b', 'the edge of a word'),
    (r'\Aa\z', 'no escape of ECMA-262'),
    (r'\a', 'no escape of ECMA-262'),
    ('a$|^b', "'\\$' at 1 stands within"),
    ('a++', 'repeats nothing, or what is repeated already'),
    ('*', 'repeats nothing'),
    ('a{,3}', "'{' at 1 stands for itself"),
    ('[]', 'matches nothing'),
    ('[a', 'never closed'),
    (r'\uD83D', 'no escape'),
    (r'[+-\d]', "'-' at 2 is beside a class"),
    (r'[\w-z]', "'-' at 3 is beside a class"),
    (r'[\d-\w]', "'-' at 3 is beside a class"),
  ],
)
def test_what_cannot_be_said_is_refused_by_its_name(pattern, words):
  with pytest.raises(ValueError, match=f'schema at #: pattern=.*{words}'):
    schemas.to_regex({'type': 'string', 'pattern': f'^{pattern}$'}, all_plain)


@pytest.mark.parametrize(
  'schema, words',
  [
    ({'const': float('nan')}, "'nan' can't be written as JSON"),
    ('{"enum": [1, Infinity]}', "can't be written as JSON"),
    ('{"const": 1e999}', "can't be written as JSON"),
    ({'const': '\ud800'}, "can't be written as JSON"),
    ({'const': {1, 2}}, "can't be written as JSON|is of type"),
    ({'type': 'object', 'properties': {'\ud800': {'type': 'null'}}}, "can't be written as JSON"),
    ('true', 'schema at #: True .* allows anything'),
    ('false', 'schema at #: False .* allows nothing'),
    (
      {'type': 'object', 'properties': {'a': False}, 'required': ['a']},
      r"required=\['a'\] are False in properties",
    ),
    ({'type': 'integer', 'minimum': -(10**5000)}, 'minimum has more than 100 digits'),
    ('[' * 100_000, 'is not JSON'),
    ('{"const": ' + '9' * 5000 + '}', 'is not JSON'),
  ],
)
def test_what_is_no_json_is_refused(schema, words):
  with pytest.raises(ValueError, match=words):
    schemas.to_regex(schema, all_plain)


def test_a_schema_without_end_is_refused():
  nested = {'type': 'null'}
  for _ in range(5000):
    nested = {'type': 'array', 'items': nested}
  with pytest.raises(ValueError, match='nested deeper'):
    schemas.to_regex(nested, all_plain)


def test_a_property_that_is_false_is_never_there():
  regex = schemas.to_regex(
    {'type': 'object', 'properties': {'a': False, 'b': {'type': 'null'}}},
    all_plain,
  )
  assert regex == schemas.to_regex(
    {'type': 'object', 'properties': {'b': {'type': 'null'}}}, all_plain
  )


def test_sizes_beyond_a_bound_are_refused_before_anything_is_built():
  for given in (
    {'schema': {'type': 'string', 'maxLength': 4000}},
    {'schema': {'type': 'array', 'items': {'type': 'string', 'maxLength': 99}, 'maxItems': 99}},
    {'schema': {'type': 'string', 'minLength': 10**30}},
    {'regex': 'a{99999999}'},
    {'regex': 'a{ 9999 }'},
    {'regex': 'a{,9999}'},
    {'regex': r'((?:[^]x]\{b){100}){100}'},
  ):
    with pytest.raises(ValueError, match=r'places .* of at most 6,144 .*: lower .*max_new_tokens'):
      Constraint(BYTES, **given)
  for regex, places in (
    ('abc', 3),
    ('(a|b)*c{3}', 5),
    (r'\{2,3\}[{}()]{4}', 9),
    (r'(?:[^]\])]x){2,}\p{Lu}\x{41}?', 6),
    (r'(?P<n>a(bc){2}){0,3}', 15),
  ):
    assert constrain._places(regex) == places, regex
