"""How are more prompts completed than an engine has rows? Some begin, and others join as rows get
free.

It is the simplest user of an engine: what comes next is read when it is there, and no one is in a
hurry. Which rows a request shares its time with changes nothing in what comes of it.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from decode.engine import Engine, Request
from decode.loop import Chunk
from decode.sampling import sample_seed
from model.transformer import Decoder
from parallel.gathering import everywhere


@dataclasses.dataclass
class Written:
  """What has come of a request.

  Attributes:
    ids: with the one that ended it, if one did.
    raw: log-probability of each by the model; processed: by the law that it was drawn from.
    ended: whether one of its ends ended it; otherwise max_new_tokens did, or the row was full.
    broken: whether it ended because the model's scores were not finite.
    cut: whether a row has less room than it asks for (Engine.fitted).
  """

  ids: list[int] = dataclasses.field(default_factory=list)
  raw: list[float] = dataclasses.field(default_factory=list)
  processed: list[float] = dataclasses.field(default_factory=list)
  ended: bool = False
  broken: bool = False
  cut: bool = False

  @property
  def full(self) -> bool:
    """Whether the row's capacity was its end, before max_new_tokens."""
    return self.cut and not self.ended and not self.broken

  def add(self, chunk: Chunk, row: int, request: Request) -> bool:
    """Takes the row's tokens of a chunk (of NumPy arrays); whether there will be no more."""
    places = np.flatnonzero(chunk.real[row])
    self.ids += chunk.ids[row, places].tolist()
    self.raw += chunk.raw[row, places].tolist()
    self.processed += chunk.processed[row, places].tolist()
    self.ended = bool(self.ids) and self.ids[-1] in request.ends
    self.broken = bool(chunk.broken[row])
    return self.ended or self.broken or len(self.ids) == request.max_new_tokens


def samples(request: Request, n: int) -> list[Request]:
  """n of the same prompt, the first of them the request itself; each draws with a seed of its own
  (decode.sampling.sample_seed), so that any of them can be asked for alone.
  """
  seed = int(request.sampling.seed[0])

  def sample(i):
    seeds = np.array([sample_seed(seed, i)], np.uint32)
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seeds))

  return [sample(i) for i in range(n)]


def complete(
  engine: Engine,
  weights: Decoder,
  requests: Iterable[Request],
  over: Callable[[int, Written], bool] = lambda index, written: False,
) -> Iterator[tuple[int, Written]]:
  """(index of a request, what has come of it), as they end, in the free rows of an engine.

  over: whether a request has ended by what has come of it so far, as by a text; it is asked of each
    whenever there is more, once.

  Requests are taken as rows become free for them, so that they need not all be there at once: as
  many together as are read together, but for a quarter of the rows at most, since a call that reads
  costs the same for fewer. Rows are freed whenever one stops to listen.

  Raises as Engine.join, for a request that does not fit.
  """
  sizes, waiting = engine.sizes, enumerate(requests)
  enough = max(1, min(sizes.read_rows, sizes.rows // 4))
  due: tuple[int, Request] | None = None  # who waits for room
  rows: dict[int, tuple[int, Request, Written]] = {}
  finished: collections.deque[tuple[int, Written]] = collections.deque()
  try:
    while True:
      may_join = not rows or len(engine.free) >= enough
      while may_join and engine.free:
        due = due or next(waiting, None)
        if not due or rows and not engine.open(due[1]):
          break
        (index, request), due = due, None
        row = next(iter(engine.open(request)), 0)  # who fits nowhere is refused
        engine.join(row, request)
        fitted = engine.fitted(request)
        cut = fitted.max_new_tokens < request.max_new_tokens
        rows[row] = index, fitted, Written(cut=cut)
      if not rows:
        return
      # To the end, or until the others have to write on and leave before there is room.
      unread = -1
      while engine.unread not in (0, unread):
        unread = engine.unread
        engine.read(weights)

      # No more steps than the one that has most to write still needs.
      left = max(request.max_new_tokens - len(text.ids) for _, request, text in rows.values())
      count = min(sizes.steps, left)
      chunk = everywhere(engine.decode(weights, count))
      ended = []
      for row, (index, request, text) in rows.items():
        full = text.add(chunk, row, request)
        if over(index, text) or full:
          ended.append(row)
      if not (ended or engine.reading or chunk.real.any()):
        raise RuntimeError(f'rows {sorted(rows)} write nothing and do not end: their state is lost')
      engine.release(ended)
      for row in ended:
        index, _, text = rows.pop(row)
        finished.append((index, text))
      while finished:
        yield finished.popleft()
  finally:
    engine.release(rows)
