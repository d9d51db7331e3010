"""What does every command share? How it ends, which machine this is, a parser, a table,
a JSON file with the hardware.
"""

import argparse
import contextlib
import errno
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence

import files

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'sentencepiece',
  'numpy',
  'datasketch',
  'libtpu',
  'torch',
  'transformers',
  'peft',
  'trl',
  'triton',
  'jax-cuda12-plugin',
  'jax-cuda13-plugin',
  'nvidia-cudnn-cu12',
  'nvidia-cudnn-cu13',
)


REMEDIES = {
  errno.ENOSPC: 'the disk is full: make room and run the same command again',
  errno.EDQUOT: 'your share of the disk is used up: make room and run the same command again',
  errno.EFBIG: 'files may not be this large here: raise the limit (ulimit -f) or use another disk',
  errno.EROFS: 'give a place that can be written to',
  errno.EACCES: 'give a place that you may use',
  errno.EPERM: 'give a place that you may use',
  errno.ENAMETOOLONG: 'give a shorter path',
  errno.EEXIST: 'a file is where a directory should be: name another place, or move it',
  errno.ENOTDIR: 'a file is where a directory should be: name another place, or move it',
  errno.EISDIR: 'a directory is where a file should be: name another place, or move it',
}


def said(error: BaseException) -> str:
  """What an error says to the person who can mend it; of one of the system, where and a remedy."""
  if not isinstance(error, OSError) or error.errno is None:
    return str(error)
  where = '' if error.filename is None else f'{error.filename}: '
  remedy = REMEDIES.get(error.errno)
  return f'{where}{error.strerror or os.strerror(error.errno)}' + (f'; {remedy}' if remedy else '')


@contextlib.contextmanager
def mendable(*more: type[Exception]) -> Iterator[None]:
  """What the person who started a command can mend ends it with one message, without a traceback:
  what a check refuses, what the system refuses, and `more`.
  """
  try:
    yield
  except (ValueError, NotImplementedError, OSError, *more) as error:
    sys.exit(f'error: {said(error)}')


LEAVING = 30  # seconds that a command takes to end, at most, after it has given up a disk

_ends = False  # whether `end` runs a command, at whose end this process may be ended


def unanswered(message: str) -> TimeoutError:
  """The error of a wait for a disk that was given up.

  What comes between its raise and the end of the command (closing files, unlocking) may wait for
  the same disk: a command is over after LEAVING seconds all the same, with the message and code 1.
  """

  def leave():
    _say(f'error: {message}')
    os._exit(1)

  if _ends:
    timer = threading.Timer(LEAVING, leave)
    timer.daemon = True
    timer.start()
  return TimeoutError(message)


def end(command: Callable[[], object], stopped_code: int = 0) -> None:
  """Runs a command to its end, which is the process's end where it failed.

  Without a traceback end what a person can mend (see `mendable`; of the rest, what the system
  refuses, numbers that are not finite, memory that is not there), and an interruption, with
  stopped_code or, as shells do, 128 + the signal's number. What remains is our fault, and said to
  be. After a failure nobody waits for threads: some of them may wait for what will not come.
  """
  global _ends
  code, _ends = 1, True
  without_64_bits()
  try:
    command()
    return
  except SystemExit as error:
    if not isinstance(error.code, str):
      raise
    _say(error.code)
  except KeyboardInterrupt as error:
    name = str(error) or signal.SIGINT.name
    _say('\ninterrupted' + ('' if name == signal.SIGINT.name else f' by {name}'))
    code = interrupted(error, stopped_code)
  except (OSError, FloatingPointError) as error:
    _say(f'error: {said(error)}')
  except MemoryError as error:
    _say(f'error: out of memory: {error}')
  except BaseException as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      _say(
        f'error: out of memory: {str(error).splitlines()[0]}; make the batch or the model smaller'
      )
    else:
      traceback.print_exc()
      _say('error: this is a fault of the program, not of what was asked of it; please report it')
  finally:
    _ends = False
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.flush()
  os._exit(code)


def interrupted(error: BaseException, stopped_code: int = 0) -> int:
  """The exit code of what a signal ended, as shells have it, or stopped_code; 0 of all else."""
  if not isinstance(error, KeyboardInterrupt):
    return 0
  return stopped_code or 128 + signal.Signals[str(error) or signal.SIGINT.name]


def without_64_bits() -> None:
  """Undoes JAX_ENABLE_X64, and says so: where types are not named, and in random numbers, it would
  give others, in a run that goes on from one without it, too.
  """
  name, jax = 'JAX_ENABLE_X64', sys.modules.get('jax')
  if os.environ.get(name, '').lower() in ('', '0', 'false', 'f', 'n', 'no', 'off'):
    return
  _say(
    f'{name}={os.environ[name]} is not heeded: types are those of the config '
    '(model.execution.dtype), and 64 bits would change results'
  )
  os.environ[name] = '0'
  if jax is not None:
    jax.config.update('jax_enable_x64', False)


def _say(text: str) -> None:
  """Writes a line for the person, after all that was printed, where a stream is open still."""
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.flush()
  with contextlib.suppress(OSError, ValueError):
    print(text, file=sys.stderr, flush=True)


def machine() -> dict:
  """Hardware and versions that a measurement was taken with: JSON-able."""
  model = platform.processor() or platform.machine()
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
    if line.startswith('model name'):
      model = line.split(':', 1)[1].strip()
      break

  versions = {}
  for package in PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = 'not installed'

  return {
    'cpu': model,
    'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
    'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1),
    'load_before': round(os.getloadavg()[0], 2),
    'system': platform.platform(),
    'python': platform.python_version(),
    'gpus': gpus(),
    **versions,
  }


@functools.cache
def gpus() -> list[str]:
  """Name, driver, memory and power limit of each NVIDIA GPU, as the driver's own tool says;
  [] where there is none.
  """
  tool = shutil.which('nvidia-smi')
  if tool is None:
    return []
  asked = subprocess.run(
    [tool, '--query-gpu=name,driver_version,memory.total,power.limit', '--format=csv,noheader'],
    capture_output=True,
    text=True,
  )
  return (
    asked.stdout.splitlines() if asked.returncode == 0 else [f'nvidia-smi: code {asked.returncode}']
  )


def parser(description: str) -> argparse.ArgumentParser:
  """A command line with --json; add what the benchmark needs."""
  made = argparse.ArgumentParser(description=description)
  made.add_argument(
    '--json', default='', metavar='FILE', help='write the results here, with the hardware'
  )
  return made


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
  """Prints aligned columns, the first to the left and the others to the right;
  floats with three digits.
  """
  cells = [
    [_digits(cell) if isinstance(cell, float) else str(cell) for cell in row] for row in rows
  ]
  widths = [max(map(len, column)) for column in zip(headers, *cells)]
  print(f'\n{title}')
  for row in [headers, ['-' * width for width in widths], *cells]:
    print(
      '  '.join(
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
      )
    )


def _digits(value: float) -> str:
  return f'{value:,.3g}' if abs(value) < 1000 else f'{value:,.0f}'


def write_json(path: str, benchmark: str, results: dict, partial: bool = False) -> None:
  """Writes the results with `machine()` to a file, and prints that; does nothing for path ''.

  partial: more is to come, so that nothing is printed: what ends this takes only what is missing.
  """
  if path:
    files.replace(
      path, json.dumps({'benchmark': benchmark, 'machine': machine(), 'results': results}, indent=1)
    )
    if not partial:
      print(f'\nwrote {path}')
