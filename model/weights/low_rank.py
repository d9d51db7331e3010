"""What is a matrix with a low-rank update on it? Any weight, asked first, plus the product of two
thin ones (LoRA, Hu et al., arXiv:2106.09685); with a length for each output, too, the decomposed
form (DoRA, Liu et al., arXiv:2402.09353).

    W' = W + s A B                 A [inputs, Z], B [Z, outputs]
    W' = m V / |V|, V = W + s A B  m [outputs], |V| over the inputs of each output

A table [V, D] is one whose rows are inputs: A [V, Z], B [Z, D].

Z rank · E experts, in front of inputs where a matrix is of them
"""

import dataclasses
import functools
import string
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.weights.above import Above, again
from parallel import axes as ax, remat

RANK = 'Z'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Above):
  """The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs
  and placeholders.

  Attributes:
    base: the weight below, of any kind; never differentiated.
    a, b: the thin matrices, Weights.
    magnitude: m, a Weight with the axes of the outputs; None leaves lengths as they come. Of plain
      matrices only: devices that share a table or an expert do not see a whole column of it.
    dropout: what A does not see of what it is multiplied with, in training
      (kernels.draws.Dropout).
    scale: s. inputs: dimensions that the matrix contracts over, behind that of experts.
  """

  base: Any
  a: Any
  b: Any
  magnitude: Any
  scale: float = dataclasses.field(metadata={'static': True})
  inputs: int = dataclasses.field(metadata={'static': True})
  dropout: Any = None
  made_of = 'base', 'a', 'b', 'magnitude'

  def cut(self, axis, pieces):
    outputs = len(self.axes) - ('experts' in self.axes) - self.inputs
    base = self.base.cut(axis, pieces)
    if -axis <= outputs:  # of the outputs, which are B's last dimensions, too
      return dataclasses.replace(
        self, base=base, a=again(self.a, pieces), b=self.b.cut(axis, pieces)
      )
    # A has the inputs in front of the rank, where the matrix has them in front of its outputs.
    a = self.a.cut(axis + outputs - 1, pieces)
    return dataclasses.replace(self, base=base, a=a, b=again(self.b, pieces))

  def numbers(self, dtype):
    total = self.base.numbers('float32') + self._update()
    if self.magnitude is not None:
      total = total * self._stretch(total)
    return total.astype(dtype)

  def _update(self) -> Array:
    """s A B in f32, laid out as the matrix is."""
    rank = len(self.axes)
    names = string.ascii_lowercase[:rank]
    experts = 'experts' in self.axes
    first, last = names[: experts + self.inputs], names[experts + self.inputs :]
    front = names[:experts]
    formula = f'...{first}{RANK},...{front}{RANK}{last}->...{names}'
    update = jnp.einsum(formula, self.a.numbers('float32'), self.b.numbers('float32'))
    return self.scale * update

  def _stretch(self, total: Array) -> Array:
    """m / |V|, with 1 for each input; the length counts as a constant (section 4.3)."""
    first = total.ndim - len(self.axes) + ('experts' in self.axes)
    summed = tuple(range(first, first + self.inputs))
    length = jax.lax.stop_gradient(jnp.sqrt(jnp.square(total).sum(summed, keepdims=True)))
    magnitude = self.magnitude.numbers('float32')
    return jnp.expand_dims(magnitude, summed) / jnp.where(length > 0, length, 1)

  def stretch(self) -> Array:
    """m / |V| of each output, f32, laid out as the magnitude is."""
    stretch = self._stretch(self.base.numbers('float32') + self._update())
    first = stretch.ndim - len(self.axes)
    return stretch.squeeze(tuple(range(first, first + self.inputs)))

  def product(self, formula, x, dtype, axes=None):
    if not self._forward(formula):
      return super().product(formula, x, dtype, axes)
    y = self.base.product(formula, x, dtype, axes)
    y = remat.summed(y + self._thin_product(formula, x, dtype, axes))
    if self.magnitude is None:
      return y
    # As tokens are: devices that share the batch need all of it.
    stretch = ax.gather(self.stretch().astype(dtype), *self.axes[self.inputs :])
    return y * jnp.expand_dims(stretch, range(y.ndim - stretch.ndim))

  def _forward(self, formula: str) -> bool:
    """Whether a product sums over the inputs, and ends in the outputs. Others (against a cache, MLA
    sums over what are outputs elsewhere) take the numbers.
    """
    terms, result = formula.split('->')
    left, right = terms.split(',')
    inputs, outputs = right[: self.inputs], right[self.inputs :]
    return (
      'experts' not in self.axes
      and left.endswith(inputs)
      and result.endswith(outputs)
      and not set(outputs) & set(left)
    )

  def _thin_product(self, formula, x, dtype, axes):
    """s (x A) B: first to the rank, where it is small."""
    terms, result = formula.split('->')
    left, right = terms.split(',')
    inputs, outputs = right[: self.inputs], right[self.inputs :]
    rows = left.removesuffix(inputs)
    down, up = f'{left},{inputs}{RANK}->{rows}{RANK}', f'{rows}{RANK},{RANK}{outputs}->{result}'
    a, b = self.a.whole(dtype), self.b.whole(dtype)
    if self.dropout is not None:
      x = self.dropout.of_tokens(x)
    if axes is None:
      thin = jnp.einsum(down, x, a)
      return _raised(up, thin * jnp.asarray(self.scale, dtype), b)
    # Whole along the length, on which the gradient of B would else be in parts. The rank is small,
    # and the gradient that is gathered for it is the one that the base gathers.
    tokens = ['length' if axis == 'sequence' else axis for axis in axes[: -len(outputs)]]
    thin = ax.einsum(down, x, a, (*tokens, None))
    return ax.place(_raised(up, thin * jnp.asarray(self.scale, dtype), b), *axes)

  # Tables [V, D].

  def rows(self, ids, mode=None):
    thin = self.a.rows(ids, mode).astype(jnp.float32) * self.scale
    update = jnp.einsum('...Z,ZD->...D', thin, self.b.numbers('float32'))
    return self.base.rows(ids, mode) + update

  def scored(self, x, bias, dtype):
    # x (W + s A B)^T is [x, s x B^T] [W, A]^T: inputs and columns of their own, so that no table of
    # the sum is ever made.
    thin = jnp.einsum('...D,ZD->...Z', x, self.b.whole(dtype, product=False))
    inputs = [x, thin * jnp.asarray(self.scale, dtype)]
    columns = [self.base.whole(dtype, product=False), self.a.whole(dtype, product=False)]
    if bias is not None:
      inputs.append(jnp.ones_like(x[..., :1]))
      columns.append(bias.astype(dtype)[:, None])
    table = jnp.concatenate(columns, -1)
    # As the loss expects a table of this width.
    table = ax.place(table, 'vocab', ax.whole_or('embed', table.shape[1]))
    return jnp.concatenate(inputs, -1), table

  # Matrices of experts [E, D, F], after `here`.

  def each(self, rows: Float[Array, 'E C D']) -> Float[Array, 'E C F']:
    thin = self.a.each(rows) * jnp.asarray(self.scale, rows.dtype)
    return self.base.each(rows) + self.b.each(thin)

  def grouped(self, rows, groups):
    thin = self.a.grouped(rows, groups) * jnp.asarray(self.scale, rows.dtype)
    return self.base.grouped(rows, groups) + self.b.grouped(thin, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _raised(formula: str, thin: Array, b: Array) -> Array:
  """(x A) B, whose gradient by B is a product with the thin factor on the left.

  JAX's own rule has the wide one there, which XLA on a CPU lays out anew for it: more work than the
  product.
  """
  return jnp.einsum(formula, thin, b)


def _raised_forward(formula, thin, b):
  return _raised(formula, thin, b), (thin, b)


def _raised_backward(formula, kept, d):
  thin, b = kept
  terms, result = formula.split('->')
  left, right = terms.split(',')
  d_thin = jnp.einsum(f'{result},{right}->{left}', d, b, out_sharding=ax.of_gradient(thin))
  d_b = jnp.einsum(f'{left},{result}->{right}', thin, d, out_sharding=ax.of_gradient(b))
  return d_thin, d_b


_raised.defvjp(_raised_forward, _raised_backward)
