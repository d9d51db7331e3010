"""Is the arithmetic holding? Dynamic loss scaling, and steps that are skipped."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('scale', 'good_steps', 'skipped_steps'),
  meta_fields=('growth', 'backoff', 'interval', 'smallest', 'largest'),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScale:
  """The state of dynamic loss scaling (Micikevicius et al., arXiv:1710.03740, section 3.2).

  Attributes:
    scale: f32 []; what the loss is multiplied with, and gradients divided by.
    good_steps: int32 []; finite steps since the scale last changed.
    skipped_steps: int32 []; steps with gradients that were not finite, since the start.
    growth, backoff: factors after `interval` good steps, and after a step that is not finite.
    smallest, largest: limits of the scale.
  """

  scale: (
    Any  # Any, because JAX rebuilds registered dataclasses with tracers, specs and placeholders
  )
  good_steps: Any
  skipped_steps: Any
  growth: float
  backoff: float
  interval: int
  smallest: float
  largest: float


def init_loss_scale(
  compute_dtype: str, *, initial: float = 2.0**15, interval: int = 2000
) -> LossScale:
  """A fresh state. Only float16 needs scaling: other types get a scale of 1 that never moves, on
  the same code path.

  Raises ValueError when the initial scale is not between 1 and 2**24 or the interval is below 1.
  """
  smallest, largest = 1.0, 2.0**24
  if not smallest <= initial <= largest:
    raise ValueError(
      f'initial loss scale {initial} must be from {smallest} to {largest}; 2**15 suits most models'
    )
  if interval < 1:
    raise ValueError(
      f'loss scale interval {interval} must be at least 1 step; 2000 suits most runs'
    )
  dynamic = compute_dtype == 'float16'
  # Two zeros, not one used twice: the state is donated, and a buffer can be donated once.
  return LossScale(
    scale=jnp.float32(initial if dynamic else 1.0),
    good_steps=jnp.zeros((), jnp.int32),
    skipped_steps=jnp.zeros((), jnp.int32),
    growth=2.0 if dynamic else 1.0,
    backoff=0.5 if dynamic else 1.0,
    interval=interval,
    smallest=smallest,
    largest=largest,
  )


def scale(loss: Float[Array, ''], state: LossScale) -> Float[Array, '']:
  """The loss to differentiate; an f32 loss, for f16 does not hold large scales."""
  return loss * state.scale.astype(loss.dtype)


def update(state: LossScale, finite: Bool[Array, '']) -> LossScale:
  """The state after a step: grown after `interval` finite steps in a row, backed off at once after
  one that is not.
  """
  good = jnp.where(finite, state.good_steps + 1, 0)
  grow = good >= state.interval
  factor = jnp.where(finite, jnp.where(grow, state.growth, 1.0), state.backoff)
  return dataclasses.replace(
    state,
    scale=jnp.clip(state.scale * factor, state.smallest, state.largest),
    good_steps=jnp.where(grow, 0, good),
    skipped_steps=state.skipped_steps + jnp.where(finite, 0, 1),
  )


def select(finite: Bool[Array, ''], new, old):
  """`new` where the step was finite, else `old`: a step that is skipped leaves no trace in
  parameters or optimizer.
  """
  return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
