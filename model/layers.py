"""Embedding, norms, positions, feed-forward, head: what looks at one token at a time.

B batch · T length · D width · H head width · F feed-forward width · V vocabulary
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from model.config import ModelConfig, RopeConfig
from model.params import param
from model.weights import read
from parallel import axes as ax
from parallel.remat import named

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': jax.nn.gelu,
  'gelu_exact': lambda x: jax.nn.gelu(x, approximate=False),
  'relu': jax.nn.relu,
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),
}
CLAMP = 7.0  # of gpt-oss's activation


def activate(
  gate: Float[Array, '*B F'] | None, up: Float[Array, '*B F'], name: str
) -> Float[Array, '*B F']:
  """act(gate) * up; act(up) where there is no gate.

  For 'clamped_silu' see ModelConfig.activation.
  """
  if name == 'clamped_silu':
    gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
  return ACTIVATIONS[name](up) if gate is None else ACTIVATIONS[name](gate) * up


class Norm(nnx.Module):
  """RMSNorm or LayerNorm over the last axis, in f32.

  Zhang & Sennrich, arXiv:1910.07467; Ba et al., arXiv:1607.06450.
  """

  def __init__(self, config: ModelConfig, size: int, rngs: nnx.Rngs, kind: str = ''):
    self.kind = kind or config.norm
    self.epsilon = config.norm_epsilon
    self.offset = float(config.norm_offset)
    self.scale = param(
      rngs,
      (size,),
      ('norm',),
      'zeros' if config.norm_offset else 'ones',
      kind='vector',
      dtype=config.execution.parameter_dtype,
    )
    biased = self.kind == 'layer' and config.biases == 'all'
    self.bias = (
      param(
        rngs, (size,), ('norm',), 'zeros', kind='vector', dtype=config.execution.parameter_dtype
      )
      if biased
      else None
    )

  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    y = x.astype(jnp.float32)
    if self.kind == 'layer':
      y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
    y = y * jnp.expand_dims(self.scale[...].astype(jnp.float32) + self.offset, range(x.ndim - 1))
    if self.bias is not None:
      y = y + jnp.expand_dims(self.bias[...].astype(jnp.float32), range(x.ndim - 1))
    return y.astype(x.dtype)


class Angles(NamedTuple):
  """Of rotary positions: cosines and sines, f32 [B, T, H/2]."""

  cosines: Array
  sines: Array


def rope_angles(
  positions: Int[Array, 'B T'], width: int, rope: RopeConfig, local: bool = False
) -> Angles:
  """Position / base^(2i/H) for pair i, stretched as `rope` says.

  RoFormer, arXiv:2104.09864, eq. 15. local: of a layer with a window.
  """
  local = local and rope.local_base > 0
  frequencies = jnp.asarray(
    rope_frequencies(
      width, rope.local_base if local else rope.base, 'none' if local else rope.scaling, rope
    )
  )
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
  scale = 1.0
  if rope.scaling == 'yarn' and not local:
    scale = rope.attention_factor or 0.1 * math.log(rope.factor) + 1.0
  return Angles(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def rope_frequencies(width: int, base: float, scaling: str, rope: RopeConfig) -> np.ndarray:
  """Radians per position of each pair, f32 [H/2]: see RopeConfig.scaling."""
  pair = np.arange(0, width, 2, dtype=np.float32) / width
  frequencies = (1.0 / np.float32(base) ** pair).astype(np.float32)
  if scaling == 'none':
    return frequencies
  slow = frequencies / np.float32(rope.factor)
  if scaling == 'linear':
    return slow
  # A pair that turns often within the original length tells neighbours apart, and keeps its
  # frequency; one that hardly gets round once tells where in the text a token is, and is slowed
  # down so that a longer text covers the angles of the original. Between is a ramp, `keep` from 1
  # to 0.
  if scaling == 'llama3':
    # The ramp is linear in the turns over the original length.
    turns = rope.original_length * frequencies / np.float32(2 * math.pi)
    keep = (turns - rope.low) / (rope.high - rope.low)
  else:
    # YaRN's is linear in the pair's index: the one whose wavelength, 2 pi base^(2i/H), makes so
    # many turns of the original length.
    def index(turns):
      return width * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = index(rope.high), index(rope.low)
    if rope.truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    keep = 1 - (np.arange(width // 2) - first) / max(last - first, 1e-3)
  keep = np.clip(keep, 0, 1).astype(np.float32)
  return frequencies * keep + slow * (1 - keep)


def rotate(x: Float[Array, 'B T N H'], angles: Angles) -> Float[Array, 'B T N H']:
  """Turns the pairs (i, i + H/2) of every head by the token's angles, in f32."""
  a, b = jnp.split(x.astype(jnp.float32), 2, -1)
  cosines, sines = (part[:, :, None, :] for part in angles)
  return jnp.concatenate([a * cosines - b * sines, b * cosines + a * sines], -1).astype(x.dtype)


