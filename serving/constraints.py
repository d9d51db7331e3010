"""How are constraints made while rows are written? By threads of their own, few at a time, each
once, and of an API key one at a time, in turn; what is made is kept for who asks the same.

A hostile expression costs its own request: its automaton is made within limits of time and memory,
by another process (decode.automaton), and whatever is beyond what the engine has room for is said.
"""

import collections
import concurrent.futures
import dataclasses
import importlib.util
import json
import threading
from concurrent.futures import Future

from data.tokenizer import Tokenizer
from decode.automaton import Room
from decode.constrain import Constraint
from decode.engine import Sizes
from serving.call import Call, Limits
from serving.queue import Queue, Waiting, check_places

THREADS = 2


@dataclasses.dataclass(eq=False, kw_only=True)
class _Making(Waiting):
  """A constraint that is being made, or is.

  Attributes:
    key: of whom it was asked for first. asked: 'regex' or 'schema', and its text.
    made: what comes of it. waiting: how many wait for it. nbytes: of its tables.
  """

  asked: tuple[str, str]
  made: Future = dataclasses.field(default_factory=Future)
  waiting: int = 1
  nbytes: int = 0

  @property
  def left(self) -> bool:
    """Whether it ends without being made: nobody waited for it any more."""
    return self.made.cancelled() or not (self.made.done() or self.waiting)


class Constraints:
  """Of one tokenizer. Any thread may ask."""

  def __init__(self, tokenizer: Tokenizer, sizes: Sizes, limits: Limits):
    self._tokenizer, self._limits = tokenizer, limits
    # One state and one class are those of no constraint.
    self._room = Room(sizes.states - 1, sizes.classes - 1)
    self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, 'constraint')
    self._kept: collections.OrderedDict[tuple, _Making] = collections.OrderedDict()
    self._queue = Queue(limits.patience)
    self._busy: list[str] = []  # keys of those that are being made
    self._able = importlib.util.find_spec('outlines_core') is not None
    self._closed = False
    self._lock = threading.Lock()

  def made(self, call: Call) -> Future | None:
    """The constraint that a call's texts keep to, when it is made; None where there is none. What
    is wrong with it is the future's ValueError. Who does not want it any more cancels the future:
    what nobody wants is not made.

    Raises ValueError for one that is too long, and where none can be made, and QueueFull where as
    many are being made as may.
    """
    if call.regex is None and call.schema is None:
      return None
    what = 'regex' if call.schema is None else 'schema'
    text = call.regex if call.schema is None else call.schema
    if not self._able:
      raise ValueError(
        f'{what}: this server keeps no text to anything, for it has no outlines-core: pip install '
        'outlines-core (the extra tandem[serve])'
      )
    if not isinstance(text, str):
      text = json.dumps(text)  # in its own order: properties are written in it
    if len(text) > self._limits.constraint:
      raise ValueError(
        f'{what} has {len(text)} characters, of at most {self._limits.constraint}; shorten it'
      )
    with self._lock:
      making = self._kept.get((what, text))
      if making is None or making.left:
        making = self._begun((what, text), call.key)
      elif making.made.done():
        self._kept.move_to_end((what, text))
        return making.made
      else:
        self._kept.move_to_end((what, text))
        making.waiting += 1
    return self._waiting_for(making)

  def _begun(self, asked: tuple[str, str], key: str) -> _Making:
    making = [each.key for each in self._kept.values() if not each.made.done()]
    most = self._limits.constraints
    check_places(key, 1, collections.Counter(making), most, 'constraints are being made', 1.0)
    begun = _Making(key, 0, 0.0, asked=asked)
    self._queue.add(begun)
    self._threads.submit(self._work)
    self._kept[asked] = begun
    self._kept.move_to_end(asked)
    self._forget()
    return begun

  def _work(self) -> None:
    """Makes one after another, as long as there is one whose turn it may be."""
    while (making := self._next()) is not None:
      try:
        if making.made.set_running_or_notify_cancel():
          making.made.set_result(self._make(making))
      except Exception as error:
        making.made.set_exception(error)
      finally:
        with self._lock:
          self._busy.remove(making.key)

  def _next(self) -> _Making | None:
    with self._lock:
      for making in self._queue:
        if making.made.cancelled():
          self._queue.remove(making)
      # Those without keys are nobody's in particular.
      making = self._queue.next(0.0, lambda each: not each.key or each.key not in self._busy)
      if making is not None:
        self._queue.turn(making)
        self._busy.append(making.key)
      return making

  def _waiting_for(self, making: _Making) -> Future:
    """A future of its own, for one of several who ask may cancel it."""
    waiting: Future = Future()

    def left(waiting: Future) -> None:
      if not waiting.cancelled():
        return
      with self._lock:
        making.waiting -= 1
        last = not making.waiting
      if last:
        making.made.cancel()  # if it has not begun; else it ends as soon as it sees that

    def came(made: Future) -> None:
      if made.cancelled():
        waiting.cancel()
      elif waiting.set_running_or_notify_cancel():
        if (error := made.exception()) is not None:
          waiting.set_exception(error)
        else:
          waiting.set_result(made.result())

    waiting.add_done_callback(left)
    making.made.add_done_callback(came)
    return waiting

  def close(self) -> None:
    """No more are made, and what is being made ends."""
    self._closed = True
    with self._lock:
      waiting = [*self._queue]
    for making in waiting:
      making.made.cancel()
    self._threads.shutdown(wait=False, cancel_futures=True)

  def _forget(self) -> None:
    """Keeps no more than may be; what was asked for longest ago goes first."""
    limits, left = self._limits, list(self._kept.values())
    for what, making in list(self._kept.items()):
      nbytes = sum(each.nbytes for each in left)
      few = len(left) <= limits.kept and nbytes <= limits.kept_bytes
      if making.made.cancelled() or (making.made.done() and not few):
        left.remove(making)
        del self._kept[what]

  def _make(self, making: _Making) -> Constraint:
    what, text = making.asked

    def wanted() -> bool:
      return making.waiting > 0 and not self._closed

    try:
      made = Constraint(self._tokenizer, **{what: text}, room=self._room, wanted=wanted)
      making.nbytes = made.next.nbytes + made.classes.nbytes
      return made
    except ValueError as error:
      refused = str(error)
    except Exception:
      with self._lock:  # who asks again may have more luck
        if self._kept.get(making.asked) is making:
          del self._kept[making.asked]
      raise
    # It is kept for who asks the same, with its traceback, which has to have no tables in it.
    raise ValueError(refused)
