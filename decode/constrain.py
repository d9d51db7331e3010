"""Which tokens may come next? Generation whose text matches a regular expression or a JSON schema,
by tables on the device.

A regular expression is an automaton over bytes, and a token, being bytes, leads each of its states
to another or nowhere. Tokens that lead all states alike are one class, of which there are few: two
small tables say what is allowed and where it leads, so that a jitted loop asks no host (Willard &
Louf, arXiv:2307.09702, with classes of tokens instead of lists of them).

B rows · V vocabulary · S states · C classes of tokens
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from data import generation
from data.tokenizer import Tokenizer
from decode import automaton, schema as schemas
from parallel import axes as ax

FREE = 0  # the state in which everything is allowed, for rows without a constraint
IDLE = 16  # constraints that no row has, and that stay in the tables for the next one, at most
SMALLEST = 64  # the tables' sides are rounded up to powers of two from here
# Of an expression's places (characters, classes), repetitions written out: at this many the library
# takes some 6 s, and 18,000 states; both grow with them.
MOST_PLACES = 6144


class NoRoom(ValueError):
  """A constraint has to wait until others have left."""


class Constraint:
  """A set of texts, as an automaton over a tokenizer's ids.

  The text is what `decode_bytes` gives of the generated ids, from the first to the last: a
  tokenizer that writes a space before a word writes it before the first, too, if the expression
  lets it (' ?' in front). End-of-text is allowed exactly where the text may end; other ids without
  bytes never are. A row that max_new_tokens cuts off has the beginning of such a text.

  Attributes:
    regex: what the whole text must match.
    classes: [V] int32, each id's class.
    next: [S, C] int32, the state after a token of a class; -1: it is not allowed. State 0 is where
      a text begins.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    *,
    regex: str | None = None,
    schema: Mapping[str, Any] | str | os.PathLike | None = None,
    room: automaton.Room = automaton.Room(),
    wanted: Callable[[], bool] = lambda: True,
  ):
    """From a regular expression or a JSON schema.

    Args:
      tokenizer: whose ids are generated.
      regex: in the syntax of Rust's regex crate (Python's without look-around and references;
        Unicode's \\w). It is of the whole text, so that ^ and $ are left out. Its
        repetitions written out have at most MOST_PLACES places, and its automaton is made within
        decode.automaton's limits.
      schema: a dict, JSON text, or a PathLike of a file; what of it is kept, see decode.schema.
      room: for its tables. wanted: whether anybody waits for it still; decode.automaton.Unwanted
        is raised when nobody does.

    Raises:
      ImportError: without outlines-core.
      ValueError: none or both of regex and schema; one that can't be read or kept;
        no ids of this tokenizer spell a text of it.
    """
    if (regex is None) == (schema is None):
      raise ValueError(f'regex={regex!r} and schema={schema!r}: give one of the two')
    if regex is None:
      regex = schemas.to_regex(schema, lambda each: automaton.plain(each, _places_of(each), wanted))
    self.regex: str = regex
    vocabulary = automaton.Vocabulary(
      tokenizer.kind, tuple(tokenizer.token_bytes), generation.ends(tokenizer)
    )
    self.classes, self.next = automaton.over_tokens(
      regex, _places_of([regex]), vocabulary, room, wanted
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Automaton:
  """The tables of all constraints of a batch; one state says where a row is, and in which
  constraint.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers,
  specs and placeholders.

  Attributes:
    classes: [V] int32, each id's class, of tokens that no state tells apart.
    next: [S, C] int32, the state after a token of a class; -1: it is not allowed.
  """

  classes: Any
  next: Any

  @classmethod
  def of(
    cls, constraints: Sequence[Constraint | None], vocabulary: int
  ) -> tuple['Automaton', Int[np.ndarray, 'B']]:
    """The tables, as numpy arrays, and each row's first state.

    A constraint that several rows share is there once.

    Args:
      constraints: each row's; None: everything is allowed.
      vocabulary: number of logits of a row; ids that a constraint's tokenizer lacks are not
        allowed.

    Raises:
      ValueError: a constraint's tokenizer has more ids than that.
    """
    distinct = list(dict.fromkeys(c for c in constraints if c is not None))
    # One table under another, that of no constraint first.
    firsts = np.cumsum([1, *(len(c.next) for c in distinct)]).tolist()
    classes, tables = _together(dict(zip(distinct, firsts)), vocabulary)
    after = np.concatenate(tables)
    # Another constraint seldom means another program.
    after = np.pad(
      after,
      [(0, max(SMALLEST, 1 << (n - 1).bit_length()) - n) for n in after.shape],
      constant_values=-1,
    )
    first = {None: FREE} | dict(zip(distinct, firsts))
    return cls(classes, after.astype(np.int32)), np.array([first[c] for c in constraints], np.int32)


class Tables:
  """The automaton of rows that come and go: constraints join and leave it, their states stay where
  they are while they are in it, and its size is fixed, so that nothing is compiled anew.

  To build it anew takes tens of milliseconds, in which no row writes. So a constraint whose last
  row has left stays, for who asks the same, until others need its room.

  Attributes:
    automaton: the tables, as numpy arrays, new ones after every `add`; at first everything is
      allowed.
  """

  def __init__(self, vocabulary: int, states: int, classes: int):
    """vocabulary: number of logits of a row. states, classes: S and C, of all constraints that are
    there at a time together.
    """
    self._vocabulary = vocabulary
    self._shape = states, classes
    self._users: dict[Constraint, int] = {}
    self._firsts: dict[Constraint, int] = {}
    self.automaton = self._built({})

  def add(self, constraint: Constraint | None) -> int:
    """The state in which a row of this constraint begins.

    Raises NoRoom where no states or classes are left for it, and ValueError as Automaton.of.
    """
    if constraint is None:
      return FREE
    if constraint not in self._firsts:
      try:
        self._put(constraint, self._firsts)
      except NoRoom:
        self._put(constraint, {c: self._firsts[c] for c in self._firsts if c in self._users})
    self._users[constraint] = self._users.get(constraint, 0) + 1
    return self._firsts[constraint]

  def remove(self, constraint: Constraint | None) -> None:
    """A row of it has left; with the last one its states are there for others."""
    if constraint is None:
      return
    self._users[constraint] -= 1
    if not self._users[constraint]:
      del self._users[constraint]
      self._firsts[constraint] = self._firsts.pop(constraint)  # behind those that left before
      idle = [c for c in self._firsts if c not in self._users]
      for longest_ago in idle[:-IDLE]:
        del self._firsts[longest_ago]

  def _put(self, constraint: Constraint, firsts: dict[Constraint, int]) -> None:
    """It joins these, which have their first states already. Raises NoRoom."""
    firsts = firsts | {constraint: self._gap(len(constraint.next), firsts)}
    self.automaton = self._built(firsts)
    self._firsts = firsts

  def _gap(self, states: int, firsts: dict[Constraint, int]) -> int:
    """The first of so many states in a row that none of these constraints has."""
    begin = FREE + 1
    for constraint, first in sorted(firsts.items(), key=lambda item: item[1]):
      if first - begin >= states:
        break
      begin = first + len(constraint.next)
    if begin + states > self._shape[0]:
      raise NoRoom(
        f'a constraint of {states} states finds no room among {self._shape[0]}, of which others '
        'have some; wait until these have left, or make room for more states'
      )
    return begin

  def _built(self, firsts: dict[Constraint, int]) -> Automaton:
    classes, tables = _together(firsts, self._vocabulary)
    S, C = self._shape
    if tables[0].shape[1] > C:
      raise NoRoom(
        f'constraints tell {tables[0].shape[1]} classes of tokens apart together, of at most {C}; '
        'wait until others have left, or make room for more classes'
      )
    after = np.full((S, C), -1, np.int32)
    for table, first in zip(tables, [FREE, *firsts.values()], strict=True):
      after[first : first + len(table), : table.shape[1]] = table
    return Automaton(classes, after)


def _together(
  firsts: dict[Constraint, int], vocabulary: int
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Classes [V] of tokens that none of the constraints tells apart, and by these the table of no
  constraint and that of each, whose states are numbered from its first.

  Raises ValueError for a constraint that is over more ids than `vocabulary`.
  """
  for c in firsts:
    if len(c.classes) > vocabulary:
      raise ValueError(
        f'a constraint is over {len(c.classes)} ids, but vocabulary={vocabulary}; build it with '
        'the model\'s tokenizer'
      )

  # A class of the whole is a combination of theirs that some id has: `columns` says which class of
  # each table that is.
  nexts = [np.zeros((1, 1), np.int32), *(c.next for c in firsts)]
  columns, classes = np.zeros((1, 1), np.int64), np.zeros(vocabulary, np.int64)
  for c in firsts:
    beyond = vocabulary - len(c.classes)
    theirs = np.pad(c.classes, (0, beyond), constant_values=automaton.NEVER)
    # One number for a pair of classes, for of numbers unique is fast, where of columns it is not.
    C = c.next.shape[1]
    pairs, classes = np.unique(classes * C + theirs, return_inverse=True)
    columns = np.vstack([columns[:, pairs // C], pairs % C])
  return classes.astype(np.int32), [
    np.where(table < 0, -1, table + first)[:, column].astype(np.int32)
    for table, first, column in zip(nexts, [FREE, *firsts.values()], columns, strict=True)
  ]


def allowed(automaton: Automaton, states: Int[Array, 'B']) -> Bool[Array, 'B V']:
  """Which tokens may come next; at least one may, in every state that allowed ones reach."""
  rows = automaton.next.at[states].get(out_sharding=ax.out('batch', None)) >= 0
  B, C = rows.shape
  # 131072 ids of 256 classes in 8 rows take a TPU v5e an estimated 500k cycles by lookups,
  # 50k by a product; one row 19k by lookups.
  tpu = _by_product if B > 1 and C <= 1024 else _by_lookup
  return jax.lax.platform_dependent(rows, automaton.classes, tpu=tpu, default=_by_lookup)


def _by_lookup(rows, classes):
  return rows.at[:, classes].get(out_sharding=ax.out('batch', None))


def _by_product(rows, classes):
  """The same by one-hot columns, which are exact in any precision and never stored: the compiler
  makes them as it multiplies.
  """
  columns = jnp.arange(rows.shape[1])[:, None] == classes[None]
  rows, columns = rows.astype(jnp.bfloat16), columns.astype(jnp.bfloat16)
  return jnp.matmul(rows, columns, out_sharding=ax.out('batch', None)) > 0


def advance(automaton: Automaton, states: Int[Array, 'B'], ids: Int[Array, 'B']) -> Int[Array, 'B']:
  """The states after these tokens. A token that is not allowed changes nothing, such as the padding
  after a row's end.
  """
  rows = ax.out('batch')
  classes = automaton.classes.at[ids].get(out_sharding=rows)
  after = automaton.next.at[states, classes].get(out_sharding=rows)
  return jnp.where(after < 0, states, after)


def _places_of(regexes: Sequence[str]) -> int:
  """Of all of them. Raises ValueError where one has more than MOST_PLACES."""
  each = list(map(_places, regexes))
  for regex, places in zip(regexes, each, strict=True):
    if places > MOST_PLACES:
      raise ValueError(
        f'regex={regex[:200]!r} has {places:,} places with its repetitions written out, of at most '
        f'{MOST_PLACES:,} (a character of a JSON string is 3): lower its counts (maxLength, '
        'maxItems), or leave them out and bound the text by max_new_tokens'
      )
  return sum(each)


_CLASS = r'\[\^?\]?(?:\[:\^?\w+:\]|\\.|[^\]\\])*\]|'
_PLACE, _PLACE_BUT_CLASSES = (
  re.compile(
    r'(?P<open>\((?:\?(?:P?<\w+>|[a-zA-Z-]*:)?)?)|(?P<close>\))'
    r'|\{(?P<count>\s*+(?P<low>\d*+)\s*+(?:,\s*+(?P<high>\d*+)\s*+)?)\}'
    rf'|(?P<free>[*+?|^$])|(?P<place>{classes}\\[pPxu]\{{[^}}]{{0,80}}\}}|\\.|.)',
    re.DOTALL,
  )
  for classes in (_CLASS, '')
)


def _places(regex: str) -> int:
  """About how many characters and classes a regular expression has, repetitions written out: known
  before the library spends time and memory on them.
  """
  totals, last = [0], 0  # of each open group, and of what a repetition would repeat
  place, begun = _PLACE, 0
  while match := place.match(regex, begun):
    begun = match.end()
    if match['open']:
      totals.append(0)
    elif match['close']:
      last = totals.pop() if len(totals) > 1 else 0
      totals[-1] += last
    elif match['count']:
      most = match['high'] or match['low'] or '1'
      times = max(int(most), 1) if len(match[0]) < 20 else MOST_PLACES
      totals[-1] += last * (times - 1)
      last *= times
    elif match['place']:
      last = 1
      totals[-1] += 1
      if match[0] == '[':
        # A class without an end: nor has another behind it, and each would look for it anew.
        place = _PLACE_BUT_CLASSES
  return sum(totals)
