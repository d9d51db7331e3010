"""What can be asked where there is no data? The interpreter's own library: its modules, their next
lines, and what its functions are for.
"""

import ast
import functools
import itertools
from collections.abc import Iterator

from data import clean
from data.config import CleanConfig, SourceConfig
from data.sources import Problems, documents
from evaluation.task import Row

# Of modules by their hash, as training tells them apart (data/prepare.py): those that it holds out
# with data.split='hash' and a validation_fraction of this or more.
SHARE = 0.02
CHARACTERS = 6000  # of a module
LINES = (4, 24)  # of a function, without its docstring
DESCRIPTION = 20  # characters of a docstring's first line, at least
BEFORE = (8, 24)  # lines that stand before one that is asked for
LENGTHS = (12, 80)  # characters of such a line, without its indentation
OF_MODULE = 8  # lines that are asked for, of a module


@functools.cache
def held_out() -> tuple[str, ...]:
  """Modules that training holds out, in a fixed order."""
  config, texts = CleanConfig(filters='code', near_duplicates=0), []
  for text in documents(SourceConfig(), Problems()):
    cleaned = clean.clean(text, config)
    if not cleaned.dropped and int.from_bytes(cleaned.digest[:8], 'little') < SHARE * 2**64:
      texts.append(cleaned.text)
  return tuple(texts)


def modules() -> Iterator[Row]:
  """{'text': the first CHARACTERS of a module}"""
  for text in held_out():
    yield {'text': text[:CHARACTERS]}


def functions() -> Iterator[Row]:
  """{'function': its text without docstring and comments, 'docstring': what its first line says}"""
  for text in held_out():
    try:
      nodes = [*ast.walk(ast.parse(text))]
    except SyntaxError:  # cleaning may have masked what it takes for an address
      continue
    for node in nodes:
      if not isinstance(node, ast.FunctionDef):
        continue
      said = (ast.get_docstring(node) or '').split('\n')[0]
      if len(said) < DESCRIPTION or len(node.body) < 2:
        continue
      node.body = node.body[1:]
      function = ast.unparse(node)
      if LINES[0] <= function.count('\n') + 1 <= LINES[1]:
        yield {'function': function, 'docstring': said}


def next_lines() -> Iterator[Row]:
  """{'before': lines of a module, 'line': the next one}, of each module one, then another of each.

  `before` ends with the line's indentation but for a space, which tokens have before a word; what
  is written from there to the end of the line is `written`.
  """
  for rows in itertools.zip_longest(*map(_lines_of, held_out())):
    yield from (row for row in rows if row is not None)


def _lines_of(text: str) -> list[Row]:
  """Of a module, from places that are about as far from one another."""
  lines, rows = text.split('\n'), []
  for i in range(BEFORE[0], len(lines)):
    line = lines[i].strip()
    if not LENGTHS[0] <= len(line) <= LENGTHS[1] or not lines[i - 1].strip():
      continue
    indent = lines[i][: len(lines[i]) - len(lines[i].lstrip())]
    before = [*lines[max(0, i - BEFORE[1]) : i], indent[:-1]]
    rows.append({'before': '\n'.join(before), 'line': line, 'written': indent[-1:] + line})
  return rows[:: -(-len(rows) // OF_MODULE) or 1]
