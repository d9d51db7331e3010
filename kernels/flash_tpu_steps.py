"""How is a TPU's attention cut into steps? Sizes of blocks, by the table or as chosen, and the
blocks that a mask leaves, in order.

A step is a block of queries, those of all heads of a group stacked, against a block of keys. Steps
are a list that the grid reads, and not a rectangle of which some are skipped: a step that does
nothing still costs its turn and its copies.

B batch · T query length · S key length · N query heads · K key/value heads ·
G query heads of a step · R = G x block of queries
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels import tuning
from kernels.blocks import LARGEST, Blocks
from kernels.mask import FULL, SKIP, Mask
from kernels.scoring import Scoring
from parallel import mesh as meshes

LANES = 128  # of a register
# Flags of a step, in the low bits of the number that names its block of keys: what scalars a step
# needs is then two numbers.
FIRST, LAST, FIRST_OF_ROW, LAST_OF_ROW, MASKED = (1 << bit for bit in range(5))
FLAGS = 5
# Steps of a call: the two numbers of each lie in scalar memory, which has 1 MiB, beside a prefix of
# each row and what the compiler needs.
TABLE = 120 << 10


def _tuning(direction: str, width: int) -> tuning.Tuning:
  """Of the chip that is compiled for.

  One that is not in the table, and what is no TPU, takes v5e's; heads past 256 take those of 256.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = device.device_kind if device is not None and meshes.platform() == 'tpu' else ''
  if not kind and jax.default_backend() == 'tpu':
    kind = jax.devices()[0].device_kind
  return tuning.lookup(kind if kind in tuning.VMEM else 'TPU v5 lite', direction, min(width, 256))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of a grid, in order: all keys of a block of queries, all blocks of a row, all rows.

  Attributes:
    queries: [n] int32, row x blocks of a row + block of queries. keys: [n] int32, block of keys <<
      FLAGS | flags.
    count: how many of the n are steps; an int, or [] int32 where arrays decide.
  """

  queries: Any
  keys: Any
  count: Any


def steps_of(kinds, B: int) -> Steps:
  """The steps for kinds of blocks as Mask.blocks gives them.

  A block of queries that sees no keys still has one step, to write zeros.
  """
  # NumPy's where no array decides: the list is then as long as there are steps, and a constant of
  # the program.
  static = isinstance(kinds, np.ndarray)
  xp = np if static else jnp
  kinds = xp.broadcast_to(kinds, (B, *kinds.shape[1:]))
  _, nq, nk = kinds.shape
  blind = (kinds == SKIP).all(2, keepdims=True) & (xp.arange(nk) == 0)[None, None]
  active = ((kinds != SKIP) | blind).reshape(-1)

  # Stable: active ones come first, in the order of (row, queries, keys). Keys go fastest, so that
  # what belongs to a block of queries (the softmax's state, its gradient) stays in VMEM from its
  # first step to its last.
  order = xp.argsort(~active, kind='stable') if static else jnp.argsort(~active, stable=True)
  count = int(active.sum()) if static else active.sum(dtype=jnp.int32)
  if static:
    order = order[:count]
  queries, rows = order // nk, order // (nk * nq)
  here = xp.arange(order.size)

  def turns(x):
    """Where a run of equal numbers begins."""
    return xp.concatenate([xp.ones(1, bool), x[1:] != x[:-1]])

  def ends(first):
    # Before the next one begins, or at the last step: what lies behind it in a traced list is not
    # run.
    return xp.concatenate([first[1:], xp.ones(1, bool)]) | (here == count - 1)

  first, first_of_row = turns(queries), turns(rows)
  flags = (
    first * FIRST
    + ends(first) * LAST
    + first_of_row * FIRST_OF_ROW
    + ends(first_of_row) * LAST_OF_ROW
    + (kinds.reshape(-1)[order] != FULL) * MASKED
  )
  return Steps(queries.astype(np.int32), ((order % nk) << FLAGS | flags).astype(np.int32), count)


def fits(steps: Steps) -> bool:
  """Whether one call can read them all."""
  return steps.queries.size <= TABLE


@dataclasses.dataclass(frozen=True)
class StepShape:
  """What a kernel knows of its problem: sizes as padded, real lengths, and what the mask consists
  of.
  """

  B: int
  N: int
  K: int
  G: int
  T: int
  S: int
  bq: int
  bk: int
  queries: int  # that are real
  keys: int
  causal: bool
  window: int
  by_index: bool
  segments: bool
  prefix: bool
  softcap: float
  tuning: tuning.Tuning
  precision: Any
  chosen: bool  # is the step that of a config, and not the table's?

  @property
  def nq(self) -> int:
    return self.T // self.bq

  @property
  def positioned(self) -> bool:
    return self.causal or self.window > 0

  @property
  def R(self) -> int:
    return self.G * self.bq

  @property
  def chunk(self) -> int:
    return min(self.tuning.chunk, self.bq)


def step_of(q, v, direction: str, blocks: Blocks) -> tuning.Tuning:
  """Of the table, with the sizes that are chosen; what such a step takes is not known."""
  step, (rows, keys) = _tuning(direction, max(q.shape[3], v.shape[3])), blocks.of(direction)
  if not rows and not keys:
    return step
  return dataclasses.replace(
    step, rows=rows or step.rows, keys=keys or step.keys, whole=0, masked=0
  )


def _fill(length: int) -> int:
  return -(-length // LANES) * LANES


def _sizes(length: int) -> list[int]:
  """Of the blocks that a row, filled up, can be cut into."""
  return [n for n in (LANES << bit for bit in range(4)) if _fill(length) % n == 0]


def _cut(
  T: int, S: int, share: int, step: tuning.Tuning, direction: str, blocks: Blocks
) -> tuple[int, int, int]:
  """Heads of a step, of the `share` that have one key, and its queries of one and keys.

  Raises ValueError where chosen ones do not fit.
  """
  rows, keys = blocks.of(direction)
  groups = [g for g in range(1, share + 1) if share % g == 0]

  def largest(length, most):
    return max(n for n in _sizes(length) if n <= most or n == LANES)

  if rows:
    # The most heads last, so that they win: a block of keys that is loaded once serves all of them.
    able = {g * n: (g, n) for g in groups for n in _sizes(T) if g * n <= LARGEST}
    if rows not in able:
      raise ValueError(
        f'model.execution.attention_blocks.{direction}_queries={rows}, of {share} heads a key or '
        f'fewer, make no whole blocks of a row of {T} queries, filled up to {_fill(T)}; '
        f'choose one of {sorted(able)}, or 0'
      )
    G, bq = able[rows]
  else:
    G = max(g for g in groups if g == 1 or g * LANES <= step.rows)
    bq = largest(T, step.rows // G)
  if keys and keys not in _sizes(S):
    raise ValueError(
      f'model.execution.attention_blocks.{direction}_keys={keys} make no whole blocks of a row of '
      f'{S} keys, filled up to {_fill(S)}; choose one of {_sizes(S)}, or 0'
    )
  return G, bq, keys or largest(S, step.keys)


def shape_of(q, k, v, scoring: Scoring, direction: str, blocks: Blocks = Blocks()) -> StepShape:
  """Of the 'forward' or the 'backward' kernel for these arrays.

  Raises ValueError where chosen blocks do not fit.
  """
  mask, (B, T, N, _), (S, K) = scoring.mask, q.shape, k.shape[1:3]
  step = step_of(q, v, direction, blocks)
  G, bq, bk = _cut(T, S, N // K, step, direction, blocks)
  # Rows in order need no arrays of positions: a block's index says them.
  by_index = not mask.positioned or (mask.query_positions is None and (mask.zigzag == 1 or T != S))
  exact = q.dtype == jnp.float32 and jax.config.jax_default_matmul_precision in (
    'highest',
    'float32',
  )
  return StepShape(
    B=B,
    N=N,
    K=K,
    G=G,
    T=_fill(T),
    S=_fill(S),
    bq=bq,
    bk=bk,
    queries=T,
    keys=S,
    causal=mask.causal,
    window=mask.window,
    by_index=by_index,
    segments=mask.query_segments is not None,
    prefix=mask.prefix is not None,
    softcap=scoring.softcap,
    tuning=step,
    precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
    chosen=any(blocks.of(direction)),
  )


def expected(steps: Steps, mask: Mask, shape: StepShape) -> int:
  """Steps that there are; where arrays decide, those without segments, and by positions half of a
  causal mask's blocks.
  """
  if isinstance(steps.count, int):
    return steps.count
  if mask.query_positions is None and mask.prefix is None:
    kinds = dataclasses.replace(mask, query_segments=None, key_segments=None).blocks(
      shape.queries, shape.keys, shape.bq, shape.bk
    )
    return shape.B * int((kinds != SKIP).sum())
  halves = 2 if mask.causal and mask.prefix is None else 1
  return -(-shape.B * shape.nq * (shape.S // shape.bk) // halves)


@dataclasses.dataclass(frozen=True)
class Ranges:
  """How the blocks of queries of all rows, in order, are dealt out to several calls.

  Attributes:
    units: what is not cut apart, `blocks` blocks of queries that follow one another. each: units of
      a call. turns: calls.
  """

  units: int
  blocks: int
  each: int
  turns: int


def ranges_of(shape: StepShape, whole_rows: bool) -> Ranges:
  """As few calls as there can be, alike in size. whole_rows: a kernel that sums over all queries of
  a row needs them in one call.

  Raises NotImplementedError where not even one unit's steps fit.
  """
  blocks = shape.nq if whole_rows else 1
  units, steps = shape.B * shape.nq // blocks, blocks * (shape.S // shape.bk)
  if steps > TABLE:
    raise NotImplementedError(
      f'backend pallas_tpu: {shape.queries} queries and {shape.keys} keys are {steps} steps of '
      f'{shape.R} queries and {shape.bk} keys that one call must have, and {TABLE} fit scalar '
      "memory; split the row over devices (mesh.context), or use model.execution.attention='xla'"
    )
  turns = -(-units // (TABLE // steps))
  return Ranges(units, blocks, -(-units // turns), turns)


def keys_in_table(mask: Mask, shape: StepShape, block: int) -> tuple[int, int]:
  """Of how many keys a call may have all queries of a row: with this mask, and with a part of the
  keys, in blocks of `block`, whose steps may be all pairs.
  """
  part = max(block, TABLE // shape.nq * shape.bk // block * block)
  pairs = shape.nq * (shape.S // shape.bk)
  steps = steps_of(mask.blocks(shape.queries, shape.keys, shape.bq, shape.bk), shape.B)
  return shape.S if fits(steps) or pairs <= TABLE else part, part
