"""How is the run going? metrics.jsonl, TensorBoard, a progress bar, true step times and device
memory.

A step's time is from the completion of the step before it to its own, with pauses (evaluation,
checkpoints) taken out. The trainer hands over step n right after dispatching it, and only then does
the watch wait for step n - 1, so that the device always has work queued:

    with Watch(workdir, steps=range(start, total), log_every=10) as watch:
      for step in range(start, total):
        state, metrics = train_step(state, batch)
        done = watch.step(step, metrics, tokens)   # numbers of step - 1
        if step in evaluations:
          with watch.pause() as done:    # numbers of `step`: nothing is left in flight
            watch.log(step, evaluate(state))
      done = watch.flush()                         # numbers of the last step
"""

import contextlib
import datetime
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax

import files
import names
from model import flops
from workdir.metrics import (
  FILE,
  Lines,
  TensorBoard,
  drop_from,
  nonfinite,
  read_metrics,
  scalars,
)


class Watch:
  """Times, records and shows the steps of one run; a context manager around the training loop.

  Args:
    directory: where metrics.jsonl and tensorboard/ go. Lines there at or after `steps.start` are
      dropped, atomically, so that a resumed run has each step once; tokens, train_seconds and
      wall_seconds go on from the last line kept.
    steps: the steps that this process will run, e.g. range(resumed_step, total_steps).
    log_every: a line is written when step % log_every == 0, at the last step, and at each pause.
    flops_per_token: model FLOPs of training on a token (model.flops.train_flops_per_token).
    chips, peak: how many the run holds, and FLOP/s of all their devices (analysis.hardware.peak).
      With peak=None, no MFU is recorded or shown.
    tensorboard: also write TensorBoard events, from a background thread.
    write: False keeps the clock and the host copies but writes and shows nothing: processes other
      than 0.
    stream: a terminal gets a progress bar, anything else plain lines.
    clock: seconds, monotonic.

  A line holds `step`, the mean of each metric over the steps since the last line (over its finite
  values, if some are not: `nonfinite_steps` counts steps with others), and tokens,
  tokens_per_second, step_seconds (mean), mfu, train_seconds (in steps), wall_seconds (pauses too),
  chip_seconds (of all chips, of lines that were dropped too), device_bytes (peak), device_share (of
  the limit), host_bytes (resident). The first step holds the compilation: it is
  `first_step_seconds`, and in no other time or rate of its line but the totals.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    steps: range,
    log_every: int = 10,
    flops_per_token: float = 0.0,
    chips: int = 1,
    peak: float | None = None,
    tensorboard: bool = True,
    write: bool | None = None,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    if log_every < 1:
      raise ValueError(
        f'log_every={log_every}: a line cannot be written more than once a step; give 1 or more'
      )
    if steps.step != 1:
      raise ValueError(f'steps={steps}: steps follow one another; give range(first, last + 1)')
    self.path = files.place(directory) / FILE
    self._steps, self._log_every, self._clock = steps, log_every, clock
    self._flops_per_token, self._chips, self._peak = flops_per_token, chips, peak
    self._write = jax.process_index() == 0 if write is None else write
    self._stream = stream or sys.stdout
    events = self.path.parent / 'tensorboard'
    self._tensorboard = TensorBoard(events, steps.start) if tensorboard and self._write else None
    self._view: PlainView | None = None
    self._window = _Window()
    self._pending: tuple[int, Any, int] | None = None
    self._line: dict[str, Any] = {}
    self._logged: set[str] = set()  # names that `log` has given: of evaluations
    self._pauses = 0
    self._handed = steps.start - 1
    self._totals = {'tokens': 0, 'train_seconds': 0.0, 'wall_seconds': 0.0, 'chip_seconds': 0.0}

  def __enter__(self) -> 'Watch':
    if self._write:
      self._view = (names.imported('workdir.bar.Bar') if self._stream.isatty() else PlainView)(
        self._stream, self._steps
      )
      self.path.parent.mkdir(parents=True, exist_ok=True)
      # What chips were held for is spent, also where it is done again.
      held = _chip_seconds(read_metrics(self.path), self._chips)
      dropped = drop_from(self.path, self._steps.start)
      if dropped:
        self.print(
          f'{self.path}: dropped {dropped} line(s) at or after step {self._steps.start}, '
          'which runs again'
        )
      kept = read_metrics(self.path)
      self._totals.update(
        {name: kept[-1][name] for name in self._totals if kept and name in kept[-1]}
      )
      self._totals['chip_seconds'] = held
      self._lines = Lines(self.path)
    self._mark = self._entered = self._clock()
    self._first = True
    return self

  def __exit__(self, kind, error, trace):
    # After an error the step in flight may never complete, or fail again; what completed before it
    # is kept.
    try:
      if kind is None:
        self.flush()
      self._close_window()
      self._write_line()
    finally:
      if self._write:
        self._lines.close()
        self._view.close()
    if self._tensorboard:
      # What ends the run is the first error, not one that follows from it.
      with contextlib.suppress(*(() if kind is None else (Exception,))):
        self._tensorboard.close()

  def step(self, step: int, metrics: Mapping[str, Any], tokens) -> dict[str, float] | None:
    """Takes over step `step`, just dispatched, and returns the numbers of the step before it, once
    that has completed.

    Args:
      metrics: scalars on device or host, nested mappings allowed (joined with '/').
      tokens: how many tokens the step trains on, padding left out, over all processes; an int, or
        an integer on a device.
    Returns `step` and each metric of the completed step as floats, non-finite ones included, or
    None where a pause or `flush` gave them already. Raises ValueError for a step out of order and a
    metric that isn't a scalar.
    """
    if step != self._handed + 1:
      raise ValueError(
        f'step {step} does not follow step {self._handed}; call Watch.step once per step, in order'
      )
    self._handed = step
    done = self._complete()
    self._pending = (step, metrics, tokens)
    return done

  def flush(self) -> dict[str, float] | None:
    """Waits for the step in flight and returns its numbers, as `step` does; None when nothing is in
    flight.
    """
    return self._complete()

  @contextlib.contextmanager
  def pause(self) -> Iterator[dict[str, float] | None]:
    """Takes what happens inside out of the step times; yields the numbers of the step that it first
    waits for.
    """
    self._pauses += 1
    try:
      done = self.flush()
      self._close_window()
      yield done
    finally:
      self._pauses -= 1
      if not self._pauses:
        self._write_line()
      self._mark = self._clock()

  def log(self, step: int, values: Mapping[str, Any]):
    """Adds values to the line of `step`, typically an evaluation inside a pause."""
    with self.pause():
      if self._line and self._line['step'] != step:
        self._write_line()
      values = scalars(values)
      self._logged |= values.keys()
      self._line = {'step': step, **self._line, **values}

  def write_text(self, step: int, name: str, text: str):
    """Gives TensorBoard a text, as Markdown."""
    if self._tensorboard:
      self._tensorboard.write({'step': step, name: text})

  def mark(self) -> dict:
    """What of the run's numbers a checkpoint is to remember, JSON-able; {} where none are written.

    Next to the mark of metrics.jsonl (workdir.metrics) the totals, for a run whose file is lost.
    """
    if not self._write:
      return {}
    return self._lines.mark() | {'totals': self._totals_now()}

  def _totals_now(self) -> dict[str, float]:
    here = self._clock() - self._entered
    return self._totals | {
      'wall_seconds': self._totals['wall_seconds'] + here,
      'chip_seconds': self._totals['chip_seconds'] + here * self._chips,
    }

  def print(self, text: str):
    """Shows a line of text without disturbing the progress bar."""
    if self._view is not None:
      self._view.print(text)
    elif self._write:
      print(text, file=self._stream, flush=True)

  def _complete(self) -> dict[str, float] | None:
    if self._pending is None:
      return None
    (step, metrics, tokens), self._pending = self._pending, None
    values = scalars(metrics)
    tokens = int(tokens)
    now = self._clock()
    seconds, self._mark = now - self._mark, now
    self._totals['tokens'] += tokens
    self._totals['train_seconds'] += seconds
    self._window.add(step, values, tokens, seconds, self._first)
    self._first = False
    if step % self._log_every == 0 or step == self._steps[-1]:
      self._close_window()
      if not self._pauses:
        self._write_line()
    if self._view is not None:
      self._view.advance(step)
    return {'step': step, **values}

  def _close_window(self):
    if not self._window.steps:
      return
    if self._line:
      self._write_line()
    self._line = self._window.line()
    if self._peak is not None and 'tokens_per_second' in self._line:
      rate = self._flops_per_token * self._line['tokens_per_second']
      self._line['mfu'] = flops.mfu(rate, 1, self._peak)
    self._window = _Window()

  def _write_line(self):
    line, self._line = self._line, {}
    if not line or not self._write:
      return
    line |= self._totals_now() | memory()
    self._lines.append(line)
    if self._tensorboard:
      self._tensorboard.write(line, self._logged)
    self._view.show(line)


def _chip_seconds(lines, chips: int) -> float:
  """Those that a run's lines say; of older ones, whose chips are not known, by as many as now."""
  last = lines[-1] if lines else {}
  return last.get('chip_seconds', last.get('wall_seconds', 0.0) * chips)


