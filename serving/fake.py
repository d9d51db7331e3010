"""How is a protocol tested without a model? By a service whose engine writes what it is told to,
and whose clock stands still.

    service = FakeService(ByteTokenizer(), write=lambda request: b'hello')
    ticket = service.submit(Call(prompt='..'))
    service.run()                        # steps until nothing is left; or `step`, one by one
"""

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

import numpy as np

from data.tokenizer import Tokenizer
from decode.engine import Request, Sizes
from decode.front import Front
from decode.loop import Chunk
from decode.scorer import PromptScores
from decode.sizes import Use
from serving import call as calls
from serving.call import Limits
from serving.desk import Desk

SIZES = Sizes(rows=4, capacity=256, read_tokens=16, steps=4, alternatives=20)

EMBEDDED = 4  # numbers of a text's vector


class StandingClock:
  """Seconds that pass when they are told to."""

  def __init__(self):
    self.now = 0.0

  def __call__(self) -> float:
    return self.now

  def advance(self, seconds: float) -> None:
    self.now += seconds


def echo(request: Request) -> Iterable[int]:
  """Writes its prompt, again and again."""
  while True:
    yield from request.prompt


class FakeEngine:
  """A serving.scheduler.AnyEngine whose rows write what a function of their request says, until it
  ends, its end included, or max_new_tokens.

  Attributes: as of AnyEngine. lost: raised by the next call, once (a device's error). broken: rows
  whose scores are not finite from now on. waiting: rows that there is no room for, for now. full:
  whether there is none for a new request. calls: names of all calls.
  """

  def __init__(self, write: Callable[[Request], Iterable[int]] = echo, sizes: Sizes = SIZES):
    self.sizes, self._write, self.width = sizes, write, EMBEDDED
    self.lost: Exception | None = None
    self.broken: set[int] = set()
    self.waiting: set[int] = set()
    self.full = False
    self.calls: list[str] = []
    self._resets = 0
    self._clear()

  def _clear(self) -> None:
    self._requests: dict[int, Request] = {}
    self._unread: dict[int, int] = {}
    self._writing: dict[int, Iterator[int]] = {}
    self._written: dict[int, int] = {}

  def _note(self, name: str) -> None:
    self.calls.append(name)
    if self.lost is not None:
      error, self.lost = self.lost, None
      raise error

  @property
  def free(self) -> list[int]:
    return [row for row in range(self.sizes.rows) if row not in self._requests]

  @property
  def reading(self) -> list[int]:
    return list(self._unread)

  def check(self, request: Request) -> None:
    pass

  def takes(self, request: Request) -> bool:
    return bool(self.free) and not self.full

  def choose(self, request: Request) -> int:
    return self.free[0]

  def join(self, row: int, request: Request) -> None:
    self._note('join')
    if row not in self.free:
      raise RuntimeError(f'row {row} is not free')
    self._requests[row], self._unread[row] = request, len(request.prompt)

  def read(self) -> list[int]:
    self._note('read')
    row = next(iter(self._unread))
    self._unread[row] -= self.sizes.read_tokens
    if self._unread[row] > 0:
      return []
    del self._unread[row]
    self._writing[row] = iter(self._write(self._requests[row]))
    self._written[row] = 0
    return [row]

  def cached(self, row: int) -> int:
    return 0

  def seat(self) -> list[int]:
    return [row for row in self._requests if row not in {*self._unread, *self.waiting}]

  def use(self) -> Use:
    tokens = sum(len(request.prompt) for request in list(self._requests.values()))
    tokens += sum(list(self._written.values()))
    return Use(tokens, self.sizes.rows * self.sizes.capacity)

  def decode(self, count: int, alternatives: bool) -> tuple[int, Chunk]:
    self._note('decode')
    B, C = self.sizes.rows, self.sizes.steps
    k = self.sizes.alternatives if alternatives else 0
    chunk = Chunk(
      ids=np.zeros((B, C), np.int32),
      real=np.zeros((B, C), bool),
      raw=np.full((B, C), -0.5, np.float32),
      processed=np.full((B, C), -0.25, np.float32),
      alternatives=np.zeros((B, C, k), np.int32) + np.arange(k, dtype=np.int32),
      alternatives_raw=np.full((B, C, k), -0.5, np.float32) - np.arange(k, dtype=np.float32),
      broken=np.isin(np.arange(B), list(self.broken & self._writing.keys())),
    )
    for row in self.broken & self._writing.keys():
      del self._writing[row]
    self.broken = set()
    for row in self._writing.keys() - self.waiting:
      for place in range(count):
        if row in self._writing:
          self._write_one(chunk, row, place)
    return self._resets, chunk

  def _write_one(self, chunk: Chunk, row: int, place: int) -> None:
    request = self._requests[row]
    chunk.ids[row, place] = next(self._writing[row], request.ends[0] if request.ends else 0)
    chunk.real[row, place] = True
    self._written[row] += 1
    ended = chunk.ids[row, place] in request.ends
    if ended or self._written[row] == request.max_new_tokens:
      del self._writing[row]

  def taken(self, chunk: tuple[int, Chunk]) -> Chunk:
    self._note('taken')
    if chunk[0] != self._resets:
      raise RuntimeError('a chunk of a state that is lost')
    return chunk[1]

  def forget(self, row: int) -> None:
    self._note('forget')

  def release(self, rows: Iterable[int]) -> None:
    self._note('release')
    for row in rows:
      del self._requests[row]  # raises for one that is free
      self._unread.pop(row, None)
      self._writing.pop(row, None)
      self._written.pop(row, None)

  def reset(self) -> None:
    self.calls.append('reset')
    self._resets += 1
    self._clear()


