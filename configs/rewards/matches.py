"""Does an answer match a pattern? For records with a `pattern`, a regular expression in RE2's
syntax: 1 where it matches the whole answer, without white space about it, else 0.

RE2 takes time in proportion to the text, whatever the pattern. Needs google-re2 (the extra
`rewards`).
"""

import re2


def reward(text: str, record: dict) -> float:
  """1 or 0. Raises ValueError for a record whose `pattern` is none."""
  try:
    return float(re2.fullmatch(record['pattern'], text.strip()) is not None)
  except re2.error as error:
    raise ValueError(f'pattern {record["pattern"]!r}: {error}') from error
