"""How do a few new tokens look at a cache? At blocks of slots, one after another, and only at those
that rows have filled.

So the work follows the tokens that are held, and not the room that there is; no scores of all slots
exist, and what an unused slot holds, NaN included, is never part of a sum. The softmax is put
together block by block (Milakov & Gimelshein, arXiv:1805.02867); where a mesh splits the slots,
devices put theirs together at the end.

R layers that a buffer stacks · B rows, of a call: all of a buffer's, or some · T new tokens ·
S slots · N query heads · K key/value heads · G = N/K · H head width · P pages
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import cached_tpu
from kernels.scoring import Scoring
from parallel import axes as ax, mesh

BLOCK = 512  # slots; a buffer has at most one block, or whole ones
# Numbers of keys that a step reads on a CPU, about, so that what it makes of them stays in its
# caches, and slots that these are of at least.
NEAR, FEWEST = 2**19, 16
# The scope of the loop over blocks, with how many there are: what a program is planned with.
FILLED = 'filled_blocks_of_'
FEW = 4  # queries of a key head, up to which a CPU takes one after another
BYTE = 127.0  # what the largest number of an int8 vector becomes


@dataclasses.dataclass(frozen=True)
class Held:
  """Keys and values of R layers.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs and
  placeholders.

  Attributes:
    keys: [R, B, K, S, H]. values: [R, B, K, S, Hv], or None: they are the first numbers of the keys
      (latent attention).
    key_scales, value_scales: [R, B, K, S] f32, what int8 vectors are multiplied with; None for
      other types.
    ring: whether position p is in slot p % S, where it stays until position p + S; otherwise p is
      in slot p.
    paged: whether dimension 1 is of pages instead of rows, each of S slots, and a table [B, n] says
      which of them hold a row: position p is in slot p % S of page table[b, p // S]. A number
      beyond the pages is none.
  """

  keys: Any
  values: Any
  key_scales: Any = None
  value_scales: Any = None
  ring: bool = False
  paged: bool = False

  @property
  def slots(self) -> int:
    return self.keys.shape[3]

  def axes(self) -> 'Held':
    """Logical axes of every array, in its place."""
    heads = ax.whole_or('kv_heads', self.keys.shape[2]) if self.keys.shape[2] > 1 else None
    vector = ('layers', 'batch', heads, None if self.ring or self.paged else 'slots')

    def there(x, axes):
      return None if x is None else axes

    return Held(
      (*vector, 'head_width'),
      there(self.values, (*vector, 'head_width')),
      there(self.key_scales, vector),
      there(self.value_scales, vector),
      self.ring,
      self.paged,
    )


jax.tree_util.register_dataclass(
  Held, data_fields=['keys', 'values', 'key_scales', 'value_scales'], meta_fields=['ring', 'paged']
)


def positions(held: Held, slots: Int[Array, 'S'], lengths: Int[Array, 'B']) -> Int[Array, 'B S']:
  """The position whose token is in each of these slots of rows that hold so many tokens; negative:
  none was ever there.
  """
  if not held.ring:
    return jnp.broadcast_to(slots[None], (lengths.shape[0], slots.shape[0]))
  last = lengths[:, None] - 1
  return last - (last - slots[None]) % held.slots


def quantised(x: Float[Array, '*B H']) -> tuple[Int[Array, '*B H'], Float[Array, '*B']]:
  """int8 vectors, and the f32 numbers that they are to be multiplied with."""
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(-1) / BYTE
  return jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale


def attention(
  q: Float[Array, 'B T N H'],
  held: Held,
  layer: Int[Array, ''] | int,
  lengths: Int[Array, 'B'],
  queries: Int[Array, 'B T'],
  scoring: Scoring,
  *,
  value_width: int = 0,
  rows: Int[Array, 'B'] | None = None,
  table: Int[Array, 'B n'] | None = None,
) -> Float[Array, 'B T N Hv']:
  """Causal attention of new tokens to the slots of one layer, theirs among them; not to be
  differentiated.

  Args:
    layer: of the R that are held. lengths: tokens of each row, the new ones included. queries:
      their positions; what those that are not below `lengths` yield means nothing.
    scoring: its mask is causal, and has a window at most: who sees whom follows from the lengths
      otherwise.
    value_width: of latent attention, how much of a key is the value.
    rows: which of its device's rows of the buffers each row is; what a number beyond them yields
      means nothing. None: all, in order.
    table: of these rows, where what is held is paged: which of its device's pages are theirs.
  Raises NotImplementedError for another mask, for dropout, and where heads do not go together on a
  mesh.
  """
  if not scoring.mask.causal or (extra := scoring.mask.fields() - {'causal', 'window'}):
    raise NotImplementedError(
      f'attention to a cache is causal, and its mask has at most a window, not '
      f"{sorted(extra) if scoring.mask.causal else 'causal=False'}; use kernels.attention"
    )
  if scoring.dropout is not None:
    raise NotImplementedError('attention to a cache leaves no weights out; use kernels.attention')
  N, K, t = q.shape[2], held.keys.shape[2], ax.size('heads')
  heads = held.axes().keys[2]
  if N % t or (heads is None and K > 1 and t % K):
    raise NotImplementedError(
      f'{N} query heads and {K} key heads do not go together over mesh.tensor={t}: '
      'it must divide the key heads, or be a multiple of them'
    )
  parts = ax.mesh_axes('slots') if not (held.ring or held.paged) else ()
  sinks, relative = scoring.sinks, scoring.relative
  run = functools.partial(
    _local,
    scoring=scoring.scaled(q.shape[3]),
    value_width=value_width,
    parts=parts,
    query_axes=ax.mesh_axes('heads') if heads is None and t > 1 else (),
  )
  q = ax.place(q, 'batch', None, 'heads', 'head_width')
  optional = {
    'sinks': (sinks, ('heads',)),
    'table': (None if relative is None else relative.table, (None, 'heads')),
    'named': (table, ('batch', None)) if held.paged else (rows, ('batch',)),
  }
  optional = {name: pair for name, pair in optional.items() if pair[0] is not None}
  result = ('batch', None, 'heads', 'head_width')
  axes = (
    result,
    held.axes(),
    (),
    ('batch',),
    ('batch', None),
    {name: axes for name, (_, axes) in optional.items()},
  )
  layer = jnp.asarray(layer, jnp.int32)
  arrays = {name: x for name, (x, _) in optional.items()}
  return ax.local(run, axes, result)(q, held, layer, lengths, queries, arrays)


def _local(
  q,
  held,
  layer,
  lengths,
  queries,
  optional,
  *,
  scoring,
  value_width,
  parts,
  query_axes,
):
  """On one device's rows, heads and slots. parts: mesh axes that split the slots. query_axes: mesh
  axes that split the query heads only.

  optional: this device's part of the sinks and of the relative's table in `scoring`, and its rows
  of the buffers or their pages, as far as there are any.
  """
  B, T, N, H = q.shape
  S, K = held.keys.shape[3], held.keys.shape[2]
  first = 0
  if (
    query_axes and K > 1
  ):  # all key heads are here: the query heads are those of one, or of whole groups
    groups = jax.lax.axis_size(query_axes)
    first, K = jax.lax.axis_index(query_axes) * K // groups, max(K // groups, 1)
  G = N // K
  Hv = value_width or held.values.shape[4]
  offset = jax.lax.axis_index(parts) * S if parts else 0
  q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  named = optional.get('named')
  if named is not None:
    named = jnp.minimum(named, held.keys.shape[1] - 1)  # none of them reads beyond the buffers

  # The TPU's kernel is for the few queries of generation; it has no relative scores, and knows no
  # slots of other devices; TPUs multiply no float16.
  relative = scoring.relative
  kernel = relative is None and not parts and q.dtype != jnp.float16
  if mesh.platform() == 'tpu' and kernel and G * T <= cached_tpu.MOST:
    top, total, mixed = cached_tpu.blocks(
      q, held, (layer, first), lengths, queries[:, 0], scoring, T=T, Hv=Hv, named=named
    )
  else:
    if relative is not None:
      table = optional['table']
      relative = dataclasses.replace(relative, table=table.reshape(table.shape[0], K, G))
    top, total, mixed = blocks(
      q,
      held,
      (layer, first),
      lengths,
      queries,
      dataclasses.replace(scoring, relative=relative),
      Hv=Hv,
      offset=offset,
      named=named,
    )

  # Devices' shares of the softmax, each relative to its own greatest score, are brought to the
  # greatest of all and added up. The sinks join then: once, and not on every device.
  if parts:
    highest = jax.lax.pmax(top, parts)
    shrink = jnp.exp(top - jnp.where(jnp.isfinite(highest), highest, 0))
    total = jax.lax.psum(total * shrink, parts)
    mixed = jax.lax.psum(mixed * shrink[..., None], parts)
    top = highest
  if 'sinks' in optional:
    sink = jnp.repeat(optional['sinks'].astype(wide).reshape(1, K, G), T, 2)
    highest = jnp.maximum(top, sink)
    shrink = jnp.exp(top - highest)
    total, mixed = total * shrink + jnp.exp(sink - highest), mixed * shrink[..., None]
  out = mixed / jnp.where(total > 0, total, 1)[..., None]
  return out.reshape(B, K, G, T, Hv).transpose(0, 3, 1, 2, 4).reshape(B, T, N, Hv).astype(q.dtype)


def products(
  q: Float[Array, 'B K M H'], keys: Float[Array, 'B K S H'], dtype
) -> Float[Array, 'B K M S']:
  """Of every query and every key."""

  def one(q):
    return jnp.einsum('BKH,BKSH->BKS', q, keys, preferred_element_type=dtype)

  # One query after another: XLA's CPU lays keys out anew for several.
  if mesh.platform() == 'cpu' and q.shape[2] <= FEW:
    return jnp.stack([one(q[:, :, m]) for m in range(q.shape[2])], 2)
  return jnp.einsum('BKMH,BKSH->BKMS', q, keys, preferred_element_type=dtype)


def blocks(
  q: Float[Array, 'B K M H'],
  held: Held,
  at: tuple,
  lengths: Int[Array, 'B'],
  queries: Int[Array, 'B T'],
  scoring: Scoring,
  *,
  Hv: int,
  offset=0,
  named=None,
):
  """What a device's slots give to the softmax: its greatest score, the sum of weights, and the
  weighted sum of values, wide.

  q: of M = G x T queries of a key head, those of a head side by side. at: the layer, and the first
  of the key heads. offset: of the first slot. named: [B] rows of the buffers, None: all, in order;
  or [B, n] the pages of each, where they are paged. A relative's table is [buckets, K, G]; sinks
  join later, when all slots' shares are together.
  """
  B, K, M, H = q.shape
  window, wide = scoring.mask.window, jnp.promote_types(q.dtype, jnp.float32)
  S, block, pages = _steps(held, named, B * K * H)

  def cut(buffer, start):
    if pages is not None:
      return _gathered(buffer, at, pages, start, (K, block))
    return _cut(buffer, at, start, (B, K, block), named)

  def step(index, carry):
    top, total, mixed = carry
    start = index * block
    slots = start + offset + jnp.arange(block, dtype=jnp.int32)
    where = positions(held, slots, lengths)[:, None]  # [B, 1, block]
    used = (where >= 0) & (where < lengths[:, None, None])
    keys = cut(held.keys, start)
    # Or XLA's CPU puts the write of a token into what reads it as well, for which it copies all
    # slots.
    if mesh.platform() == 'cpu':
      keys = jnp.where(used[..., None], keys, 0)
    scales = None if held.key_scales is None else cut(held.key_scales, start)
    scores = _scores(q, keys, scales, where, used, queries, scoring)

    # The online softmax: weights are relative to the greatest score so far, and what was summed
    # before is brought to it. Of a query that has seen nothing yet that is -inf, beside which
    # differences would be NaN.
    now = jnp.maximum(top, scores.max(-1))
    finite = jnp.where(jnp.isfinite(now), now, 0)
    weights, shrink = jnp.exp(scores - finite[..., None]), jnp.exp(top - finite)
    total = total * shrink + weights.sum(-1)

    values = keys[..., :Hv] if held.values is None else cut(held.values, start)
    scales = held.key_scales if held.values is None else held.value_scales
    # A vector's scale goes to its weight, one number instead of Hv. What is not used is 0 in both:
    # 0 x NaN would be NaN.
    if scales is not None:
      weights = weights * jnp.where(used, cut(scales, start), 0)[:, :, None]
    values = jnp.where(used[..., None], values, 0).astype(q.dtype)
    new_mixed = jnp.einsum(
      'BKMS,BKSH->BKMH', weights.astype(q.dtype), values, preferred_element_type=wide
    )
    return now, total, mixed * shrink[..., None] + new_mixed

  empty = (
    jnp.full((B, K, M), -jnp.inf, wide),
    jnp.zeros((B, K, M), wide),
    jnp.zeros((B, K, M, Hv), wide),
  )
  if S == block:
    return step(0, empty)
  # From the first block that a window of any row reaches to the last that a row has filled; a
  # ring's positions are all over it.
  filled = jnp.clip(lengths.max() - offset, 0, S)
  begin = 0
  if window and not held.ring:
    begin = jnp.maximum(queries.min() - window + 1 - offset, 0) // block
  with jax.named_scope(f'{FILLED}{S // block}'):
    return jax.lax.fori_loop(begin, -(-filled // block), step, empty)


def _cut(buffer, at, start, shape, rows):
  """A block of a layer's slots, [B, K, block, ...] of `shape`."""
  (layer, first), (B, K, block), rest = at, shape, buffer.shape[4:]
  behind = (first, start, *(0,) * len(rest))
  if rows is None:
    return jax.lax.dynamic_slice(buffer, (layer, 0, *behind), (1, B, K, block, *rest))[0]
  # One by one: they are few, and compilers make less of a gather than of slices.
  size = (1, 1, K, block, *rest)
  return jnp.concatenate(
    [jax.lax.dynamic_slice(buffer, (layer, row, *behind), size)[0] for row in rows]
  )


def _steps(held: Held, named, numbers: int):
  """Slots of a row in all and of a step; and the pages of every step [B, steps, p], each of so many
  slots: behind a row's last one, any. A step is of several pages, or some steps are of one.

  numbers: of keys that are in a slot of all rows.
  """
  slots, most = held.slots, BLOCK
  if mesh.platform() == 'cpu':
    most = min(BLOCK, max(FEWEST, NEAR // numbers))
  block = next(size for size in range(min(slots, most), 0, -1) if slots % size == 0)
  if not held.paged:
    return slots, block, None
  # As many as a block of slots that lie side by side has, so that sums are of the same parts.
  B, n = named.shape
  each = max(1, min(n, most // slots))
  pages = jnp.pad(named, ((0, 0), (0, -n % each))).reshape(B, -1, each)
  return slots * each * pages.shape[1], block * each, pages


def _gathered(buffer, at, pages: Int[Array, 'B n p'], start, size: tuple[int, int]):
  """A block of a layer's slots, [B, K, block, ...] of `size`, that lie in these pages."""
  (layer, first), (K, block), slots = at, size, buffer.shape[3]
  of_step = pages[:, start // (slots * pages.shape[2])]
  if block < slots:
    return _cut(buffer, (layer, first), start % slots, (1, K, block), of_step[:, 0])
  x = jnp.moveaxis(buffer.at[layer, of_step].get(mode='clip'), 1, 2)
  if K != x.shape[1]:
    x = jax.lax.dynamic_slice_in_dim(x, first, K, 1)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _scores(q, keys, scales, where, used, queries, scoring):
  """[B, K, M, block] of a block of slots, as the softmax takes them.

  scales: of int8 keys [B, K, block], or None. where, used [B, 1, block]: positions, and whether a
  token of the row is there.
  """
  (B, K, M, _), T, window = q.shape, queries.shape[1], scoring.mask.window
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scores = products(q, keys.astype(q.dtype), wide) * scoring.scale
  if scales is not None:
    scores = scores * scales[:, :, None]
  scores = scores.reshape(B, K, M // T, T, -1)
  if scoring.relative is not None:
    rows = scoring.relative.scores(queries, where[:, 0])
    scores = scores + jnp.moveaxis(rows, (1, 2), (3, 4)).astype(wide)
  if scoring.softcap:
    scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
  seen = used & (where <= queries[..., None])
  if window:
    seen = seen & (queries[..., None] - where < window)
  return jnp.where(seen[:, None, None], scores, -jnp.inf).reshape(B, K, M, -1)
