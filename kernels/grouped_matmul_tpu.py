"""How does a TPU multiply rows by the matrix of their group, and only those that are there? Pallas
kernels: rows times matrices, that against them transposed, and the matrices' gradient.

Rows lie as they are sorted, in tiles that know nothing of groups. A visit is a tile and a group
that has rows in it; those of a group follow one another, so that its matrix is read once, and so do
those of a tile, so that groups that share one write their rows side by side. Of a tile a visit
computes only the chunks that the group has rows in. Tiles without rows are visited last, to be
zeros, and cost no product. Visits are tabled before the kernel; their greatest number is static.

M rows · E groups · K inputs · N outputs of a product · V visits
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import tuning
from parallel import mesh, target

LANES, SUBLANES = 128, 16  # of a register of 16 bits
MATRIX = 256  # the widest matrix unit
TWO_CORES = 'TPU v4', 'TPU v5'  # that share a kernel: the first dimension of a grid splits evenly
LEAST_VMEM = 16 << 20
# Rows of a tile and outputs of a matrix, whose product hides how both are fetched; rows of a chunk,
# which hide how the matrix unit is loaded. The same of the matrices' gradient.
ROWS, OUTPUTS, CHUNK = 512, 1024, 256
# Multiply-adds of a loop's body, which is written out: 8,192 bundles or less. The compiler's time
# grows faster than they do, and a core's instruction memory has an end.
BODY = 1 << 29
OUTER, OUTER_CHUNK = 1024, 512


class GroupVisits(NamedTuple):
  """A table in scalar memory, [V] each.

  Attributes:
    group, tile: of a visit; of what comes behind the last group's, the group and the rows that are
      there already. target: the tile that is written, that of tiles without rows too.
    low, high: rows of the tile that are the group's; none: 0, 0.
    first, last: whether the target, or of the matrices' gradient the group, is seen for the first
      time, and the last.
  """

  group: jax.Array
  tile: jax.Array
  target: jax.Array
  low: jax.Array
  high: jax.Array
  first: jax.Array
  last: jax.Array


@dataclasses.dataclass(frozen=True)
class GroupedSteps:
  """What a grid step works on: rows of a tile and of a chunk, inputs and outputs of a product, and
  of these as many as a chunk meets at a time.
  """

  rows: int
  chunk: int
  inputs: int
  outputs: int
  columns: int
  vmem: int


def refusal(x, w, automatic: bool = False) -> str:
  """Why the kernel does not multiply these rows and matrices; '' where it does.

  automatic: in place of XLA's loop, which computes f32 in one pass of bfloat16.
  """
  K, N = w.shape[1:]
  if x.dtype == jnp.float32 and automatic or x.dtype not in (jnp.float32, jnp.bfloat16):
    return f'rows in {x.dtype}'
  if K % LANES or N % LANES:
    return f'matrices of {K} x {N}, not multiples of {LANES}'
  if steps_of(x, w) is None:
    return f'{K} inputs, of which {LANES} outputs do not fit vector memory'
  # Whether there will be a gradient is not known here, and where rows have one it is too late.
  if steps_of(x, w, transposed=True) is None:
    return (
      f'matrices of {K} x {N}, of whose {N} outputs the gradient of {LANES} inputs does not fit '
      'vector memory'
    )
  return ''


def grouped(x, w, sizes, filled):
  """Same contract as kernels.grouped_matmul; on another platform than a TPU it is interpreted.

  filled: rows that the declared cost counts.
  """
  return _grouped(_static(x, w, filled), x, w, sizes)


def chained(x, w, sizes, filled):
  """The same, and x, to be multiplied by other matrices: what it gets as their gradient is added in
  the kernel that computes this one's, where XLA would read and write all of both once more.
  """
  return _chained(_static(x, w, filled), x, w, sizes)


def _static(x, w, filled):
  why = refusal(x, w)
  if why:
    raise NotImplementedError(
      f"grouped_matmul backend 'pallas_tpu' does not take {why}; use 'blocked', or 'auto' "
      '(model.execution.experts)'
    )
  return min(filled, x.shape[0]), mesh.platform() != 'tpu'


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(static, x, w, sizes):
  return products(x, w, sizes, *static)


def _forward(static, x, w, sizes):
  return _grouped(static, x, w, sizes), (x, w, sizes)


def _backward(static, kept, dy, onto=None):
  x, w, sizes = kept
  dx = products(dy, w, sizes, *static, transposed=True, onto=onto)
  if jnp.issubdtype(w.dtype, jnp.integer):
    return dx, None, None
  return dx, outer_products(x, dy, w.dtype, sizes, *static), None


_grouped.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chained(static, x, w, sizes):
  return products(x, w, sizes, *static), x


_chained.defvjp(
  lambda static, x, w, sizes: (_chained(static, x, w, sizes), (x, w, sizes)),
  lambda static, kept, gradients: _backward(static, kept, *gradients),
)


def products(x, w, sizes, filled, interpret, transposed=False, onto=None):
  """Rows [M, K] times the matrix of their group: [M, N]. transposed: matrices are [E, N, K]. onto:
  [M, N], which they are added to.
  """
  steps = steps_of(x, w, transposed)
  (M, K), E, N = x.shape, w.shape[0], w.shape[1 if transposed else 2]
  x = _filled_up(x, steps.rows)
  visits = visits_of(sizes, len(x), steps.rows)
  block = (steps.outputs, K) if transposed else (K, steps.outputs)

  def matrix(n, v, visits):
    return (visits.group[v], n, 0) if transposed else (visits.group[v], 0, n)

  of_part = pl.BlockSpec((steps.rows, steps.outputs), lambda n, v, visits: (visits.target[v], n))
  added = [] if onto is None else [_filled_up(onto, steps.rows)]
  cost = _Cost(filled, E, steps.chunk, 2 * K * N)
  y = pl.pallas_call(
    functools.partial(_products_step, steps=steps, transposed=transposed, adds=bool(added)),
    name='grouped_rows' if transposed else 'grouped_forward',
    interpret=interpret,
    cost_estimate=cost.estimate(
      cost.groups * K * N * w.dtype.itemsize,
      x.dtype.itemsize * (filled * K * (N // steps.outputs) + (1 + len(added)) * len(x) * N),
    ),
    # Over what they are added to: of a block that is read before it is written.
    input_output_aliases={len(visits) + 2: 0} if added else {},
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(N // steps.outputs, len(visits.group)),
      in_specs=[
        pl.BlockSpec((steps.rows, K), lambda n, v, visits: (visits.tile[v], 0)),
        pl.BlockSpec((1, *block), matrix),
        *(of_part for _ in added),
      ],
      out_specs=of_part,
      scratch_shapes=[pltpu.VMEM(block, x.dtype)] if w.dtype != x.dtype else [],
    ),
    out_shape=jax.ShapeDtypeStruct((len(x), N), x.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=steps.vmem
    ),
  )(visits, x, w, *added)
  return y[:M]


def outer_products(x, dy, dtype, sizes, filled, interpret):
  """The gradient of the matrices: [E, K, N] of rows [M, K] and gradients [M, N], summed in f32."""
  steps = outer_steps_of(x, dy)
  K, N, E = x.shape[1], dy.shape[1], len(sizes)
  x, dy = (_filled_up(a, steps.rows) for a in (x, dy))
  visits = visits_of(sizes, len(x), steps.rows, every=True)
  block = (steps.inputs, steps.outputs)
  parts = K // steps.inputs, N // steps.outputs
  cost = _Cost(filled, E, steps.chunk, 2 * K * N)
  return pl.pallas_call(
    functools.partial(_outer_step, steps=steps),
    name='grouped_matrices',
    interpret=interpret,
    cost_estimate=cost.estimate(
      E * K * N * dtype.itemsize, filled * x.dtype.itemsize * (K * parts[1] + N * parts[0])
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(*parts, len(visits.group)),
      in_specs=[
        pl.BlockSpec((steps.rows, block[0]), lambda k, n, v, visits: (visits.tile[v], k)),
        pl.BlockSpec((steps.rows, block[1]), lambda k, n, v, visits: (visits.tile[v], n)),
      ],
      out_specs=pl.BlockSpec((1, *block), lambda k, n, v, visits: (visits.group[v], k, n)),
      scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct((E, K, N), dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=steps.vmem
    ),
  )(visits, x, dy)


def _products_step(visits, x, w, *rest, steps, transposed, adds):
  """A visit: the chunks of a tile that the group has rows in, times a part of its matrix. rest:
  what is added to, if anything is, the result, and numbers of a matrix of bytes.
  """
  onto, (y, *numbers) = (rest[0], rest[1:]) if adds else (None, rest)
  v = pl.program_id(1)
  low, high, first = visits.low[v], visits.high[v], visits.first[v] != 0
  before = visits.group[jnp.maximum(v - 1, 0)]

  # Of a matrix of bytes numbers are made once for all visits of its group.
  if numbers:

    @pl.when((v == 0) | (visits.group[v] != before))
    def _():
      numbers[0][...] = w[0].astype(jnp.float32).astype(x.dtype)

  # Rows that no group has are zeros, or as they were; those of groups to come are written over.
  @pl.when(first & (high - low < steps.rows))
  def _():
    y[...] = onto[...] if adds else jnp.zeros_like(y)

  parts = steps.outputs // steps.columns

  def chunk(n, carry):
    c, part = (n, 0) if parts == 1 else (jax.lax.div(n, parts), jax.lax.rem(n, parts))
    at = pl.ds(pl.multiple_of(c * steps.chunk, steps.chunk), steps.chunk)
    columns = pl.ds(pl.multiple_of(part * steps.columns, steps.columns), steps.columns)
    of_part = (columns, slice(None)) if transposed else (slice(None), columns)
    matrix = numbers[0][of_part] if numbers else w[(0, *of_part)]
    product = _product(x[at, :], matrix, 1, int(transposed))
    if adds:
      product += onto[at, columns].astype(jnp.float32)
    # A row is multiplied by itself: NaN of another one's stays there.
    mine = _between(c * steps.chunk, low, high, product.shape)
    y[at, columns] = jnp.where(mine, product.astype(y.dtype), y[at, columns])
    return carry

  behind = pl.cdiv(high, steps.chunk) * parts
  jax.lax.fori_loop(low // steps.chunk * parts, behind, chunk, None)


def _outer_step(visits, x, dy, out, sums, *, steps):
  """A visit: what its rows add to a part of the group's gradient."""
  v = pl.program_id(2)
  low, high = visits.low[v], visits.high[v]

  @pl.when(visits.first[v] != 0)
  def _():
    sums[...] = jnp.zeros_like(sums)

  def add(c, masked):
    at = pl.ds(pl.multiple_of(c * steps.chunk, steps.chunk), steps.chunk)
    operands = [ref[at, :] for ref in (x, dy)]
    if masked:  # both: what is NaN on one side would be NaN times 0
      operands = [_kept(a, c * steps.chunk, low, high) for a in operands]
    sums[...] += _product(*operands, 0, 0)

  whole = high - low == steps.rows

  @pl.when(whole)
  def _():
    for c in range(steps.rows // steps.chunk):
      add(c, masked=False)

  @pl.when(jnp.logical_not(whole))
  def _():
    jax.lax.fori_loop(
      low // steps.chunk, pl.cdiv(high, steps.chunk), lambda c, _: add(c, masked=True), None
    )

  @pl.when(visits.last[v] != 0)
  def _():
    out[0] = sums[...].astype(out.dtype)


def _product(a, b, of_a: int, of_b: int):
  """f32; of 16 bits Mosaic knows one precision. of_a, of_b: the dimensions that are summed over."""
  exact = jax.lax.Precision.HIGHEST if a.dtype.itemsize > 2 else jax.lax.Precision.DEFAULT
  contracted = (((of_a,), (of_b,)), ((), ()))
  return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32, precision=exact)


