"""How does a directory in the cache appear whole or not at all, made by one process at a time?"""

import contextlib
import glob
import os
import pathlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator

import files
from data import cache

WAIT = 24 * 3600  # seconds that a process waits for another one that builds the same
BEAT, STALE = 10, 600  # seconds between a builder's signs of life; without one, until it is dead
POLL = 0.2  # seconds between looks of who waits


def once(
  final: pathlib.Path, build: Callable[[pathlib.Path], object], log: Callable[[str], object]
) -> None:
  """Builds `final` from an empty directory, if it is not there. One process does at a time; one
  that comes meanwhile waits, saying for whom, and finds the result, or takes over where there is
  none.

  What the lock promises is in `turn`. Where two build in spite of it, each does so in a directory
  of its own, and the first result stays: that costs time, and nothing else.

  Raises what `build` raises, and ValueError after a day of waiting.
  """
  if (final / cache.INDEX).exists():
    return
  final.parent.mkdir(parents=True, exist_ok=True)
  with turn(final.with_name(f'.{final.name}.lock'), str(final), log):
    if (final / cache.INDEX).exists():
      log(f'data: {final} was finished by another process')
      return
    with building(final, log) as partial:
      build(partial)
    log(f'data: wrote {final}')


@contextlib.contextmanager
def turn(path: pathlib.Path, place: str, log: Callable[[str], object]) -> Iterator[None]:
  """A block of one process at a time, or one thread of it, for which others wait at most a day.

  The lock at `path` is files.locked's, which the system takes from whoever dies on this machine,
  and, where the disk passes locks on, on others. For disks that do not, or that remember a machine
  which is gone, a holder renews the file's time every BEAT seconds; where it has not for STALE
  seconds, and is no process that this machine's system knows to hold it, it counts as dead. So
  nobody is waited for in vain. But one that was only stopped so long, or that began in the same
  moment on a disk without locks, may be in the block as well: it must be able to bear that.
  """
  with contextlib.ExitStack() as stack:
    file = _enter(stack, path, place, log)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, ended), daemon=True)
    beating.start()
    stack.callback(beating.join)
    stack.callback(ended.set)
    yield


def _enter(
  stack: contextlib.ExitStack, path: pathlib.Path, place: str, log: Callable[[str], object]
) -> int:
  """The lock's open file, once it is this process's."""
  deadline, told = time.monotonic() + WAIT, ''
  seen: dict[tuple[int, int], float] = {}  # signs of life, and when each was seen first
  remedy = 'end it, or give another data.cache_dir'
  while True:
    try:
      return stack.enter_context(files.locked(path, place, remedy, elsewhere=True))
    except files.InUse as error:
      held = error
    now = time.monotonic()
    if now >= deadline:
      raise ValueError(f'waited {WAIT / 3600:.3g} h in vain: {held}') from held
    with contextlib.suppress(FileNotFoundError):
      status = path.stat()
      silent = now - seen.setdefault((status.st_ino, status.st_mtime_ns), now) >= STALE
      if silent and not held.sure:
        path.unlink()
        continue
    if str(held) != told:
      told = str(held)
      log(f'data: waiting, {WAIT / 3600:.3g} h at most: {told}')
    time.sleep(POLL)


def _beat(file: int, ended: threading.Event) -> None:
  """Renews the file's time until then."""
  while not ended.wait(BEAT):
    with contextlib.suppress(OSError):
      os.utime(file)


@contextlib.contextmanager
def building(final: pathlib.Path, log: Callable[[str], object]) -> Iterator[pathlib.Path]:
  """A directory that becomes `final` in one step when the block ends well,
  and vanishes when it doesn't.
  """
  prefix = f'{final.name}.partial-{socket.gethostname()}-'
  for left in final.parent.glob(f'{glob.escape(prefix)}*'):
    process = left.name.removeprefix(prefix)
    if not process.isdecimal():
      continue  # of a host whose name begins as this one's
    if int(process) == os.getpid() or not files.alive(int(process)):
      log(f'data: removed {left}, left by a run that was killed')
      shutil.rmtree(left)
  partial = final.with_name(f'{prefix}{os.getpid()}')
  partial.mkdir()
  try:
    yield partial
    _discard_unfinished(final, partial, log)
    try:
      os.rename(partial, final)
    except OSError:
      if not (final / cache.INDEX).exists():
        raise
      log(f'data: {final} was finished by another process first')
      shutil.rmtree(partial)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _discard_unfinished(
  final: pathlib.Path, partial: pathlib.Path, log: Callable[[str], object]
) -> None:
  """Clears the way to `final` where a directory without an index stands in it: the index came with
  it in one step, so that somebody has deleted it, and nothing tells whether the rest is whole.
  """
  if not final.is_dir() or (final / cache.INDEX).exists():
    return
  # Aside before it is looked at again: another process may be putting a whole one there.
  aside = partial.with_name(f'{partial.name}9')
  os.rename(final, aside)
  if (aside / cache.INDEX).exists():
    os.rename(aside, final)
    return
  log(f'data: {final} had no {cache.INDEX}, so that nothing in it could be trusted: prepared anew')
  shutil.rmtree(aside)
