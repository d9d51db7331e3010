"""How are constraints made while rows are written? By threads of their own, few at a time, each
once; what is made is kept for who asks the same.

A hostile expression costs its own request: its automaton is made within limits of time and memory,
by another process (decode.automaton), and whatever is beyond what the engine has room for is said.
"""

import collections
import concurrent.futures
import json
import threading
from concurrent.futures import Future

from data.tokenizer import Tokenizer
from decode.constrain import Constraint
from decode.engine import Sizes
from serving.call import Call, Limits, QueueFull

THREADS = 2


class Constraints:
  """Of one tokenizer. Any thread may ask."""

  def __init__(self, tokenizer: Tokenizer, sizes: Sizes, limits: Limits):
    self._tokenizer, self._sizes, self._limits = tokenizer, sizes, limits
    self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, 'constraint')
    self._kept: collections.OrderedDict[tuple, Future] = collections.OrderedDict()
    self._lock = threading.Lock()

  def made(self, call: Call) -> Future | None:
    """The constraint that a call's texts keep to, when it is made; None where there is none. What
    is wrong with it is the future's ValueError.

    Raises ValueError for one that is too long, and QueueFull where as many are being made as may.
    """
    if call.regex is None and call.schema is None:
      return None
    what = 'regex' if call.schema is None else 'schema'
    text = call.regex if call.schema is None else call.schema
    if not isinstance(text, str):
      text = json.dumps(text)  # in its own order: properties are written in it
    if len(text) > self._limits.constraint:
      raise ValueError(
        f'{what} has {len(text)} characters, of at most {self._limits.constraint}; shorten it'
      )
    with self._lock:
      if (what, text) in self._kept:
        self._kept.move_to_end((what, text))
        return self._kept[what, text]
      being_made = sum(not future.done() for future in self._kept.values())
      if being_made >= self._limits.constraints:
        raise QueueFull(
          f'{being_made} constraints are being made, of at most {self._limits.constraints} at a '
          'time; come again later',
          1.0,
        )
      future = self._kept[what, text] = self._threads.submit(self._make, what, text)
      for key in list(self._kept)[: max(0, len(self._kept) - self._limits.kept)]:
        if self._kept[key].done():
          del self._kept[key]
    return future

  def close(self) -> None:
    """No more are made."""
    self._threads.shutdown(wait=False, cancel_futures=True)

  def _make(self, what: str, text: str) -> Constraint:
    try:
      return self._fitting(what, text)
    except ValueError as error:
      refused = str(error)
    except Exception:
      with self._lock:  # who asks again may have more luck
        self._kept.pop((what, text), None)
      raise
    # It is kept for who asks the same, with its traceback, which has to have no tables in it.
    raise ValueError(refused)

  def _fitting(self, what: str, text: str) -> Constraint:
    constraint = Constraint(self._tokenizer, **{what: text})
    (states, classes), sizes = constraint.next.shape, self._sizes
    # One state and one class are those of no constraint.
    if states >= sizes.states or classes >= sizes.classes:
      raise ValueError(
        f'{what} takes {states} states and tells {classes} classes of tokens apart, of at most '
        f'{sizes.states - 1} and {sizes.classes - 1} that this server has room for; make it simpler'
      )
    return constraint
