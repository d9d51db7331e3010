"""Does an answer match a pattern? For records with a `pattern`, a regular expression in RE2's
syntax: 1 where it matches the whole answer, without white space about it, else 0.

RE2 takes time in proportion to the text, whatever the pattern. Needs google-re2 (the extra
`rewards`).
"""

import re2

OPTIONS = re2.Options()
OPTIONS.log_errors = False  # they are raised


def reward(text: str, record: dict) -> float:
  """1 or 0. Raises ValueError for a record whose `pattern` is none."""
  try:
    pattern = re2.compile(record['pattern'], OPTIONS)
  except re2.error as error:
    raise ValueError(f'pattern {record["pattern"]!r}: {error.args[0].decode()}') from error
  return float(pattern.fullmatch(text.strip()) is not None)
