"""How is a bucket's directory one process's, and what can be promised of that?"""

import contextlib
import json
import os
import pathlib
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import files
from remote import system
from remote.system import answering

BEAT, STALE = 10, 60  # seconds between a holder's signs of life; without one, until it is dead
SETTLES = 2  # seconds after which whoever took a lock over at the same time has done so


class _Lease:
  """A lock's object, renewed by a thread until it is given back."""

  def __init__(self, place, root):
    self.place, self.root, self._lost = place, root, ''
    self.mark = uuid.uuid4().hex
    self._last = time.monotonic()  # when it was renewed
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._renew, daemon=True)

  def begin(self) -> None:
    self._last = time.monotonic()
    _leases[self.root] = self
    self._thread.start()

  def end(self) -> None:
    self._ended.set()
    self._thread.join()
    _leases.pop(self.root, None)
    # Whoever slept longer than others wait for may find another's there.
    if not self.lost and _holder(self.place).get('mark') == self.mark:
      self.place.unlink(missing_ok=True)

  @property
  def lost(self) -> str:
    """Why it is this process's no more; ''. Where the thread's request hangs, or all of the process
    was stopped, whoever asks looks itself: others wait twice as long before they take it over.
    """
    if not self._lost and self._overdue:
      self._beat()
    return self._lost

  @property
  def _overdue(self) -> bool:
    return time.monotonic() - self._last > STALE / 2

  def _beat(self) -> None:
    try:
      held = _holder(self.place)
      if held.get('mark') not in (self.mark, None):
        self._lost = f'process {held.get("process")} on {held.get("host")} took it over'
        return
      with answering(self.place) as system:
        system.pipe_file(self.place.path, content_of(self.mark))
      self._last = time.monotonic()
    except OSError as error:
      if self._overdue:
        self._lost = f'it could not be renewed for {STALE / 2:.0f} s: {error}'

  def _renew(self) -> None:
    while not self._lost and not self._ended.wait(BEAT):
      self._beat()


def content_of(mark: str, **more) -> bytes:
  """What a lock's object holds; mark: of its holder. more: instead of what this process is."""
  own = {'space': _space(), 'mark': mark, 'beat': time.time()}
  return json.dumps({**files.this_process(), **own, **more}).encode()


def _space() -> str:
  """Within which a process's number means something: containers may share a host's name."""
  with contextlib.suppress(OSError):
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot}-{os.stat("/proc/self/ns/pid").st_ino}'
  return ''


@contextlib.contextmanager
def locked(path, place: str, remedy: str) -> Iterator[None]:
  """As files.locked, by an object that its holder renews every BEAT seconds.

  It is made only where there is none, which the bucket promises. One that is not renewed for STALE
  seconds is taken over, at once where its process was of this machine and is gone. What this cannot
  promise: a holder that was stopped that long, and goes on, writes until it looks again, which it
  does at each beat; checkpoints are therefore sealed last, and a run's records name the run.
  """
  system.check(path.parent, write=True)
  lease, taken = _Lease(path, path.parent), False
  if path.parent in _leases:
    raise files.InUse(f'{place} is in use by this process already; {remedy}', sure=True)
  while not _created(path, content_of(lease.mark)):
    _wait_for_end(path, place, remedy)
    taken = True
  # Two that took the same one over: the later one's object is there.
  if taken and _settled(path).get('mark') != lease.mark:
    raise files.InUse(f'{place} is in use by {_named(_holder(path))}; {remedy}', sure=False)
  lease.begin()
  try:
    yield
  finally:
    lease.end()


def _created(path, content: bytes) -> bool:
  """Whether this made the object, which nobody had."""
  try:
    with answering(path) as system:
      system.pipe_file(path.path, content, mode='create')
    return True
  except FileExistsError:
    return False
  except OSError as error:
    if isinstance(error.__cause__, FileExistsError) or _taken(error):
      return False
    raise


def _taken(error: OSError) -> bool:
  """Whether the bucket refused since there is an object; by what it said, not by our own words,
  which have the place's name in them.
  """
  said = error.__cause__
  if getattr(said, 'code', None) in (409, 412):
    return True
  return bool(re.search('PreconditionFailed|ConditionalRequestConflict', str(said)))


def _wait_for_end(path, place: str, remedy: str) -> None:
  """Returns once the lock's object is gone. Raises files.InUse where its holder lives.

  One that cannot be read is of nobody that is known, who may give a sign of life all the same.
  """
  before, told, until = _content(path), False, time.monotonic() + STALE
  while (now := _content(path)) is not None and now == before:
    held = _held(now, path)
    here = held.get('host') == socket.gethostname() and held.get('space') == _space()
    gone = here and not files.alive(held.get('process') or 0)
    if gone or time.monotonic() > until:
      path.unlink(missing_ok=True)
      return
    if not told:
      told = True
      print(f'waiting {STALE} s, at most, for a sign of life of {_named(held)} in {place}')
    time.sleep(1)
  if now is not None:
    raise files.InUse(f'{place} is in use by {_named(_held(now, path))}; {remedy}', sure=False)


def _settled(path) -> dict:
  time.sleep(SETTLES)
  return _holder(path)


def _named(held: dict) -> str:
  return (
    f'process {held.get("process", "?")} on {held.get("host", "another machine")}, since '
    f'{held.get("since", "?")}'
  )


def _content(path) -> bytes | None:
  """Of the lock's object; None where there is none."""
  try:
    return path.read_bytes()
  except FileNotFoundError:
    return None


def _held(content: bytes | None, path) -> dict:
  """What a holder wrote; {} where that is nothing, or cannot be read."""
  try:
    return {} if content is None else files.json_object(content, path)
  except ValueError:
    return {}


def _holder(path) -> dict:
  return _held(_content(path), path)


_leases: dict[object, _Lease] = {}


def lost(root) -> str:
  """Why a place is this process's no more; ''."""
  return _leases[root].lost if root in _leases else ''


def check_held(place) -> None:
  """Raises OSError where a place is below one that was this process's, and is no more."""
  for root, lease in _leases.items():
    if lease.lost and (place == root or str(place).startswith(f'{root}/')):
      raise OSError(
        f'{root} is not this process\'s any more, so that {place} is not written: {lease.lost}; '
        'what was saved before is whole'
      )
