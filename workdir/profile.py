"""What do the devices do in a few steps? A trace of them, for XProf or Perfetto."""

import os
from typing import Any

import jax

import files
import names


class ProfileWindow:
  """Traces the steps named, e.g. '10-12' or '10', with jax.profiler, for XProf or Perfetto.

  Call `before(step)` and `after(step, outputs)` around each step's dispatch. The last step named is
  waited for, so that the trace holds all of it. '' names no step. Raises ValueError for other text,
  and for steps that the run won't reach.
  """

  def __init__(self, steps: str, directory: str | os.PathLike, run: range):
    self._staged = None
    if steps and files.remote(directory):  # the profiler writes files
      self._staged = names.imported('remote.local.Staging')(directory)
    self.directory = str(self._staged.directory if self._staged else directory)
    self.steps = range(0)
    self._annotation = None
    self._tracing = False
    if steps:
      first, _, last = steps.partition('-')
      if not (first.isdecimal() and (last or first).isdecimal()) or steps.endswith('-'):
        raise ValueError(
          f'profile={steps!r} names no steps; write the first and the last, as in 10-12'
        )
      self.steps = range(int(first), int(last or first) + 1)
      if not self.steps or self.steps[0] not in run or self.steps[-1] not in run:
        raise ValueError(
          f'profile={steps!r} is not within the steps of this run, {run.start}-{run.stop - 1}'
        )

  def before(self, step: int):
    """Starts the trace if `step` is the first one named."""
    if step in self.steps:
      if step == self.steps[0]:
        jax.profiler.start_trace(self.directory)
        self._tracing = True
      self._annotation = jax.profiler.StepTraceAnnotation('train', step_num=step)
      self._annotation.__enter__()

  def after(self, step: int, outputs: Any):
    """Ends the trace if `step` is the last one named; `outputs` are any of its results (a pytree of
    arrays).
    """
    if step in self.steps:
      self._annotation.__exit__(None, None, None)
      if step == self.steps[-1]:
        jax.block_until_ready(outputs)
        self.close()

  def close(self):
    """Ends the trace if it is still running: a run that stopped early keeps what was traced."""
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
      if self._staged:
        self._staged.send()
