"""What does generation remember? Keys and values of the tokens so far, in buffers that are born
whole and rewritten in place.

R layers of a place of a period · B rows · J of them that a call is about · T new tokens · S slots ·
K key/value heads · H head width · n pages of a row
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import names
from kernels import cached
from kernels.cached import Held
from model import places
from model.config import ModelConfig
from parallel import axes as ax

# Tokens that are appended together at most, but for those that an empty cache gets: so much longer
# than windows rings are.
APPEND = 256
DTYPES = ('', 'float32', 'bfloat16', 'float16', 'int8')


@dataclasses.dataclass(frozen=True)
class Cache:
  """Rows of tokens; slots that none of them is in are unused, whatever they hold.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs and
  placeholders.

  Attributes:
    held: keys and values of every place (ModelConfig.places).
    lengths: [B] int32, tokens that each row holds. capacity: how many it can hold.
    memory: what cross-attention looks up of a source: keys and values of every place, as `held`; or
      None before a source was read (and without one).
    memory_lengths: [B] int32, tokens of each row's source; or None.
    table: [B, n] int32, which of its device's pages hold each row, see kernels.cached.Held.paged;
      None: rows have slots of their own in all places, as they have in rings. Who hands pages out
      writes it.
  """

  held: Any
  lengths: Any
  memory: Any = None
  memory_lengths: Any = None
  table: Any = None
  capacity: int = 0

  def lengths_of(self, rows: Int[Array, 'J'] | None) -> Int[Array, 'J']:
    """Tokens of these rows (see Slots.rows)."""
    return self.lengths if rows is None else rows_of(self.lengths, rows)

  def places(
    self, tokens: int, counts: Int[Array, 'J'] | None, fresh: bool, rows: Int[Array, 'J'] | None
  ) -> 'CachedPlaces':
    """All places, for a call of `tokens` tokens a row, which are the row's where counts is None.

    Raises NotImplementedError for rows where not some rows only can be written.
    """
    lengths = self.lengths_of(rows)
    counts = jnp.full_like(lengths, tokens) if counts is None else counts
    table = self.table
    if rows is not None or table is not None:
      _check_some(self, fresh)
    if rows is not None:
      # A place of the call that is about no row looks at nothing.
      lengths = jnp.where(counts > 0, lengths, 0)
      table = None if table is None else rows_of(table, rows)
    memory, sources = (None,) * len(self.held), None
    if self.memory is not None:
      memory, sources = self.memory, self.memory_lengths
      sources = sources if rows is None else rows_of(sources, rows)
    return CachedPlaces(
      self.held, lengths, memory, sources, counts, rows, table, self.capacity, fresh
    )

  def remembering(
    self, memory: tuple, lengths: Int[Array, 'J'], rows: Int[Array, 'J'] | None = None
  ) -> 'Cache':
    """With what cross-attention looks up of sources of these lengths, in all rows, or in some
    (see Slots.rows) of a cache that has room for it.

    memory: keys and values [R, J, S, K, H] of every place.
    """
    memory = tuple(Held(*(jnp.swapaxes(x, 2, 3) for x in pair)) for pair in memory)
    if rows is None:
      return dataclasses.replace(self, memory=_padded(memory), memory_lengths=lengths)
    memory = jax.tree.map(
      lambda x, new, axes: _with_first(x, rows, new, axes),
      self.memory,
      memory,
      tuple(held.axes() for held in self.memory),
    )
    lengths = with_rows(self.memory_lengths, rows, lengths)
    return dataclasses.replace(self, memory=memory, memory_lengths=lengths)

  def longer(self, held: tuple, counts: Int[Array, 'J'], rows: Int[Array, 'J'] | None) -> 'Cache':
    """With these buffers, and so many more tokens in these rows (see Slots.rows)."""
    if rows is None:
      lengths = self.lengths + counts
    else:
      lengths = with_rows(self.lengths, rows, self.lengths_of(rows) + counts)
    return dataclasses.replace(self, held=held, lengths=lengths)


def rows_of(x: Any, rows: Int[Array, 'J']) -> Any:
  """x[rows] of arrays [B, ...], each device on its own rows; see Slots.rows."""

  def take(x, rows):
    return jax.tree.map(lambda x: x.at[rows].get(mode='clip'), x)

  return ax.local(take, (('batch',), ('batch',)), ('batch',))(x, rows)


def with_rows(x: Any, rows: Int[Array, 'J'], values: Any) -> Any:
  """Arrays [B, ...] with values [J, ...] in these rows, each device on its own; see Slots.rows."""

  def put(x, rows, values):
    return jax.tree.map(lambda x, new: x.at[rows].set(new, mode='drop'), x, values)

  return ax.local(put, (('batch',),) * 3, ('batch',))(x, rows, values)


def _padded(memory: tuple) -> tuple:
  """With as many slots as kernels.cached takes."""

  def pad(x, axes):
    S = x.shape[3]
    x = jnp.pad(x, [(0, _whole(S) - S if axis == 3 else 0) for axis in range(x.ndim)])
    return ax.place(x, *axes)

  return tuple(jax.tree.map(pad, held, held.axes()) for held in memory)


def _with_first(x, rows: Int[Array, 'J'], new, axes: tuple):
  """Buffers [R, B, K, S, ..] with [R, J, K, S', ..] in the first slots of these rows, each device's
  of its own.
  """

  def put(x, rows, new):
    return x.at[:, rows, :, : new.shape[3]].set(new.astype(x.dtype), mode='drop')

  return ax.local(put, (axes, ('batch',), axes), axes)(x, rows, ax.place(new, *axes))


@dataclasses.dataclass(frozen=True)
class CachedPlaces(places.Places):
  """Some places of a cache, and which tokens a call adds to which rows, which is the same in all.

  Attributes:
    memory: of each place, see Cache. sources, counts, rows, table, capacity, fresh: see Slots.
  """

  memory: tuple = ()
  sources: Any = None
  counts: Any = None
  rows: Any = None
  table: Any = None
  capacity: int = 0
  fresh: bool = False

  def part(self, places: slice) -> 'CachedPlaces':
    """Some of the places."""
    return dataclasses.replace(super().part(places), memory=self.memory[places])

  def slots(self, place: int, layer: Int[Array, ''] | int) -> 'Slots':
    """What a block sees: one layer of a place."""
    return Slots(
      self.held[place],
      self.memory[place],
      layer,
      self.lengths,
      self.counts,
      self.capacity,
      self.fresh,
      self.rows,
      self.table if self.held[place].paged else None,
      self.sources,
    )


def _check_some(cache: Cache, fresh: bool) -> None:
  if fresh:
    raise NotImplementedError(
      'rows or pages of a cache with fresh=True: a call that fills buffers from their beginning is '
      'about all rows, and slots side by side; append to empty rows instead (fresh=False)'
    )
  if ax.size('layers') > 1:
    raise NotImplementedError(
      f'rows of a cache over mesh.stage={ax.size("layers")}: stages write all rows at once; '
      'generate on a mesh without stages'
    )


@dataclasses.dataclass(frozen=True)
class Slots:
  """A block's view of a cache.

  Attributes:
    held: of its place. memory: the same of cross-attention, or None. layer: which of their R layers
      it is.
    lengths: [J] tokens before this call. counts: [J] how many of the call's tokens are the row's,
      the others being padding.
    capacity: see Cache. fresh: whether the rows were empty.
    rows: [J] int32, which of its device's rows of the buffers each row of the call is, different
      ones; as many as a device has, or more: none, and its count is 0. None: all rows, in order.
      Where a mesh splits rows, those of a call are split alike, and a number counts the rows of
      its own device: what is on another cannot be named.
    table: [J, n] int32, of these rows, where `held` is paged; None otherwise.
    sources: [J] int32, tokens that `memory` has of these rows; None without.
  """

  held: Any
  memory: Any
  layer: Any
  lengths: Any
  counts: Any
  capacity: int
  fresh: bool
  rows: Any = None
  table: Any = None
  sources: Any = None

  def append(
    self, keys: Float[Array, 'J T K H'], values: Float[Array, 'J T K Hv'] | None, window: int = 0
  ) -> 'Slots':
    """With the row's tokens behind those that it has. A token that would pass the capacity is not
    written: the caller stops rows before.

    window: of the layer. Raises ValueError for more tokens than a ring of slots has room for
    besides its window.
    """
    held, T = self.held, keys.shape[1]
    if held.ring and not self.fresh and T > held.slots - window + 1:
      raise ValueError(
        f'{T} tokens at once overwrite what a window of {window} still sees in a ring of '
        f'{held.slots} slots; append at most {held.slots - window + 1}, or make the cache with '
        f'init_cache(.., append={T})'
      )
    tokens = Held(keys, values)
    if held.keys.dtype == jnp.int8:
      pairs = [(None, None) if x is None else cached.quantised(x) for x in (keys, values)]
      tokens = Held(pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1])

    axes, written = held.axes(), {}
    write = self._fill if self.fresh else self._scatter
    for name in ('keys', 'values', 'key_scales', 'value_scales'):
      buffer, x = getattr(held, name), getattr(tokens, name)
      if x is not None:
        written[name] = write(buffer, getattr(axes, name), x.astype(buffer.dtype))
    return dataclasses.replace(self, held=dataclasses.replace(held, **written))

  def look(self, q: Float[Array, 'J T N H'], **how) -> Float[Array, 'J T N Hv']:
    """Attention of the call's tokens to all that is held; how: see kernels.cached.attention."""
    queries = self.lengths[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    lengths, which = self.lengths + self.counts, dict(rows=self.rows, table=self.table)
    return cached.attention(q, self.held, self.layer, lengths, queries, **which, **how)

  def recall(self, q: Float[Array, 'J T N H'], **how) -> Float[Array, 'J T N H']:
    """Attention of the call's tokens to all of their rows' sources."""
    # Behind the last token of a source every query sees all of it.
    queries = jnp.broadcast_to(self.sources[:, None] - 1, q.shape[:2])
    rows = self.rows
    return cached.attention(q, self.memory, self.layer, self.sources, queries, rows=rows, **how)

  def _fill(self, buffer, axes, x):
    """The first tokens of rows [B, T, K, ...]: slots side by side."""
    S, T, rows = buffer.shape[3], x.shape[1], ('batch', None, *axes[2:3], *axes[4:])
    x = ax.place(x, *rows)
    if self.held.ring and T > S:
      slots = cached.positions(self.held, jnp.arange(S, dtype=jnp.int32), self.counts)

      def take(x, at):
        return jnp.take_along_axis(
          x, jnp.maximum(at, 0).reshape(*at.shape, *(1,) * (x.ndim - 2)), 1
        )

      x = ax.local(take, (rows, ('batch', None)), rows)(x, slots)
    x = jnp.moveaxis(x[:, :S], 1, 2)[None]
    if ax.size('slots') > 1 and not self.held.ring:
      x = jnp.pad(x, [(0, S - n if axis == 3 else 0) for axis, n in enumerate(x.shape)])

    def put(buffer, x, layer, counts):
      at = (layer, *(0,) * (buffer.ndim - 1))
      # No row is, on a stage that is idle.
      real = (counts > 0).reshape(1, -1, *(1,) * (x.ndim - 2))
      return jax.lax.dynamic_update_slice(
        buffer, jnp.where(real, x, jax.lax.dynamic_slice(buffer, at, x.shape)), at
      )

    of_layer = (None, *axes[1:])
    return ax.local(put, (axes, of_layer, (), ('batch',)), axes)(
      buffer, ax.place(x, *of_layer), jnp.asarray(self.layer, jnp.int32), self.counts
    )

  def _scatter(self, buffer, axes, x):
    """Tokens [J, T, K, ...] behind those of their rows, whose pages are there already."""
    S, T, parts = buffer.shape[3], x.shape[1], ax.mesh_axes('slots') if axes[3] else ()
    paged = self.held.paged
    which = self.table if paged else self.rows
    some = () if which is None else (which,)

    def put(buffer, x, layer, lengths, counts, which=None):
      index = jnp.arange(T, dtype=jnp.int32)[None]
      where = lengths[:, None] + index
      inside = (index < counts[:, None]) & (where < self.capacity)
      if paged:
        # Padding goes to the page behind the last one: nowhere.
        pages = jnp.take_along_axis(which, jnp.minimum(where // S, which.shape[1] - 1), 1)
        at = layer, jnp.where(inside, pages, buffer.shape[1]), slice(None), where % S
        return buffer.at[at].set(x, mode='drop', unique_indices=True)
      where = where % S if self.held.ring else where
      if parts:
        where = where - jax.lax.axis_index(parts) * buffer.shape[3]
      # Padding, and what another device has room for, goes behind the last slot: nowhere.
      where = jnp.where(inside & (where >= 0), where, buffer.shape[3])
      rows = jnp.arange(buffer.shape[1], dtype=jnp.int32) if which is None else which
      return buffer.at[layer, rows[:, None], :, where].set(x, mode='drop', unique_indices=True)

    tokens = ('batch', None, *axes[2:3], *axes[4:])
    named = [('batch', *(None,) * (each.ndim - 1)) for each in some]
    run = ax.local(put, (axes, tokens, (), ('batch',), ('batch',), *named), axes)
    layer = jnp.asarray(self.layer, jnp.int32)
    return run(buffer, ax.place(x, *tokens), layer, self.lengths, self.counts, *some)


jax.tree_util.register_dataclass(
  Cache,
  data_fields=['held', 'lengths', 'memory', 'memory_lengths', 'table'],
  meta_fields=['capacity'],
)
jax.tree_util.register_dataclass(
  Slots,
  data_fields=['held', 'memory', 'layer', 'lengths', 'counts', 'rows', 'table', 'sources'],
  meta_fields=['capacity', 'fresh'],
)


def init_cache(
  config: ModelConfig,
  rows: int,
  capacity: int,
  dtype: str = '',
  append: int = APPEND,
  pages: int = 0,
  page: int = 0,
  source: int = 0,
) -> Cache:
  """An empty cache for `rows` sequences of at most `capacity` tokens; a layer with a window has a
  ring of slots, if that is less.

  Over pipeline stages, layers are split as the model's are; key heads over `tensor`, and slots, but
  those of rings, over `context`.

  Args:
    dtype: of keys and values; default: the compute dtype. 'int8': with an f32 scale for each
      vector. Those of a source are in the compute dtype whatever it is.
    append: tokens that may follow others in one call, at most.
    pages: of `page` slots each, in which all rows' tokens lie that are in no ring, and of which
      none is anyone's so far; 0: every row has slots of its own.
    source: tokens of a source for which every row has room, whose row may then be read alone; 0:
      who reads a source makes the room for it.
  Raises ValueError when the capacity passes the model's longest sequence, and for an encoder, which
  generates nothing; NotImplementedError on a mesh with stages for an encoder-decoder or layers of
  which some are on every stage.
  """
  _check_asked(config, capacity, dtype, append)
  dtype, latent = dtype or config.execution.dtype, config.latent
  heads = (1, latent.width + latent.rope_width) if latent.width else (config.K, config.H)
  most = _whole(-(-capacity // ax.size('slots'))) * ax.size('slots')

  def empty(repeats, B, S, dtype, heads, values=True, **kind):
    K, H = heads
    shape = jax.ShapeDtypeStruct((repeats, B, K, S, H), dtype)
    axes = Held(shape, None, **kind).axes().keys

    def zeros(width, dtype, axes):
      return ax.place(
        jnp.zeros((repeats, B, K, S, *width), dtype, out_sharding=ax.out(*axes)), *axes
      )

    vectors = [zeros((H,), dtype, axes), zeros((H,), dtype, axes) if values else None]
    scales = [
      None if x is None or dtype != 'int8' else zeros((), jnp.float32, axes[:4]) for x in vectors
    ]
    return Held(*vectors, *scales, **kind)

  def held(window, repeats):
    least = _whole(window + append - 1) if window else most
    ring = least < most
    paged = bool(pages) and not ring
    B, S = (pages, page) if paged else (rows, min(least, most))
    return empty(repeats, B, S, dtype, heads, not latent.width, ring=ring, paged=paged)

  lengths = ax.place(jnp.zeros((rows,), jnp.int32, out_sharding=ax.out('batch')), 'batch')
  table = memory = None
  if pages:
    none = jnp.full(
      (rows, -(-capacity // page)), pages, jnp.int32, out_sharding=ax.out('batch', None)
    )
    table = ax.place(none, 'batch', None)
  if source:
    room = rows, _whole(source), config.execution.dtype, (config.K, config.H)
    memory = tuple(empty(len(layers), *room) for _, layers in config.places)
  return Cache(
    tuple(held(kind.window, len(layers)) for kind, layers in config.places),
    lengths,
    memory,
    jnp.zeros_like(lengths) if source else None,
    table,
    capacity,
  )


def _check_asked(config: ModelConfig, capacity: int, dtype: str, append: int) -> None:
  """Raises as init_cache says."""
  names.check('dtype of a cache', dtype, DTYPES)
  if not config.causal:
    raise ValueError(
      'model.causal=False: an encoder sees all tokens at once and has no use for a cache'
    )
  if config.max_length and capacity > config.max_length:
    raise ValueError(
      f'a cache of {capacity} tokens passes model.max_length={config.max_length}; ask for fewer '
      'tokens'
    )
  if capacity < 1 or append < 1:
    raise ValueError(
      f'a cache of capacity={capacity} tokens with append={append} at once: both must be at least 1'
    )
  if ax.size('layers') > 1 and (len(config.stacks) > 1 or config.encoder_layers):
    scans = f'layers of {len(config.stacks)} scans (model.stacks)'
    unsplit = f'model.encoder_layers={config.encoder_layers}' if config.encoder_layers else scans
    raise NotImplementedError(
      f'a cache for {unsplit} is not split over mesh.stage={ax.size("layers")}; generate on a mesh '
      'without stages'
    )


def _whole(slots):
  """The next number of slots that kernels.cached takes."""
  unit = 8 if slots <= cached.BLOCK else cached.BLOCK
  return -(-slots // unit) * unit
