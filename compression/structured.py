"""Which heads, channels and layers can go, and what is the model without them? A smaller one of the
same kind, in smaller shapes.

    heads=6        query heads that stay in each layer, with the keys and values that they share
    channels=1024  of each feed-forward
    layers=20      of the stack

A unit scores by what it adds where it is read: |X_i| |W_i| of the matrix behind it, over its inputs
i (their norms X over tokens, of a calibration), or, by magnitude alone, the product of the norms of
the matrices that write and read it. A layer scores by 1 - cos(what comes in, what goes out), over
tokens: its influence (Men et al., arXiv:2403.03853).

L layers · N query heads · K key/value heads · F feed-forward width
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from compression import walk
from data.batch import Batch
from model import transformer
from model.config import ModelConfig
from model.params import abstract, by_name, is_param, name_of
from model.weights import read

UNITS = ('heads', 'channels', 'layers')


def parse(text: str) -> dict[str, int]:
  """Sizes by unit, of 'heads=6,channels=1024'; {} of a text that is of no units."""
  entries = [re.fullmatch(r'(\w+)=(\d+)', part) for part in text.split(',')]
  if not all(entries) or not {entry[1] for entry in entries} <= {*UNITS}:
    return {}
  return {entry[1]: int(entry[2]) for entry in entries}


def smaller(config: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
  """The config with so many units. Raises ValueError or NotImplementedError for what is none."""
  if config.encoder_layers or config.shared_layers > 1:
    raise NotImplementedError(
      'units go from a stack of layers with parameters of their own: not from an encoder-decoder, '
      'nor from layers that share them (model.shared_layers)'
    )
  if 'channels' in sizes and config.moe.experts:
    raise NotImplementedError(
      'channels of experts stay: they are of feed-forwards that all tokens pass; use heads= or '
      'layers='
    )
  if 'heads' in sizes and config.position == 'relative':
    raise NotImplementedError('heads of relative positions stay: all layers share their table')
  for unit, have, step in (
    ('heads', config.N, config.G),
    ('channels', config.F, 1),
    ('layers', config.L, 1),
  ):
    size = sizes.get(unit, have)
    if not 0 < size <= have or size % step:
      whole = f', and a multiple of the {step} that share keys and values' if step > 1 else ''
      raise ValueError(f'--scheme={unit}={size} is at least 1, at most {have}{whole}')
  changes = {'head_width': config.H, 'feed_forward': config.F, 'layers': config.L}
  if 'heads' in sizes:
    changes |= {'heads': sizes['heads'], 'kv_heads': sizes['heads'] // config.G}
  if 'channels' in sizes:
    changes |= {'feed_forward': sizes['channels']}
  return dataclasses.replace(config, **changes | {'layers': sizes.get('layers', config.L)})


def without(prefix: str, layer, statistics: Mapping, config: ModelConfig, small: ModelConfig):
  """A layer with the heads and channels that add most, whose arrays have a first dimension of 1.
  Traced.

  statistics: of what 'attention.o' and 'feed_forward.down' multiply, by name behind `prefix`
    (compression.calibration); {}: by magnitude.
  """

  def numbers(name):
    p = functools.reduce(getattr, name.split('.'), layer)
    return None if p is None else read(p).numbers('float32')[0]

  def added(name, x):
    """Norms of what each input of a matrix adds."""
    found = statistics.get(f'{prefix}.{name}')
    norm = _norm(x, (x.ndim - 1,))
    return norm if found is None else norm * jnp.sqrt(found.squares).reshape(norm.shape)

  picked = {}
  if small.N < config.N:
    heads = _norm(added('attention.o', numbers('attention.o')), (1,))
    if not statistics:
      v = _norm(numbers('attention.v'), (0, 2))
      heads = heads * jnp.repeat(v, config.N // len(v))
    groups = _highest(_norm(heads.reshape(config.K, -1), (1,)), small.K)
    every = groups[:, None] * config.G + jnp.arange(config.G)[None]
    picked |= {'heads': every.reshape(-1), 'kv_heads': groups}
  if small.F < config.F:
    channels = added('feed_forward.down', numbers('feed_forward.down'))
    for name in () if statistics else ('up', 'gate') if config.gated else ('up',):
      channels = channels * _norm(numbers(f'feed_forward.{name}'), (0,))
    picked['feed_forward'] = _highest(channels, small.F)

  def one(p):
    x = p.get_value()
    for axis, logical in enumerate(p.axes):
      if logical in picked:
        x = jnp.take(x, picked[logical], axis + 1)
    return p.replace(x)

  return jax.tree.map(one, layer, is_leaf=is_param)


def by_magnitude(model: transformer.Decoder, small: ModelConfig) -> transformer.Decoder:
  """The model whose layers have fewer heads and channels, and its old config; on one device."""
  run = jax.jit(functools.partial(without, '', statistics={}, config=model.config, small=small))
  made = jax.tree.map(lambda x: x, model)  # a copy, to be written to
  for block, layers in enumerate(jax.device_get(list(model.stack.blocks))):
    each = [run(layer=jax.tree.map(lambda x: x[i : i + 1], layers)) for i in range(_depth(layers))]
    each = jax.device_get(each)
    made.stack.blocks[block] = jax.tree.map(lambda *xs: jnp.asarray(np.concatenate(xs)), *each)
  return made


def influence(model: transformer.Decoder, batches: Sequence[Batch]) -> list[float]:
  """1 - cos(what comes in, what goes out) of each layer, over the tokens of calibration."""

  def apart(shell, block, x, batch):
    y = walk.through(shell, block, x, batch, None, 'stack')
    real = batch.segments > 0
    a, b = x.astype(jnp.float32), y.astype(jnp.float32)
    cos = (a * b).sum(-1) / jnp.maximum(_norm(a, (-1,)) * _norm(b, (-1,)), 1e-30)
    return jnp.where(real, 1 - cos, 0).sum(), y

  run, shell, found = jax.jit(apart), walk.without_layers(model), []
  enter = jax.jit(functools.partial(walk.entered, side='stack'))
  states = [enter(shell, batch, None) for batch in batches]
  tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
  for layer in walk.layers_of(model.config):
    blocks = model.stack.blocks[layer.place]
    block = jax.tree.map(lambda x: x[layer.repeat : layer.repeat + 1], blocks)
    sums, states = zip(*(run(shell, block, x, b) for x, b in zip(states, batches)))
    states = [np.asarray(x) for x in states]
    found.append(float(sum(sums)) / tokens)
    if not np.isfinite(found[-1]):
      raise ValueError(f'{layer} gives NaN or infinity on rows of calibration; look at the model')
  return found


def left(config: ModelConfig, small: ModelConfig, influence: Sequence[float] | None) -> list[int]:
  """The layers that stay, in order. Raises ValueError where they would not be those of `small`."""
  if small.L == config.L:
    return [*range(config.L)]
  layers = sorted(np.argsort(-np.asarray(influence), kind='stable')[: small.L].tolist())
  kinds = [config.kinds[layer] for layer in layers]
  if kinds != list(small.kinds):
    raise ValueError(
      f'layers {layers} would stay, which differ (windows, experts) and follow one another in '
      'another order than model.window, model.global_every and model.moe say; let another number '
      'stay, or prune heads and channels'
    )
  return layers


def joined(model: transformer.Decoder, small: ModelConfig, layers: Sequence[int], mesh):
  """The model of `small`, of the layers of `model` that stay; on the mesh in context."""
  target = abstract(functools.partial(transformer.init, small, 0), mesh)
  old = {layer: place for place, layer in _layers(model.config).items()}
  new = _layers(small)
  before = {name: np.asarray(p.get_value()) for name, p in by_name(model).items()}

  def one(path, p):
    name = name_of(path)
    value, parts = p.get_value(), name.split('.')
    if parts[:2] != ['stack', 'blocks']:
      return p.replace(jax.device_put(before[name], value.sharding))
    rows = []
    for row in range(value.shape[0]):
      block, index = old[layers[new[int(parts[2]), row]]]
      rows.append(before['.'.join(['stack.blocks', str(block), *parts[3:]])][index])
    return p.replace(jax.device_put(np.stack(rows), value.sharding))

  return jax.tree_util.tree_map_with_path(one, target, is_leaf=is_param)


def _layers(config: ModelConfig) -> dict[tuple[int, int], int]:
  """(block, row in it) -> layer."""
  return {
    (block, row): layer
    for block, (_, layers) in enumerate(config.places)
    for row, layer in enumerate(layers)
  }


def _highest(scores, count: int):
  """Places of the highest, in order."""
  return jnp.sort(jnp.argsort(-scores, stable=True)[:count])


def _depth(layers) -> int:
  return jax.tree.leaves(layers)[0].shape[0]


def _norm(x, axes: tuple[int, ...]):
  return jnp.sqrt(jnp.square(x).sum(axes))
