"""Who does the tasks of a stage, and what becomes of one whose worker dies? An engine does them, in
processes of this machine (`LocalEngine`) or on a cluster (data/on_ray.py); `run` gives it tasks,
and again those that were lost.

A task is a function of its arguments that fills a directory. The directory appears whole, with an
index, or not at all; one that is there is a task that is done, whoever did it and when. So any
task may be done twice, by two workers at once, or again after anything has failed, and nothing
depends on when it was, or where.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import resource
import secrets
import shutil
import socket
import struct
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import names
from data import cache
from data.processes import without_main

LOST = 12  # workers that one task may lose before it is given up
BLAMED = 3  # of them at the same document, before that one is left out
FAILED = 3  # times that the system may refuse a task something, before that is the error
EVERY = 10  # seconds between lines of progress
WORTH = 1  # seconds of a stage that are worth a line at its end
AT = 'at'  # file of the number of the document that a worker is at
DECISIVE = 'sentencepiece', 'tokenizers', 'datasketch'
# Imported once for all processes.
PRELOADED = 'data.stages', 'data.stages_encode', 'datasketch', 'scipy.sparse.csgraph'


@dataclasses.dataclass(frozen=True)
class CorpusTask:
  """One task.

  Attributes:
    call: name of the function: call(output, *arguments) -> its report, JSON-able.
    place: the directory that it fills.
    arguments: what pickle takes.
    weight: how much there is to do, next to other tasks of the stage: bytes, documents.
    attempt: of this one attempt, no two have the same.
    without: documents that are left out, by their numbers.
    versions: as `versions`, of who gives the task.
  """

  call: str
  place: str
  arguments: tuple
  weight: float = 1.0
  attempt: str = ''
  without: tuple[int, ...] = ()
  versions: tuple[tuple[str, str], ...] = ()

  @property
  def aside(self) -> pathlib.Path:
    """Where this attempt writes until it is done."""
    place = pathlib.Path(self.place)
    return place.with_name(f'{place.name}.{self.attempt}.tmp')


class TaskOutput:
  """What a task writes into.

  Attributes:
    path: an empty directory. without: as of the task.
  """

  def __init__(self, path: pathlib.Path, without: tuple[int, ...]):
    self.path, self.without = path, without
    self._at = os.open(path / AT, os.O_WRONLY | os.O_CREAT)

  def at(self, document: int) -> None:
    """Says which document is next, so that the one that ends a process is known."""
    os.pwrite(self._at, struct.pack('<q', document), 0)

  def close(self) -> None:
    os.close(self._at)
    (self.path / AT).unlink()


@functools.cache
def versions() -> tuple[tuple[str, str], ...]:
  """Of what decides about bytes: the workers of one preparation have the same."""
  unicode = unicodedata.unidata_version
  return ('unicode', unicode), *((name, importlib.metadata.version(name)) for name in DECISIVE)


class TaskDone(NamedTuple):
  """What comes of a task: its report, whether it was done before, and the greatest memory (bytes)
  that its process has had so far.
  """

  report: dict
  before: bool
  peak: int


def perform(task: CorpusTask) -> TaskDone:
  """Does a task, or finds it done; in a worker."""
  if task.versions != versions():
    raise ValueError(
      f'a worker on {socket.gethostname()} has {dict(versions())}, and who prepares the corpus '
      f'{dict(task.versions)}: install the same on all machines'
    )
  place = pathlib.Path(task.place)
  if (report := finished(place)) is not None:
    return TaskDone(report, True, _peak())
  shutil.rmtree(place, ignore_errors=True)  # damaged
  task.aside.mkdir(parents=True)
  try:
    with contextlib.closing(TaskOutput(task.aside, task.without)) as output:
      report = names.imported(task.call)(output, *task.arguments)
    within = sorted(path for path in task.aside.rglob('*') if path.is_file())
    written = [cache.record(task.aside, str(path.relative_to(task.aside))) for path in within]
    cache.write_index(task.aside, written, report)
    try:
      os.rename(task.aside, place)
    except OSError:
      if (report := finished(place)) is None:  # otherwise another attempt was first
        raise
  finally:
    shutil.rmtree(task.aside, ignore_errors=True)
  return TaskDone(cache.read_index(place)['report'], False, _peak())


def _peak() -> int:
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def finished(place: pathlib.Path) -> dict | None:
  """The report of a task that is done and whose files are what was written; None of any other."""
  if not (place / cache.INDEX).is_file():
    return None
  try:
    index = cache.read_index(place)
    cache.check(place, index['files'], contents=True)
  except cache.CorruptShardError:
    return None
  return index['report']


class WorkerLost(Exception):
  """A worker ended in the middle of a task."""


class TaskEngine(Protocol):
  """Does tasks somewhere.

  Attributes:
    slots: how many tasks it can do at once, at the moment.
  """

  slots: int

  def submit(self, number: int, task: CorpusTask) -> None:
    """Begins a task, of which `next` tells by this number."""

  def next(self, seconds: float) -> tuple[int, TaskDone | Exception] | None:
    """The number of a task that has ended, and TaskDone, the error that it raised, or WorkerLost;
    None where none has within so many seconds.
    """

  def close(self) -> None:
    """Ends all workers."""


class LocalEngine:
  """Processes of this machine, a task at a time each; one that dies is replaced.

  Args:
    workers: how many.
  """

  def __init__(self, workers: int):
    if workers < 1:
      raise ValueError(f'workers={workers} must be at least 1')
    self.slots = workers
    # Forked from a process that has imported what all need and runs no threads, JAX's least of all.
    self._context = multiprocessing.get_context('forkserver')
    self._context.set_forkserver_preload([*PRELOADED])
    self._idle: list[_Worker] = []
    self._busy: dict[int, _Worker] = {}

  @property
  def workers(self) -> list[int]:
    """Numbers of the processes."""
    return [each.process.pid for each in (*self._idle, *self._busy.values())]

  def submit(self, number: int, task: CorpusTask) -> None:
    worker = self._idle.pop() if self._idle else _Worker(self._context)
    self._busy[number] = worker
    with contextlib.suppress(OSError):  # it died idle; `next` finds that out
      worker.pipe.send(task)

  def next(self, seconds: float) -> tuple[int, TaskDone | Exception] | None:
    pipes = {worker.pipe: number for number, worker in self._busy.items()}
    ready = multiprocessing.connection.wait([*pipes], seconds)
    if not ready:
      return None
    number = pipes[ready[0]]
    worker = self._busy.pop(number)
    try:
      outcome = worker.pipe.recv()
    except (EOFError, OSError):
      worker.process.join()
      worker.pipe.close()
      return number, WorkerLost(f'its process ended with code {worker.process.exitcode}')
    self._idle.append(worker)
    return number, outcome

  def close(self) -> None:
    for worker in (*self._idle, *self._busy.values()):
      worker.process.kill()
      worker.process.join()
      worker.pipe.close()
    self._idle, self._busy = [], {}


class _Worker:
  def __init__(self, context):
    self.pipe, theirs = context.Pipe()
    self.process = context.Process(target=_work, args=(theirs,), daemon=True)
    with without_main():
      self.process.start()
    theirs.close()  # so that the pipe ends with the process


def _work(pipe) -> None:
  """A worker's life: tasks, until whoever gives them is gone."""
  with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
    while True:
      pipe.send(outcome_of(pipe.recv()))


