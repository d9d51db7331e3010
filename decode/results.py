"""How do results of many prompts reach a person before the last of them is there? Lines of a file
that grows, and a bar that says how many there are.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator


class GrowingFile:
  """JSON objects, one a line, that are in the file as soon as they are added, whole or not at all:
  what an interruption leaves is valid. The first one takes the place of what was there before.
  """

  def __init__(self, path: str | os.PathLike | None):
    self._path = path
    self._file: io.FileIO | None = None

  def add(self, objects: Iterable[dict]) -> None:
    """Writes them behind the others."""
    for each in objects:
      line = json.dumps(each, ensure_ascii=False) + '\n'
      if self._file is None:
        self._file = open(self._path, 'wb', buffering=0)
      self._append(line.encode())

  def close(self) -> None:
    """Nothing can be added any more."""
    if self._file is not None:
      self._file.close()

  def _append(self, line: bytes) -> None:
    before = self._file.tell()
    try:
      # A disk that gets full takes a part of it.
      while line:
        line = line[self._file.write(line) :]
    except BaseException:
      self._file.truncate(before)
      self._file.seek(before)
      raise


@contextlib.contextmanager
def progress_bar(
  total: int, stream: io.TextIOBase | None = None
) -> Iterator[Callable[[int, str], None]]:
  """A block in which calling what it gives, with how many more there are and a text beside them,
  moves a bar on a terminal (default: stderr), and does nothing elsewhere.
  """
  stream = stream or sys.stderr
  if not stream.isatty():
    yield lambda more, text: None
    return
  from rich import console, progress

  bar = progress.Progress(
    progress.MofNCompleteColumn(),
    progress.BarColumn(bar_width=20),
    progress.TimeRemainingColumn(),
    progress.TextColumn('{task.description}', markup=False),
    console=console.Console(file=stream),
  )
  task = bar.add_task('the first ones: compiling', total=total)
  with bar:
    yield lambda more, text: bar.update(
      task, completed=min(bar.tasks[0].completed + more, total), description=text
    )
