"""Who writes and reads a checkpoint's arrays? Orbax, of whose many words a person gets what is
needed.
"""

import contextlib
import functools
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator

import jax
import orbax.checkpoint as ocp


class Writer:
  """Writes arrays in the background, into directories of a file for each chunk.

  OCDBT, orbax's default, holds whole arrays until it commits them, and takes twice the time.
  """

  def __init__(self, chunk_bytes: int):
    _quieten()
    self._chunk_bytes = chunk_bytes
    self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))

  def begin(self, path: pathlib.Path, leaves: dict) -> None:
    """Returns once the arrays may be donated. Raises OSError for what the system refuses."""
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=self._chunk_bytes), leaves)
    with _by_the_system(path):
      self._orbax.save(path, args=ocp.args.PyTreeSave(leaves, save_args=pieces))

  def finish(self, path: pathlib.Path) -> None:
    """Returns when all is written. Raises as `begin`."""
    with _by_the_system(path):
      self._orbax.wait_until_finished()

  def files(self) -> dict:
    """What is known of the files without reading them: nothing."""
    return {}


def read(path: pathlib.Path, wanted: dict, saved: Iterable[str]) -> dict:
  """The arrays of a checkpoint that orbax wrote, by name.

  wanted: what of `saved`, all that it holds, is read, with shapes, dtypes and shardings.
  """

  def like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

  request = {name: like(wanted[name]) if name in wanted else ocp.PLACEHOLDER for name in saved}
  arguments = ocp.checkpoint_utils.construct_restore_args(request)
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.restore(path, args=ocp.args.PyTreeRestore(item=request, restore_args=arguments))
  return {name: tree[name] for name in wanted}


def _worth_saying(record: logging.LogRecord) -> bool:
  """Orbax warns at every save that it merges no OCDBT files, which it was told not to write; and
  what a thread of its ran into is raised by `wait`, with all that it says a second time.
  """
  said = str(record.msg)
  return not said.startswith('[process=%s][thread=%s] Skipping merge of OCDBT') and not (
    'orbax' in record.pathname and record.exc_info
  )


@functools.cache
def _quieten() -> None:
  """Once for the process."""
  logging.getLogger('absl').addFilter(_worth_saying)
  sys.excepthook, sys.unraisablehook = _quiet(sys.excepthook), _quiet(sys.unraisablehook)


def _quiet(hook: Callable) -> Callable:
  """A hook of `sys` that does not show what TensorStore's threads raise, hundreds of times, when
  the loop that waited for them has failed and is gone.
  """

  def quiet(*what):
    error = what[1] if len(what) > 1 else what[0].exc_value
    if not (isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'):
      hook(*what)

  return quiet


@contextlib.contextmanager
def _by_the_system(path: pathlib.Path) -> Iterator[None]:
  """What the operating system refused comes as an OSError about `path`, though TensorStore says it
  as a ValueError behind hundreds of lines.
  """
  try:
    yield
  except ValueError as error:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if not code:
      raise
    raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
