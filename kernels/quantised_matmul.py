"""How do codes multiply without becoming a matrix in main memory? A request, and what computes it.

A step of decoding waits for weights: codes are a half or a quarter of their bytes only if numbers
are made of them behind main memory.

`reference`: the oracle, a matrix of numbers.
`in_registers`: for one row on a CPU, where XLA makes one loop of unpacking and multiplying, over
outputs side by side, if it is written as sums over few inputs each.
`in_digits`: for a few rows there, in two digits of a byte each: codes become bytes once for all of
them, which is a fourth of their numbers, and a library multiplies bytes by bytes.
`pallas_tpu`: a kernel for TPUs (quantised_matmul_tpu).

M rows · E matrices · K inputs · F outputs · G groups of inputs
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import names
from parallel import mesh

FEW = 8  # rows, above which a CPU makes numbers of bytes and codes for all of them at once
BYTE, DIGIT = 127, 128  # the largest of a digit, and what a high one counts
# Inputs of a loop's sum, of bytes and of 4 bits: LLVM writes it out, and then takes outputs side by
# side; of more it does not.
SUMMED = {False: 16, True: 8}
ADDED = 8  # groups of a loop's sum, for the same reason
# A code of 4 bits as the upper fraction of an f32 that begins with 1: 1 + (code + 8) / 16.
FRACTION, ONE, SHIFTS = 0x00780000, 0x3FC00000, (19, 15)
STEPS, OFFSET = 16, 24  # code = STEPS * number - OFFSET


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedOperand:
  """Matrices in codes, as they multiply: whole numbers, 0 moved, times a scale for each group.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs and
  placeholders.

  Attributes:
    codes: int8 [E, K, F]; of 4 bits uint8 [E, K/2, F], see `pack`.
    scale: f32 [E, G, F]. zero: f32, the same, the code that stands for 0; None: 0.
    pack: of so many inputs the codes, of 4 bits with a sign, lie in half as many bytes: the first
      half in the low bits. 0: a code is a byte.
  """

  codes: Any
  scale: Any
  zero: Any = None
  pack: int = dataclasses.field(default=0, metadata={'static': True})

  @property
  def shape(self) -> tuple[int, int, int]:
    E, K, F = self.codes.shape
    return E, 2 * K if self.pack else K, F

  @property
  def group(self) -> int:
    """Inputs that share a scale."""
    return self.shape[1] // self.scale.shape[1]

  def numbers(self, dtype) -> Array:
    """[E, K, F]."""
    E, K, F = self.shape
    codes = self.codes
    if self.pack:
      codes = codes.reshape(E, -1, self.pack // 2, F)
      halves = (codes << 4).view(jnp.int8) >> 4, codes.view(jnp.int8) >> 4
      codes = jnp.concatenate(halves, 2)
    codes = codes.reshape(E, -1, self.group, F).astype(jnp.float32)
    if self.zero is not None:
      codes = codes - self.zero[:, :, None]
    return (codes * self.scale[:, :, None]).reshape(E, K, F).astype(dtype)


def product(x: Float[Array, 'M K'], w: CodedOperand) -> Float[Array, 'M F']:
  """Rows times one matrix, f32, by what `choose` says; differentiable in x."""
  return _product(x, w, choose(x, w))


def choose(x, w: CodedOperand) -> str:
  """What multiplies these rows on the platform that is compiled for, said once; 'numbers' where
  that is none of ours.
  """
  platform, rows = mesh.platform(), x.shape[0]
  if platform == 'tpu':
    refusal = names.imported('kernels.quantised_matmul_tpu.refusal')(w, rows, x.dtype)
    return _said('numbers' if refusal else 'pallas_tpu', platform, refusal)
  if platform != 'cpu':
    return _said('numbers', platform, 'there is no kernel')
  if rows == 1 and w.group % 2 == 0:
    return 'in_registers'
  return 'in_digits' if rows <= FEW else 'numbers'


@functools.cache
def _said(chosen: str, platform: str, why: str) -> str:
  """What codes multiply by, printed once."""
  if jax.process_index() == 0:
    reason = f', with numbers made of them before: {why}' if why else ''
    print(f'codes are multiplied by {chosen!r} on a {platform}{reason}', file=sys.stderr)
  return chosen


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, w, backend):
  if backend in ON_CPU:
    return ON_CPU[backend](x, w)
  if backend == 'reference':
    return reference(x[None], w)[0]
  run = names.imported('kernels.quantised_matmul_tpu.product')
  return run(x[None], w, jnp.zeros((1,), jnp.int32))[0]


def _backward(backend, residuals, cotangent):
  x, w = residuals
  # In the rows' type, as the product of a matrix that is no codes is differentiated.
  numbers = w.numbers(x.dtype)[0]
  gradient = jnp.einsum('MF,KF->MK', cotangent.astype(x.dtype), numbers)
  return gradient, jax.tree.map(_no_gradient, w)


def _no_gradient(x):
  # Of whole numbers there is none, of scales it is not asked.
  return np.zeros(x.shape, jax.dtypes.float0) if x.dtype.kind in 'iu' else jnp.zeros_like(x)


_product.defvjp(lambda x, w, backend: (_product(x, w, backend), (x, w)), _backward)


def reference(x: Float[Array, 'E M K'], w: CodedOperand) -> Float[Array, 'E M F']:
  """Rows times their matrix, f32."""
  return jnp.einsum('EMK,EKF->EMF', x, w.numbers(x.dtype), preferred_element_type=jnp.float32)


def in_registers(x: Float[Array, 'M K'], w: CodedOperand) -> Float[Array, 'M F']:
  """Few rows times one matrix, f32."""
  # A quotient XLA does not compute again for everyone who reads it, as it would what x comes from,
  # in the innermost loop; nor does it know that this one is x.
  x = x.astype(jnp.float32)
  x = x / jnp.where(x == jnp.inf, 2.0, 1.0)
  return jnp.concatenate([_row(row, w) for row in x])


def in_digits(x: Float[Array, 'M K'], w: CodedOperand) -> Float[Array, 'M F']:
  """A few rows times one matrix, f32; of a row's largest number 15 bits count."""
  M, F, G = x.shape[0], w.shape[2], w.scale.shape[1]
  high_low, unit = digits(x)
  stored = _after(w.codes[0], x)
  if w.pack:
    halves = stored.reshape(-1, w.pack // 2, F)
    halves = (halves << 4).view(jnp.int8) >> 4, halves.view(jnp.int8) >> 4
    stored = jnp.concatenate(halves, 1)
  codes = stored.reshape(G, -1, F)
  rows = high_low.reshape(2 * M, G, -1)
  sums = jnp.einsum('DGK,GKF->GDF', rows, codes, preferred_element_type=jnp.int32)
  # In two steps, and of two kinds of sums, for what `_row` says of them.
  added = max(n for n in range(1, ADDED + 1) if G % n == 0)
  sums = sums.astype(jnp.float32).reshape(-1, added, 2, M, F)
  sums = sums * w.scale[0].reshape(-1, added, 1, 1, F)
  high, low = jax.lax.reduce((sums[:, :, 0], sums[:, :, 1]), (jnp.float32(0),) * 2, _add, (1,))
  y = sum(DIGIT * high + low) * unit
  return y if w.zero is None else y - _of_offsets(x, w.zero[0] * w.scale[0])


def digits(x: Float[Array, 'M K']):
  """Rows in two digits of a byte: int8 [2 M, K], high ones first; what a low one counts [M, 1]."""
  tiny = jnp.finfo(jnp.float32).tiny
  unit = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), tiny) / (BYTE * DIGIT)
  x = jnp.round(x / unit)
  high = jnp.round(x / DIGIT)
  return jnp.concatenate([high, x - DIGIT * high]).astype(jnp.int8), unit


