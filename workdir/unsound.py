"""What is said of a step that was not finite? Norms that name the culprit."""

import math

import jax
import jax.numpy as jnp

from model.params import named_leaves


def error(done: dict, norms, config, checkpoints) -> FloatingPointError:
  """The error of a completed step; see workdir.progress.check_finite. Waits for what is being
  saved.
  """
  by_module = norms_by_module(jax.device_get(norms))
  bad = non_finite(by_module)
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


def norms_by_module(tree) -> dict[str, float]:
  """L2 norms, in f32, of each top-level module ('stack') and of each parameter in it
  ('stack.blocks.0.attention.q').

  A stacked parameter is one entry for all layers. Waits for the arrays; on several hosts every
  process must call it. A norm of finite elements is finite unless it exceeds f32 itself.
  """

  def norm(x):
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x))
    unit = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.sum(jnp.square(x / unit)))

  leaves = named_leaves(tree)
  norms = jax.device_get(jax.jit(lambda xs: [norm(x) for x in xs])([*leaves.values()]))
  parameters = dict(zip(leaves, map(float, norms), strict=True))
  modules = {}
  for name, n in parameters.items():
    modules.setdefault(name.split('.')[0], []).append(n)
  return {**{module: math.hypot(*ns) for module, ns in modules.items()}, **parameters}


def non_finite(norms: dict[str, float]) -> list[str]:
  """Names whose norm is not finite, in order."""
  return [name for name, n in norms.items() if not math.isfinite(n)]
