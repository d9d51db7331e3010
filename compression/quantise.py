"""Which codes stand for a model's matrices? Those nearest to its numbers, by a scale that holds the
largest of each block (`nearest`), or one that clips it, or of floats leaves room above it, where
that is nearer for all (`clipped`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import names
from model.params import is_param, name_of
from model.weights.codes import reduced
from model.weights.int8 import Int8
from model.weights.scheme import Scheme, made_by, parsed, rule_of, stored, summed_of
from model.weights.weight import Weight

# Of the largest number of a block, what may be on the grid's edge (as MSE observers try).
SHRINKS = tuple(1 - i / 40 for i in range(21))
# The same of fp8: errors of a float are shares of it, which clipping makes no smaller; but how many
# numbers lie just above a power of two, where steps are coarsest, is the scale's choice.
GROWN = tuple(2 ** (i / 20) for i in range(21))


def nearest(scheme: Scheme, x: jax.Array, summed: tuple[int, ...], axes, name: str) -> Weight:
  """Rounds to the nearest codes: |W - Wq| is at most half of a step."""
  return scheme.of(x, summed, axes, name)


def clipped(scheme: Scheme, x: jax.Array, summed: tuple[int, ...], axes, name: str) -> Weight:
  """The same by the scale of each block, of SHRINKS or GROWN, with the least squared errors."""
  single = dataclasses.replace(scheme, double=False, activations=False)
  whole = single.of(x, summed, axes, name)

  def tried(shrink):
    made = single.of(x, summed, axes, name, shrink)
    return _of_scales(made, jnp.square(made.numbers('float32') - x.astype(jnp.float32)))

  def better(best, shrink):
    error, chosen = best
    now = tried(shrink)
    return (jnp.minimum(now, error), jnp.where(now < error, shrink, chosen)), None

  first = tried(jnp.float32(1)), jnp.ones_like(whole.scale)
  sizes = GROWN if scheme.grid == 'fp8' else SHRINKS
  (_, chosen), _ = jax.lax.scan(better, first, jnp.float32(sizes[1:]))
  return scheme.of(x, summed, axes, name, chosen)


def _of_scales(made: Weight, errors: jax.Array) -> jax.Array:
  """Sums over all numbers that share a scale, laid out as the scales are."""
  if isinstance(made, Int8):
    return errors.sum(made.summed, keepdims=True)
  return reduced(errors, made.blocks, jnp.sum)


METHODS = {'rtn': nearest, 'mse': clipped}


def usual(entries: Sequence[str]) -> str:
  """Which of METHODS is taken where nobody says one: of fp8 the scale decides where numbers lie
  between two powers of two, and it is worth a search; others are rounded.
  """
  grids = {scheme.grid for _, scheme in parsed(entries)} - {'keep'}
  return 'mse' if grids == {'fp8'} else 'rtn'


def quantised(model, entries: Sequence[str], method: str = 'rtn'):
  """The model with its matrices in codes, by the entries of model.execution.stored. Traced.

  Raises ValueError for an unknown method, and as model.weights.scheme.stored.
  """
  return stored(model, entries, METHODS[names.check('--method', method, METHODS)])


def streamed(target, entries: Sequence[str], method: str, take: Callable[[str, Any], Any]):
  """The same of a model that is taken parameter by parameter, and layer by layer made codes of: at
  no time is more in memory than the codes, the parameters that stay, and one stack of layers.

  target: the model, abstract. take: (name, abstract parameter) -> the parameter.
  """
  rules, how = parsed(entries), METHODS[names.check('--method', method, METHODS)]

  @functools.partial(jax.jit, static_argnames=('name', 'scheme'), donate_argnums=0)
  def coded(p, name, scheme):
    def one(x):
      return made_by(how, scheme, x, summed_of(p), p.axes, name)

    x = p.get_value()
    return p.replace(jax.lax.map(one, x) if x.ndim > len(p.axes) else one(x))

  def parameter(path, p):
    name = name_of(path)
    taken = take(name, p)
    _, scheme = rule_of(name, p, rules) or ('', Scheme('keep'))
    return taken if scheme.grid == 'keep' else coded(taken, name, scheme)

  made = jax.tree_util.tree_map_with_path(parameter, target, is_leaf=is_param)
  return jax.jit(functools.partial(quantised, entries=entries, method=method))(made)
