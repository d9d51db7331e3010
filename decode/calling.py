"""How does a compiled program get what it is called with at little cost of the host? Weights as the
list of their arrays, for to take a tree of modules apart at every call costs a good part of what a
small model takes to run; arrays of rows several together.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from parallel import axes as ax


def flattened(
  function: Any, weights: Any, donate: int, options: Any = None, **static: Any
) -> Callable:
  """A jitted function of weights of this structure, made anew: it takes their leaves, and has these
  static arguments.

  donate: which argument is given away. options: of the compiler.
  """
  structure = jax.tree.structure(weights)
  run = functools.partial(function.__wrapped__, **static)

  def program(leaves: Sequence[jax.Array], *arguments: Any) -> Any:
    return run(structure.unflatten(leaves), *arguments)

  program.__name__ = function.__name__
  return jax.jit(program, donate_argnums=donate, compiler_options=options)


class Leaves:
  """Of the weights that were asked for last: as a rule, all calls have the same."""

  def __init__(self):
    self._of: tuple[Any, list] = (None, [])

  def __call__(self, weights: Any) -> list:
    """Weights are known by who they are: none changes in place."""
    if weights is not self._of[0]:
      self._of = weights, jax.tree.leaves(weights)
    return self._of[1]


class Splits:
  """Puts arrays on a mesh, split along their rows."""

  def __init__(self, mesh: jax.sharding.Mesh):
    self._mesh, self._several = mesh, mesh.is_multi_process
    self._shardings: dict[int, jax.NamedSharding] = {}

  def put(self, xs: Sequence[np.ndarray]) -> list[jax.Array]:
    """Of new arrays each time: on a CPU the device may go on using the memory of what it is
    given.
    """
    if self._several:  # where device_put would compare what all processes give, on their devices
      return [jax.make_array_from_callback(x.shape, self.of(x.ndim), x.__getitem__) for x in xs]
    return jax.device_put(list(xs), [self.of(x.ndim) for x in xs])

  def of(self, rank: int) -> jax.NamedSharding:
    """Of an array with so many dimensions."""
    if rank not in self._shardings:
      with jax.set_mesh(self._mesh):
        spec = ax.spec('batch', *(None,) * (rank - 1))
      self._shardings[rank] = jax.NamedSharding(self._mesh, spec)
    return self._shardings[rank]
