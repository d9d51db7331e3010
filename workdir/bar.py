"""How does a run show how it goes, on a terminal?"""

from typing import TextIO

from rich import console, progress

from workdir.watch import PlainView


class Bar(PlainView):
  """For terminals: a progress bar with the last known numbers beside it, within 80 columns."""

  FORMS = {
    'loss': 'loss {:.3f}',
    'tokens_per_second': '{} tok/s',
    'mfu': 'MFU {:.0%}',
    'left': '{} left',
    'bits_per_byte': '{:.3f} bits/byte',
  }
  # Of a policy, whose loss tells little of how it goes.
  JUDGED = {
    'reward': 'reward {:.3f}',
    'kl': 'KL {:.2g}',
    'log_ratio': 'drift {:.1g}',
    'tokens_per_second': FORMS['tokens_per_second'],
    'left': FORMS['left'],
  }

  def __init__(self, stream: TextIO, steps: range):
    super().__init__(stream, steps)
    self._progress = progress.Progress(
      progress.MofNCompleteColumn(),
      progress.BarColumn(bar_width=6),
      progress.TextColumn('{task.description}'),
      console=console.Console(file=stream),
    )
    self._task = self._progress.add_task(
      'first step: compiling', total=steps.stop - 1, completed=max(steps.start - 1, 0)
    )
    self._known: dict[str, float] = {}
    self._progress.start()

  def print(self, text: str):
    self._progress.console.print(text, markup=False, highlight=False)

  def show(self, line: dict[str, float]):
    self._known |= line
    if 'reward' in line:
      self.FORMS = self.JUDGED
    self._progress.update(self._task, description=self._describe(self._known))

  def advance(self, step: int):
    self._progress.update(self._task, completed=step)

  def close(self):
    self._progress.stop()
