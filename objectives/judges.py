"""What is an answer worth? What reward functions say of it, each within a limit of time and beside
the step's thread, and what reward models say; their weighted sum.

What raises, takes too long, or returns no finite number is an answer without a score: it is named,
counted, and never 0.

R answers · J judges
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from data.prompts import Prompt
from objectives.judging import MOST
from parallel.gathering import of_first

WORKERS = 4  # processes that run a file's function at a time
START_SECONDS = 60.0  # that its imports may take
ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer that is to be judged.

  Attributes:
    prompt: what it answers. ids: its own, with the one that ends it. text: without that.
  """

  prompt: Prompt
  ids: tuple[int, ...]
  text: str


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A score, or why there is none."""

  score: float = float('nan')
  error: str = ''


@runtime_checkable
class Judge(Protocol):
  """Says what answers are worth.

  Attributes:
    name: as the config has it. of: what its scores are a function of, besides an answer, JSON-able:
      another one gives others.
  """

  name: str
  of: dict

  def submit(self, answer: Answer) -> None:
    """Another one; it may be judged at once, beside what the caller does."""

  def verdicts(self) -> list[Verdict]:
    """Of all that were submitted since the last call, in order."""

  def close(self) -> None:
    """No more come."""


class Worker:
  """A process that runs the function of a file, as its content was (objectives/judging.py)."""

  def __init__(self, path: str, content: bytes):
    before = os.environ.get('PYTHONPATH', '')
    environment = os.environ | {'PYTHONPATH': f'{ROOT}{os.pathsep}{before}'}
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'objectives.judging', path],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=environment,
      start_new_session=True,  # Ctrl-C is the trainer's to hear
    )
    self._unread = b''
    self._content = content

  def ready(self) -> str:
    """Waits until it can be asked; why it cannot, or ''."""
    self._say(self._content.decode('latin-1'))
    return self._line(START_SECONDS).get('error', '')

  def judged(self, answer: Answer, seconds: float) -> dict:
    """What it says of an answer. Raises TimeoutError, after which it is no more to be asked."""
    self._say({'text': answer.text, 'record': answer.prompt.row})
    return self._line(seconds)

  def _say(self, content: Any) -> None:
    self._process.stdin.write(json.dumps(content, default=str).encode() + b'\n')
    self._process.stdin.flush()

  def _line(self, seconds: float) -> dict:
    # Not a blocking read: only the wait for a file descriptor has a limit.
    out, until = self._process.stdout, time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
      selector.register(out, selectors.EVENT_READ)
      while b'\n' not in self._unread:
        if not selector.select(max(0.0, until - time.monotonic())):
          raise TimeoutError
        part = os.read(out.fileno(), 2**16)
        if not part:
          raise EOFError
        self._unread += part
    line, _, self._unread = self._unread.partition(b'\n')
    return json.loads(line)

  def kill(self) -> None:
    self._process.kill()
    self._process.wait()
    with contextlib.suppress(BrokenPipeError):  # of what it was told last, and did not read
      self._process.stdin.close()
    self._process.stdout.close()


class FileJudge:
  """The function reward(text, record) -> float of a Python file, in processes of its own, so that
  it may take its time, hang or exit. It is to be a function of these two alone: which of the
  processes calls it, and in which order, is not said. Edited later, it is still what it was.

  Raises ValueError for a file that has no such function.
  """

  def __init__(self, path: str, seconds: float):
    self.name, self._path, self._seconds = path, path, seconds
    self._workers: dict[int, Worker] = {}
    self._threads = concurrent.futures.ThreadPoolExecutor(WORKERS, 'reward')
    self._waiting: list[concurrent.futures.Future] = []
    # A run that ends, however it does, leaves no processes behind.
    self.close = weakref.finalize(self, _end, self._threads, self._workers)
    problem = f'{path} is no Python file'
    if pathlib.Path(path).is_file():
      self._content = pathlib.Path(path).read_bytes()
      problem = self._problem()
    if problem:
      self.close()
      raise ValueError(f'objective.reward={path} cannot be used: {problem}')
    self.of = {'digest': hashlib.blake2b(self._content, digest_size=16).hexdigest()}

  def _problem(self) -> str:
    """Why the file cannot judge, or ''."""
    first = Worker(self._path, self._content)
    try:
      return first.ready()
    except TimeoutError:
      return f'its imports took more than {START_SECONDS:g} s'
    except (BrokenPipeError, EOFError):
      return 'it ended its process'
    finally:
      first.kill()

  def submit(self, answer: Answer) -> None:
    self._waiting.append(self._threads.submit(self._judge, answer))

  def verdicts(self) -> list[Verdict]:
    waiting, self._waiting = self._waiting, []
    return [future.result() for future in waiting]

  def _judge(self, answer: Answer) -> Verdict:
    """In one of the threads, each of which has a process."""
    thread = threading.get_ident()
    try:
      if thread not in self._workers:
        self._workers[thread] = Worker(self._path, self._content)
        if problem := self._workers[thread].ready():
          raise OSError(problem)
      return Verdict(**self._workers[thread].judged(answer, self._seconds))
    except (TimeoutError, OSError, EOFError) as error:
      # The next answer gets a new process.
      if worker := self._workers.pop(thread, None):
        worker.kill()
      if isinstance(error, TimeoutError):
        return Verdict(error=f'it took more than {self._seconds:g} s (objective.reward_timeout)')
      return Verdict(error=f'it ended its process {error}'.rstrip())


def _end(threads: concurrent.futures.ThreadPoolExecutor, workers: dict[int, Worker]) -> None:
  threads.shutdown(wait=True, cancel_futures=True)
  while workers:
    workers.popitem()[1].kill()


class ModelJudge:
  """A reward model, which reads prompt and answer as they are, its end too.

  scores: (ids of texts) -> rewards, as workdir.reward.RewardModel.said. of: see Judge.
  """

  def __init__(self, name: str, scores: Callable[[Sequence[Sequence[int]]], np.ndarray], of: dict):
    self.name, self._scores, self.of = name, scores, of
    self._waiting: list[list[int]] = []

  def submit(self, answer: Answer) -> None:
    self._waiting.append([*answer.prompt.ids, *answer.ids])

  def verdicts(self) -> list[Verdict]:
    waiting, self._waiting = self._waiting, []
    return [_verdict(float(score)) for score in self._scores(waiting)] if waiting else []

  def close(self) -> None:
    pass


def _verdict(score: float) -> Verdict:
  if not abs(score) <= MOST:
    return Verdict(error=f'it said {score}, which is no finite number of float32')
  return Verdict(score)


@dataclasses.dataclass(frozen=True)
class Judgements:
  """Attributes:
  each: f64 [J, R], by judge; NaN where one gave none. failures: why, each naming judge and prompt.
  """

  each: Float[np.ndarray, 'J R']
  failures: list[str]


class Judges:
  """All that a run's answers are judged by, with what each one's scores weigh."""

  def __init__(self, judges: Sequence[Judge], weights: Sequence[float]):
    self._judges, self.weights = judges, np.array(weights, np.float64)
    self._answers: list[Answer] = []

  @property
  def of(self) -> dict[str, dict]:
    """By name of a judge, what its scores are a function of."""
    return {judge.name: judge.of for judge in self._judges}

  def submit(self, answer: Answer) -> None:
    """Begins to judge an answer."""
    self._answers.append(answer)
    for judge in self._judges:
      judge.submit(answer)

  def scores(self) -> Judgements:
    """Of all answers since the last call, in the order in which they were submitted."""
    answers, self._answers = self._answers, []
    said = [judge.verdicts() for judge in self._judges]
    failures = [
      f'{judge.name} gave no reward to an answer to {answer.prompt.place} '
      f'({answer.text[:60]!r}): {verdict.error}'
      for judge, verdicts in zip(self._judges, said)
      for answer, verdict in zip(answers, verdicts, strict=True)
      if verdict.error
    ]
    each = np.array([[v.score for v in verdicts] for verdicts in said], np.float64)
    # Each process has judged; where one waited longer for a function than another, all learn from
    # the same scores all the same.
    each = of_first(each.reshape(len(self._judges), len(answers)))
    return Judgements(each, failures)

  def close(self) -> None:
    """Ends the processes."""
    for judge in self._judges:
      judge.close()


def totals(
  each: Float[np.ndarray, 'J R'], weights: Float[np.ndarray, 'J'], group: int = 0
) -> Float[np.ndarray, 'R']:
  """The weighted sum of scores, NaN where one is.

  group: how many answers follow one another that are to one prompt, over whose mean and standard
    deviation each judge's scores are taken before they are added, so that a weight is what it says;
    0: they are added as they are.
  """
  if group:
    scores = each.reshape(len(each), -1, group)
    counted = np.isfinite(scores)
    count = np.maximum(counted.sum(-1, keepdims=True), 1)
    filled = np.where(counted, scores, 0.0)
    mean = filled.sum(-1, keepdims=True) / count
    apart = np.where(counted, scores - mean, 0.0)
    std = np.sqrt(np.square(apart).sum(-1, keepdims=True) / np.maximum(count - 1, 1))
    each = np.where(counted, apart / (std + 1e-6), np.nan).reshape(each.shape)
  return (weights[:, None] * each).sum(0)


def is_file(reward: str) -> bool:
  """Whether a reward is a Python file, and not the directory of a run."""
  return reward.endswith('.py')
