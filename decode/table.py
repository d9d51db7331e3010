"""What is an option? A row of a table: its name, type, default, range and help, once.

`decode.options` has the rows.
"""

import dataclasses
import enum
import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


class Where(enum.Enum):
  """What reads an option: the law of sampling, row by row; the call as a whole; generate.py."""

  LAW = 'What is drawn'
  CALL = 'The call'
  COMMAND = 'Of the command only'


@dataclasses.dataclass(frozen=True)
class Range:
  """The numbers from `least` to `most`.

  Attributes:
    ends: as mathematics writes them: '[' or ']' where that number is in the range, '(' or ')' where
      it is not.
    must: how an error says what is in it.
  """

  least: int | float = -math.inf
  most: int | float = math.inf
  ends: str = '[)'
  must: str = ''

  def holds(self, x):
    """Whether numbers, or each of an array, are in the range; NaN is in none."""
    above = x >= self.least if self.ends[0] == '[' else x > self.least
    below = x <= self.most if self.ends[1] == ']' else x < self.most
    return above & below

  def __str__(self) -> str:
    least, most = (_power(end) for end in (self.least, self.most))
    return f'{self.ends[0]}{least}, {most}{self.ends[1]}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
  """A row of the table.

  Attributes:
    type: of a number as it is stored, or str; words where it is something else.
    default: where nobody says anything.
    help: a sentence, as the command line prints it.
    more: what a reader of docs gets beside it.
    where: what reads it.
    range: of numbers.
    choices: of others, by how the command line spells them.
    per_row: whether it may be a sequence, of one value for each prompt.
    flag: of which kind the command line's is, as absl names them; '': it has none.
  """

  name: str = ''
  type: Any
  default: Any
  help: str
  more: str = ''
  where: Where = Where.CALL
  range: Range | None = None
  choices: Mapping[str, Any] | None = None
  per_row: bool = False
  flag: str = ''


# The absl kind of a type's flags, and the type in words.
TYPES = {
  np.float32: ('float', 'number'),
  float: ('float', 'number'),
  np.int32: ('integer', 'whole number'),
  np.uint32: ('integer', 'whole number'),
  int: ('integer', 'whole number'),
  str: ('string', 'text'),
}


def option_field(type, default, range, help, more='', **rest):
  """A dataclass's field and its row of the table. rest: other attributes of Option."""
  flag = rest.pop('flag', TYPES[type][0] if type in TYPES else '')
  row = Option(type=type, default=default, range=range, help=help, more=more, flag=flag, **rest)
  return dataclasses.field(default=default, metadata={'option': row})


def law_field(type, default, range, help, more='', **rest):
  """The same of an option that the law of sampling reads, row by row."""
  return option_field(type, default, range, help, more, where=Where.LAW, per_row=True, **rest)


def rows_of(cls: type) -> dict[str, Option]:
  """The rows of a dataclass's fields, by name."""
  return {
    field.name: dataclasses.replace(field.metadata['option'], name=field.name)
    for field in dataclasses.fields(cls)
  }


def markdown(rows: Iterable[Option]) -> str:
  """The rows as a table for people."""
  head = '| option | type | default | range | |\n|---|---|---|---|---|'
  return '\n'.join([head, *map(_line, rows)])


def _line(row: Option) -> str:
  cells = (
    f'`{row.name}`{"*" if row.per_row else ""}{"" if row.flag else " (no flag)"}',
    TYPES[row.type][1] if row.type in TYPES else row.type,
    f'`{row.default!r}`',
    '' if row.range is None else f'`{row.range}`',
    f'{row.help} {row.more}'.strip(),
  )
  return f'| {" | ".join(cells)} |'


def attributes(rows: Iterable[Option]) -> str:
  """The rows as a docstring has them."""
  return '\n'.join(
    textwrap.fill(
      f'{row.name}: {row.help} {row.more}'.strip(),
      100,
      initial_indent='    ',
      subsequent_indent='      ',
      break_on_hyphens=False,
    )
    for row in rows
  )


def _power(x: int | float) -> str:
  """A number as ranges show it."""
  if math.isinf(x):
    return '-inf' if x < 0 else 'inf'
  exponent = round(math.log2(x)) if x > 2**16 else 0
  return f'2**{exponent}' if exponent and x == 2**exponent else f'{x:g}'
