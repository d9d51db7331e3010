"""How is a file written so that it is there whole or not at all, and a place so that one process
alone writes it; and how is JSON read, whatever it holds, and known to be what was written?
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import names


def replace(path: str | os.PathLike, data: bytes | str) -> None:
  """Writes `data` to `path`: a reader, a crash or a kill sees the old file or the new one,
  never a part.
  """
  if remote(path):
    return place(path).write_bytes(data.encode() if isinstance(data, str) else data)
  temporary = _beside(path)
  try:
    with open(temporary, 'wb') as file:
      file.write(data.encode() if isinstance(data, str) else data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def replace_directory(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
  """Has `write` fill a directory that then takes the place of the one at `path`: where it fails, or
  the process ends, the old one is there still, if only as PATH.old. In a bucket, which renames
  nothing, the new files come behind the end of the old ones.
  """
  if remote(path):
    if path.is_dir():
      remove(path)
    write(path)
    return
  made, old = _beside(path), path.with_name(f'{path.name}.old')
  try:
    write(made)
    if path.exists():
      path.rename(old)
    made.rename(path)
  finally:
    shutil.rmtree(made, ignore_errors=True)
  shutil.rmtree(old, ignore_errors=True)


class BucketError(OSError):
  """What a bucket refuses, or does not answer: nothing that is wrong with what lies there."""


def remote(path: str | os.PathLike) -> bool:
  """Whether it is the address of something in a bucket."""
  return re.match('(s3|gs):/', str(path)) is not None


def of_hub(path: str | os.PathLike) -> bool:
  """Whether it is the address of something on Hugging Face's hub."""
  return str(path).startswith('hf:/')


def place(path: str | os.PathLike) -> pathlib.Path:
  """A path, or, of a bucket's address, what stands for one (remote/address.py); '~' is the home
  directory, which no shell puts in behind --workdir=. Raises ValueError for an address of another
  kind, which would be taken for a directory of that name.
  """
  if remote(path):
    return names.imported('remote.address.Address')(str(path))
  check_local('the place', path := re.sub('^file:/+', '/', str(path)))
  return pathlib.Path(os.path.expanduser(path))


def here(path: str | os.PathLike) -> pathlib.Path:
  """A path, for who reads files only: of a bucket's or the hub's address, of a copy on this
  machine.
  """
  if of_hub(path):
    return names.imported('remote.hub.here')(str(path))
  return names.imported('remote.local.here')(place(path)) if remote(path) else place(path)


def kept(path: str | os.PathLike) -> pathlib.Path:
  """A directory that is read and written as files: of a bucket's address, this machine's for it."""
  return names.imported('remote.local.kept')(place(path)) if remote(path) else place(path)


def worked_on(path: str | os.PathLike) -> contextlib.AbstractContextManager[pathlib.Path]:
  """A block with a directory that is read and written as files, and what lies there afterwards."""
  if remote(path):
    return names.imported('remote.local.worked_on')(place(path))
  return contextlib.nullcontext(place(path))


def stream(path: str | os.PathLike) -> BinaryIO:
  """A file to be read from its beginning; in a bucket, by ranges, ahead."""
  return place(path).stream() if remote(path) else open(path, 'rb')


def remove(path: pathlib.Path) -> None:
  """A directory with all that is in it."""
  path.remove() if remote(path) else shutil.rmtree(path)


def check_local(
  what: str, path: str | os.PathLike, buckets: bool = False, hub: bool = False
) -> None:
  """Raises ValueError for the address of something that is reached otherwise than through the file
  system, which would be taken for a directory of that name; buckets: but for a bucket's, hub: but
  for one of Hugging Face's.
  """
  scheme = re.match(r'([a-z][a-z0-9+.-]*):/', str(path))
  if scheme and scheme[1] == 'hf' and not hub:
    raise ValueError(
      f'{what}={path} is an address of the hub, of which data.sources, data.tokenizer.path and '
      f'convert.py import read; python convert.py import --from={path} --workdir=RUN makes a run '
      'of a model there: give that'
    )
  if scheme and not (hub and scheme[1] == 'hf' or buckets and scheme[1] in ('s3', 'gs', 'file')):
    where = 'on file systems and in buckets (s3, gs)' if buckets else 'on file systems'
    raise ValueError(
      f'{what}={path} is an address ({scheme[1]}), and files are read and written {where} here; '
      'mount it as a directory (gcsfuse, mount-s3, ...) and give that, or copy it'
    )


def check_writable(path: str | os.PathLike) -> None:
  """Raises OSError where `replace` could not write, before there is anything to lose;
  what is at `path` stays.
  """
  if remote(path):
    return names.imported('remote.system.check')(place(path).parent, write=True)
  if os.path.isdir(path):
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  temporary = _beside(path)
  temporary.touch()
  temporary.unlink()


def parsed(content: bytes | str, name: str | os.PathLike) -> Any:
  """What JSON says.

  Raises:
    ValueError: naming `name`, for whatever a parser stumbles over: no JSON, no UTF-8, a number of
      thousands of digits, nesting beyond Python's stack.
  """
  try:
    return json.loads(content)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{os.fspath(name)} is not JSON that can be read: {error}') from error


