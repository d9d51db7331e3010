"""Which number does a text give? By parsing, exactly, in rational numbers, and never by running
what somebody wrote: digits, depth and exponents are bounded, so that no input takes long.
"""

import ast
import fractions
import re

DIGITS = 30  # of a number
LENGTH = 200  # characters of an expression
DEPTH = 20
EXPONENT = 64
BITS = 4096  # of a numerator or a denominator, on the way

# A sign belongs to a number where nothing stands before it that it could be between, and a power of
# ten where no word goes on behind it.
NUMBER = re.compile(
  r'(?<![\w.,)])-?\d[\d,]*(?:\.\d+)?(?:/\d+|[eE][-+]?\d+\b)?%?'
  r'|\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+\b)?'
)


def value(text: str) -> fractions.Fraction:
  """Of a number, or of an expression of +, -, *, /, ** and brackets.

  Raises ValueError for anything else, for what has no value, and for what passes a bound.
  """
  expression = text.strip().replace(',', '').replace('$', '').rstrip('.')
  if not 0 < len(expression) <= LENGTH:
    raise ValueError(f'an expression of {len(expression)} characters; it has 1 to {LENGTH} of them')
  if any(len(digits) > DIGITS for digits in re.findall(r'\d+', expression)):
    raise ValueError(f'{expression[:60]!r} has a number of more than {DIGITS} digits')
  # Brackets and signs nest: what the parser would recurse into is counted before.
  if re.search(rf'(?:[-+(]\s*){{{DEPTH + 1},}}', expression) or expression.count('(') > DEPTH:
    raise ValueError(f'{expression[:60]!r} is nested deeper than {DEPTH}')
  try:
    parsed = ast.parse(expression, mode='eval').body
  except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
    raise ValueError(f'{expression[:60]!r} is no arithmetic expression') from error
  return _value(parsed, expression)


def agree(one: str, other: str) -> bool:
  """Whether the last numbers of two texts are one: '25%' is 1/4, and, beside a text that leaves the
  unit out, 25.
  """
  first, second = (_readings(text) for text in (one, other))
  if len(first) == len(second):
    return first[:1] == second[:1] != []
  return bool({*first} & {*second})


def _readings(text: str) -> list[fractions.Fraction]:
  number = last_number(text)
  if number is None:
    return []
  return [number, number * 100] if NUMBER.findall(text)[-1].endswith('%') else [number]


def last_number(text: str) -> fractions.Fraction | None:
  """The last number that a text names; None where it names none, or one that passes a bound."""
  named = NUMBER.findall(text[-LENGTH * 10 :])
  if not named:
    return None
  last = named[-1].replace(',', '')
  percent = last.endswith('%')
  if len(last) > DIGITS:
    return None
  try:
    number = _literal(last.rstrip('%'))
  except (ValueError, ZeroDivisionError):
    return None
  return number / 100 if percent else number


def _literal(number: str) -> fractions.Fraction:
  """As it is written: 0.1 is a tenth. Raises ValueError for what has more than a small exponent."""
  power = re.search(r'[eE]([-+]?\d+)$', number)
  if power and abs(int(power[1])) > EXPONENT:
    raise ValueError(f'{number[:60]!r} has an exponent that is not of {EXPONENT} at most')
  return fractions.Fraction(number)


def _value(node: ast.expr, expression: str) -> fractions.Fraction:
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    return _literal(ast.get_source_segment(expression, node).replace('_', ''))
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
    of = _value(node.operand, expression)
    return -of if isinstance(node.op, ast.USub) else of
  if isinstance(node, ast.BinOp):
    left, right = _value(node.left, expression), _value(node.right, expression)
    return _bounded(_applied(node.op, left, right, expression), expression)
  raise ValueError(f'{expression[:60]!r} has more in it than numbers, brackets and + - * / **')


def _applied(operator: ast.operator, left, right, expression: str) -> fractions.Fraction:
  if isinstance(operator, ast.Add):
    return left + right
  if isinstance(operator, ast.Sub):
    return left - right
  if isinstance(operator, ast.Mult):
    return left * right
  if isinstance(operator, ast.Div) and right:
    return left / right
  if isinstance(operator, ast.Pow):
    if right.denominator == 1 and abs(right) <= EXPONENT and (left or right >= 0):
      return fractions.Fraction(left ** int(right))
    raise ValueError(
      f'{expression[:60]!r} has an exponent that is not whole, of {EXPONENT} at most'
    )
  raise ValueError(f'{expression[:60]!r} has no value')


def _bounded(number: fractions.Fraction, expression: str) -> fractions.Fraction:
  if max(number.numerator.bit_length(), number.denominator.bit_length()) > BITS:
    raise ValueError(f'{expression[:60]!r} is a number of more than {BITS} bits')
  return number