def _between(start, low, high, shape):
  row = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return (row >= low) & (row < high)


def _kept(a, start, low, high):
  # In f32, which all vector units select.
  wide = a.astype(jnp.float32)
  return jnp.where(_between(start, low, high, a.shape), wide, 0.0).astype(a.dtype)


def visits_of(sizes, M: int, rows: int, every: bool = False) -> GroupVisits:
  """The visits of M rows in tiles of `rows`. every: groups without rows have one, too."""
  E, tiles = len(sizes), pl.cdiv(M, rows)
  sizes = sizes.astype(jnp.int32)
  ends = jnp.cumsum(sizes)
  starts = ends - sizes
  # A group's tiles are those from its first row's to its last row's.
  begin = jnp.minimum(starts // rows, tiles - 1)
  spanned = jnp.where(sizes > 0, (ends - 1) // rows - begin + 1, int(every))
  behind = jnp.cumsum(spanned)

  # No sizes have more: each group but the first shares a tile at most with the one before.
  index = jnp.arange(tiles + E - 1, dtype=jnp.int32)
  total = behind[-1]
  at = jnp.clip(index, 0, jnp.maximum(total - 1, 0))
  group = jnp.minimum((at[:, None] >= behind[None]).sum(1, dtype=jnp.int32), E - 1)
  tile = begin[group] + at - (behind - spanned)[group]
  tile = jnp.clip(tile, 0, tiles - 1)
  used = (index < total) & (sizes[group] > 0)
  low, high = (
    jnp.where(used, jnp.clip(x[group] - tile * rows, 0, rows), 0) for x in (starts, ends)
  )

  # Behind the last group: tiles without rows, then the last tile again, which is left as it is.
  target = (
    tile
    if every
    else jnp.where(
      index < total, tile, jnp.minimum(-(-ends[-1] // rows) + index - total, tiles - 1)
    )
  )
  seen = group if every else target
  change = (seen[1:] != seen[:-1]).astype(jnp.int32)
  edge = jnp.ones((1,), jnp.int32)
  first, last = jnp.concatenate([edge, change]), jnp.concatenate([change, edge])
  return GroupVisits(group, tile, target, low, high, first, last)


class _Cost(NamedTuple):
  """What a call declares. operations: of a row."""

  filled: int
  E: int
  chunk: int
  operations: int

  @property
  def groups(self) -> int:
    """That have rows, at most."""
    return min(self.E, self.filled)

  def estimate(self, *moved: int) -> pl.CostEstimate:
    # A chunk that two groups share is computed for both.
    rows = self.filled + (self.groups - 1) * self.chunk
    return pl.CostEstimate(
      flops=rows * self.operations, bytes_accessed=sum(moved), transcendentals=0
    )


def steps_of(x, w, transposed: bool = False) -> GroupedSteps | None:
  """Of `products`: all inputs of as many outputs as fit; None where none do."""
  K, N = w.shape[:0:-1] if transposed else w.shape[1:]
  rows, vmem, halves = _here(len(x))
  width = x.dtype.itemsize
  # What is fetched and written is there twice: one in use, one on its way. A gradient of rows may
  # be added to another one.
  blocks = K * w.dtype.itemsize + (2 if transposed else 1) * rows * width
  of_output = 2 * blocks + (w.dtype != x.dtype) * K * width
  # A chunk's products are in f32 before they are rounded.
  of_output += 4 * min(CHUNK, rows)
  outputs = _part(N, min(OUTPUTS, (vmem - 2 * rows * K * width) // of_output), halves)
  if not outputs:
    return None
  chunk = min(CHUNK, rows)
  columns = _part(outputs, max(LANES, BODY // (chunk * K)))
  return GroupedSteps(rows, chunk, K, outputs, columns, vmem)


def outer_steps_of(x, dy) -> GroupedSteps:
  """Of `outer_products`."""
  rows, vmem, halves = _here(len(x))
  inputs, outputs = _part(x.shape[1], OUTER, halves), _part(dy.shape[1], OUTER)
  return GroupedSteps(rows, min(OUTER_CHUNK, rows), inputs, outputs, outputs, vmem)


def _here(M: int) -> tuple[int, int, bool]:
  """Rows of a tile, bytes of vector memory, and whether two cores share a kernel."""
  kind = target.kind()
  rows = min(ROWS, max(SUBLANES, 1 << (M - 1).bit_length()))
  return rows, tuning.VMEM.get(kind, LEAST_VMEM) * 7 // 8, kind in TWO_CORES


def _part(n: int, most: int, halves: bool = False) -> int:
  """The largest equal part of n that fills whole registers, whole matrix units first, an even
  number of them where `halves`; 0 where it would pass `most`.
  """
  parts = [p for p in range(LANES, min(n, most) + 1, LANES) if n % p == 0]
  even = [p for p in parts if n // p % 2 == 0] if halves else []
  parts = even or parts
  return max(parts, key=lambda p: (p % MATRIX == 0, p), default=0)


def _filled_up(x, rows: int):
  """At least a tile."""
  return jnp.pad(x, ((0, max(0, rows - len(x))), (0, 0)))
