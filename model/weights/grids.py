"""Which numbers can a code be? The grids of a few bits, what is nearest on them, and how two codes
share a byte.

int8, int4: whole numbers, by a scale, and by a zero point where both sides of 0 are not alike.
nf4: 16 quantiles of a normal law (QLoRA, arXiv:2305.14314, appendix E).
fp8: float8_e4m3fn, of 4 bits of exponent and 3 of mantissa, up to 448.
mxfp4: floats of 2 bits of exponent and one of mantissa, by a power of two (OCP's microscaling
formats, 1.0).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

# Quantiles of N(0, 1) that lie evenly in probability, 8 below 0, 0, and 7 above, over the largest.
NF4 = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)
FP8 = jnp.float8_e4m3fn
# Of a float of 4 bits: by exponent and mantissa, and the same below 0.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
TABLES = {'nf4': NF4, 'mxfp4': E2M1}  # code -> what it stands for


@dataclasses.dataclass(frozen=True)
class Grid:
  """Attributes:
  lowest, highest: of what a code stands for, before its scale.
  packed: whether two codes share a byte.
  """

  name: str
  lowest: float
  highest: float
  packed: bool = False

  def nearest(self, x: jax.Array) -> jax.Array:
    """Codes of numbers, f32, that are scaled and lie between lowest and highest, or beside them."""
    x = jnp.clip(x, self.lowest, self.highest)  # fp8's own cast makes NaN of what lies beside
    if self.name == 'fp8':
      return x.astype(FP8)
    if self.name == 'nf4':
      middles = jnp.float32((np.float32(NF4[1:]) + np.float32(NF4[:-1])) / 2)
      return sum((x > middle).astype(jnp.int8) for middle in middles)
    if self.name == 'mxfp4':
      sizes = np.float32(E2M1[:8])
      size = sum((jnp.abs(x) > middle).astype(jnp.int8) for middle in (sizes[1:] + sizes[:-1]) / 2)
      return size + 8 * (x < 0).astype(jnp.int8)
    return jnp.round(x).astype(jnp.int8)

  def stands_for(self, codes: jax.Array) -> jax.Array:
    """What codes are before their scale, f32."""
    if self.name in TABLES:
      # Not a gather, of which a CPU makes a loop: 16 choices that become one select each.
      table = TABLES[self.name]
      return sum(jnp.where(codes == i, jnp.float32(x), 0) for i, x in enumerate(table) if x)
    return codes.astype(jnp.float32)


GRIDS = {
  grid.name: grid
  for grid in (
    Grid('int8', -127.0, 127.0),
    Grid('int4', -8.0, 7.0, packed=True),
    Grid('nf4', -1.0, 1.0, packed=True),
    Grid('fp8', -448.0, 448.0),
    Grid('mxfp4', -6.0, 6.0, packed=True),
  )
}


def packed(codes: jax.Array, axis: int, block: int) -> jax.Array:
  """Codes of 4 bits, two in a byte: of every `block` along `axis`, counted from the last, the first
  half in the low bits and the second in the high ones.
  """
  at = codes.ndim + axis
  halves = _split(codes, at, 2, block // 2).astype(jnp.uint8) & 15
  low, high = (jax.lax.index_in_dim(halves, i, at + 1, keepdims=False) for i in (0, 1))
  return _merged(low | (high << 4), at, 2)


def unpacked(x: jax.Array, axis: int, block: int, signed: bool) -> jax.Array:
  """What `packed` was given, int8; signed: codes below 0 are among them."""
  at = x.ndim + axis
  x = _split(x, at, block // 2)
  if signed:  # an arithmetic shift brings the sign along
    low, high = ((half.view(jnp.int8) >> 4) for half in (x << 4, x))
  else:
    low, high = (half.astype(jnp.int8) for half in (x & 15, x >> 4))
  return _merged(jnp.stack([low, high], at + 1), at, 3)


def spread(x: jax.Array, blocks: tuple[int, ...]) -> jax.Array:
  """A number for each block of a matrix, as one for each entry. Dimensions that are one block stay
  as they are.
  """
  for axis, block in zip(range(-len(blocks), 0), blocks):
    if block > 1 and x.shape[axis] > 1:
      at = x.ndim + axis
      shape = (*x.shape[: at + 1], block, *x.shape[at + 1 :])
      x = _merged(jnp.broadcast_to(jnp.expand_dims(x, at + 1), shape), at, 2)
  return x


def _split(x: jax.Array, at: int, *sizes: int) -> jax.Array:
  """A dimension as several: (the rest, *sizes)."""
  return x.reshape(*x.shape[:at], x.shape[at] // math.prod(sizes), *sizes, *x.shape[at + 1 :])


def _merged(x: jax.Array, at: int, count: int) -> jax.Array:
  """So many dimensions as one."""
  size = math.prod(x.shape[at : at + count])
  return x.reshape(*x.shape[:at], size, *x.shape[at + count :])
