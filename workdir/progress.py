"""Is the run getting better, and is its arithmetic still sound?"""

import dataclasses
import math
from collections.abc import Mapping

import jax

from training import precision


@dataclasses.dataclass(frozen=True)
class Progress:
  """What evaluations have shown so far: the lowest validation loss, and how many evaluations have
  not beaten it.
  """

  best: float = math.inf
  waited: int = 0

  def after(self, validation_loss: float) -> 'Progress':
    """The progress after one more evaluation; a loss that is not finite is none."""
    if math.isfinite(validation_loss) and validation_loss < self.best:
      return Progress(validation_loss, 0)
    return Progress(self.best, self.waited + 1)

  def impatient(self, patience: int) -> str:
    """Why to stop: `patience` evaluations or more in a row were no better; '' while there is no
    reason (or patience is 0).
    """
    return (
      f'train.patience={patience}: no better validation loss in {self.waited} evaluations'
      if 0 < patience <= self.waited
      else ''
    )

  def record(self) -> dict:
    """JSON-able; None stands for no evaluation yet."""
    return {'best': self.best if math.isfinite(self.best) else None, 'waited': self.waited}

  @classmethod
  def resume(cls, checkpoints, step: int) -> 'Progress':
    """As it was when the checkpoint of `step` was saved; fresh for step 0."""
    if not step:
      return cls()
    record = checkpoints.record(step)['progress']
    return cls(math.inf if record['best'] is None else record['best'], record['waited'])


def worse_than_guessing(done: Mapping | None, config) -> str:
  """What to say of a model that was tuned and is worse, at its first step, than one that knows
  nothing: of another tokenizer, or of another template. '' where there is nothing to say.
  """
  guess = math.log(config.model.V)
  if done is None or done['step'] != 1 or not config.init:
    return ''
  begins = done.get('cross_entropy', done['loss'])  # of the text, where the loss is of more
  if not begins > guess:
    return ''
  return (
    f'WARNING: the loss begins at {begins:.2f}, above the {guess:.2f} of guessing among '
    f'{config.model.V:,} tokens: is the tokenizer, and the chat template, that of {config.init}? '
    '--show=3 prints what it learns from'
  )


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
  by_module = precision.norms_by_module(jax.device_get(norms))
  bad = precision.non_finite(by_module)
  checkpoints.wait()
  steps = checkpoints.steps()
  good = f'checkpoint {steps[-1]} in {checkpoints.directory}' if steps else 'there is none yet'
  remedy = 'Lower optimizer.learning_rate, or set train.nonfinite=skip to go on.'
  if done['step'] == 1:
    begins = f'--config.init={config.init}' if config.init else 'model.init_scale, train.seed'
    remedy = (
      'No update was made before it, so that no rate is to blame: look at what the model begins '
      f'with ({begins}), and at model.execution.dtype={config.model.execution.dtype}.'
    )
  raise FloatingPointError(
    f'step {done["step"]}: loss {done["loss"]}, gradient norm {done["grad_norm"]}. '
    'Gradient norm by module: '
    + ', '.join(f'{name} {norm:.3g}' for name, norm in by_module.items())
    + f'. Not finite: {bad}. Last good checkpoint: {good}. {remedy}'
  )