class _Window:
  """The steps since the last line."""

  def __init__(self):
    self.steps = self._nonfinite = 0
    self._last, self._first_seconds = -1, None
    self._sums: dict[str, list[float]] = {}
    self._timed_steps, self._tokens, self._seconds = 0, 0, 0.0

  def add(self, step: int, metrics: dict[str, float], tokens: int, seconds: float, first: bool):
    self.steps, self._last = self.steps + 1, step
    self._nonfinite += bool(nonfinite(metrics))
    for name, value in metrics.items():
      self._sums.setdefault(name, []).append(value)
    if first:
      self._first_seconds = seconds
    else:
      self._timed_steps += 1
      self._tokens += tokens
      self._seconds += seconds

  def line(self) -> dict[str, float]:
    line = {'step': self._last}
    for name, values in self._sums.items():
      line[name] = statistics.fmean([value for value in values if math.isfinite(value)] or values)
    if self._nonfinite:
      line['nonfinite_steps'] = self._nonfinite
    if self._first_seconds is not None:
      line['first_step_seconds'] = self._first_seconds
    if self._timed_steps and self._seconds > 0:
      line['step_seconds'] = self._seconds / self._timed_steps
      line['tokens_per_second'] = self._tokens / self._seconds
    return line


def memory() -> dict[str, float]:
  """Bytes in use: device_bytes (peak) and device_share (of the limit) of the first local device,
  host_bytes (resident).

  A name is missing where the backend or the system doesn't tell (a CPU has no device statistics).
  """
  found = {}
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    found['device_bytes'] = stats['peak_bytes_in_use']
    if stats.get('bytes_limit'):
      found['device_share'] = stats['peak_bytes_in_use'] / stats['bytes_limit']
  statm = pathlib.Path('/proc/self/statm')
  if statm.exists():
    found['host_bytes'] = int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  return found


