"""How is a file written so that it is there whole or not at all?"""
import os
import pathlib
import socket


def replace(path: str | os.PathLike, data: bytes | str) -> None:
  """Writes `data` to `path`: a reader, a crash or a kill sees the old file or the new one, never a part."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.{socket.gethostname()}-{os.getpid()}.tmp')
  with open(temporary, 'wb') as file:
    file.write(data.encode() if isinstance(data, str) else data)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
