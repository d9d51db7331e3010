"""What does a benchmark measure with? The shortest time, and the memory that a process reaches."""

import os
import pathlib
import threading
import time
from collections.abc import Callable


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
  """The shortest of several timings: the one least disturbed by other work."""
  best = float('inf')
  for _ in range(repeats):
    began = time.perf_counter()
    run()
    best = min(best, time.perf_counter() - began)
  return best


class PeakMemory:
  """Samples the resident memory (bytes) of a process and its descendants while a `with` block runs;
  Linux only.

  Pages that processes share are counted once for each of them, so the sum is an upper bound.

  Attributes:
    peak: the greatest sum seen.
  """

  def __init__(self, process: int, interval: float = 0.05):
    self._process, self._interval = process, interval
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._sample, daemon=True)
    self.peak = 0

  def __enter__(self) -> 'PeakMemory':
    self._thread.start()
    return self

  def __exit__(self, *exception) -> None:
    self._stop.set()
    self._thread.join()

  def _sample(self) -> None:
    while not self._stop.wait(self._interval):
      self.peak = max(self.peak, resident(self._process))


def resident(process: int) -> int:
  """Resident bytes of a process and its descendants; 0 for one that has ended."""
  where = pathlib.Path(f'/proc/{process}')
  try:
    total = int((where / 'statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    children = [
      child
      for task in (where / 'task').iterdir()
      for child in (task / 'children').read_text().split()
    ]
  except (FileNotFoundError, ProcessLookupError):
    return 0
  return total + sum(resident(int(child)) for child in children)
