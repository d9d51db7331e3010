"""What is read besides texts that are written, and when? Prompts to be scored, texts to be
embedded: one job after another, part by part, between the steps of those that write, who wait for
one part at a time. Keys take turns, as for rows.
"""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any

from serving.call import JobCounts, Limits, QueueFull
from serving.queue import Queue, Waiting, check_places

log = logging.getLogger(__name__)

KINDS = 'embedding', 'score'
Job = Generator[None, None, Any]  # which goes on part by part, and returns what comes of it


class JobFailed(Exception):
  """The device has failed, or the server ends."""


@dataclasses.dataclass(eq=False, kw_only=True)
class WaitingJob(Waiting):
  job: Job
  result: Future
  kind: str
  tokens: int


class Jobs:
  """Those that wait. `submit` may be called from any thread; they go on by that of `step`."""

  def __init__(self, limits: Limits, clock: Callable[[], float]):
    self._limits, self._clock = limits, clock
    self._until: float | None = None
    self._lock = threading.Lock()
    self._waiting = Queue(limits.patience)
    self._now: WaitingJob | None = None
    self._over = False
    self.counts = {kind: JobCounts() for kind in KINDS}  # of those that have ended
    self.refused = 0

  @property
  def waiting(self) -> int:
    """How many wait for their turn."""
    return len(self._waiting)

  @property
  def idle(self) -> bool:
    return self._now is None and not len(self._waiting)

  def submit(self, job: Job, kind: str, tokens: int, *, key: str = '', priority: int = 0) -> Future:
    """What comes of a job, when it is there, or JobFailed. kind: of KINDS. tokens: that it reads.
    key, priority: see serving.call.Call.

    Raises QueueFull.
    """
    with self._lock:
      for gone in [waiting for waiting in self._waiting if waiting.result.cancelled()]:
        gone.job.close()
        self._waiting.remove(gone)
      try:
        of_keys = collections.Counter(waiting.key for waiting in self._waiting)
        check_places(key, 1, of_keys, self._limits.waiting, 'requests wait to be read', 1.0)
      except QueueFull:
        self.refused += 1
        raise
      waiting = WaitingJob(
        key, priority, self._clock(), job=job, result=Future(), kind=kind, tokens=tokens
      )
      if self._over:
        waiting.result.set_exception(JobFailed('the server ends'))
      else:
        self._waiting.add(waiting)
    return waiting.result

  def drain(self, until: float) -> None:
    """What has not ended by then ends."""
    self._until = until

  def step(self) -> None:
    """Another part."""
    if self._until is not None and self._clock() >= self._until:
      self.end_all()
    if self._now is None:
      with self._lock:
        self._now = self._waiting.next(self._clock())
        if self._now is None:
          return
        self._waiting.turn(self._now)
    if self._now.result.cancelled():
      self._now.job.close()
      self._now = None
      return
    try:
      next(self._now.job)
    except StopIteration as end:
      self._finish(self._now, end.value)
    except Exception as error:
      log.exception('a job has failed')
      message = f'the device has failed ({type(error).__name__}); ask again'
      self._finish(self._now, JobFailed(message))

  def end_all(self) -> None:
    """Nobody gets anything any more."""
    with self._lock:
      self._over = True
      left = [*self._waiting]
      self._waiting = Queue(self._limits.patience)
    for waiting in [*left, *([self._now] if self._now else [])]:
      self._finish(waiting, JobFailed('the server ends'))

  def _finish(self, waiting: WaitingJob, result: Any) -> None:
    self._now = None
    counts = self.counts[waiting.kind]
    if waiting.result.set_running_or_notify_cancel():
      if isinstance(result, Exception):
        counts.failed += 1
        waiting.result.set_exception(result)
      else:
        counts.done += 1
        counts.tokens += waiting.tokens
        counts.seconds += self._clock() - waiting.since
        waiting.result.set_result(result)
