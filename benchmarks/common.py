"""What every benchmark shares: which machine this is, a table, a JSON file,
and the memory that a process reaches.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

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
  'triton',
  'jax-cuda12-plugin',
  'jax-cuda13-plugin',
  'nvidia-cudnn-cu12',
  'nvidia-cudnn-cu13',
)


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


def write_json(path: str, benchmark: str, results: dict) -> None:
  """Writes the results with `machine()` to a file, and prints that; does nothing for path ''."""
  if path:
    files.replace(
      path, json.dumps({'benchmark': benchmark, 'machine': machine(), 'results': results}, indent=1)
    )
    print(f'\nwrote {path}')


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
