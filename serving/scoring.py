"""Whose prompts are scored next? One after another, part by part, between the steps of those that
write: who writes waits for one part at a time.
"""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from decode.front import Front
from decode.scorer import PromptScores
from serving.call import Limits, QueueFull

log = logging.getLogger(__name__)

# Gives, of ids, their front and a number of alternatives, what is known after each part.
Scorer = Callable[[Sequence[int], Front, int], Iterator[PromptScores]]


class ScoringFailed(Exception):
  """The device has failed, or the server ends."""


@dataclasses.dataclass
class _Job:
  ids: Sequence[int]
  front: Front
  alternatives: int
  result: Future


class Scoring:
  """Prompts that wait to be scored. `submit` may be called from any thread."""

  def __init__(self, scorer: Scorer, limits: Limits, clock: Callable[[], float]):
    self._scorer, self._limits, self._clock = scorer, limits, clock
    self._until: float | None = None
    self._lock = threading.Lock()
    self._jobs: collections.deque[_Job] = collections.deque()
    self._job: _Job | None = None
    self._parts: Iterator[PromptScores] = iter(())
    self._over = False

  @property
  def idle(self) -> bool:
    return self._job is None and not self._jobs

  def submit(self, ids: Sequence[int], front: Front, alternatives: int) -> Future:
    """A prompt's PromptScores, when they are there, or ScoringFailed. Raises QueueFull."""
    with self._lock:
      if len(self._jobs) >= self._limits.waiting:
        raise QueueFull(
          f'{len(self._jobs)} prompts wait to be scored, of at most {self._limits.waiting}; come '
          'again later',
          1.0,
        )
      job = _Job(ids, front, alternatives, Future())
      if self._over:
        job.result.set_exception(ScoringFailed('the server ends'))
      else:
        self._jobs.append(job)
    return job.result

  def drain(self, until: float) -> None:
    """What has not ended by then ends."""
    self._until = until

  def step(self) -> None:
    """Another part."""
    if self._until is not None and self._clock() >= self._until:
      self.end_all()
    if self._job is None:
      with self._lock:
        if not self._jobs:
          return
        self._job = self._jobs.popleft()
      job = self._job
      self._parts = self._scorer(job.ids, job.front, job.alternatives)
    job, found = self._job, None
    if job.result.cancelled():
      self._job = None
      return
    try:
      found = next(self._parts, None)
      last = found is None or len(found.logprobs) >= len(job.ids) - 1
    except Exception as error:
      log.exception('a prompt could not be scored')
      self._finish(job, ScoringFailed(f'the device has failed ({type(error).__name__}); ask again'))
      return
    if last:
      self._finish(job, found or PromptScores())

  def end_all(self) -> None:
    """Nobody gets anything any more."""
    with self._lock:
      self._over = True
      left, self._jobs = [*self._jobs], collections.deque()
    for job in [*left, *([self._job] if self._job else [])]:
      self._finish(job, ScoringFailed('the server ends'))

  def _finish(self, job: _Job, result: PromptScores | Exception) -> None:
    self._job = None
    if job.result.set_running_or_notify_cancel():
      if isinstance(result, Exception):
        job.result.set_exception(result)
      else:
        job.result.set_result(result)
