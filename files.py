"""How is a file written so that it is there whole or not at all, and JSON of others read?"""

import errno
import json
import os
import pathlib
import socket


def replace(path: str | os.PathLike, data: bytes | str) -> None:
  """Writes `data` to `path`: a reader, a crash or a kill sees the old file or the new one,
  never a part.
  """
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


def check_writable(path: str | os.PathLike) -> None:
  """Raises OSError where `replace` could not write, before there is anything to lose;
  what is at `path` stays.
  """
  if os.path.isdir(path):
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  temporary = _beside(path)
  temporary.touch()
  temporary.unlink()


def _beside(path):
  """The name of a process's own file in the same directory, which is made if needed."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  return path.with_name(f'{path.name}.{socket.gethostname()}-{os.getpid()}.tmp')


def json_object(data: bytes | str, place: object) -> dict:
  """The object that JSON from elsewhere holds.

  Raises ValueError, which names the place, for what is none: no UTF-8, numbers of thousands of
  digits, and brackets in brackets without end (RecursionError) among others.
  """
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{place} is not JSON: {error if data else "it is empty"}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{place} holds {type(value).__name__}, not an object with names')
  return value
