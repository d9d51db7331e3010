"""Is a number that a text gives read exactly, and nothing else ever run?"""

import time
from fractions import Fraction

import pytest

from configs.rewards import arithmetic, brackets, matches
from evaluation.arithmetic import agree, last_number, value


@pytest.mark.parametrize(
  'text, expected',
  [
    ('36', 36),
    (' $1,234.50 ', Fraction(2469, 2)),
    ('0.1 + 0.2', Fraction(3, 10)),
    ('3 * (17 - 5)', 36),
    ('-2 ** 2', -4),
    ('2 ** -2', Fraction(1, 4)),
    ('1 / 3', Fraction(1, 3)),
    ('1e3 + 2.5E-1', Fraction(4001, 4)),
  ],
)
def test_values_are_exact(text, expected):
  assert value(text) == expected


@pytest.mark.parametrize(
  'text',
  [
    '',
    '1 / 0',
    '0 ** -1',
    '2 ** 0.5',
    '2 ** 65',
    '9 ** 64 ** 2',
    '((9 ** 64) ** 64) ** 64',
    '1e65',
    '1e999999999',
    '2 + 1e-999999999',
    '1_0e9_9_9_9_9_9_9_9_9',
    '9' * 31,
    '(' * 50 + '1' + ')' * 50,
    '-' * 150 + '1',
    '1' + '+1' * 200,
    '__import__("os").system("true")',
    'x + 1',
    '[1][0]',
    '1 if 1 else 2',
    'True',
    '1j',
    '"a" * 9',
  ],
)
def test_what_is_no_bounded_expression_is_refused(text):
  began = time.monotonic()
  with pytest.raises(ValueError):
    value(text)
  assert time.monotonic() - began < 5  # hours, where one of them is run


@pytest.mark.parametrize(
  'text, expected',
  [
    ('so it is 12 + 5 = 17.', 17),
    ('The answer is $1,200.', 1200),
    ('-3', -3),
    ('from 5-3 of them', 3),
    ('about 12.5%', Fraction(1, 8)),
    ('3/4', Fraction(3, 4)),
    ('it is 1e3', 1000),
    ('from 5-2.5e-1 of them', Fraction(1, 4)),
    ('1.5e1%', Fraction(3, 20)),
    ('a digest of 1e3f', 3),
    ('1e999999999', None),
    ('none at all', None),
    ('1/0', None),
    ('7' * 40, None),
  ],
)
def test_the_last_number_of_a_text(text, expected):
  assert last_number(text) == expected


def test_rewards_of_the_configs():
  assert arithmetic.reward('That makes 36.0', {'answer': 'first 40 - 4\n#### 36'}) == 1.0
  assert arithmetic.reward('That makes 35', {'answer': 36}) == 0.0
  assert arithmetic.reward('I do not know', {'answer': '6 * 6'}) == 0.0
  assert arithmetic.reward('1e3', {'answer': 1000}) == 1.0
  assert arithmetic.reward('1e3', {'answer': 3}) == 0.0
  with pytest.raises(ValueError):
    arithmetic.reward('36', {'answer': 'many'})
  assert matches.reward(' abc\n', {'pattern': '[a-c]+'}) == 1.0
  assert matches.reward('abcd', {'pattern': '[a-c]+'}) == 0.0
  # Which takes an engine that goes back for ever.
  assert matches.reward('x' * 60, {'pattern': '(x+x+)+y'}) == 0.0
  with pytest.raises(ValueError, match=r"pattern '\(': missing \)"):
    matches.reward('x', {'pattern': '('})
  balanced = [brackets.reward(text, {'prompt': '(['}) for text in ('])', '])()', ')]', ']', '])x')]
  assert balanced == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
  'one, other, same',
  [
    ('Therefore 25%.', '#### 25', True),
    ('Therefore 0.25', '#### 25', False),
    ('25', '#### 25%', True),
    ('0.25', '#### 25%', True),
    ('2500%', '#### 25%', False),
    ('2500%', '#### 25', True),
    ('none', 'none', False),
    ('250%', '#### 25', False),
  ],
)
def test_a_percentage_is_one_with_its_unit_left_out(one, other, same):
  assert agree(one, other) == agree(other, one) == same
  if '%' not in other and same is not None and other != 'none':
    assert arithmetic.reward(one, {'answer': other}) == float(same)
