"""What can be asked of a matrix, however it is stored? The protocol, with what numbers suffice for.

A way of storing is a frozen dataclass, registered as a pytree, whose arrays are its fields. Stacked
by layers it has one more dimension in front, which a scan takes off: dimensions are therefore
counted from the last, and `axes` never names that of layers. It says which numbers it stands for
(`numbers`), how its arrays are laid out (`layout`), and how it becomes whole (`gathered`, and
inside of a shard_map `here` and `cut`). Then it works in every layer and on every mesh; what it
multiplies faster than by its numbers, it overrides (`product`, `each`, `grouped`, `scores`), and
what it looks up without them (`rows`), perhaps behind its own rows (`virtual`).

So groups of int4 or NF4 are codes, scales and `numbers`; fp8 is int8 with another cast; a sparse
matrix its kept numbers with their places; and a low-rank adapter holds the weight that it lies on,
of any kind, asks it first, and adds its own product.

B batch · T length · D, F width before and after a product · V vocabulary
E experts · C slots of an expert · M rows of all experts
"""

import abc

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import names
from kernels.grouped_matmul import RowGroups
from parallel import axes as ax, zero


class Weight(abc.ABC):
  """A matrix, table or vector of a model.

  Attributes:
    axes: logical axes of its dimensions, but for that of stacked layers.
    virtual: ids behind a table that have rows all the same (model.weights.appended).
    shape, dtype: of the matrix that it stands for; dtype: that of its numbers before a cast.
    adapters: that rows of a batch can have on it, each another one (model.weights.bank).
    coded: whether it is stored in codes, which no cast is of.
  """

  axes: tuple[str | None, ...]
  adapters, virtual, coded = 0, range(0), False

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]: ...

  @property
  @abc.abstractmethod
  def dtype(self): ...

  @abc.abstractmethod
  def numbers(self, dtype: jax.typing.DTypeLike) -> Array:
    """The matrix in `dtype`, laid out as it is stored."""

  @abc.abstractmethod
  def layout(self) -> 'Weight':
    """The same pytree with the logical axes of each array in its place, for parallel.axes.local."""

  @abc.abstractmethod
  def gathered(self, dtype: str) -> 'Weight':
    """With its shards along `embed` gathered (parallel.axes.gather), ready for `dtype`."""

  @abc.abstractmethod
  def here(self, shards: tuple[str, ...], dtype: str) -> 'Weight':
    """Inside of parallel.axes.local: ready for `dtype`, and gathered along `expert_embed`.

    Gathered there, the gradient is scattered where it is summed. shards: the mesh axes of
    `expert_embed`.
    """

  @abc.abstractmethod
  def cut(self, axis: int, pieces: int) -> 'Weight':
    """In equal pieces along `axis`, counted from the last; they are a new first dimension."""

  def cast(self, dtype: str) -> 'Weight':
    """With its numbers in `dtype`, once and for all; what is in codes stays as it is."""
    return self if self.coded else jax.tree.map(lambda x: x.astype(dtype), self)

  def joined(self, whole: 'Weight') -> 'Weight':
    """What computes with `whole`, of `gathered`; its gradient, if there is one, is self's."""
    return whole

  def of_rows(self, index: Int[Array, 'B']) -> 'Weight':
    """What computes with rows of a batch that have these adapters; 0: none."""
    return self

  def whole(self, dtype: str, product: bool = True) -> Array:
    """The matrix in `dtype`, gathered along `embed`.

    product: whether all that is done with it is a product with tokens (see parallel.zero.gather).
    """
    return (zero if product else ax).gather(self.numbers(dtype), *self.axes)

  def product(
    self, formula: str, x: Array, dtype: str, axes: tuple[str | None, ...] | None = None
  ) -> Array:
    """Tokens times the matrix, as jnp.einsum; in `dtype`.

    axes: of the result, where its sharding is a choice (parallel.axes.einsum).
    """
    return ax.product(formula, x, self.whole(dtype), axes)

  # Tables [V, D].

  def rows(self, ids: Int[Array, '...'], mode: str | None = None) -> Float[Array, '... D']:
    """Entries of the first dimension, where they lie; in the type that they are stored in, or f32.

    mode: of ids that are out of bounds (jax.numpy.ndarray.at).
    """
    return self.numbers(self.dtype).at[ids].get(mode=mode)

  def rows_here(self, ids: Int[Array, '...'], part: Int[Array, '']) -> Float[Array, '... D']:
    """Of a device's part of a table, inside of parallel.axes.local: its rows for ids of the whole
    table, and zeros for those that other parts have. part: which one this is.
    """
    ids = ids - part * self.shape[0]
    here = (ids >= 0) & (ids < self.shape[0])
    return jnp.where(
      here[..., None], self.rows(jnp.where(here, ids, 0), mode='promise_in_bounds'), 0
    )

  def scored(self, x: Float[Array, '*B D'], bias: Array | None, dtype: str) -> tuple[Array, Array]:
    """Hidden states and the table, in `dtype`, whose products are the scores, bias [V] included.

    The table is laid out as it is stored, but for one with a bias, which is whole along D.
    """
    if bias is None:
      return x, self.numbers(dtype)
    bias = bias.astype(dtype)  # one more input, that is always 1
    return (
      jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1),
      jnp.concatenate([self.whole(dtype, product=False), bias[:, None]], -1),
    )

  def scores(self, x: Float[Array, '*B D'], bias: Array | None, dtype: str) -> Float[Array, '*B V']:
    """Of hidden states against the table, in f32."""
    x, table = self.scored(x, bias, dtype)
    if ax.on_one_cpu() and x.dtype == jnp.float32:
      flat = x.reshape(-1, x.shape[-1])
      return names.imported('parallel.one_cpu.of_rows')(flat, table).reshape(*x.shape[:-1], -1)
    table = ax.place(table, 'vocab', None)
    return jnp.einsum('...D,VD->...V', x, table, preferred_element_type=jnp.float32)

  # Matrices of experts [E, D, F], after `here`.

  def each(self, rows: Float[Array, 'E C D']) -> Float[Array, 'E C F']:
    """Rows of each expert, as many of each, times its matrix."""
    return jnp.einsum('ECD,EDF->ECF', rows, self.numbers(rows.dtype))

  def grouped(self, rows: Float[Array, 'M D'], groups: RowGroups) -> Float[Array, 'M F']:
    """Rows, sorted by expert, times the matrix of theirs: see kernels.grouped_matmul."""
    return groups.multiply(rows, self.numbers(rows.dtype))


def along(axes: tuple[str | None, ...], x: jax.Array) -> tuple[str | None, ...]:
  """The logical axes of all dimensions of `x`: that of stacked layers too, where there is one."""
  return ('layers',) * (x.ndim - len(axes)) + axes


def in_pieces(x: jax.Array, axis: int, pieces: int) -> jax.Array:
  """`x` cut along `axis`, counted from the last: the pieces in a new first dimension."""
  axis += x.ndim
  return jnp.moveaxis(x.reshape(*x.shape[:axis], pieces, -1, *x.shape[axis + 1 :]), axis, 0)


def gathered_here(x: jax.Array, axes: tuple[str | None, ...], shards: tuple[str, ...]) -> jax.Array:
  """Inside of parallel.axes.local: an array with these axes, gathered along `expert_embed`."""
  if not shards or 'expert_embed' not in axes:
    return x
  at = axes.index('expert_embed')
  # In front of the others: of a minor dimension XLA for TPU would make an all-reduce of the
  # gradient's reduce-scatter.
  whole = jnp.moveaxis(zero.all_gather(x[None], shards, 0), 0, at)
  return whole.reshape(*x.shape[:at], -1, *x.shape[at + 1 :])
