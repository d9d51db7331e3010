"""Which backend multiplies rows by the matrix of their group? One function; rows are sorted by
group, as experts want them.

`reference`: the jnp oracle, each row with its own copy of its matrix, [M, D, F] in memory.
`blocked`: a scan over blocks of rows of one group each, at most 1.25 times the ideal work
(kernels.grouped_blocks). `pallas_tpu`: a kernel that computes what rows there are
(kernels.grouped_matmul_tpu). `auto`: that on a TPU where it takes the operands, else `blocked`;
which it is is printed once (on a CPU not: there is nothing else). `lax.ragged_dot` is not among
them: XLA expands it to a product per group and row, E times the work, on GPU always and on TPU for
the gradient of the matrices up to jax 0.10.2 (benchmarks/grouped_matmul.py). A kernel for GPUs is
not there yet.

M rows · E groups · D width of a row · F width of a product
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
from jaxtyping import Array, Float, Int

import names
from parallel import mesh

# Imported when it is asked for.
BACKENDS = {
  'reference': 'kernels.grouped_blocks.reference',
  'blocked': 'kernels.grouped_blocks.blocked',
  'pallas_tpu': 'kernels.grouped_matmul_tpu.grouped',
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGroups:
  """How rows lie in groups, and what multiplies them.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers.

  Attributes:
    sizes: rows of each group, int32 [E]. of_row: which group a row is of, below E also behind the
      last group's, int32 [M].
    backend, filled: see grouped_matmul.
  """

  sizes: Any
  of_row: Any
  backend: str = dataclasses.field(default='auto', metadata={'static': True})
  filled: int = dataclasses.field(default=0, metadata={'static': True})

  def multiply(self, x: Float[Array, 'M D'], w: Array) -> Float[Array, 'M F']:
    return grouped_matmul(x, w, self.sizes, backend=self.backend, filled=self.filled)


def grouped_matmul(
  x: Float[Array, 'M D'],
  w: Float[Array, 'E D F'] | Int[Array, 'E D F'],
  sizes: Int[Array, 'E'],
  *,
  backend: str = 'auto',
  filled: int = 0,
) -> Float[Array, 'M F']:
  """The first sizes[0] rows times w[0], the next sizes[1] rows times w[1], and so on;
  differentiable in x and w.

  Args:
    w: in x's type, or int8, whose numbers are made as they multiply.
    sizes: rows of each group; their sum is at most M. Rows behind it are zeros in the result and
      contribute nothing to gradients, whatever they hold, NaN included.
    backend: 'auto' or one of BACKENDS.
    filled: how many rows are expected in all groups together, which a kernel's cost is declared by
      and nothing else depends on; 0: all.
  Returns: the products, summed in f32 (or wider, as x is), in x's type.
  Raises: ValueError for an unknown backend, or when x and w differ in type; NotImplementedError for
    operands that the backend does not take.
  """
  if w.dtype not in (x.dtype, 'int8'):
    raise ValueError(
      f'rows are {x.dtype} and matrices {w.dtype}; cast one of them, nothing is cast here'
    )
  backend = chosen(x, w, backend)
  if backend == 'pallas_tpu':
    return names.imported(BACKENDS[backend])(x, w, sizes, filled or x.shape[0])
  return names.imported(BACKENDS[backend])(x, w, sizes)


def chosen(x, w, backend: str) -> str:
  """The backend of these operands: what `auto` means on the platform that is compiled for is said
  once, but for a CPU, which has no choice. Raises ValueError for one that is unknown.
  """
  if names.check('grouped_matmul backend', backend, ('auto', *BACKENDS)) != 'auto':
    return backend
  platform = mesh.platform()
  if platform == 'tpu':
    refusal = names.imported('kernels.grouped_matmul_tpu.refusal')(x, w, automatic=True)
    return _said('blocked' if refusal else 'pallas_tpu', platform, refusal)
  return _said('blocked', platform, 'want of a kernel') if platform == 'gpu' else 'blocked'


@functools.cache
def _said(backend: str, platform: str, why: str) -> str:
  if jax.process_index() == 0:
    reason = f' for {why}' if why else ''
    print(f"experts: 'auto' is {backend!r} on a {platform}{reason}", file=sys.stderr)
  return backend