class FeedForward(nnx.Module):
  """act(x gate) * (x up) down, or act(x up) down when not gated.

  `width` takes the place of the config's F.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, width: int = 0):
    D, F, dtype = config.D, width or config.F, config.execution.parameter_dtype
    self.dtype, self.activation = config.execution.dtype, config.activation
    self.stream_dtype = config.stream_dtype
    self.gate = (
      param(rngs, (D, F), ('embed', 'feed_forward'), D**-0.5, dtype=dtype) if config.gated else None
    )
    self.up = param(rngs, (D, F), ('embed', 'feed_forward'), D**-0.5, dtype=dtype)
    self.down = param(
      rngs, (F, D), ('feed_forward', 'embed'), (F * 2 * config.L) ** -0.5, dtype=dtype
    )
    biased = config.biases == 'all'
    self.up_bias = (
      param(rngs, (F,), ('feed_forward',), 'zeros', kind='vector', dtype=dtype) if biased else None
    )
    self.gate_bias = (
      param(rngs, (F,), ('feed_forward',), 'zeros', kind='vector', dtype=dtype)
      if biased and config.gated
      else None
    )
    self.down_bias = (
      param(rngs, (D,), ('norm',), 'zeros', kind='vector', dtype=dtype) if biased else None
    )

  def __call__(
    self, x: Float[Array, 'B T D'], dropped: Callable = lambda x, site: x
  ) -> Float[Array, 'B T D']:
    """dropped: what of the hidden numbers is let through (model.attention.View.dropped)."""
    up = named(project('BTD,DF->BTF', x, self.up, self.up_bias, self.dtype), 'up')
    gate = (
      None
      if self.gate is None
      else named(project('BTD,DF->BTF', x, self.gate, self.gate_bias, self.dtype), 'gate')
    )
    # Where the stream is wider than the compute dtype, already the products of gate and up may pass
    # what that holds, and the sums over F do.
    dtype = self.stream_dtype
    up, gate = (h if h is None else h.astype(dtype) for h in (up, gate))
    h = dropped(activate(gate, up, self.activation), 'hidden')
    # Row-parallel.
    y = read(self.down).product('BTF,FD->BTD', h, dtype, ax.residual(x.shape[1]))
    return add_bias(y, self.down_bias, dtype)


def project(formula: str, x: Array, weight: nnx.Param, bias: nnx.Param | None, dtype: str) -> Array:
  """A column-parallel product: the result's sharding follows from the operands'."""
  return add_bias(read(weight).product(formula, x, dtype), bias, dtype)


def add_bias(x: Array, bias: nnx.Param | None, dtype: str) -> Array:
  """`x` plus a bias over its last axes; `x` itself where there is none."""
  if bias is None:
    return x
  b = bias[...].astype(dtype)
  return x + jnp.expand_dims(b, range(x.ndim - b.ndim))


class Embedding(nnx.Module):
  """Tokens, and where the config has them learned positions and token types, as vectors."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, dtype = config.D, config.execution.parameter_dtype
    self.dtype, self.stream_dtype = config.execution.dtype, config.stream_dtype
    self.scale = config.D**0.5 if config.embedding_scale else 1.0

    def table(rows, axis):
      return (
        param(rngs, (rows, D), (axis, 'embed'), config.init_scale, kind='embedding', dtype=dtype)
        if rows
        else None
      )

    self.tokens = table(config.table_rows, 'vocab')
    self.positions = table(config.max_length if config.position == 'learned' else 0, 'position')
    self.types = table(config.token_types, 'position')
    self.norm = Norm(config, D, rngs) if config.norm_placement == 'post' else None
    # Of the virtual ids, the last ones, for which layers have keys and values (model.soft).
    self.prefix_tokens = 0

  def prefix(self, tokens: Int[Array, 'B T']) -> Int[Array, 'B T'] | None:
    """Which of these keys and values stand in each token's place: see model.attention.View."""
    count = self.prefix_tokens
    return tokens - (read(self.tokens).virtual.stop - count) if count else None

  def __call__(
    self, tokens: Int[Array, 'B T'], positions: Int[Array, 'B T'], types: Int[Array, 'B T'] | None
  ) -> Float[Array, 'B T D']:
    x = lookup(self.tokens, tokens, self.dtype)
    if self.scale != 1.0:
      # The factor is rounded, too, in the models that do it.
      x = x * jnp.asarray(self.scale, x.dtype)
    if self.positions is not None:
      x = x + lookup(self.positions, positions, self.dtype)
    if self.types is not None:
      x = x + lookup(self.types, jnp.zeros_like(tokens) if types is None else types, self.dtype)
    return (x if self.norm is None else self.norm(x)).astype(self.stream_dtype)


