"""How does Adam keep its two moments in a byte each? Blockwise dynamic quantisation, as an optax
transformation.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861. A block is 256
neighbours along the last axis (the last block of a row may be shorter). It stores the largest
magnitude in f32 and, for each element, a byte that stands for a fraction of it on a scale that is
dense near zero, which holds most second moments that a linear scale would flush. Those below all of
its levels (of a gradient less than about 4e-4 of the block's largest) are rounded up to the lowest,
3.25e-7 of the largest, and never to 0: an update is divided by their root, and would be thousands
of times Adam's; so it is smaller than that.

A parameter whose last axis is W wide (W <= 256, or a multiple) has 2 + 8 / min(256, W) bytes of
state per element, 2.03 from 256 on, where f32 Adam has 8.

The paper's blocks run over the flattened tensor; along the last axis they follow a sharded tensor.
Codes have the parameter's own shape and sharding, and blocks are the same on every mesh, so a
checkpoint moves between meshes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8

from parallel import axes as ax
from training.adam import wide_zeros

BLOCK = 256
SMALLEST = (
  4096  # Elements; below it a tensor stays f32, as in bitsandbytes: there is little to save.
)
_DECADES = 7


class Quantized(NamedTuple):
  """A tensor of shape [..., W] as codes, [..., W], and the largest magnitudes of its blocks, [...,
  ceil(W / 256)].
  """

  codes: UInt8[Array, '... W']
  largest: Float[Array, '... K']


class Adam8bitState(NamedTuple):
  """As optax.ScaleByAdamState, but a moment may be Quantized."""

  count: Int[Array, '']
  mu: optax.Updates
  nu: optax.Updates


def rescaling(settings: dict[str, float], specs, whole: bool) -> optax.GradientTransformation:
  """Gradients to updates at learning rate 1, before decay; see training.optimizer.OWN."""
  del whole

  # As a function, because optax would call a tree that is itself a callable module.
  def matrices(_):
    return jax.tree.map(lambda spec: spec.kind == 'matrix', specs)

  return scale_by_adam8bit(settings['b1'], settings['b2'], settings['epsilon'], matrices)


def scale_by_adam8bit(b1: float, b2: float, epsilon: float, mask) -> optax.GradientTransformation:
  """optax.scale_by_adam whose moments are quantised between steps; the update is made from the f32
  moments.

  Args:
    mask: which parameters may be quantised: a tree of bools, a prefix of theirs, or a function from
      parameters to one. Leave embeddings out: their gradients are sparse and very uneven. What is
      masked out, or smaller than SMALLEST, is treated as training.adam's does.
  """

  def init(params):
    def moments(signed):
      def zeros(may, p):
        if may and p.size >= SMALLEST:
          return quantize(wide_zeros(p), signed)
        return jnp.zeros_like(p) if signed else wide_zeros(p)

      return jax.tree.map(
        lambda may, sub: jax.tree.map(lambda p: zeros(may, p), sub), allowed, params
      )

    allowed = mask(params) if callable(mask) else mask
    return Adam8bitState(jnp.zeros([], jnp.int32), moments(signed=True), moments(signed=False))

  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)

    def one(g, mu, nu):
      m = b1 * dequantize(mu, signed=True) + (1 - b1) * g
      v = b2 * dequantize(nu, signed=False) + (1 - b2) * jnp.square(g)
      m_hat, v_hat = m / (1 - b1**count), v / (1 - b2**count)
      update = m_hat / (jnp.sqrt(v_hat) + epsilon)
      return (
        (update, quantize(m, True), quantize(v, False))
        if isinstance(mu, Quantized)
        else (update, m, v)
      )

    leaves, tree = jax.tree.flatten(updates)
    results = map(one, leaves, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu))
    updates, mu, nu = (tree.unflatten(column) for column in zip(*results, strict=True))
    return updates, Adam8bitState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def dynamic_map(signed: bool) -> Float[np.ndarray, '256']:
  """The 256 values that codes stand for, in order: the reference for `encode` and `decode`.

  The paper's dynamic quantisation. Seven decades up to 1; each spans 0.1 to 1 times its power of
  ten and holds twice as many equally spaced levels as the decade below, from 1 (signed) or 2
  (unsigned) to 64 or 128; the levels are the centres of their intervals. Zero and one are added, so
  that the largest magnitude of a block is exact (if positive).
  """
  magnitudes = []
  for decade in range(_DECADES):
    levels = 2**decade if signed else 2 ** (decade + 1)
    magnitudes.append(
      10.0 ** (decade + 1 - _DECADES) * (0.1 + 0.9 * (np.arange(levels) + 0.5) / levels)
    )
  magnitudes = np.concatenate(magnitudes)
  return np.sort(np.concatenate([-magnitudes if signed else [], [0.0], magnitudes, [1.0]])).astype(
    np.float32
  )


def quantize(x: Float[Array, '... W'], signed: bool) -> Quantized:
  """The nearest codes and the scales they refer to; a NaN makes its block's scale NaN, so that it
  comes back as NaN.

  What is unsigned and above 0 has a code above 0: it is divided by.
  """
  largest = _largest_per_block(x)
  scale = _per_element(largest, x)
  codes = encode(x / jnp.where(scale > 0, scale, 1), signed)
  return Quantized(codes if signed else jnp.maximum(codes, (x > 0).astype(jnp.uint8)), largest)


def dequantize(q: Quantized | Float[Array, '...'], signed: bool) -> Float[Array, '... W']:
  """The values that codes stand for; an array that was left unquantised is returned as it is."""
  if not isinstance(q, Quantized):
    return q
  return decode(q.codes, signed) * _per_element(q.largest, q.codes)


def encode(x: Float[Array, '...'], signed: bool) -> UInt8[Array, '...']:
  """Index of the value of `dynamic_map` nearest to each x in [-1, 1] ([0, 1] when unsigned).

  Computed, not looked up: the map is a small floating-point format, and arithmetic is 20 times as
  fast as a binary search on a CPU, runs on vector units and keeps any sharding, where gathers from
  a table do not.
  """
  values = dynamic_map(signed)
  magnitudes = values[np.argmax(values == 0) :]
  first = (
    1 if signed else 2
  )  # Levels in the lowest decade; levels before a decade: as many as in it, less `first`.
  starts = [1 + first * (2**decade - 1) for decade in range(_DECADES)]
  middle = (magnitudes[1:] + magnitudes[:-1]) / 2
  u = jnp.abs(x)
  decade = sum((u > middle[start - 1]).astype(jnp.int32) for start in starts[1:])
  levels = first * jnp.left_shift(1, decade)
  position = (
    u * _by_decade(decade, [10.0 ** (_DECADES - 1 - d) for d in range(_DECADES)]) - 0.1
  ) / 0.9
  level = jnp.clip(jnp.floor(position * levels).astype(jnp.int32), 0, levels - 1)
  rank = jnp.where(u > middle[0], 1 + levels - first + level, 0)
  rank = jnp.where(u > middle[-1], len(magnitudes) - 1, rank)
  if not signed:
    return rank.astype(jnp.uint8)
  # Minus one has no code: the most negative value is that of the last level.
  return jnp.where(x < 0, 127 - jnp.minimum(rank, 127), 127 + rank).astype(jnp.uint8)


def decode(codes: UInt8[Array, '...'], signed: bool) -> Float[Array, '...']:
  """The values of `dynamic_map` at these indices, by arithmetic (see `encode`)."""
  first, top = (1, 128) if signed else (2, 255)
  index = codes.astype(jnp.int32)
  rank = jnp.abs(index - 127) if signed else index
  shifted = jnp.maximum(rank - 1 + first, first)
  decade = sum((shifted >= first * 2**d).astype(jnp.int32) for d in range(1, _DECADES))
  levels = first * jnp.left_shift(1, decade)
  fraction = 0.1 + 0.9 * (shifted - levels + 0.5) / levels
  value = fraction * _by_decade(decade, [10.0 ** (d + 1 - _DECADES) for d in range(_DECADES)])
  value = jnp.where(rank == 0, 0.0, jnp.where(rank == top, 1.0, value))
  return jnp.where(index < 127, -value, value) if signed else value


def _by_decade(decade: Int[Array, '...'], powers: list[float]) -> Float[Array, '...']:
  # A table of seven, exact, without a gather.
  value = jnp.full_like(decade, powers[0], dtype=jnp.float32)
  for d, power in enumerate(powers):
    value = jnp.where(decade == d, power, value)
  return value


def _run(x: jax.Array) -> int:
  """Length of the longest run along the last axis that lies within one block and on one device."""
  split = jax.typeof(x).sharding.spec[-1]
  return math.gcd(
    BLOCK,
    x.shape[-1] // math.prod(jax.typeof(x).sharding.mesh.shape[a] for a in ax.of_entry(split)),
  )


def _with_last_axis(x: jax.Array, entry) -> jax.Array:
  sharding = jax.typeof(x).sharding
  if sharding.spec[-1] == entry:
    return x
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(*sharding.spec[:-1], entry)))


def _largest_per_block(x: Float[Array, '... W']) -> Float[Array, '... K']:
  run = _run(x)
  largest = jnp.max(jnp.abs(x).reshape(*x.shape[:-1], -1, run), axis=-1)
  if run == BLOCK:
    return largest
  # Blocks straddle devices (or the width is no multiple of 256): all-gather the maxima of runs, 1 /
  # run of the tensor.
  largest = _with_last_axis(largest, None)
  largest = jnp.pad(largest, [(0, 0)] * (x.ndim - 1) + [(0, -largest.shape[-1] % (BLOCK // run))])
  return jnp.max(largest.reshape(*x.shape[:-1], -1, BLOCK // run), axis=-1)


def _per_element(largest: Float[Array, '... K'], like: jax.Array) -> Float[Array, '... W']:
  """The scale of each element's block, in the shape and sharding of `like`."""
  run, lead, width = _run(like), like.shape[:-1], like.shape[-1]
  if run != BLOCK:
    largest = jnp.broadcast_to(largest[..., None], (*largest.shape, BLOCK // run))
    largest = largest.reshape(*lead, -1)[..., : width // run]
    largest = _with_last_axis(largest, jax.typeof(like).sharding.spec[-1])
  return jnp.broadcast_to(largest[..., None], (*lead, width // run, run)).reshape(like.shape)
