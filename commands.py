"""What does every command share? Which machine this is, a parser, a table,
a JSON file with the hardware.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Sequence

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
