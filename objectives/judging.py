"""What calls a reward function that a person wrote, apart from training? A process of its own,
which may hang, exit or print what it likes: python -m objectives.judging FILE.

What the file holds comes in first, as a line of JSON: whoever asks knows what judges, though the
file may be edited meanwhile. Then a line for each answer, {"text": .., "record": ..}; one goes out
for each: {"score": number} or {"error": text}. Imports nothing of the project.
"""

import json
import math
import os
import sys
import types
from collections.abc import Callable

FUNCTION = 'reward'
MOST = 3e38  # as float32 holds, in which answers are credited


def loaded(path: str, content: bytes) -> Callable[[str, dict], float]:
  """The function of a file that holds this. Raises ValueError where it has none; what the file
  raises passes.
  """
  module = types.ModuleType('reward_file')
  module.__file__ = path
  exec(compile(content, path, 'exec'), vars(module))
  function = getattr(module, FUNCTION, None)
  if not callable(function):
    raise ValueError(
      f'{path} has no function {FUNCTION}(text: str, record: dict) -> float; write one'
    )
  return function


def judged(function: Callable[[str, dict], float], text: str, record: dict) -> dict:
  """What goes out for an answer; whatever the function raises is told, not passed on."""
  try:
    score = function(text, record)
    number = float(score) if hasattr(score, '__float__') else math.nan
  except Exception as error:  # of a number beyond floats, of an array of several, too
    return {'error': f'{type(error).__name__}: {error}'}
  if not abs(number) <= MOST:
    return {'error': f'it returned {score!r}, which is no finite number of float32'}
  return {'score': number}


def main(path: str) -> None:
  """Judges what standard input says, until it ends."""
  # What the function prints goes to the errors: the answers have standard output for themselves.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def say(content: dict) -> None:
    answers.write(json.dumps(content) + '\n')
    answers.flush()

  try:
    # A character a byte, since what encoding a file is in is for Python to find.
    function = loaded(path, json.loads(sys.stdin.readline()).encode('latin-1'))
  except Exception as error:
    say({'error': f'{type(error).__name__}: {error}'})
    return
  say({})
  for line in sys.stdin:
    say(judged(function, **json.loads(line)))


if __name__ == '__main__':
  main(sys.argv[1])
