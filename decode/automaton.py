"""How is a regular expression made an automaton over bytes, within a limit of time and memory?

Some expressions take as many states as 2 to the power of a repetition, (a|b)*a(a|b){20}, which no
look at their text tells, and the library that makes them cannot be stopped. So another process
does it, which the system ends.
"""

import importlib.util
import logging
import os
import pathlib
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

log = logging.getLogger(__name__)

MOST_SECONDS, MOST_BYTES = 30, 2**31  # of the other process
MOST_STATES = 2**16  # that it hands back: 67 MB
EOS, MARK = 256, 257

# Places of an expression that is made in this process, for another one takes half a second to
# begin. It has characters, and classes of ASCII's, and nothing else: its states are 2 to this power
# at most, and of few bytes. One place of \w has hundreds.
FEW = 12
_PLAIN_PLACES = re.compile(
  r'(?:[^.\\\[\](){}]|\\\W|\[[A-Za-z0-9_ -]+\]|\((?:\?:|(?!\?))|\)|\{\d+,?\d*\})*'
)

_MAKE = """
import pickle, resource, sys
room, (seconds, size), name, regexes = pickle.load(sys.stdin.buffer)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
sys.path.insert(0, room)
from decode import automaton
made = [getattr(automaton, name)(regex) for regex in regexes]
sys.stdout.buffer.write(pickle.dumps(made))
"""

Tables = tuple[np.ndarray, np.ndarray, int]


class _Refused(ValueError):
  """What is wrong with an expression, behind `regex=.. `."""


def over_bytes(regex: str, places: int) -> Tables:
  """The state after each [S, 256], -1 for none; where a text may end [S]; the first state.

  Nothing leads on from the last state, so that -1 is an index, too.

  places: how many characters and classes the expression has.

  Raises:
    ImportError: without outlines-core.
    ValueError: for what is no expression, and for one that takes more than MOST_SECONDS,
      MOST_BYTES or MOST_STATES.
  """
  return _made('_tables', [regex], places)[0]


def plain(regexes: Sequence[str], places: int) -> list[bool]:
  """Of each expression, whether all its texts stand for themselves within a JSON string. places: of
  all of them. Raises as `over_bytes`, whose limits are of all of them together.
  """
  return _made('_plain', regexes, places)


def _made(name: str, regexes: Sequence[str], places: int) -> list:
  """What the function of this name gives of each."""
  if importlib.util.find_spec('outlines_core') is None:
    raise ImportError(
      'constraints need outlines-core: pip install outlines-core (the extra tandem[constrain])'
    )
  if places <= FEW and all(map(_PLAIN_PLACES.fullmatch, regexes)):
    made = [globals()[name](regex) for regex in regexes]
  else:
    made = _made_elsewhere(name, regexes)
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
  """See `over_bytes`."""
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


def _made_elsewhere(name: str, regexes: Sequence[str]) -> list:
  """The same by another process.

  Raises ValueError where it passes a limit, and RuntimeError where it fails, whose own words are in
  the log: they are none for who asks a server.
  """
  room = pathlib.Path(__file__).resolve().parents[1]
  limits = MOST_SECONDS, MOST_BYTES
  done = subprocess.run(
    [sys.executable, '-c', _MAKE],
    input=pickle.dumps((str(room), limits, name, list(regexes))),
    capture_output=True,
    # Of many threads, each with memory of its own, there is no use.
    env=os.environ | {'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1'},
  )
  if done.returncode > 0 and b'MemoryError' not in done.stderr:
    log.error('no automaton could be made: %s', done.stderr.decode(errors='replace'))
    raise RuntimeError(
      f'no automaton could be made: the process for it ended with code {done.returncode}; the log '
      'says more'
    )
  if done.returncode:  # the system ended it
    others = f' and {len(regexes) - 1} more, together,' if len(regexes) > 1 else ''
    raise ValueError(
      f'regex={regexes[0][:200]!r}{others} takes more than {MOST_SECONDS} s or '
      f'{MOST_BYTES / 2**30:g} GiB to make an automaton of: a repetition that may begin at many '
      'places takes 2 to its power many states; lower its counts, or say what stands before it '
      'more exactly'
    )
  return pickle.loads(done.stdout)


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
