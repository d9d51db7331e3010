"""What was measured? metrics.jsonl, a JSON object per line with its `step`, and the same numbers as
TensorBoard events.

JSON has no NaN or infinity: they are written as the strings 'nan', 'inf' and '-inf', so that any
parser reads the file.
"""

import concurrent.futures
import hashlib
import itertools
import json
import math
import os
import pathlib
import time
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

import commands
import files
import names

FILE = 'metrics.jsonl'
# What a line may hold: key -> (unit, meaning). A vector's key is followed by '/' and an index. An
# objective adds its own (objectives/objective.py, `metrics` and `verdict`).
KEYS = {
  'step': ('steps', 'of the line; every line has it'),
  'loss': (
    'nats a token',
    'of training: the mean over what the objective predicts, without z-loss; of objectives that '
    'predict no tokens what they minimise, in their own unit',
  ),
  'accuracy': ('0 to 1', 'share of the predicted tokens that no other token outscores'),
  'predicted_tokens': ('tokens', 'that were predicted in a step'),
  'learned_examples': ('examples', 'of a step, where objective.weighting=example counts them'),
  'grad_norm': ('', 'L2 norm of the gradient of all that is trained, before clipping'),
  'learning_rate': ('', 'of the step, by its schedule'),
  'loss_scale': ('', 'that losses are multiplied by, under float16 only'),
  'expert_load': ('1 is a fair share', 'choices that fell on each expert, of all layers together'),
  'expert_load_max': ('1 is a fair share', 'the same of the busiest expert of any layer'),
  'dropped': ('0 to 1', 'share of choices of experts that found no room'),
  'balance_loss': ('nats a token', 'what balances experts, as it is added to the loss'),
  'router_z_loss': ('nats a token', "the routers' z-loss, as it is added to the loss"),
  'validation_loss': (
    'nats a token',
    'of an evaluation; the best checkpoint has the lowest, unless train.best names another '
    'number; followed by / and the name of a source, '
    'where there are several, of what is held out of it',
  ),
  'validation_accuracy': ('0 to 1', 'the same share of what was held out; not of next_token'),
  'completion_log_likelihood': ('nats an example', 'of held-out answers: the mean of their sums'),
  'bits_per_byte': (
    'bits',
    'the same per byte of the held-out text, whatever the tokenizer; of each source, too',
  ),
  'gzip_bits_per_byte': (
    'bits',
    'what gzip -9 takes for the same documents, or a part of many; at the end',
  ),
  'xz_bits_per_byte': ('bits', 'what xz -9 takes for them'),
  'nonfinite_steps': ('steps', 'since the last line with a number that is not finite, if any'),
  'first_step_seconds': ('s', 'of the first step of a process, compilation included'),
  'step_seconds': ('s', 'mean of the steps since the last line, from completion to completion'),
  'tokens_per_second': ('tokens/s', 'of the same steps, padding left out'),
  'mfu': ('0 to 1', "model FLOP/s of the peak; not where the hardware's peak is unknown"),
  'tokens': ('tokens', 'since the run began, padding left out'),
  'train_seconds': ('s', 'in steps, since the run began'),
  'wall_seconds': ('s', 'the same with evaluations and checkpoints'),
  'chip_seconds': ('chips x s', 'by the chips of each start; steps done twice are in it twice'),
  'device_bytes': ('bytes', 'peak on the first device, where the backend tells'),
  'device_share': ('0 to 1', 'of what a device may use'),
  'host_bytes': ('bytes', 'resident memory of process 0'),
}
_NAMES = ('nan', 'inf', '-inf')
FLUSH_SECONDS, CLOSING_SECONDS = 10, 60  # of TensorBoard's files
SEND_SECONDS = 60  # between two times that they are sent to a bucket, whole


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


class Lines:
  """A metrics.jsonl that lines are appended to, and what is in it so far."""

  def __init__(self, path: pathlib.Path):
    content = path.read_bytes() if path.exists() else b''
    self._bytes, self._digest = len(content), hashlib.sha256(content)
    self._file = path.open('ab')

  def append(self, line: Mapping[str, float]) -> None:
    """Writes one line and hands it to the operating system, so that it outlives a killed
    process.
    """
    valid = {
      name: value if math.isfinite(value) else str(float(value)) for name, value in line.items()
    }
    content = (json.dumps(valid) + '\n').encode()
    self._file.write(content)
    self._file.flush()
    self._bytes += len(content)
    self._digest.update(content)

  def mark(self) -> dict:
    """What `problem` knows the file's content of now by, JSON-able."""
    return {'bytes': self._bytes, 'sha256': self._digest.hexdigest()}

  def close(self) -> None:
    self._file.close()


