"""What is a matrix of which each row of a batch has its own update? Any weight, asked first, plus
the product of the two thin matrices of the row's adapter: many low-rank adapters (LoRA, Hu et al.,
arXiv:2106.09685) on one model, in one batch.

    y_b = (x_b W + x_b A_i B_i) t_i   i: the adapter of row b; i = 0: y_b = x_b W

s is in B_i already; t_i is 1, or DoRA's m / |V| (model.weights.low_rank). Nothing of the matrix's
size is made for a row. A step of decoding waits for memory: rows at least as many as the adapters
read each of these once, for all rows (`_of_all`). Fewer rows, and many tokens, take copies of their
own ones (`_of_own`). Punica (Chen et al., arXiv:2310.18547) has a kernel that needs neither. Which
it is depends on shapes alone, so that what a row gets does not depend on its neighbours' adapters;
what is no number would reach them, and adapters are finite.

B rows · n adapters · Z rank
"""

import dataclasses
import string
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from model.weights.above import Above
from parallel import axes as ax

RANK, MANY = 'Z', 'n'
# Tokens of a row, times adapters, for which none is copied: about as many products for each of an
# adapter's numbers as fit into the time of reading it. By the hardware's tables, and not measured.
FEW = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank(Above):
  """The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs
  and placeholders.

  Attributes:
    base: the weight below, of any kind; no table, and none of experts, whose tokens have left their
      rows.
    a, b: Weights [n, inputs, Z] and [n, Z, outputs], the scale in b; where an adapter has a lower
      rank, or leaves the matrix as it is, zeros.
    stretch: t, a Weight [n, outputs], f32; None where no adapter has one.
    index: [B] int32, of each row of a call: 0, or i for the adapter at i - 1. None: not said yet.
    inputs: dimensions that the matrix contracts over.
  """

  base: Any
  a: Any
  b: Any
  stretch: Any
  index: Any
  inputs: int = dataclasses.field(metadata={'static': True})
  made_of = 'base', 'a', 'b', 'stretch'

  @property
  def adapters(self):
    return self.a.shape[len(self.a.shape) - len(self.a.axes)]

  def of_rows(self, index: Int[Array, 'B']) -> 'Bank':
    # As the matrix, stacked by layers, whose dimension a scan takes off.
    layers = self.shape[: len(self.shape) - len(self.axes)]
    index = jnp.broadcast_to(jnp.expand_dims(index, range(len(layers))), (*layers, *index.shape))
    return dataclasses.replace(self, index=index)

  def layout(self):
    bank = super().layout()
    return dataclasses.replace(bank, index=None if self.index is None else ('batch',))

  def numbers(self, dtype):
    raise NotImplementedError(
      'numbers of a matrix that is another one for each row: merge the adapter (convert.py merge), '
      'or leave this matrix out of its adapter.targets'
    )

  def here(self, shards, dtype):
    return self.numbers(dtype)

  def cut(self, axis, pieces):
    return self.numbers(self.dtype)

  def product(self, formula, x, dtype, axes=None):
    if self.index is None:
      raise ValueError(
        'rows of a model with several adapters are of none until they are told of which: call '
        'model.weights.of_rows(model, index) first'
      )
    _, right, result = _terms(formula, x.ndim)
    # Against a cache, MLA sums over what are outputs elsewhere, which are stretched before then.
    stretched = set(right[self.inputs :]) <= set(result)
    if not stretched:
      x = self._stretched(x, dtype)
    y = self.base.product(formula, x, dtype, axes)
    thin = self._thin(formula, x, dtype, axes)
    y = y + (thin if axes is None else ax.place(thin, *axes))
    return self._stretched(y, dtype) if stretched else y

  def _stretched(self, x, dtype):
    """Rows, which end in the outputs' dimensions, times t of their adapter."""
    if self.stretch is None:
      return x
    factors = self._taken(self.stretch, 'float32')
    factors = _where(jnp.expand_dims(self.index > 0, range(1, factors.ndim)), factors, 1).astype(
      dtype
    )
    return x * jnp.expand_dims(factors, range(1, 1 + x.ndim - factors.ndim))

  def _thin(self, formula, x, dtype, axes):
    """x_b A_i B_i, or the same by its transpose where the formula sums over the outputs: first to
    the rank, where it is small.
    """
    left, right, result = _terms(formula, x.ndim)
    inputs, outputs = right[: self.inputs], right[self.inputs :]
    summed = [letter for letter in right if letter not in result]
    ends = [(self.a, inputs + RANK), (self.b, RANK + outputs)]
    if not set(summed) <= set(inputs):
      ends.reverse()
    kept = ''.join(letter for letter in left if letter not in summed)
    length = x.shape[1] if x.ndim > 2 else 1
    few = x.shape[0] >= self.adapters and length * self.adapters <= FEW
    run = self._of_all if few else self._of_own
    # Whole along the length, as the base's product has it before its sum is scattered.
    tokens = None
    if axes is not None:
      tokens = ['length' if axis == 'sequence' else axis for axis in axes[: len(kept)]]
    return run((left, kept, result), x, ends, dtype, tokens)

  def _of_all(self, terms, x, ends, dtype, tokens):
    """Of all adapters, of which a row keeps what its own makes of it."""
    (first, down), (second, up) = ends
    left, kept, result = terms
    y = _summed(f'{left},{MANY}{down}->{kept}{MANY}{RANK}', x, first.whole(dtype), tokens)
    own = self.index[:, None] == 1 + jnp.arange(self.adapters)[None]
    y = _where(jnp.expand_dims(own, (*range(1, y.ndim - 2), y.ndim - 1)), y)
    return jnp.einsum(f'{kept}{MANY}{RANK},{MANY}{up}->{result}', y, second.whole(dtype))

  def _of_own(self, terms, x, ends, dtype, tokens):
    """Of copies of the adapter of each row."""
    (first, down), (second, up) = ((self._taken(weight, dtype), term) for weight, term in ends)
    left, kept, result = terms
    row = left[0]
    y = _summed(f'{left},{row}{down}->{kept}{RANK}', x, first, tokens)
    y = _where(jnp.expand_dims(self.index > 0, range(1, y.ndim)), y)
    return jnp.einsum(f'{kept}{RANK},{row}{up}->{result}', y, second)

  def _taken(self, weight, dtype):
    """[B, ...] of [n, ...], each device for its own rows."""
    whole = weight.whole(dtype, product=False)
    axes = tuple(None if axis in ax.EMBED else axis for axis in weight.axes)

    def take(x, index):
      return x.at[jnp.maximum(index - 1, 0)].get(mode='promise_in_bounds')

    return ax.local(take, (axes, ('batch',)), ('batch', *axes[1:]))(whole, self.index)


def _terms(formula: str, ndim: int) -> tuple[str, str, str]:
  """The terms of a product with x of so many dimensions, an ellipsis of it in letters."""
  terms, result = formula.split('->')
  left, right = terms.split(',')
  free = [letter for letter in string.ascii_lowercase if letter not in (*formula, MANY)]
  rest = ''.join(free[: ndim - len(left.replace('...', ''))])
  return left.replace('...', rest), right, result.replace('...', rest)


def _summed(formula, x, y, tokens):
  """A product whose sum devices may have parts of; tokens: axes of what the result has of x."""
  if tokens is None:
    return jnp.einsum(formula, x, y)
  more = len(formula.split('->')[1]) - len(tokens)
  return ax.einsum(formula, x, y, (*tokens, *(None,) * more))


def _where(own, y, otherwise=0):
  """y where it is a row's own."""
  return jnp.where(own, y, jnp.full((), otherwise, y.dtype))