def short(number: float) -> str:
  """Three digits and a suffix: 12345 -> '12.3k'."""
  for size, suffix in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(number) >= size * 0.9995:
      return f'{number / size:.3g}{suffix}'
  return f'{number:.3g}'


class PlainView:
  """Plain text, a line per line of metrics: for files and pipes."""

  FORMS = {
    'loss': 'loss {:.4f}',
    'reward': 'reward {:.4f}',
    'kl': 'KL {:.2g}',
    'log_ratio': 'log ratio {:.2g}',
    'validation_loss': 'validation {:.4f}',
    'bits_per_byte': '{:.3f} bits/byte',
    'nonfinite_steps': '{} non-finite',
    'first_step_seconds': 'first step {:.1f} s',
    'tokens_per_second': '{} tokens/s',
    'step_seconds': '{} s/step',
    'mfu': 'MFU {:.1%}',
    'device_share': 'HBM {:.0%}',
    'left': '{} left',
  }

  def __init__(self, stream: TextIO, steps: range):
    self._stream, self._steps = stream, steps

  def print(self, text: str):
    print(text, file=self._stream, flush=True)

  def show(self, line: dict[str, float]):
    self.print(f'step {line["step"]}/{self._steps.stop - 1}  {self._describe(line)}')

  def advance(self, step: int):
    pass

  def close(self):
    pass

  def _describe(self, line: dict[str, float]) -> str:
    shown = dict(line)
    for name in ('tokens_per_second', 'step_seconds'):
      if name in line:
        shown[name] = short(line[name])
    if 'step_seconds' in line:
      left = (self._steps.stop - 1 - line['step']) * line['step_seconds']
      shown['left'] = datetime.timedelta(seconds=round(left))
    return '  '.join(form.format(shown[name]) for name, form in self.FORMS.items() if name in shown)