def problem(path: pathlib.Path, mark: Mapping[str, Any]) -> str:
  """What is wrong with a file that was marked: that its beginning is not what it was; or ''."""
  if not path.exists():
    return f'{path} is missing'
  with path.open('rb') as file:
    content = file.read(mark['bytes'])
  if len(content) < mark['bytes']:
    return f'{path} has {len(content)} bytes, {mark["bytes"]} were written'
  if hashlib.sha256(content).hexdigest() != mark['sha256']:
    return f'{path} was changed since it was written'
  return ''


def begin_anew(path: pathlib.Path, step: int, totals: Mapping[str, float]) -> str:
  """Puts a file that is not what was written aside, if there is one, and begins another with what
  was known at `step`; returns where the old one is, or ''.
  """
  aside = ''
  if path.exists():
    number = next(n for n in itertools.count(1) if not path.with_suffix(f'.damaged-{n}').exists())
    aside = str(path.rename(path.with_suffix(f'.damaged-{number}')))
  files.replace(path, json.dumps({'step': step, **totals}) + '\n')
  return aside


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
  """The lines of a metrics.jsonl in order of step; lines of the same step are one dict.

  Empty if there is no file.

  A last line without its newline (a process killed while writing) is left out; any other line that
  isn't JSON raises ValueError with its number.
  """
  path, steps = files.place(path), {}
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
  path = files.place(path)
  read_metrics(path)
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  kept = [line for line in lines if line.endswith('\n') and json.loads(line)['step'] < step]
  if len(kept) < len(lines):
    files.replace(path, ''.join(kept))
  return len(lines) - len(kept)


class TensorBoard:
  """Writes event files from one background thread, which also pays for the library's import. Tags
  are in two groups: validation/ has what evaluations found, train/ all else.

  The library's own SummaryWriter has a thread more: where that one dies, as on a full disk, whoever
  hands it something waits for good. Here, an error is raised at the next line.
  """

  def __init__(self, directory: pathlib.Path, first_step: int):
    self._staged = (
      names.imported('remote.local.Staging')(directory) if files.remote(directory) else None
    )
    self._directory = self._staged.directory if self._staged else directory
    self._first_step = first_step
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'tensorboard')
    self._writing: list[concurrent.futures.Future] = []
    self._writer = None
    self._flushed = 0.0

  def write(self, line: Mapping[str, float | str], evaluated: Collection[str] = ()):
    """A line of metrics, or of texts (Markdown); evaluated: names that an evaluation gave."""
    # result() raises here what failed over there.
    self._writing = [writing for writing in self._writing if not writing.done() or writing.result()]
    self._writing.append(self._thread.submit(self._add, line, frozenset(evaluated)))

  def close(self):
    """Ends the files. Raises what failed, and OSError where a minute was too short for it."""
    if self._writing:
      self._writing.append(self._thread.submit(self._end))
    self._thread.shutdown(wait=False)
    for writing in self._writing:
      try:
        writing.result(CLOSING_SECONDS)
      except TimeoutError as error:
        raise commands.unanswered(
          f'{self._directory} was not written within {CLOSING_SECONDS} s: does its disk answer?'
        ) from error

  def _add(self, line, evaluated):
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    if self._writer is None:
      # TensorBoard hides what earlier processes wrote from the step of a start on. Files are named
      # by the second, and one of the same name is overwritten: the suffix keeps a quick restart
      # from doing that.
      self._directory.mkdir(parents=True, exist_ok=True)
      self._writer = event_file_writer.EventsWriter(
        str(self._directory / 'events'), f'.from{self._first_step}'
      )
      log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._event(self._first_step, session_log=log)
    for name, value in line.items():
      if isinstance(value, str):
        self._event(line['step'], summary=summary.text(name, value))
      elif name != 'step':
        # 'validation_loss' as validation/loss, so that it stands beside train/loss.
        group = 'validation' if name in evaluated else 'train'
        tag = f'{group}/{name.removeprefix("validation_")}'
        self._event(line['step'], summary=summary.scalar(tag, value))
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self._writer.flush()
      if self._staged:
        self._staged.send(SEND_SECONDS)
      self._flushed = time.monotonic()

  def _event(self, step: int, **content):
    from tensorboardX.proto import event_pb2

    self._writer.write_event(event_pb2.Event(step=step, wall_time=time.time(), **content))

  def _end(self):
    if self._writer is not None:
      self._writer.close()
      if self._staged:
        self._staged.send()