def outcome_of(task: CorpusTask) -> TaskDone | Exception:
  """What `perform` gives, or the error that it raised, as something that can be sent."""
  try:
    return perform(task)
  except (ValueError, OSError) as error:
    return error
  except Exception as error:  # whose class its reader may not be able to make again
    return RuntimeError(f'{type(error).__name__}: {error}')


def run(
  engine: TaskEngine, stage: str, tasks: Sequence[CorpusTask], log: Callable[[str], object]
) -> list[dict]:
  """Does all tasks of a stage; their reports, in the order of the tasks.

  A task whose worker dies is done again. Where BLAMED workers died at one document, it is left out,
  which the task's report says.

  Raises:
    ValueError: what a task refuses; a task that loses too many workers.
    OSError: what the system refused FAILED times.
  """
  reports: dict[int, dict] = {}
  waiting = collections.deque(enumerate(tasks))
  at_work: dict[int, CorpusTask] = {}
  troubles = _Troubles(stage)
  progress = _Progress(stage, tasks, log)
  while waiting or at_work:
    while waiting and len(at_work) < engine.slots:
      number, task = waiting.popleft()
      attempt = secrets.token_hex(8)
      at_work[number] = dataclasses.replace(task, attempt=attempt, versions=versions())
      engine.submit(number, at_work[number])
    ended = engine.next(EVERY)
    if ended is not None:
      number, outcome = ended
      task = at_work.pop(number)
      if isinstance(outcome, Exception):
        waiting.appendleft((number, troubles.again(task, outcome)))
        progress.lost += 1
      else:
        reports[number] = outcome.report
        progress.done(task, outcome)
    progress.say()
  progress.end()
  return [reports[number] for number in range(len(tasks))]