def lookup(table: nnx.Param, ids: Int[Array, 'B T'], dtype: str) -> Float[Array, 'B T D']:
  """Rows of a table [V, D] in `dtype`, laid out as the residual stream is.

  The table stays where it is: ids go to its shards, rows come back. Rows of a batch are far fewer
  bytes than a table of a large vocabulary, and their gradient is added up on the shards.
  """
  stored = read(table)
  rows, embed = (ax.mesh_axes(axis) if axis else () for axis in (stored.axes[0], 'embed'))
  out = ax.residual(ids.shape[1])
  # Tokens are dealt out over these.
  shared = tuple(axis for axis in rows if out[1] == 'sequence' and axis in ax.mesh_axes('sequence'))
  whole = tuple(axis for axis in rows if axis not in shared)

  def local(table, ids):  # table: a Weight of this device's rows
    everyone = jax.lax.all_gather(ids, embed) if embed else ids[None]  # [devices of embed, B, T]
    if rows:
      # Each device answers for its own rows, with zeros for others': the sum is the row.
      x = table.rows_here(everyone, jax.lax.axis_index(rows)).astype(dtype)
      x = jax.lax.psum(x, whole) if whole else x
      x = jax.lax.psum_scatter(x, shared, scatter_dimension=2, tiled=True) if shared else x
    else:
      x = table.rows(everyone).astype(dtype)
    # This device has its columns of everyone's tokens, and needs all columns of its own.
    return (
      jax.lax.all_to_all(x, embed, split_axis=0, concat_axis=3, tiled=True)[0] if embed else x[0]
    )

  outputs = out if shared else ('batch', 'length', 'width')
  x = ax.local(local, (stored.layout(), ('batch', 'length')), outputs)(stored, ids)
  return ax.place(x, *out)


class Head(nnx.Module):
  """What stands between the final hidden states and the output embedding; its own table.

  Nothing, or BERT's projection and norm.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, V, dtype = config.D, config.table_rows, config.execution.parameter_dtype
    self.dtype, self.activation = config.execution.dtype, config.activation
    mlm = config.head == 'mlm'
    self.tokens = (
      None
      if config.tie_embeddings
      else param(rngs, (V, D), ('vocab', 'embed'), D**-0.5, kind='embedding', dtype=dtype)
    )
    self.dense = param(rngs, (D, D), ('embed', None), D**-0.5, dtype=dtype) if mlm else None
    self.dense_bias = (
      param(rngs, (D,), ('norm',), 'zeros', kind='vector', dtype=dtype) if mlm else None
    )
    self.norm = Norm(config, D, rngs) if mlm else None
    self.bias = param(rngs, (V,), ('vocab',), 'zeros', kind='vector', dtype=dtype) if mlm else None

  def __call__(self, x: Float[Array, '*B T D']) -> Float[Array, '*B T D']:
    """What the output embedding is multiplied with."""
    if self.dense is None:
      return x
    return self.norm(
      activate(
        None, project('...D,DE->...E', x, self.dense, self.dense_bias, self.dtype), self.activation
      )
    )


class Pooler(nnx.Module):
  """A projection and tanh of a row's first token: what BERT classifies."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, dtype = config.D, config.execution.parameter_dtype
    self.dtype = config.execution.dtype
    self.dense = param(rngs, (D, D), ('embed', None), D**-0.5, dtype=dtype)
    self.bias = param(rngs, (D,), ('norm',), 'zeros', kind='vector', dtype=dtype)

  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B D']:
    return jnp.tanh(project('BD,DE->BE', x[:, 0], self.dense, self.bias, self.dtype))
