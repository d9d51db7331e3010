"""What in a text is personal data, by rules: where there is a check digit or a range of numbers, it
decides.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable

# Each pattern begins with a character or a class, and looks behind it only then: re skips to
# possible beginnings at memory speed, but tries a leading look-behind at every character (four
# times slower on the standard library).
_EMAIL_HINT = re.compile(r'@(?<=\w@)[^\W_][\w-]*\.')
_EMAIL = re.compile(
  r"[\w.+'-](?<![\w.+'-]{2})[\w.+'-]{0,63}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}"
  r'(?:[^\W\d_]{2,24}|xn--[A-Za-z0-9-]{2,59})(?![\w-])'
)
_IPV4 = re.compile(r'[0-9](?<![\w.][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w]|\.[0-9])')
_IPV6 = re.compile(r'[0-9A-Fa-f](?<![\w:.].)[0-9A-Fa-f]{0,3}:[0-9A-Fa-f:]{2,37}(?![\w:])')
# Addresses that are given to machines (RFC 4291, 4193): the rest of the range is words of hex
# digits, such as face::b00c.
_IPV6_GIVEN = [
  ipaddress.ip_network(net) for net in ('2000::/3', 'fe80::/10', 'fc00::/7', 'ff00::/8')
]

_END = r'(?![\w-]|[ ./][0-9])'  # no part of a longer number, a date, a version
_PHONES = (
  # +44 20 7946 0958, +1 (555) 010-9999, +35236450: at most 15 digits (ITU-T E.164); 0049 170 ...
  re.compile(
    r'(?:\+(?<![\w.+]\+)|0(?<![\w.+/-]0)(?<![0-9] 0)0[ ]?)[1-9][0-9]{0,2}'
    r'(?:[ -]?(?:\([0-9]{1,4}\)|[0-9]{2,4})){2,5}(?![\w-]|\.[0-9])'
  ),
  # (555) 010-9999
  re.compile(r'\((?<!\w\()[0-9]{2,5}\)[ .-]?[0-9]{3,4}[ .-][0-9]{3,4}(?![\w-]|\.[0-9])'),
  # 555-010-9999: North America's, with one separator
  re.compile(r'[2-9](?<![\w.+/-][0-9])(?<![0-9] [0-9])[0-9]{2}([ .-])[0-9]{3}\1[0-9]{4}' + _END),
  # 020 7946 0958, 0170-123-4567, 030/1234567, 06 12 34 56 78: with the 0 of long distance
  re.compile(
    r'0(?<![\w.+/-]0)(?<![0-9] 0)[1-9](?:[0-9]{0,3}[ .-][0-9]{3,4}[ .-][0-9]{3,4}'
    r'|[0-9]{1,3}[ /-][0-9]{6,8}|(?:([ .-])[0-9]{2})(?:\1[0-9]{2}){3})' + _END
  ),
)
# 4 x 4 digits, or American Express's 4, 6 and 5
_CARDS = re.compile(
  r'[1-9](?<![\w.][0-9])[0-9]{3}(?:(?:[ -][0-9]{4}){3}|[ -][0-9]{6}[ -][0-9]{5})(?![\w-]|[ .][0-9])'
)
_SOCIAL_SECURITY = re.compile(r'[0-8](?<![\w.+/-][0-9])[0-9]{2}-[0-9]{2}-[0-9]{4}(?![\w-]|\.[0-9])')
_IBAN = re.compile(
  r'[A-Z](?<!\w[A-Z])[A-Z][0-9]{2}(?: ?[0-9A-Z]{4}){2,7}(?: ?[0-9A-Z]{1,3})?(?!\w)'
)
_DIGITS = re.compile(r'[0-9](?<![\w.][0-9])[0-9]{8,}(?!\w|\.[0-9])')


def anonymise(text: str, kinds: Iterable[str]) -> tuple[str, dict[str, int]]:
  """Replaces personal data by placeholders.

  Rules, not a recogniser: names and addresses stay; 'a@b.de' in prose and 'x@layer.weight' in
  Python look the same and both go. tests/data/test_personal.py has what goes and what stays.

  Args:
    text: any text.
    kinds: of 'email', 'ip', 'phone', 'digits' (runs of nine or more; numbers of cards and IBANs
      whose check digits are right; US social security numbers within their ranges), in any order.

  Returns:
    The text with <EMAIL>, <IP>, <PHONE>, <DIGITS>, and how many of each kind were replaced.
  """
  counts = {}
  wanted = set(kinds)
  if 'email' in wanted and _EMAIL_HINT.search(text):
    text, counts['email'] = _EMAIL.subn('<EMAIL>', text)
  if 'ip' in wanted:
    text, v4 = _masked(text, _IPV4, '<IP>', _is_address)
    text, v6 = _masked(text, _IPV6, '<IP>', _is_given)
    counts['ip'] = v4 + v6
  numbers = 0
  if 'digits' in wanted:
    for pattern, check in ((_CARDS, _is_card), (_IBAN, _is_iban), (_SOCIAL_SECURITY, _is_social)):
      text, count = _masked(text, pattern, '<DIGITS>', check)
      numbers += count
  if 'phone' in wanted:
    for pattern in _PHONES:
      text, count = _masked(text, pattern, '<PHONE>', _is_phone)
      counts['phone'] = counts.get('phone', 0) + count
  if 'digits' in wanted:
    text, runs = _DIGITS.subn('<DIGITS>', text)
    counts['digits'] = numbers + runs
  return text, {kind: count for kind, count in counts.items() if count}


def _masked(
  text: str, pattern: re.Pattern, mask: str, check: Callable[[str], bool]
) -> tuple[str, int]:
  """Masks those matches that pass a check; returns the text and their number."""
  masked = 0

  def replace(match: re.Match) -> str:
    nonlocal masked
    if not check(match[0]):
      return match[0]
    masked += 1
    return mask

  return pattern.sub(replace, text), masked


def _is_address(given: str) -> bool:
  try:
    ipaddress.ip_address(given)
  except ValueError:
    return False
  return True


def _is_given(given: str) -> bool:
  # Slices such as x[1::2] parse as IPv6: ask for three groups, or a first one of four digits as in
  # fe80::1.
  groups = [group for group in given.split(':') if group]
  if (len(groups) < 3 and len(groups[0]) < 4) or not _is_address(given):
    return False
  return any(ipaddress.ip_address(given) in network for network in _IPV6_GIVEN)


def _figures(given: str) -> list[int]:
  return [int(character) for character in given if character in '0123456789']


def _is_phone(given: str) -> bool:
  count = len(_figures(given))
  return 7 <= count <= (17 if given.startswith('00') else 15)


def _is_card(given: str) -> bool:
  """By the sum of Luhn (ISO/IEC 7812-1), and the beginnings of the large issuers."""
  figures = _figures(given)
  if (len(figures) == 15) != (given[:2] in ('34', '37')) or given[0] not in '23456':
    return False
  doubled = [sum(divmod(2 * figure, 10)) for figure in figures[-2::-2]]
  return (sum(doubled) + sum(figures[-1::-2])) % 10 == 0


def _is_iban(given: str) -> bool:
  """By its remainder (ISO 13616)."""
  plain = given.replace(' ', '')
  return len(plain) >= 15 and int(''.join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def _is_social(given: str) -> bool:
  area, group, serial = map(int, given.split('-'))
  return area not in (0, 666) and group > 0 and serial > 0
