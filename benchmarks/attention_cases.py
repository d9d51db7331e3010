"""What is a peer of benchmarks.attention asked, and what does it answer?
Cases, a job of them, and lines of results that all peers print alike.

T length · N heads · H head width
"""

import dataclasses
import json
import pathlib
import statistics
import time

import numpy as np

REPEATS = 7  # timed runs
# Length of a run in seconds, at about this many FLOP/s.
SECONDS = 0.04
RATE = 400e12
DIRECTIONS = {'forward': 2, 'backward': 5}  # products of a pair of a query and a key
# Words of errors after which a process can run nothing more on its GPU.
STICKY = ('CUDA_ERROR', 'CUDA error', 'illegal', 'launch failure')


@dataclasses.dataclass(frozen=True)
class Case:
  """Attention of a batch; as many query as key heads,
  `tokens` and `hidden` whatever the length and the width of a head.

  Attributes:
    mask: 'causal', 'full', 'window' (causal, the last T/16 keys)
      or 'packed' (causal, 8 documents in a row).
  """

  mask: str
  length: int
  width: int
  tokens: int = 16384
  hidden: int = 2048

  @property
  def name(self) -> str:
    return f'{self.mask} {self.length} x {self.width}'

  @property
  def heads(self) -> int:
    return self.hidden // self.width

  @property
  def rows(self) -> int:
    return max(1, self.tokens // self.length)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return self.rows, self.length, self.heads, self.width

  @property
  def window(self) -> int:
    return self.length // 16 if self.mask == 'window' else 0

  @property
  def document(self) -> int:
    return self.length // 8 if self.mask == 'packed' else self.length

  def flops(self, direction: str) -> float:
    """Of the pairs that the mask leaves: causal ones are half,
    and windows and documents are what they are.
    """
    from model.flops import mean_keys

    keys = (
      self.length if self.mask == 'full' else mean_keys(self.length, self.window, self.document)
    )
    return DIRECTIONS[direction] * 2 * self.rows * self.heads * self.length * keys * self.width

  def visible(self, q, k):
    """Whether the query at q sees the key at k."""
    if self.mask == 'full':
      return (q >= 0) & (k >= 0)
    seen = (k <= q) & (q // self.document == k // self.document)
    return seen & (q - k < self.window) if self.window else seen

  def calls(self, direction: str) -> int:
    return max(2, min(100, round(SECONDS * RATE / self.flops(direction))))


class Job:
  """What a process is asked to do: a peer's name, cases,
  and numbers that all processes draw alike.
  """

  def __init__(self, path: str):
    job = json.loads(pathlib.Path(path).read_text())
    self.peer = job['peer']
    self.deadline = job['deadline']
    self.rehearsal = job['rehearsal']
    self.cases = [Case(**case) for case in job['cases']]
    self.directory = pathlib.Path(path).parent
    self.peak_size = job['peak_size']

    largest = max([0, *(int(np.prod(case.shape)) for case in self.cases)])
    # A generator each: what an array begins with is then the same for a process
    # that has only some of the cases.
    self._drawn = [
      np.random.default_rng([job['seed'], i]).standard_normal(largest, np.float32) for i in range(4)
    ]

  def arrays(self, case: Case) -> list[np.ndarray]:
    """q, k, v and the gradient of what comes out, in f32; every peer rounds them to bfloat16."""
    return [x[: np.prod(case.shape)].reshape(case.shape) for x in self._drawn]

  def late(self) -> bool:
    return time.time() > self.deadline

  def errors(self, case: Case, outputs: dict) -> dict:
    """Of the probed head: root mean square over that of the exact values,
    each of out, dq, dk and dv.
    """
    with np.load(self.directory / f'{case.name}.npz') as exact:
      return {
        name: float(np.sqrt(np.mean((value - exact[name]) ** 2) / np.mean(exact[name] ** 2)))
        for name, value in outputs.items()
      }


def probe(case: Case) -> tuple:
  """Where the head lies that is compared: the last row, a head in the middle."""
  return case.rows - 1, slice(None), case.heads // 2


def report(**result) -> None:
  print('RESULT ' + json.dumps(result), flush=True)


def as_rows(attend, case: Case):
  """For peers without segments: documents as rows of their own,
  which works because all are as long.
  """
  if case.mask != 'packed':
    return attend

  def split(x):
    return x.reshape(-1, case.document, *x.shape[2:])

  return lambda *x: attend(*map(split, x)).reshape(x[0].shape)


def seconds_of(run, sync, repeats: int = REPEATS) -> float:
  """The median of several runs, after those that warmed up."""
  taken = []
  for _ in range(repeats):
    began = time.perf_counter()
    sync(run())
    taken.append(time.perf_counter() - began)
  return statistics.median(taken)


def attempt(case: Case, function, *arguments):
  """The function's result; a failure is reported as the case's,
  and ends the process where the GPU is lost with it.
  """
  try:
    return function(*arguments)
  # Compilers and kernels raise whatever they like, and the other cases are still wanted.
  except Exception as error:
    report(case=case.name, error=in_a_line(error))


def in_a_line(error: Exception) -> str:
  """What it says first; raises it again where the GPU is lost with it."""
  if any(word in str(error) for word in STICKY):
    raise error
  return f'{type(error).__name__}: {error}'.strip().splitlines()[0][:300]


def both(job: Job, case: Case, forward, backward, unchecked=()) -> None:
  """Reports seconds and errors of a case. forward, backward: () -> (seconds of a call, what it
  returned by name); one fails alone.

  unchecked: what they note while they run.
  """
  seconds, outputs = forward()
  result = {'forward': seconds, 'no_backward': ''}
  try:
    result['backward'], gradients = backward()
    outputs |= gradients
  except Exception as error:
    result['no_backward'] = in_a_line(error)
  report(
    case=case.name,
    errors=job.errors(case, outputs),
    unchecked=' '.join(filter(None, unchecked)),
    **result,
  )
