"""Where does it hurt? How far each matrix of each layer is from what it was, and models that have
the smaller one's matrices in some places only, of which KL can be asked.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.params import by_name, is_param, name_of
from model.weights import read
from model.weights.scheme import dequantised


class MatrixPlace(NamedTuple):
  """A matrix of a layer.

  Attributes:
    layer: its number; -1: of none, as a head. kind: such as attention.q.
    name: of the parameter. index: in its stack; 0 where it is not stacked.
  """

  layer: int
  kind: str
  name: str
  index: int


def places(model, errors: Mapping[str, np.ndarray]) -> list[MatrixPlace]:
  """All places of `distances` that are not as they were. model: one of both.

  Raises ValueError where norms or biases are among them: scales were folded into these, and a
  matrix without its norm is none of either model.
  """
  config, found = model.config, []
  vectors = {name for name, p in by_name(model).items() if p.kind == 'vector'}
  for name, each in errors.items():
    if name in vectors and np.any(each > 0):
      raise ValueError(
        f'{name} is not as it was (awq and smoothquant fold scales into norms and biases, which go '
        'with more than one matrix): by layer, such models are not compared'
      )
    layers, kind = (-1,), name
    for stack, known in (('stack', config.places), ('encoder', None)):
      if name.startswith(f'{stack}.blocks.'):
        block, kind = name.removeprefix(f'{stack}.blocks.').split('.', 1)
        layers = known[int(block)][1] if known else range(len(each))
        kind = kind if known else f'encoder {kind}'
    found += [MatrixPlace(layers[i], kind, name, i) for i, error in enumerate(each) if error > 0]
  return sorted(found)


def distances(original, smaller) -> dict[str, jax.Array]:
  """|W - W'| / |W| (Frobenius) of each layer of each parameter, [layers]. Traced.

  Raises ValueError where the two have not the same parameters.
  """
  before, after = _both(original, smaller)

  def distance(name, p):
    x, y = (read(one).numbers('float32') for one in (before[name], p))
    stacked = x.ndim > len(p.axes)
    x, y = (z.reshape(z.shape[0] if stacked else 1, -1) for z in (x, y))
    size = jnp.linalg.norm(x, axis=1)
    return jnp.linalg.norm(x - y, axis=1) / jnp.where(size > 0, size, 1)

  return {name: distance(name, p) for name, p in after.items()}


def exchanged(original, smaller, chosen: Mapping[str, jax.Array]):
  """The original with the smaller one's numbers where chosen, [layers] of bools by name. Traced."""
  before, _ = _both(original, smaller)

  def one(path, p):
    name = name_of(path)
    x = read(before[name]).numbers('float32')
    if name not in chosen:
      return p.replace(x)
    here = chosen[name] if x.ndim > len(p.axes) else chosen[name][0]
    here = here.reshape(here.shape + (1,) * (x.ndim - here.ndim))
    return p.replace(jnp.where(here, read(p).numbers('float32'), x))

  return jax.tree_util.tree_map_with_path(one, dequantised(smaller), is_leaf=is_param)


def _both(original, smaller) -> tuple[dict, dict]:
  """Parameters by name; where only the smaller one has a head of its own, the original's is its
  table.
  """
  before, after = by_name(original), by_name(smaller)
  if 'head.tokens' in after:
    before.setdefault('head.tokens', before['embedding.tokens'])
  for name in before.keys() | after.keys():
    shapes = [read(one[name]).shape if name in one else 'not there' for one in (before, after)]
    if shapes[0] != shapes[1]:
      raise ValueError(
        f'{name} is {shapes[0]} in one and {shapes[1]} in the other: layer by layer only models of '
        'the same shapes are compared'
      )
  return before, after
