"""What is said of a step that was not finite?"""

import jax

from training import precision


def error(done: dict, norms, config, checkpoints) -> FloatingPointError:
  """The error of a completed step; see workdir.progress.check_finite. Waits for what is being
  saved.
  """
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
  return FloatingPointError(
    f'step {done["step"]}: loss {done["loss"]}, gradient norm {done["grad_norm"]}. '
    'Gradient norm by module: '
    + ', '.join(f'{name} {norm:.3g}' for name, norm in by_module.items())
    + f'. Not finite: {bad}. Last good checkpoint: {good}. {remedy}'
  )
