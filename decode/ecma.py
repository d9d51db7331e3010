r"""What does a pattern of a JSON schema, which is a regular expression of ECMA-262 (with its u
flag), say in the syntax of Rust's regex crate?

The two look alike and differ: \d, \w and \s are Unicode's in Rust and ECMA's own here, the dot
stops at more ends of lines, a class holds [ and && as they stand, and (?i) is Rust's alone. What
can't be said there is refused by its name.
"""

import re

_SPACE = (
  r'\t\n\x0B\x0C\r \u{A0}\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}\u{FEFF}'
)
_SETS = {'d': '0-9', 'w': 'A-Za-z0-9_', 's': _SPACE}
_CONTROLS = {'t': '\t', 'n': '\n', 'v': '\v', 'f': '\f', 'r': '\r'}
_SYNTAX = '^$\\.*+?()[]{}|/'
_QUANTIFIER = re.compile(r'(?:[*+?]|\{[0-9]+(?:,[0-9]*)?\})\??')
_ESCAPED = (
  re.compile(r'u([Dd][89ABab][0-9A-Fa-f]{2})\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})'),
  re.compile(r'u([0-9A-Fa-f]{4})'),
  re.compile(r'u\{([0-9A-Fa-f]{1,6})\}'),
  re.compile(r'x([0-9A-Fa-f]{2})'),
)
_PROPERTY = re.compile(r'[pP]\{[A-Za-z0-9_=]+\}')


def to_rust(pattern: str) -> str:
  """The same expression in Rust's syntax; of a whole text, without ^ and $ around it.

  Raises:
    ValueError: what Rust's crate, or ECMA-262, does not know: it says which part.
  """
  written, at, repeatable = [], 0, False
  while at < len(pattern):
    rest = pattern[at:]
    if match := _QUANTIFIER.match(rest):
      if not repeatable:
        raise ValueError(f'{match[0]!r} at {at} repeats nothing, or what is repeated already')
      written.append(match[0])
      repeatable, at = False, at + len(match[0])
      continue

    repeatable = rest[0] not in '(|'
    if rest[0] == '[':
      text, length = _class(rest, at)
    elif rest[0] == '\\':
      text, length = _escape(rest, at)
      text = f'[{text}]' if rest[1:2] in _SETS else text
    elif rest[0] == '.':
      text, length = r'[^\n\r\u{2028}\u{2029}]', 1
    elif rest[0] == '(':
      text, length = _group(rest, at)
    elif rest[0] in '^$':
      raise ValueError(
        f'{rest[0]!r} at {at} stands within; write ^(?:...|...)$ around the alternatives'
      )
    elif rest[0] in '{}]':
      raise ValueError(f'{rest[0]!r} at {at} stands for itself: write \\{rest[0]}')
    else:
      text, length = rest[0] if rest[0] in ')|' else _literal(rest[0]), 1
    written.append(text)
    at += length
  return ''.join(written)


def _literal(character: str) -> str:
  return character if character.isalnum() or character == ' ' else f'\\u{{{ord(character):X}}}'


def _group(rest: str, at: int) -> tuple[str, int]:
  if not rest.startswith('(?'):
    return '(?:', 1
  if rest.startswith('(?:'):
    return '(?:', 3
  if match := re.match(r'\(\?<[A-Za-z_$][\w$]*>', rest):
    return '(?:', len(match[0])
  kind = {'=': 'look-ahead', '!': 'look-ahead', '<': 'look-behind'}.get(rest[2:3], 'a flag')
  raise ValueError(f'{rest[:4]!r} at {at} is {kind}, which no automaton here knows; leave it out')


def _escape(rest: str, at: int) -> tuple[str, int]:
  """An escape as it stands within a class: a character, or ranges; complements in brackets."""
  kind = rest[1:2]
  if kind in _SETS and kind:
    return _SETS[kind], 2
  if kind.lower() in _SETS and kind:
    return f'[^{_SETS[kind.lower()]}]', 2
  if kind in _CONTROLS and kind:
    return _literal(_CONTROLS[kind]), 2
  if kind == '0' and not rest[2:3].isdecimal():
    return _literal('\0'), 2
  if match := re.match('c([A-Za-z])', rest[1:]):
    return _literal(chr(ord(match[1]) % 32)), 3
  for form in _ESCAPED:
    if match := form.match(rest[1:]):
      code = int(match[1], 16)
      if len(match.groups()) == 2:
        code = 0x10000 + ((code - 0xD800) << 10) + int(match[2], 16) - 0xDC00
      if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
        break
      return _literal(chr(code)), 1 + len(match[0])
  if match := _PROPERTY.match(rest[1:]):
    return '\\' + match[0], 1 + len(match[0])
  if kind and (kind in _SYNTAX or kind == '-'):
    return _literal(kind), 2
  known = {'b': 'the edge of a word', 'B': 'the edge of a word', 'k': 'a reference'}
  meaning = 'a reference' if kind.isdecimal() else known.get(kind, 'no escape of ECMA-262')
  raise ValueError(f'{rest[:2]!r} at {at} is {meaning}; leave it out')


def _class(rest: str, at: int) -> tuple[str, int]:
  position = 2 if rest.startswith('[^') else 1
  written, is_set = [], False
  while rest[position : position + 1] not in ('', ']'):
    if rest.startswith('\\b', position):
      text, length = _literal('\b'), 2
    elif rest[position] == '\\':
      text, length = _escape(rest[position:], at + position)
    elif rest[position] == '-':
      # Between two characters it is a range's, else itself.
      inner = len(written) > 0 and rest[position + 1 : position + 2] not in ('', ']')
      if inner and (is_set or _is_set(rest, position + 1)):
        raise ValueError(f"'-' at {at + position} is beside a class and no range: write \\-")
      text, length = '-' if inner else _literal('-'), 1
    else:
      text, length = _literal(rest[position]), 1
    is_set = _is_set(rest, position)
    written.append(text)
    position += length
  if position >= len(rest):
    raise ValueError(f"'[' at {at} is never closed")
  if not written:
    if rest.startswith('[^'):
      return r'[\u{0}-\u{10FFFF}]', 3
    raise ValueError(f"'[]' at {at} matches nothing")
  return ('[^' if rest.startswith('[^') else '[') + ''.join(written) + ']', position + 1


def _is_set(rest: str, position: int) -> bool:
  """Whether an escape of several characters is there."""
  return rest[position : position + 1] == '\\' and rest[position + 1 : position + 2] in 'dDwWsSpP'
