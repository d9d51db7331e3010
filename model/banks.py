"""How do several adapters come onto one model? Each matrix becomes a bank of their updates
(model.weights.bank), from which each row of a batch takes its own.

n adapters · Z rank
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from model.adaptation import AdapterConfig
from model.adapters import Adapter, inputs_of
from model.config import ModelConfig
from model.params import is_param, name_of
from model.rearranged import stacked_names
from model.weights import read
from model.weights.bank import Bank
from model.weights.low_rank import LowRank
from model.weights.plain import Plain
from parallel import axes as ax

REMEDY = 'merge it into a run of its own (convert.py merge), and generate with that'


def banked(
  model,
  stored: ModelConfig,
  adapters: Sequence[Adapter | None],
  configs: Sequence[AdapterConfig | None],
  names: Sequence[str] = (),
  rank: int = 0,
):
  """The model, as generation holds it, with these adapters on it, for model.weights.of_rows. On
  the mesh in context, and traced: use under jit.

  Args:
    stored: config of the model that the adapters were trained on, which names their matrices.
    adapters, configs: of each place; None is a place for later. Others of the same targets and
      kind, of ranks up to `rank`, make a model of the same shapes: nothing compiles anew for it.
    names: of the adapters, for errors. rank: Z; 0: the largest.
  Raises ValueError for adapters that are not of this model, and for a rank below theirs;
  NotImplementedError for what a bank does not hold, and over pipeline stages.
  """
  if ax.size('layers') > 1:
    raise NotImplementedError(
      f'several adapters over mesh.stage={ax.size("layers")}; use a mesh without stages'
    )
  names = names or [str(i + 1) for i in range(len(adapters))]
  for name, config in zip(names, configs, strict=True):
    if config is not None and config.soft:
      raise NotImplementedError(
        f'adapter {name!r} has soft tokens (adapter.kind={config.kind!r}), which are ids before a '
        'text and no matrices: put it on with model.soft.together (decode.beside does both)'
      )
  ranks = [config.rank for config in configs if config is not None]
  rank = rank or max(ranks, default=0)
  if max(ranks, default=0) > rank:
    raise ValueError(f'rank={rank} of a bank is below that of an adapter, {max(ranks)}; raise it')

  stacked, left = stacked_names(stored), {name for a in adapters for name in a or ()}

  def put(path, p):
    source, layer = stacked(name_of(path))
    pairs = [(a or {}).get(source) for a in adapters]
    if not any(pairs):
      return p
    left.discard(source)
    _check_matrix(source, p, [name for name, pair in zip(names, pairs) if pair])
    return p.replace(_bank(p, pairs, configs, rank, layer, model.config.execution.dtype))

  adapted = jax.tree_util.tree_map_with_path(put, model, is_leaf=is_param)
  if left:
    raise ValueError(f'adapters have matrices that this model has not: {", ".join(sorted(left))}')
  return adapted


@functools.partial(jax.jit, static_argnames=('stored', 'configs', 'names'))
def _banks(model, stored, adapters, configs, names) -> dict[str, Bank]:
  """Those of `banked` by their matrices' names, without these: what a program returns as it came is
  a copy.
  """
  leaves = jax.tree_util.tree_leaves_with_path(
    banked(model, stored, adapters, configs, names), is_leaf=is_param
  )
  values = {name_of(path): p.get_value() for path, p in leaves}
  return {
    name: dataclasses.replace(value, base=None)
    for name, value in values.items()
    if isinstance(value, Bank)
  }


def with_adapters(
  model, stored: ModelConfig, adapters: Mapping[str, tuple[Adapter, AdapterConfig]]
):
  """The model with these adapters by name, as `banked`, whose errors it raises. Their numbers are
  finite: others would reach all rows (decode.beside looks).
  """
  trees, configs = zip(*adapters.values())
  known = _banks(model, stored, trees, configs=configs, names=tuple(adapters))

  def put(path, p):
    bank = known.get(name_of(path))
    return p if bank is None else p.replace(dataclasses.replace(bank, base=read(p)))

  return jax.tree_util.tree_map_with_path(put, model, is_leaf=is_param)


def _check_matrix(name: str, p: nnx.Param, adapters: Sequence[str]) -> None:
  kinds = {
    'a table': p.kind == 'embedding',
    'of experts, where tokens of all rows meet': 'experts' in read(p).axes,
    'a router': p.wide,
  }
  for words, is_one in kinds.items():
    if is_one:
      raise NotImplementedError(
        f'adapter {adapters[0]!r} has {name} among its adapter.targets, {words}, which rows do not '
        f'have one each of so far; train it without, or {REMEDY}'
      )


def _bank(
  p: nnx.Param,
  pairs: Sequence[Mapping[str, nnx.Param] | None],
  configs: Sequence[AdapterConfig | None],
  rank: int,
  layer: int | None,
  dtype: str,
) -> Bank:
  """Of one matrix, [1, ...] of a layer; each adapter's pair is of all layers of its place."""
  weight, inputs = read(p), inputs_of(p)
  axes, shape = tuple(weight.axes), tuple(weight.shape)
  stacked = len(shape) - len(axes)
  front, ins, outs = shape[:stacked], shape[stacked : stacked + inputs], shape[stacked + inputs :]
  layers = (None,) * stacked
  axes_a, axes_b = (*axes[:inputs], None), (None, *axes[inputs:])
  pairs = [pair and {part: _of_layer(p, layer) for part, p in pair.items()} for pair in pairs]

  def many(value_of, axes, shape, missing=0):
    """[layers, n, ..] of every adapter."""
    values = []
    for pair, config in zip(pairs, configs, strict=True):
      value = None if pair is None else value_of(pair, config)
      if value is None:
        value = missing + jnp.zeros((*front, *shape), out_sharding=ax.out(*layers, *axes))
      values.append(ax.place(value, *layers, *axes))
    return jnp.stack(values, stacked)

  def padded(x, at):
    """With zeros up to the rank in a dimension."""
    padding = [(0, 0)] * x.ndim
    padding[at] = (0, rank - x.shape[at])
    return jnp.pad(x, padding)

  def stretch(pair, config):
    if 'magnitude' not in pair:
      return None
    thin = Plain(pair['a'], axes_a), Plain(pair['b'], axes_b)
    magnitude = Plain(pair['magnitude'], axes[inputs:])
    return LowRank(weight, *thin, magnitude, config.scale, inputs).stretch()

  a = many(lambda pair, _: padded(pair['a'], -1), axes_a, (*ins, rank))
  b = many(lambda pair, c: c.scale * padded(pair['b'], stacked), axes_b, (rank, *outs))
  stretched = None
  if any('magnitude' in pair for pair in pairs if pair):
    stretched = Plain(many(stretch, axes[inputs:], outs, 1), (None, *axes[inputs:]))
  a, b = Plain(a.astype(dtype), (None, *axes_a)), Plain(b.astype(dtype), (None, *axes_b))
  return Bank(weight, a, b, stretched, None, inputs)


def _of_layer(p: nnx.Param, layer: int | None) -> jax.Array:
  """[1, ...] of a parameter of several layers; all of one that is of none."""
  x = read(p).numbers('float32')
  if layer is None or len(x) == 1:
    return x
  return jax.lax.slice_in_dim(x, layer, layer + 1)
