"""How is a model adapted that stays as it is? Thin matrices beside some of its own, or soft tokens
before its texts (model/soft.py): made, put on, and merged.

An adapter is a tree of its own, {name of the matrix: {'a': .., 'b': .., ('magnitude': ..)}}, whose
leaves are parameters like any other: sharded as what they lie on, saved alone, trained alone.
`applied` gives the model in which the two are one (model.weights.low_rank).

Z rank
"""

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from model import soft
from model.adaptation import AdapterConfig
from model.params import by_name, is_param, name_of
from model.weights import read
from model.weights.low_rank import LowRank
from model.weights.plain import Plain
from parallel import axes as ax

Adapter = dict[str, dict[str, nnx.Param]]


def new(model, config: AdapterConfig, key: jax.Array, ids: Sequence[int] | None = None) -> Adapter:
  """A new adapter of a model, which may be abstract: B is zero, so that nothing changes yet; soft
  tokens are as they begin. On the mesh in context, and traced: use under jit or eval_shape.

  ids: of the text that soft tokens begin as, where they do.
  Raises ValueError for a pattern that matches no matrix, NotImplementedError for what cannot have
    an update of this kind.
  """
  if config.soft:
    return soft.new(model, config, key, ids)
  adapter = {}
  for i, (name, p) in enumerate(targets(model, config)):
    adapter[name] = _pair(p, config, jax.random.fold_in(key, i), name)
  return adapter


def targets(model, config: AdapterConfig) -> Iterator[tuple[str, nnx.Param]]:
  """The parameters that a config's patterns name, in the model's order. Raises as `new`."""
  known = {name: p for name, p in by_name(model).items() if p.kind in ('matrix', 'embedding')}
  # Tables and routers are adapted where they are meant, and not because a pattern is wide.
  wide = {name for name, p in known.items() if p.kind == 'embedding' or p.wide}
  chosen = set()
  for pattern in config.targets:
    matching = {
      name for name in fnmatch.filter(known, pattern) if name == pattern or name not in wide
    }
    if not matching:
      raise ValueError(
        f'adapter.targets: no matrix of the model is named like {pattern!r}; its matrices: '
        f'{", ".join(name for name in known if name not in wide)}; by their whole names only: '
        f'{", ".join(sorted(wide))}'
      )
    chosen |= matching
  for name, p in known.items():
    if name in chosen:
      if config.kind == 'dora' and (p.kind == 'embedding' or 'experts' in p.axes):
        raise NotImplementedError(
          f"adapter.kind='dora' of {name}, of which no device sees whole columns; use 'lora', or "
          'other adapter.targets'
        )
      yield name, p


def _pair(p: nnx.Param, config: AdapterConfig, key: jax.Array, name: str) -> dict[str, nnx.Param]:
  """The parameters of one matrix [experts, inputs, outputs], stacked by layers as it is."""
  weight = read(p)
  axes, shape = tuple(weight.axes), tuple(weight.shape)
  stacked, experts = len(shape) - len(axes), int('experts' in axes)
  inputs = inputs_of(p)
  first, last = stacked + experts, stacked + experts + inputs
  ins, outs = shape[first:last], shape[last:]
  if config.rank > min(math.prod(ins), math.prod(outs)):
    raise ValueError(
      f'adapter.rank={config.rank} is more than {name} has, a matrix of {math.prod(ins)} x '
      f'{math.prod(outs)}; lower it, or leave it out of adapter.targets'
    )
  layers = soft.layers_axis(p) * stacked
  front, axes_in, axes_out = (
    axes[:experts],
    axes[experts : experts + inputs],
    axes[last - stacked :],
  )

  def thin(values, axes, inputs, kind):
    placed = ax.place(values, *layers, *axes)
    return nnx.Param(placed, axes=axes, kind=kind, inputs=inputs, wide=False)

  # He et al.'s uniform with a slope of sqrt(5), as PEFT begins: a bound of 1 / sqrt(inputs).
  drawn = (*front, *axes_in, None)
  bound = math.prod(ins) ** -0.5
  a = bound * jax.random.uniform(
    key, (*shape[:last], config.rank), minval=-1, maxval=1, out_sharding=ax.out(*layers, *drawn)
  )
  raised = (*front, None, *axes_out)
  b = jnp.zeros((*shape[:first], config.rank, *outs), out_sharding=ax.out(*layers, *raised))
  pair = {'a': thin(a, drawn, inputs, p.kind), 'b': thin(b, raised, 1, p.kind)}
  if config.kind == 'dora':
    lengths = jnp.sqrt(jnp.square(weight.numbers('float32')).sum(range(first, last)))
    pair['magnitude'] = thin(lengths, axes_out, 1, 'vector')
  return pair


def inputs_of(p: nnx.Param) -> int:
  """Dimensions that a matrix contracts over; a table's is that of its rows."""
  return 1 if p.kind == 'embedding' else p.inputs


def applied(model, adapter: Adapter, config: AdapterConfig):
  """The model with the adapter on it: other weights in the same places, which share the arrays of
  both.
  """
  if config.soft:
    return soft.applied(model, adapter)

  def put(path, p):
    pair = adapter.get(name_of(path))
    return p if pair is None else p.replace(_updated(p, pair, config))

  return jax.tree_util.tree_map_with_path(put, model, is_leaf=is_param)


def merged(model, adapter: Adapter, config: AdapterConfig):
  """The model whose matrices are the sums, as numbers of the types that they have; of a base in
  bytes all are numbers, in f32. Soft tokens are no sum with anything: they are put on it.
  """
  low_rank = {} if config.soft else adapter

  def put(path, p):
    pair = low_rank.get(name_of(path))
    weight = read(p) if pair is None else _updated(p, pair, config)
    if isinstance(weight, Plain):
      return p
    return p.replace(ax.place(weight.numbers(weight.dtype), *_whole_axes(p)))

  model = jax.tree_util.tree_map_with_path(put, model, is_leaf=is_param)
  return soft.applied(model, adapter) if config.soft else model


def _whole_axes(p: nnx.Param) -> tuple[str | None, ...]:
  axes = tuple(read(p).axes)
  return soft.layers_axis(p) * (len(read(p).shape) - len(axes)) + axes


def _updated(p: nnx.Param, pair: Mapping[str, nnx.Param], config: AdapterConfig) -> LowRank:
  magnitude = read(pair['magnitude']) if 'magnitude' in pair else None
  a, b = read(pair['a']), read(pair['b'])
  return LowRank(read(p), a, b, magnitude, config.scale, inputs_of(p))
