"""What was measured? metrics.jsonl, a JSON object per line with its `step`, and the same numbers as
TensorBoard events.

JSON has no NaN or infinity: they are written as the strings 'nan', 'inf' and '-inf', so that any
parser reads the file.
"""

import concurrent.futures
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import numpy as np

import files

FILE = 'metrics.jsonl'
_NAMES = ('nan', 'inf', '-inf')


def scalars(metrics: Mapping[str, Any], prefix: str = '') -> dict[str, float]:
  """The metrics on the host, flat: waits for device arrays; names in nested mappings, and indices
  of vectors, are joined with '/'.

  Raises ValueError for a metric that is neither a scalar nor a vector.
  """
  if not prefix:
    metrics = jax.device_get(metrics)
  flat = {}
  for name, value in metrics.items():
    if isinstance(value, Mapping):
      flat |= scalars(value, f'{prefix}{name}/')
    elif np.ndim(value) == 1:
      flat |= scalars({str(i): x for i, x in enumerate(np.asarray(value))}, f'{prefix}{name}/')
    elif np.ndim(value):
      raise ValueError(
        f'metric {prefix + name!r} has shape {np.shape(value)}; give scalars, vectors, or a '
        'mapping of them'
      )
    else:
      flat[prefix + name] = (
        np.asarray(value).item() if np.asarray(value).dtype.kind in 'iu' else float(value)
      )
  return flat


def nonfinite(metrics: Mapping[str, float]) -> list[str]:
  """Names of the metrics that are NaN or infinite."""
  return [name for name, value in metrics.items() if not math.isfinite(value)]


def lowest(losses: Mapping[int, float]) -> int | None:
  """The step with the lowest loss, the first of several; None where none is finite.

  NaN compares as neither lower nor higher, and `min` keeps it where it comes first: what is not
  finite is the best of nothing.
  """
  finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
  return min(finite, key=finite.get, default=None)


def append_line(file: TextIO, line: Mapping[str, float]):
  """Writes one line and hands it to the operating system, so that it outlives a killed process."""
  valid = {
    name: value if math.isfinite(value) else str(float(value)) for name, value in line.items()
  }
  file.write(json.dumps(valid) + '\n')
  file.flush()


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
  """The lines of a metrics.jsonl in order of step; lines of the same step are one dict.

  Empty if there is no file.

  A last line without its newline (a process killed while writing) is left out; any other line that
  isn't JSON raises ValueError with its number.
  """
  path, steps = pathlib.Path(path), {}
  lines = path.read_text().split('\n')[:-1] if path.exists() else []
  for number, text in enumerate(lines, 1):
    try:
      line = {
        name: float(value) if value in _NAMES else value for name, value in json.loads(text).items()
      }
      steps.setdefault(line['step'], {}).update(line)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
      raise ValueError(
        f'{path}, line {number} is not a line of metrics: {text[:80]!r}; remove it to go on'
      ) from error
  return [steps[step] for step in sorted(steps)]


def drop_from(path: str | os.PathLike, step: int) -> int:
  """Drops the lines at or after `step`, atomically; returns how many.

  A last line cut short counts as one.

  Raises ValueError, and changes nothing, where a line isn't one of metrics (see `read_metrics`).
  """
  path = pathlib.Path(path)
  read_metrics(path)
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  kept = [line for line in lines if line.endswith('\n') and json.loads(line)['step'] < step]
  if len(kept) < len(lines):
    files.replace(path, ''.join(kept))
  return len(lines) - len(kept)


class TensorBoard:
  """Writes event files from one background thread, which also pays for the library's import."""

  def __init__(self, directory: pathlib.Path, first_step: int):
    self._directory, self._first_step = directory, first_step
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'tensorboard')
    self._writing: list[concurrent.futures.Future] = []
    self._writer = None

  def write(self, line: dict[str, float]):
    # result() raises here what failed over there.
    self._writing = [writing for writing in self._writing if not writing.done() or writing.result()]
    self._writing.append(self._thread.submit(self._add, line))

  def close(self):
    self._thread.shutdown()
    for writing in self._writing:
      writing.result()
    if self._writer is not None:
      self._writer.close()

  def _add(self, line: dict[str, float]):
    if self._writer is None:
      import tensorboardX

      # TensorBoard hides what earlier processes wrote from purge_step on. Files are named by the
      # second, and one of the same name is overwritten: the suffix keeps a quick restart from doing
      # that.
      self._writer = tensorboardX.SummaryWriter(
        str(self._directory),
        purge_step=self._first_step,
        flush_secs=10,
        filename_suffix=f'.from{self._first_step}',
      )
    for name, value in line.items():
      if name != 'step':
        self._writer.add_scalar(name, value, line['step'])
