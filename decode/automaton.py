"""How is a regular expression made an automaton over tokens, within a limit of time and memory?

Some expressions take as many states as 2 to the power of a repetition, (a|b)*a(a|b){20}, which no
look at their text tells, and the library that makes them cannot be stopped. So another process
does it, which the system ends, and what tokens make of its states, too: who serves meanwhile has
the interpreter to himself.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

log = logging.getLogger(__name__)

MOST_SECONDS, MOST_BYTES = 30, 2**31  # of the other process
MOST_WAITING = 120  # seconds until it has ended, on a machine that has others to do
MOST_STATES = 2**16  # over bytes: 67 MB
MOST_MOVES = 2**29  # bytes of what kinds of tokens do to all states
POLL = 0.2  # seconds
EOS, MARK = 256, 257
NEVER = 0  # the class of tokens that are never allowed

# Places of an expression that is made in this process, for another one takes half a second to
# begin. It has characters, and classes of ASCII's, and nothing else: its states are 2 to this power
# at most, and of few bytes. One place of \w has hundreds.
FEW = 12
_PLAIN_PLACES = re.compile(
  r'(?:[^.\\\[\](){}]|\\\W|\[[A-Za-z0-9_ -]+\]|\((?:\?:|(?!\?))|\)|\{\d+,?\d*\})*'
)

_MAKE = """
import os, pickle, resource, sys
os.nice(10)  # who writes texts meanwhile goes first
room, (seconds, size) = pickle.load(sys.stdin.buffer)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
sys.path.insert(0, room)
from decode import automaton
name, regexes, more = pickle.load(sys.stdin.buffer)
made = [getattr(automaton, name)(regex, *more) for regex in regexes]
sys.stdout.buffer.write(pickle.dumps(made))
"""

Tables = tuple[np.ndarray, np.ndarray, int]


class Vocabulary(NamedTuple):
  """Of a tokenizer: its kind, each id's bytes, and the ids that end a text."""

  kind: str
  token_bytes: tuple[bytes, ...]
  ends: tuple[int, ...]


class Room(NamedTuple):
  """What an automaton over tokens may take: states, and classes of tokens."""

  states: int = sys.maxsize
  classes: int = sys.maxsize


class Unwanted(Exception):
  """Nobody waits any more for what was being made."""


class _Refused(ValueError):
  """What is wrong with an expression, behind `regex=.. `."""


def _anyone() -> bool:
  return True


def over_tokens(
  regex: str,
  places: int,
  vocabulary: Vocabulary,
  room: Room = Room(),
  wanted: Callable[[], bool] = _anyone,
) -> tuple[np.ndarray, np.ndarray]:
  """Classes [V] and next [S, C] of a decode.constrain.Constraint.

  places: how many characters and classes the expression has. wanted: whether anybody waits for it
  still, which is asked now and then.

  Raises:
    ImportError: without outlines-core.
    ValueError: for what is no expression, for one of which no ids of the vocabulary spell a text,
      and for one that takes more than `room`, MOST_SECONDS, MOST_BYTES or MOST_STATES.
    Unwanted: once nobody waits.
  """
  return _made('_over_tokens', [regex], places, wanted, vocabulary, room)[0]


def plain(regexes: Sequence[str], places: int, wanted: Callable[[], bool] = _anyone) -> list[bool]:
  """Of each expression, whether all its texts stand for themselves within a JSON string. places: of
  all of them. Raises as `over_tokens`, whose limits are of all of them together.
  """
  return _made('_plain', regexes, places, wanted)


def _made(
  name: str, regexes: Sequence[str], places: int, wanted: Callable[[], bool], *more: Any
) -> list:
  """What the function of this name gives of each, and `more`."""
  if importlib.util.find_spec('outlines_core') is None:
    raise ImportError(
      'constraints need outlines-core: pip install outlines-core (the extra tandem[constrain])'
    )
  if places <= FEW and all(map(_PLAIN_PLACES.fullmatch, regexes)):
    made = [globals()[name](regex, *more) for regex in regexes]
  else:
    made = _made_elsewhere(name, regexes, wanted, *more)
  for regex, each in zip(regexes, made, strict=True):
    if isinstance(each, _Refused):
      raise ValueError(f'regex={regex[:200]!r} {each}')
  return made


