"""How is a regular expression made an automaton over bytes, within a limit of time and memory?

Some expressions take as many states as 2 to the power of a repetition, (a|b)*a(a|b){20}, which no
look at their text tells, and the library that makes them cannot be stopped. So another process
does it, which the system ends.
"""

import importlib.util
import pathlib
import pickle
import subprocess
import sys

import numpy as np

MOST_SECONDS, MOST_BYTES = 30, 2**31  # of the other process
EOS, MARK = 256, 257

FEW = 14  # places of an expression whose states are few, however it is written

_MAKE = """
import pickle, resource, sys
room, (seconds, size), tried = pickle.load(sys.stdin.buffer)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
sys.path.insert(0, room)
from decode.automaton import _made
sys.stdout.buffer.write(pickle.dumps(_made(tried)))
"""


def over_bytes(regex: str, places: int) -> tuple[np.ndarray, np.ndarray, int]:
  """The state after each [S, 256], -1 for none; where a text may end [S]; the first state.

  Nothing leads on from the last state, so that -1 is an index, too.

  places: how many characters and classes the expression has, which has at most 2 to their power
    many states.

  Raises:
    ImportError: without outlines-core.
    ValueError: for what is no expression, and for one that takes more than MOST_SECONDS or
      MOST_BYTES.
  """
  if importlib.util.find_spec('outlines_core') is None:
    raise ImportError(
      'constraints need outlines-core: pip install outlines-core (the extra tandem[constrain])'
    )
  # The first without a group around it, which a stray ')' would close. For the second, the library
  # prefers: of a|ab it takes the a, unless a match must reach the end (\z). It looks for matches
  # that begin later, too, in 2 to the power of a repetition many combinations, unless something of
  # lower rank has matched before (|, the empty text). It knows no first state of what can be empty,
  # hence a mark in front; and forgets what follows an end, hence one of two bytes.
  tried = f'{regex}|', rf'\x00\x00(?:{regex})\z|'
  index = _made(tried) if places <= FEW else _made_elsewhere(regex, tried)
  if isinstance(index, str):
    raise ValueError(
      f'regex={regex!r} can\'t be used: {index.rstrip(".")}. It is in the syntax of Rust\'s regex '
      'crate, which knows neither look-around nor references, and of the whole text, so that ^ and '
      '$ are left out'
    )
  transitions = index.get_transitions()
  first = transitions[index.get_initial_state()].get(MARK)
  number = {state: i for i, state in enumerate(sorted(transitions))}
  after = np.full((len(number) + 1, EOS + 1), -1, np.int32)
  for state, moves in transitions.items():
    for byte in moves.keys() - {MARK}:
      after[number[state], byte] = number[moves[byte]]
  return after[:, :EOS], after[:, EOS] >= 0, number.get(first, len(number))


def _made(tried: tuple[str, ...]):
  """The library's Index of the last of the expressions tried, or what is wrong with one of them."""
  import outlines_core

  bytes_ = {bytes([byte]): [byte] for byte in range(256)} | {b'\0\0': [MARK]}
  vocabulary = outlines_core.Vocabulary(EOS, bytes_)
  try:
    return [outlines_core.Index(regex, vocabulary) for regex in tried][-1]
  except ValueError as error:
    return str(error)


def _made_elsewhere(regex: str, tried: tuple[str, ...]):
  """The same by another process; regex: for the error."""
  room = pathlib.Path(__file__).resolve().parents[1]
  limits = MOST_SECONDS, MOST_BYTES
  done = subprocess.run(
    [sys.executable, '-c', _MAKE],
    input=pickle.dumps((str(room), limits, tried)),
    capture_output=True,
  )
  if done.returncode > 0 and b'MemoryError' not in done.stderr:
    raise RuntimeError(f'no automaton could be made: {done.stderr.decode(errors="replace")}')
  if done.returncode:  # the system ended it
    raise ValueError(
      f'regex={regex[:200]!r} takes more than {MOST_SECONDS} s or {MOST_BYTES / 2**30:g} GiB to '
      'make an automaton of: a repetition that may begin at many places takes 2 to its power many '
      'states; lower its counts, or say what stands before it more exactly'
    )
  return pickle.loads(done.stdout)