_locked: dict[pathlib.Path, object] = {}  # by this process, which the system lets lock a file twice


class InUse(ValueError):
  """Somebody else is in a locked block. sure: whether this machine's system knows that they are."""

  def __init__(self, message: str, sure: bool):
    super().__init__(message)
    self.sure = sure


@contextlib.contextmanager
def locked(
  path: str | os.PathLike, place: str, remedy: str, elsewhere: bool = False
) -> Iterator[int]:
  """A block during which no other process is in one with the same file, which is there meanwhile.

  The system takes the lock from a process that ends, however it ends: a file that a killed one left
  is taken over. It holds between machines where their shared disk passes locks on (NFS, Lustre and
  GPFS do, if they were not told otherwise); on one that knows no locks, the file's content is
  believed about this machine, and other machines are not seen.

  Args:
    path: of the file. place: what is locked, for the message; remedy: what to do there.
    elsewhere: whether the content is believed about other machines, too, though nothing here tells
      whether they live: for callers who find that out (data.building).
  Gives the open file. Raises InUse, a ValueError, where another process is in the block: its
  number, machine and when it began. In a bucket: as remote.lease.locked.
  """
  if remote(path):
    with names.imported('remote.lease.locked')(path, place, remedy):
      yield -1
    return
  path = pathlib.Path(path).absolute()
  fresh = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
  path.parent.mkdir(parents=True, exist_ok=True)
  claim = object()
  # Nor may it be opened here a second time: closing it would give the lock away.
  if _locked.setdefault(path, claim) is not claim:
    raise InUse(f'{place} is in use by this process already; {remedy}', sure=True)
  try:
    file = _lock(path, place, remedy, elsewhere)
    try:
      yield file
    finally:
      if _is_at(file, path):
        path.unlink()  # while it is locked: who opened it before sees that it is gone
      os.close(file)
  finally:
    del _locked[path]
    for parent in fresh:
      with contextlib.suppress(OSError):  # something was put there
        parent.rmdir()


def _lock(path: pathlib.Path, place: str, remedy: str, elsewhere: bool) -> int:
  """The open and locked file."""
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      known, taken = True, False
    except (BlockingIOError, PermissionError):
      known = taken = True
    except OSError:  # a file system without locks
      known, taken = False, _lives(_holder(file))
    holder = _holder(file)
    here = holder.get('host') == socket.gethostname()
    if taken or not known and elsewhere and holder and not here:
      os.close(file)
      raise InUse(
        f'{place} is in use by process {holder.get("process", "?")} on '
        f'{holder.get("host", "another machine")}, since {holder.get("since", "?")}; {remedy}',
        sure=known and here,
      )
    # Between opening and locking, the one before may have ended and taken its file away.
    if _is_at(file, path):
      break
    os.close(file)

  os.ftruncate(file, 0)
  os.pwrite(file, json.dumps(this_process()).encode(), 0)
  return file


def this_process() -> dict:
  """What this process says of itself in a lock."""
  since = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
  return {'process': os.getpid(), 'host': socket.gethostname(), 'since': since}


def _is_at(file: int, path: pathlib.Path) -> bool:
  """Whether an open file is the one at a path."""
  with contextlib.suppress(FileNotFoundError):
    return os.path.samestat(os.fstat(file), path.stat())
  return False


def _holder(file: int) -> dict:
  """What the process that holds a lock says of itself; {} where it has not yet."""
  try:
    content = json.loads(os.pread(file, 4096, 0))
  except ValueError:
    return {}
  return content if isinstance(content, dict) else {}


def _lives(holder: dict) -> bool:
  """Whether it is another process of this machine that is there still."""
  process = holder.get('process')
  if holder.get('host') != socket.gethostname() or process in (None, os.getpid()):
    return False
  return alive(process)


def alive(process: int) -> bool:
  """Whether this machine has a process of that number."""
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def _beside(path):
  """The name of a process's own file in the same directory, which is made if needed."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  return path.with_name(f'{path.name}.{socket.gethostname()}-{os.getpid()}.tmp')


def json_object(data: bytes | str, place: str | os.PathLike) -> dict:
  """The object that JSON holds. Raises ValueError for what is none; see `parsed`."""
  value = parsed(data, place)
  if not isinstance(value, dict):
    raise ValueError(f'{place} holds {type(value).__name__}, not an object with names')
  return value


def digest(values: Any) -> str:
  """Of what JSON can hold, hex."""
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()


SEAL = 'sha256'


def sealed(values: dict) -> dict:
  """An object with a seal behind its values, by which `unsealed` knows that it is unharmed."""
  return values | {SEAL: digest(values)}


def unsealed(values: dict, place: str | os.PathLike, remedy: str) -> dict:
  """The object without its seal; one without is taken as it is, since older versions set none.

  Raises ValueError where it was changed since it was sealed.
  """
  seal = values.get(SEAL)
  rest = {name: value for name, value in values.items() if name != SEAL}
  if seal is not None and seal != digest(rest):
    raise ValueError(f'{place} was changed since it was written; {remedy}')
  return rest