def _plain(regex: str) -> bool | _Refused:
  tables = _tables(regex)
  if isinstance(tables, _Refused):
    return tables
  after, ends, first = tables
  kept = useful(after, ends, first)
  return not np.isin(after[kept][:, [*range(0x20), ord('"'), ord('\\')]], kept).any()


def _tables(regex: str) -> Tables | _Refused:
  """The state after each byte [S, 256], -1 for none; where a text may end [S]; the first state.

  Nothing leads on from the last state, so that -1 is an index, too.
  """
  import outlines_core

  # The first without a group around it, which a stray ')' would close. For the second, the library
  # prefers: of a|ab it takes the a, unless a match must reach the end (\z). It looks for matches
  # that begin later, too, in 2 to the power of a repetition many combinations, unless something of
  # lower rank has matched before (|, the empty text). It knows no first state of what can be empty,
  # hence a mark in front; and forgets what follows an end, hence one of two bytes.
  tried = f'{regex}|', rf'\x00\x00(?:{regex})\z|'
  bytes_ = {bytes([byte]): [byte] for byte in range(256)} | {b'\0\0': [MARK]}
  vocabulary = outlines_core.Vocabulary(EOS, bytes_)
  try:
    index = [outlines_core.Index(each, vocabulary) for each in tried][-1]
  except ValueError as error:
    return _Refused(
      f'can\'t be used: {str(error).rstrip(".")}. It is in the syntax of Rust\'s regex crate, '
      'which knows neither look-around nor references, and of the whole text, so that ^ and $ are '
      'left out'
    )
  transitions = index.get_transitions()
  if len(transitions) > MOST_STATES:
    return _Refused(
      f'takes {len(transitions):,} states, of at most {MOST_STATES:,}: lower its counts, or say '
      'what stands before a repetition more exactly'
    )

  first = transitions[index.get_initial_state()].get(MARK)
  number = {state: i for i, state in enumerate(sorted(transitions))}
  after = np.full((len(number) + 1, EOS + 1), -1, np.int32)
  for state, moves in transitions.items():
    for byte in moves.keys() - {MARK}:
      after[number[state], byte] = number[moves[byte]]
  return after[:, :EOS], after[:, EOS] >= 0, number.get(first, len(number))


def _made_elsewhere(
  name: str, regexes: Sequence[str], wanted: Callable[[], bool], *more: Any
) -> list:
  """The same by another process, which is ended when nobody wants it any more.

  Raises ValueError where it passes a limit, and RuntimeError where it fails, whose own words are in
  the log: they are none for who asks a server.
  """
  root = pathlib.Path(__file__).resolve().parents[1]
  # What is of classes of ours can be read where the program's directory is known.
  told = (str(root), (MOST_SECONDS, MOST_BYTES)), (name, list(regexes), more)
  code, made, said = _ended(b''.join(map(pickle.dumps, told)), wanted)
  if code > 0 and b'MemoryError' not in said:
    log.error('no automaton could be made: %s', said.decode(errors='replace'))
    raise RuntimeError(
      f'no automaton could be made: the process for it ended with code {code}; the log says more'
    )
  if code:  # the system ended it, or we
    others = f' and {len(regexes) - 1} more, together,' if len(regexes) > 1 else ''
    raise ValueError(
      f'regex={regexes[0][:200]!r}{others} takes more than {MOST_SECONDS} s or '
      f'{MOST_BYTES / 2**30:g} GiB to make an automaton of: a repetition that may begin at many '
      'places takes 2 to its power many states; lower its counts, or say what stands before it '
      'more exactly'
    )
  return pickle.loads(made)


def _ended(told: bytes, wanted: Callable[[], bool]) -> tuple[int, bytes, bytes]:
  """How the process that is told this has ended, and what it has said. Raises Unwanted."""
  until, pipe = time.monotonic() + MOST_WAITING, subprocess.PIPE
  # Of many threads, each with memory of its own, there is no use.
  alone = os.environ | {'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1'}
  command = [sys.executable, '-c', _MAKE]
  with contextlib.ExitStack() as stack:
    # A file: of what is for a pipe, communicate forgets the rest when its time is over.
    file = stack.enter_context(tempfile.TemporaryFile())
    file.write(told)
    file.seek(0)
    process = subprocess.Popen(command, stdin=file, stdout=pipe, stderr=pipe, env=alone)
    stack.enter_context(process)
    stack.callback(process.kill)  # which nothing waits for, whatever has happened
    while True:
      try:
        made, said = process.communicate(timeout=POLL)
        return process.returncode, made, said
      except subprocess.TimeoutExpired:
        if not wanted():
          raise Unwanted from None
        if time.monotonic() > until:
          process.kill()