def scored(
  ids: Sequence[int], front: Front, alternatives: int
) -> Generator[None, None, PromptScores]:
  """A scorer of prompts: id i has -i / 8, and rank i; the likeliest are 0, 1 and so on."""
  found = PromptScores()
  for i in ids[1:]:
    found.logprobs.append(-i / 8)
    found.ranks.append(i)
    found.alternatives.append([(i, -i / 8) for i in range(alternatives)])
    yield
  return found


def embedded(texts: Sequence[Sequence[int]], front: Front) -> Generator[None, None, np.ndarray]:
  """An embedder: of a text's first ids, from 0 on where there are fewer."""
  yield
  return np.array([[*ids, *[0] * EMBEDDED][:EMBEDDED] for ids in texts], np.float32)


class FakeService(Desk):
  """A serving.service.Service that goes on when it is told to, by `step` and `run`, or `by_itself`
  on a thread.

  Attributes: as of Service. clock: a StandingClock. engine: the FakeEngine.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    write: Callable[[Request], Iterable[int]] = echo,
    *,
    sizes: Sizes = SIZES,
    limits: Limits = Limits(),
    adapters: Mapping[str, Front] | None = None,
    state: str = calls.READY,
    scores: bool = False,
    embeds: bool = False,
  ):
    self.engine = FakeEngine(write, sizes)
    super().__init__(
      self.engine,
      tokenizer,
      limits=limits,
      adapters=adapters,
      clock=StandingClock(),
      scorer=scored if scores else None,
      embedder=embedded if embeds else None,
    )
    self.state, self.progress = state, (7, 7)
    self._came = threading.Event()
    self._ended = threading.Event()

  def step(self) -> bool:
    """One step; whether there is more to do at once."""
    more = self._step()
    if self.state == calls.DRAINING and self.idle:
      self.state = calls.CLOSED
      self._ended.set()
    return more

  def run(self) -> None:
    """Steps until nothing is left that can go on."""
    while self.step():
      pass

  @contextlib.contextmanager
  def by_itself(self) -> Iterator[None]:
    """A block in which it goes on by a thread of its own, as a real one does."""
    over = threading.Event()

    def run():
      while not over.is_set():
        if not self.step():
          self._came.wait(0.05)
          self._came.clear()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
      yield
    finally:
      over.set()
      self._woken()
      thread.join()

  def _woken(self) -> None:
    if hasattr(self, '_came'):
      self._came.set()

  def ready(self, timeout: float | None = None) -> bool:
    return self.state == calls.READY

  def closed(self, timeout: float | None = None) -> bool:
    return self._ended.wait(timeout)

  def close(self) -> None:
    self._end_all(calls.DRAINED)
    self.state = calls.CLOSED
    self._constraints.close()
    self._ended.set()
