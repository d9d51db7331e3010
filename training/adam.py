"""How does Adam rescale? By optax, whose second moment is kept in f32 whatever the parameters are.

In bfloat16 it could only rise: of b2 = 0.999 a step takes a thousandth of it, where the next number
is 0.2% to 0.4% away, and rounding gives it back.
"""

import jax
import jax.numpy as jnp
import optax


def rescaling(settings: dict[str, float], specs, whole: bool) -> optax.GradientTransformation:
  """Gradients to updates at learning rate 1, before decay; see training.optimizer.OWN."""
  del specs, whole
  return scale_by_adam(settings['b1'], settings['b2'], settings['epsilon'])


def scale_by_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
  """optax.scale_by_adam, with its `nu` in f32 or wider."""
  adam = optax.scale_by_adam(b1, b2, epsilon)

  def init(parameters):
    return adam.init(parameters)._replace(nu=jax.tree.map(wide_zeros, parameters))

  return optax.GradientTransformation(init, adam.update)


def wide_zeros(p: jax.Array) -> jax.Array:
  """Zeros in the place of a parameter, in f32 or wider."""
  return jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32))
