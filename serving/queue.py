"""Who goes next? ApiKeys take turns, so that nobody waits for all that another has asked for; a
priority goes before others, until one of these has waited too long.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

from serving.call import QueueFull


@dataclasses.dataclass(eq=False)
class Waiting:
  """Something that waits. key, priority: see serving.call.Call. since: when it came."""

  key: str
  priority: int
  since: float
  number: int = -1


class Queue:
  """Things that wait, each once.

  Of what may go, a key's turn is the next whose last one, or whose coming where it has had none,
  is the longest ago: a key waits for one turn of every other that was there, and for none that
  comes later. What has waited for `patience` seconds goes as if nothing had a better priority.
  """

  def __init__(self, patience: float):
    self._patience = patience
    self._waiting: dict[int, Waiting] = {}
    self._turns: dict[str, int] = {}  # of every key that waits, its place in the order of turns
    self._turn = itertools.count()
    self._numbers = itertools.count()

  def __len__(self) -> int:
    return len(self._waiting)

  def __iter__(self) -> Iterator[Waiting]:
    return iter(list(self._waiting.values()))

  def add(self, item: Waiting) -> None:
    """It waits, behind what its key has waiting already."""
    item.number = next(self._numbers)
    self._waiting[item.number] = item
    self._turns.setdefault(item.key, next(self._turn))

  def remove(self, item: Waiting) -> None:
    """It does not wait any more. Raises KeyError where it does not."""
    del self._waiting[item.number]
    if all(other.key != item.key for other in self._waiting.values()):
      del self._turns[item.key]

  def next(self, now: float, may: Callable[[Waiting], bool] = lambda item: True) -> Waiting | None:
    """Whose turn it is, of those that may go; it stays until it is removed or has its `turn`."""
    able = [item for item in self._waiting.values() if may(item)]
    if not able:
      return None
    best = min(item.priority for item in able)
    overdue = {item.number for item in able if now - item.since >= self._patience}
    able = [item for item in able if item.priority == best or item.number in overdue]
    return min(
      able,
      key=lambda item: (
        self._turns[item.key],
        item.number not in overdue,
        item.priority,
        item.number,
      ),
    )

  def turn(self, item: Waiting) -> None:
    """It goes, and its key's next turn comes after everyone else's."""
    self._turns[item.key] = next(self._turn)
    self.remove(item)


def check_places(
  key: str, count: int, waiting: Mapping[str, int], most: int, what: str, retry_after: float
) -> None:
  """Raises QueueFull where no more of this key may wait, and ValueError where so many never may.

  A key that has some waiting gets half of what others leave, at most. So there are places for who
  comes later, whatever another has asked for; without keys ('') all are anybody's.

  waiting: how many of each key do. what: they are, and do.
  """
  if count > most:
    raise ValueError(f'{count} samples, of at most {most} that may wait; ask for fewer at a time')
  total, mine = sum(waiting.values()), waiting.get(key, 0)
  share, of_key = most - total + mine, ''
  if key and mine:
    share //= 2
    of_key = f' ({mine} of this API key, which gets half of what others leave)'
  if mine + count > share:
    raise QueueFull(
      f'{total} {what}, of at most {most}{of_key}, and {count} more are asked for; come again '
      'later, or ask for fewer at a time',
      retry_after,
    )