class _Troubles:
  """What happened to the tasks of a stage that were not done at once."""

  def __init__(self, stage: str):
    self._stage = stage
    self._lost: collections.Counter = collections.Counter()  # by place
    self._refused: collections.Counter = collections.Counter()
    self._at: collections.Counter = collections.Counter()  # by place and document

  def again(self, task: CorpusTask, error: Exception) -> CorpusTask:
    """The task to do now. Raises the error that ends all."""
    what = f'{self._stage}: {pathlib.Path(task.place).name}'
    if isinstance(error, OSError):
      self._refused[task.place] += 1
      if self._refused[task.place] >= FAILED:
        raise error
    elif not isinstance(error, WorkerLost):
      raise error

    document = _last_document(task)
    shutil.rmtree(task.aside, ignore_errors=True)
    if not isinstance(error, WorkerLost):
      return task
    self._lost[task.place] += 1
    if document is not None:
      self._at[task.place, document] += 1
      if self._at[task.place, document] >= BLAMED and document not in task.without:
        self._lost[task.place] = 0
        return dataclasses.replace(task, without=(*task.without, document))
    if self._lost[task.place] >= LOST:
      raise ValueError(
        f'{what} lost {LOST} workers (the last time, {error}); where that is for want of memory, '
        'use fewer workers on a machine; the same command goes on from what is done'
      ) from error
    return task


def _last_document(task: CorpusTask) -> int | None:
  """The one that a worker was at; None where it did not say."""
  try:
    (document,) = struct.unpack('<q', (task.aside / AT).read_bytes())
  except (OSError, struct.error):
    return None
  return document


class _Progress:
  """What is said of a stage while it goes on: parts, share, rate, and what is left of it."""

  def __init__(self, stage: str, tasks: Sequence[CorpusTask], log: Callable[[str], object]):
    self._stage, self._log, self._tasks = stage, log, len(tasks)
    self._total = sum(task.weight for task in tasks)
    self._began = self._said = time.monotonic()
    self._ended = self._before = self._peak = 0
    self._weight = self._weight_before = 0.0
    self.lost = 0

  def done(self, task: CorpusTask, outcome: TaskDone) -> None:
    self._ended += 1
    self._weight += task.weight
    self._before += outcome.before
    self._weight_before += task.weight * outcome.before
    self._peak = max(self._peak, outcome.peak)

  def say(self) -> None:
    now = time.monotonic()
    if now - self._said < EVERY:
      return
    self._said, took = now, now - self._began
    here = self._weight - self._weight_before
    left = ''
    if here:
      left = f', about {_time((self._total - self._weight) * took / here)} left'
    self._log(
      f'data: {self._stage}: {self._ended:,} of {self._tasks:,} parts, '
      f'{self._weight / max(self._total, 1e-9):.0%}{left}'
    )

  def end(self) -> None:
    """Of a stage that takes a moment and goes well, nothing."""
    took = time.monotonic() - self._began
    notes = [(self._before, 'done before'), (self.lost, 'done again')]
    notes = [f', {count:,} {what}' for count, what in notes if count]
    if notes or took >= WORTH:
      parts = f'{self._tasks:,} part{"s" * (self._tasks != 1)}'
      memory = f', at most {self._peak / 1e6:,.0f} MB a process'
      self._log(f'data: {self._stage}: {parts} in {_time(took)}{memory}' + ''.join(notes))


def _time(seconds: float) -> str:
  if seconds < 100:
    return f'{seconds:.1f} s'
  return f'{seconds / 60:.0f} min' if seconds < 6000 else f'{seconds / 3600:.1f} h'
