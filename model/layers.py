"""Norms, positions, feed-forward: the parts of a block that look at one token at a time.

B batch · T length · D width · H head width · F feed-forward width
"""
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.params import param, use
from parallel import axes as ax

ACTIVATIONS = {
    'silu': jax.nn.silu,
    'gelu': jax.nn.gelu,
    'relu': jax.nn.relu,
    'relu2': lambda x: jnp.square(jax.nn.relu(x)),
}


class Norm(nnx.Module):
  """RMSNorm (Zhang & Sennrich, arXiv:1910.07467) or LayerNorm (Ba et al., arXiv:1607.06450) over the last axis, in f32."""

  def __init__(self, config: ModelConfig, size: int, rngs: nnx.Rngs, kind: str = ''):
    self.kind = kind or config.norm
    self.epsilon = config.norm_epsilon
    self.scale = param(rngs, (size,), ('norm',), 'ones', kind='vector', dtype=config.parameter_dtype)
    biased = self.kind == 'layer' and config.biases
    self.bias = param(rngs, (size,), ('norm',), 'zeros', kind='vector', dtype=config.parameter_dtype) if biased else None

  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    y = x.astype(jnp.float32)
    if self.kind == 'layer':
      y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
    y = y * jnp.expand_dims(self.scale[...].astype(jnp.float32), range(x.ndim - 1))
    if self.bias is not None:
      y = y + jnp.expand_dims(self.bias[...].astype(jnp.float32), range(x.ndim - 1))
    return y.astype(x.dtype)


def rope_angles(positions: Int[Array, 'B T'], head_width: int, base: float) -> tuple[Float[Array, 'B T H2'], Float[Array, 'B T H2']]:
  """Cosines and sines of rotary positions, f32: position / base^(2i/H) for pair i (RoFormer, arXiv:2104.09864, eq. 15)."""
  frequencies = base ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, 'B T N H'], cosines: Float[Array, 'B T H2'], sines: Float[Array, 'B T H2']) -> Float[Array, 'B T N H']:
  """Turns the pairs (i, i + H/2) of every head by the token's angles, in f32."""
  a, b = jnp.split(x.astype(jnp.float32), 2, -1)
  cosines, sines = cosines[:, :, None, :], sines[:, :, None, :]
  return jnp.concatenate([a * cosines - b * sines, b * cosines + a * sines], -1).astype(x.dtype)


class FeedForward(nnx.Module):
  """act(x gate) * (x up) down, or act(x up) down when not gated."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, F, dtype = config.D, config.F, config.parameter_dtype
    self.dtype, self.activation = config.dtype, config.activation
    self.gate = param(rngs, (D, F), ('embed', 'feed_forward'), D**-0.5, dtype=dtype) if config.gated else None
    self.up = param(rngs, (D, F), ('embed', 'feed_forward'), D**-0.5, dtype=dtype)
    self.down = param(rngs, (F, D), ('feed_forward', 'embed'), (F * 2 * config.L) ** -0.5, dtype=dtype)
    biased = config.biases
    self.up_bias = param(rngs, (F,), ('feed_forward',), 'zeros', kind='vector', dtype=dtype) if biased else None
    self.gate_bias = param(rngs, (F,), ('feed_forward',), 'zeros', kind='vector', dtype=dtype) if biased and config.gated else None
    self.down_bias = param(rngs, (D,), ('norm',), 'zeros', kind='vector', dtype=dtype) if biased else None

  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    h = project('BTD,DF->BTF', x, self.up, self.up_bias, self.dtype)
    act = ACTIVATIONS[self.activation]
    if self.gate is None:
      h = act(h)
    else:
      h = act(project('BTD,DF->BTF', x, self.gate, self.gate_bias, self.dtype)) * h
    y = ax.einsum('BTF,FD->BTD', h, use(self.down, self.dtype), ('batch', 'length', 'width'))  # row-parallel
    return add_bias(y, self.down_bias, self.dtype)


def project(formula: str, x: Array, weight: nnx.Param, bias: nnx.Param | None, dtype: str) -> Array:
  """A column-parallel product: the result's sharding follows from the operands'."""
  return add_bias(jnp.einsum(formula, x, use(weight, dtype)), bias, dtype)


def add_bias(x: Array, bias: nnx.Param | None, dtype: str) -> Array:
  """`x` plus a bias over its last axes; `x` itself where there is none."""
  if bias is None:
    return x
  b = bias[...].astype(dtype)
  return x + jnp.expand_dims(b, range(x.ndim - b.ndim))