def _after(codes, x):
  """Codes alone XLA would make numbers of before the loop over tokens, once for all of them, and
  keep those in memory: hence a bit of the rows', which is 0.
  """
  return codes ^ never(x).astype(codes.dtype)


def never(x) -> Array:
  """False, bool [], though XLA does not know it before x is there; whatever x holds."""
  first = x.ravel()[0]
  return (first != first) & (first == jnp.inf)


def _add(a, b):
  return a[0] + b[0], a[1] + b[1]


def _of_offsets(x, offset: Float[Array, 'G F']):
  """What inputs of each group together add, times so much."""
  groups = x.astype(jnp.float32).reshape(len(x), len(offset), -1).sum(2)
  return jnp.einsum('MG,GF->MF', groups, offset)


def _row(x: Float[Array, 'K'], w: CodedOperand) -> Float[Array, '1 F']:
  F, G = w.shape[2], w.scale.shape[1]
  # Each sum is of two kinds of products: of low and high bits, or of a first and a second half.
  # XLA's CPU hands sums of one kind to a library, with their products written out before.
  half = (w.pack or w.group) // 2
  summed = max(n for n in range(1, min(half, SUMMED[bool(w.pack)]) + 1) if half % n == 0)
  rows = x.reshape(-1, 2, half // summed, summed, 1)
  stored = _after(w.codes[0], x)
  if w.pack:
    codes = stored.reshape(-1, half // summed, summed, F).astype(jnp.uint32)
    halves = tuple(
      jax.lax.bitcast_convert_type(((codes << shift) & FRACTION) ^ ONE, jnp.float32)
      for shift in SHIFTS
    )
  else:
    codes = stored.reshape(-1, 2, half // summed, summed, F).astype(jnp.float32)
    halves = codes[:, 0], codes[:, 1]
  products = tuple(rows[:, n] * codes for n, codes in enumerate(halves))
  low, high = jax.lax.reduce(products, (jnp.float32(0),) * 2, _add, (2,))
  sums = (low + high).reshape(G, -1, F).sum(1)
  scale = w.scale[0]
  offset = 0.0 if w.zero is None else w.zero[0]
  if w.pack:
    sums, offset = STEPS * sums, offset + OFFSET
  y = (sums * scale).sum(0, keepdims=True)
  if w.pack or w.zero is not None:
    y = y - _of_offsets(x[None], offset * scale)
  return y


ON_CPU = {'in_registers': in_registers, 'in_digits': in_digits}
