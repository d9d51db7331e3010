"""How do events of a call reach who reads them, on another thread, at his own pace?

The service puts them in from its thread; one reader takes them out, of an event loop (async for) or
of a thread (for). Neither waits for the other: what is unread is bounded, and beyond that the
service ends the call.
"""

import asyncio
import collections
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from serving.call import Call, Event, Times, Usage

_numbers = itertools.count(1)


class Ticket:
  """A call that was taken.

  Iterating gives its events, as they come, until every sample has ended; one reader, once. An event
  loop's reader that stops before the end cancels it.

  Attributes:
    id: that no other ticket of this process has.
    call, usage, times: see serving.call; usage and times grow until it is done.
    prompt: ids that the model reads.
    done: whether every sample has ended, though events may be unread.
  """

  def __init__(
    self, call: Call, prompt: list[int], asked: float, cancel: Callable[['Ticket'], None]
  ):
    """asked: when, by the service's clock. cancel: what `cancel` does."""
    self.id = f'{next(_numbers):08x}'
    self.call, self.prompt = call, prompt
    self.usage = Usage()
    self.times = Times(asked)
    self._cancel = cancel
    self._lock = threading.Condition()
    self._events: collections.deque[Event] = collections.deque()
    self._left = set(call.samples)
    self._unread = 0
    self._wake: Callable[[], None] | None = None

  @property
  def done(self) -> bool:
    return not self._left

  @property
  def unread(self) -> int:
    """Tokens, and alternatives of tokens, that nobody has taken so far."""
    return self._unread

  def cancel(self) -> None:
    """Nobody reads any more: what is left of it ends, within a chunk. From any thread, at any time,
    also again.
    """
    self._cancel(self)

  def put(self, event: Event) -> None:
    """Of the service: another event. Of a sample that has ended, there is none any more."""
    with self._lock:
      if event.sample not in self._left:
        raise RuntimeError(f'sample {event.sample} of {self.id} has ended, or was not asked for')
      if event.ids and self.times.first is None:
        self.times.first = event.at
      self.usage.completion += len(event.ids)
      if event.finish:
        self._left.remove(event.sample)
        if not self._left:
          self.times.ended = event.at
      self._unread += _size(event)
      self._events.append(event)
      self._lock.notify_all()
      wake = self._wake
    if wake is not None:
      wake()

  def _take(self) -> Event | None:
    """The next event, if there is one; with the lock."""
    if not self._events:
      return None
    event = self._events.popleft()
    self._unread -= _size(event)
    return event

  def next(self, timeout: float | None = None) -> Event | None:
    """The next event, or None where all were taken. From a thread that may wait.

    Raises TimeoutError after so many seconds.
    """
    with self._lock:
      if not self._lock.wait_for(lambda: self._events or self.done, timeout):
        raise TimeoutError(f'no event of {self.id} within {timeout} s')
      return self._take()

  def __iter__(self) -> Iterator[Event]:
    while (event := self.next()) is not None:
      yield event

  async def __aiter__(self) -> AsyncIterator[Event]:
    loop, came = asyncio.get_running_loop(), asyncio.Event()

    def wake():
      try:
        loop.call_soon_threadsafe(came.set)
      except RuntimeError:  # the loop has been closed: nobody reads any more
        self.cancel()

    with self._lock:
      self._wake = wake
    try:
      while True:
        with self._lock:
          event = self._take()
          over = event is None and self.done
          came.clear()
        if over:
          return
        if event is None:
          await came.wait()
        else:
          yield event
    finally:
      self._wake = None
      if not self.done:
        self.cancel()


def _size(event: Event) -> int:
  """Tokens, and alternatives of tokens: of either it is these that take memory."""
  return len(event.ids) + sum(map(len, event.alternatives))
