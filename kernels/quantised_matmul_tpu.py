"""How does a TPU multiply codes that it reads from main memory as they are? A Pallas kernel that
makes numbers of them in registers.

Numbers of 16 bits are what the matrix unit takes, and to make them must take less time than to read
the codes. Of four codes of 4 bits that are a word's each quarter two are moved, masked and put into
the fraction of a 1, all at once: 1 + (code + 8) / 16 is a bfloat16. What that adds is, like a zero
point, the same for all of a group: so many times the sum of a row's inputs there. Scales are
applied to a group's sums, which are few, and not to its numbers, which are many. Pairs of inputs
come out in another order than they lie in: the rows are put in that order instead.

I blocks of rows · b rows of a block · K inputs · F outputs · G groups of inputs
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS = 256  # of a block at most, for which there is room in VMEM beside what is read
LANES, WORD_ROWS = 128, 32  # of a register of bytes
CODES = 1 << 20  # bytes of a step's
# Of a word's four bytes the codes of 4 bits, two at a time, to the upper fraction of a bfloat16.
SHIFTS = (-3, 5, 1, 9)
FRACTION, ONE = 0x00780078, 0x3FC03FC0  # the sign's bit is turned, so that codes begin with 0
STEPS, OFFSET = 16, 24  # code = STEPS * number - OFFSET


def refusal(w, rows: int, dtype) -> str:
  """Why the kernel does not multiply so many rows of `dtype` with these matrices; '' where it does.

  Of more rows than a block's the products take longer than reading numbers does: there is nothing
  to gain, and every block would make them anew.
  """
  _, K, F = w.shape
  if rows > ROWS:
    return f'more rows than {ROWS}'
  if jnp.dtype(dtype) in (jnp.float32, jnp.float16):
    return f'rows in {jnp.dtype(dtype)}'
  if F % LANES or K % LANES:
    return f'{K} inputs and {F} outputs, not multiples of {LANES}'
  if w.pack and (w.group % (2 * WORD_ROWS) or w.pack % 8):
    return f'groups of {w.group}, not a multiple of {2 * WORD_ROWS}'
  if w.group % WORD_ROWS:
    return f'groups of {w.group}, not a multiple of {WORD_ROWS}'
  return ''


def _kernel(which, used, x, codes, scale, zero, out, sums, *, group: int, packed: bool):
  """One step: some groups of inputs and some outputs of a matrix, and all rows of a block."""
  block, step = pl.program_id(0), pl.program_id(2)

  @pl.when(step == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)

  @pl.when(used[block] != 0)
  def _():
    for n in range(scale.shape[1]):
      rows = x[0, :, n * group : (n + 1) * group]
      product = _product(rows, _numbers(codes, n, group, packed, rows.dtype))
      offset = 0.0 if zero is None else zero[0, n][None]
      if packed:
        product, offset = STEPS * product, offset + OFFSET
      if packed or zero is not None:
        product = product - offset * rows.astype(jnp.float32).sum(1, keepdims=True)
      sums[...] += product * scale[0, n][None]

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    out[0] = sums[...].astype(out.dtype)


def _product(x, y):
  """f32; Mosaic knows no other precision of 16 bits."""
  return jax.lax.dot_general(
    x,
    y,
    (((1,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.DEFAULT if x.dtype.itemsize == 2 else jax.lax.Precision.HIGHEST,
  )


def _numbers(codes, n: int, group: int, packed: bool, dtype):
  """Of the inputs of group n, [group, F]: whole numbers; of 4 bits (code + OFFSET) / STEPS, in the
  order of `_in_order`.
  """
  if not packed:
    return codes[0, n * group : (n + 1) * group].astype(jnp.float32).astype(dtype)
  words = pltpu.bitcast(codes[0, n * group // 2 : (n + 1) * group // 2], jnp.int32)
  parts = []
  for shift in SHIFTS:
    moved = words << -shift if shift < 0 else words >> shift
    parts.append(pltpu.bitcast((moved & FRACTION) ^ ONE, jnp.bfloat16))
  return jnp.concatenate(parts, 0).astype(dtype)


def _in_order(x, pack: int, group: int):
  """Rows with their inputs in the order in which a group's numbers come out of words: those in low
  bits before those in high ones, of each every other one first.
  """
  parts = x.reshape(*x.shape[:-1], -1, group // pack, 2, pack // 4, 2)
  n = x.ndim - 1
  order = (*range(n + 1), n + 2, n + 4, n + 1, n + 3)
  return parts.transpose(order).reshape(x.shape)


def product(x, w, which, used=None, *, interpret=False):
  """Blocks of rows [I, b, K], each times matrix `which` [I] of w (a CodedOperand):
  [I, b, F] in x's type, summed in f32.

  used: [I] whether a block has rows; of others the result means nothing, and nothing is read.
  """
  (blocks, b, K), F = x.shape, w.shape[2]
  used = jnp.ones((blocks,), jnp.int32) if used is None else used.astype(jnp.int32)
  if w.pack:
    x = _in_order(x, w.pack, w.group)
  padded = -(-b // 16) * 16
  x = jnp.pad(x, ((0, 0), (0, padded - b), (0, 0)))
  inputs, outputs = _sizes(w)
  stored = inputs // 2 if w.pack else inputs

  # Past the blocks that have rows a step names what is there already: nothing is copied.
  def matrix(i, f, k, which, used):
    return which[i], jnp.where(used[i] != 0, k, 0), jnp.where(used[i] != 0, f, 0)

  def rows(i, f, k, which, used):
    return i, 0, jnp.where(used[i] != 0, k, 0)

  of_group = pl.BlockSpec((1, inputs // w.group, outputs), matrix)
  given = [w.codes, w.scale, w.zero]
  specs = [pl.BlockSpec((1, stored, outputs), matrix), of_group, of_group]
  there = [a is not None for a in given]
  body = functools.partial(_kernel, group=w.group, packed=bool(w.pack))

  def kernel(which, used, x, *refs):
    refs = list(refs)
    body(which, used, x, *(refs.pop(0) if here else None for here in there), *refs)

  cost = pl.CostEstimate(
    flops=2 * blocks * padded * K * F,
    transcendentals=0,
    bytes_accessed=blocks * (w.codes[0].size + 4 * w.scale[0].size + 2 * padded * (K + F)),
  )
  y = pl.pallas_call(
    kernel,
    name='quantised_matmul',
    interpret=interpret,
    cost_estimate=cost,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(blocks, F // outputs, K // inputs),
      in_specs=[
        pl.BlockSpec((1, padded, inputs), rows),
        *(spec for spec, here in zip(specs, there) if here),
      ],
      out_specs=pl.BlockSpec((1, padded, outputs), lambda i, f, k, *_: (i, 0, f)),
      scratch_shapes=[pltpu.VMEM((padded, outputs), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct((blocks, padded, F), x.dtype),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
  )(which.astype(jnp.int32), used, x, *(a for a in given if a is not None))
  return y[:, :b]


def _sizes(w) -> tuple[int, int]:
  """Inputs and outputs of a step: whole groups, eight or all of them as scales want it, about CODES
  bytes; as many outputs as that leaves room for.
  """
  _, K, F = w.shape
  unit = math.lcm(8 * w.group, LANES)
  inputs = [*(n for n in range(unit, K, unit) if K % n == 0), K]
  for outputs in (n for n in (1024, 512, 256, LANES) if F % n == 0):
    most = CODES * (2 if w.pack else 1) // outputs
    fitting = [n for n in inputs if n <= most]
    if fitting:
      return fitting[-1], outputs
  return inputs[0], LANES