def _over_tokens(
  regex: str, vocabulary: Vocabulary, room: Room
) -> tuple[np.ndarray, np.ndarray] | _Refused:
  """See `over_tokens`."""
  tables = _tables(regex)
  if isinstance(tables, _Refused):
    return tables
  after, ends, first = tables
  # Bytes that lead all states alike are taken for one of them: 'a' to 'z' in [a-z]+.
  _, same = _merged(after)
  alike = bytes(int(np.argmax(same == kind)) for kind in same)

  # What each class of byte strings does to all states: nothing leads on, all stay, and what comes.
  moves = [np.full(len(after), -1, np.int32), np.arange(len(after), dtype=np.int32)]
  known = {move.tobytes(): i for i, move in enumerate(moves)}
  longer: dict[tuple[int, int], int] = {}  # the class of a byte string with a byte more
  classes = np.zeros(len(vocabulary.token_bytes), np.int64)
  for index, token in enumerate(vocabulary.token_bytes):
    here = 1 if token else NEVER
    for byte in token.translate(alike):
      if (here, byte) not in longer:
        move = after[moves[here], byte]
        longer[here, byte] = known.setdefault(move.tobytes(), len(moves))
        if longer[here, byte] == len(moves):
          moves.append(move)
          if len(moves) * move.nbytes > MOST_MOVES:
            return _Refused(
              f'takes more than {MOST_MOVES / 2**20:g} MiB for what tokens do to its states: '
              'shorten it, or lower its counts (maxLength, maxItems)'
            )
      here = longer[here, byte]
    classes[index] = here
  classes[[*vocabulary.ends]] = len(moves)
  moves.append(np.where(ends, moves[1], -1).astype(np.int32))

  used, classes = np.unique([NEVER, *classes], return_inverse=True)
  table = np.stack([moves[i] for i in used], 1)
  kept = useful(table, ends, first)
  if not kept.size:
    return _Refused(
      f'accepts no text that ids of this {vocabulary.kind!r} tokenizer spell: it accepts none, or '
      'only some with characters that the vocabulary lacks; allow others, or use a tokenizer that '
      'has bytes for all characters'
    )

  renumbered = np.full(len(table) + 1, -1, np.int32)
  renumbered[kept] = np.arange(len(kept))
  # The class of nothing but -1 is the first, NEVER, and stays it.
  table, merged = _merged(renumbered[table[kept]])
  if table.shape[0] > room.states or table.shape[1] > room.classes:
    return _Refused(
      f'takes {table.shape[0]} states and tells {table.shape[1]} classes of tokens apart, of at '
      f'most {room.states} and {room.classes} that there is room for; make it simpler'
    )
  return merged[classes[1:]].astype(np.int32), table


def _merged(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The different columns of a table, in the order in which they come, and which of them each
  column is.

  By their bytes: to sort columns of many thousand rows takes numpy ten seconds and more.
  """
  known: dict[bytes, int] = {}
  which = [known.setdefault(column.tobytes(), len(known)) for column in table.T]
  _, firsts = np.unique(which, return_index=True)
  return table[:, firsts], np.array(which)


def useful(after: np.ndarray, ends: np.ndarray, first: int) -> np.ndarray:
  """States that a text passes, the first of them in front: reached from there, and able to end.

  after: [S, anything], -1 for none.
  """
  from scipy.sparse import coo_array
  from scipy.sparse.csgraph import breadth_first_order

  S = len(after)
  sources, columns = np.nonzero(after >= 0)
  # S: the end, to which states lead where a text may end.
  targets = np.append(after[sources, columns], np.full(ends.sum(), S))
  sources = np.append(sources, np.flatnonzero(ends))
  graph = coo_array((np.ones(len(sources)), (sources, targets)), shape=(S + 1, S + 1)).tocsr()
  reached = breadth_first_order(graph, first, return_predecessors=False)
  able = breadth_first_order(graph.T.tocsr(), S, return_predecessors=False)
  return reached[np.isin(reached, able) & (reached < S)]
