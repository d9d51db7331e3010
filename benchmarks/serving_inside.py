"""What does a scheduler cost by itself, and what does a prompt that was read before save? Seen from
inside of a process that serves.
"""

import functools
import statistics
import time
from collections.abc import Callable

PREFIX = 1024  # tokens that prompts have in common
TAIL = 16
TIMES = 5  # that a prompt is asked for, read before or not


class OwnTime:
  """Processor seconds of the thread that steps, in the scheduler and not in the engine. Their share
  of all that the process takes is what scheduling costs.
  """

  def __init__(self):
    from serving.rows import EngineRows
    from serving.scheduler import Scheduler

    self._steps = self._engine = 0.0
    for name in ('choose', 'join', 'read', 'decode', 'taken', 'forget', 'release', 'reset'):
      setattr(EngineRows, name, self._timed(getattr(EngineRows, name), '_engine'))
    Scheduler.step = self._timed(Scheduler.step, '_steps')

  def _timed(self, function: Callable, account: str) -> Callable:
    @functools.wraps(function)
    def timed(*arguments):
      began = time.thread_time()
      try:
        return function(*arguments)
      finally:
        setattr(self, account, getattr(self, account) + time.thread_time() - began)

    return timed

  def begun(self) -> tuple[float, float]:
    """Own time so far, and the process's."""
    return self._steps - self._engine, time.process_time()

  def share(self, began: tuple[float, float]) -> float:
    """Of the process's time since then."""
    own, whole = (now - before for now, before in zip(self.begun(), began))
    return own / whole


def sharing(service) -> dict:
  """Seconds to the first token of a prompt of PREFIX tokens and a few more, where nobody has read
  the first ones, and where others have; medians. Nothing else runs.
  """
  import numpy as np

  from decode.options import Options
  from serving.call import Call

  draw = np.random.default_rng(0)
  options = Options(max_new_tokens=1, temperature=0.0)

  def asked(ids, salt):
    tail = draw.integers(3, service.vocabulary, TAIL).tolist()
    began = time.perf_counter()
    ticket = service.submit(Call(prompt=ids + tail, options=options, ignore_end=True, salt=salt))
    for event in ticket:
      if event.error is not None:
        raise RuntimeError(event.error.message)
    return time.perf_counter() - began, ticket.usage.cached

  ids = draw.integers(3, service.vocabulary, PREFIX).tolist()
  new = [asked(ids, str(i)) for i in range(TIMES)]
  again = [asked(ids, '0') for _ in range(TIMES)]
  if any(cached for _, cached in new) or not all(cached for _, cached in again):
    raise RuntimeError(f'what was read before is not what was meant: {new}, {again}')
  first, hit = (statistics.median(seconds for seconds, _ in each) for each in (new, again))
  return {'tokens': PREFIX, 'new': first, 'read_before': hit, 'times': first / hit}
