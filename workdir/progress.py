"""Is the run getting better, and is its arithmetic still sound?"""

import dataclasses
import math
from collections.abc import Mapping

import names

LOSS = 'lowest validation_loss'  # what train.best is where nobody says


@dataclasses.dataclass(frozen=True)
class Progress:
  """What evaluations have shown so far: the lowest cost, how many evaluations have not beaten it,
  and what it is the cost of (train.best).
  """

  best: float = math.inf
  waited: int = 0
  of: str = LOSS

  def after(self, cost: float) -> 'Progress':
    """The progress after one more evaluation; a cost that is not finite is none."""
    if math.isfinite(cost) and cost < self.best:
      return Progress(cost, 0, self.of)
    return Progress(self.best, self.waited + 1, self.of)

  def impatient(self, patience: int) -> str:
    """Why to stop: `patience` evaluations or more in a row were no better; '' while there is no
    reason (or patience is 0).
    """
    return (
      f'train.patience={patience}: no better {self.of.split(maxsplit=1)[1].replace("_", " ")} in '
      f'{self.waited} evaluations'
      if 0 < patience <= self.waited
      else ''
    )

  def record(self) -> dict:
    """JSON-able; None stands for no evaluation yet."""
    best = self.best if math.isfinite(self.best) else None
    return {'best': best, 'waited': self.waited, 'of': self.of}

  @classmethod
  def resume(cls, checkpoints, step: int, of: str = LOSS) -> 'Progress':
    """As it was when the checkpoint of `step` was saved; fresh for step 0, and where it was of
    something else then.
    """
    record = checkpoints.record(step)['progress'] if step else {}
    if not record or record.get('of', LOSS) != of:
      return cls(of=of)
    return cls(math.inf if record['best'] is None else record['best'], record['waited'], of)


def cost_of(best: str, evaluation: Mapping[str, float]) -> float | None:
  """What the best model has the lowest of, by train.best; None where an evaluation does not say it.

  Raises ValueError where one that reads the validation data was to say it.
  """
  extreme, name = best.split(maxsplit=1)
  of_task = '/' in name and not name.startswith('validation_')
  if 'validation_loss' in evaluation and not of_task:
    names.check('train.best: the metric', name, evaluation)
  if name not in evaluation:
    return None
  return evaluation[name] if extreme == 'lowest' else -evaluation[name]


def check_finite(done: dict | None, norms, config, checkpoints) -> None:
  """Raises FloatingPointError when a completed step was not finite and the config says to stop.

  The message names the step, the norm of each module's gradient and the last good checkpoint. The
  state is as before that step: an update that is not finite is never applied. Under f16 loss
  scaling a step may overflow, which lowers the scale; it is an error once the scale can go no
  lower.

  Args:
    done: metrics of the step, as Watch returns them. norms: its gradient norms by parameter, on
      device.
  """
  if done is None or config.train.nonfinite == 'skip' or done.get('loss_scale', 1) > 1:
    return
  if math.isfinite(done['loss']) and math.isfinite(done['grad_norm']):
    return
  raise names.imported('workdir.unsound.error')(done, norms, config, checkpoints)
