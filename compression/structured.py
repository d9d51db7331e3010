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
import numpy as np

from model import transformer
from model.config import ModelConfig
from model.params import abstract
from model.weights import read

UNITS = ('heads', 'channels', 'layers')
Arrays = Mapping[str, np.ndarray]


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


def scores(
  model: transformer.Decoder, norms: Mapping[tuple[int, str], np.ndarray] | None
) -> dict[tuple[int, str], np.ndarray]:
  """Of the key/value groups, ('heads'), and channels of each layer.

  norms: of the inputs of (layer, 'attention.o' or 'feed_forward.down'); None: by magnitude.
  """
  found, config = {}, model.config
  for (block, row), layer in _layers(config).items():

    def of(name):
      p = functools.reduce(getattr, name.split('.'), model.stack.blocks[block])
      return None if p is None else np.asarray(read(p).numbers('float32')[row], np.float64)

    o = _norm(of('attention.o'), (2,))
    if norms is None:
      v = np.repeat(_norm(of('attention.v'), (0, 2)), config.N // of('attention.v').shape[1])
      heads = v * _norm(o, (1,))
    else:
      heads = _norm(norms[layer, 'attention.o'].reshape(o.shape) * o, (1,))
    found[layer, 'heads'] = _norm(heads.reshape(config.K, -1), (1,))
    if config.moe.experts:
      continue
    channels = _norm(of('feed_forward.down'), (1,))
    if norms is None:
      for name in ('up', 'gate') if config.gated else ('up',):
        channels = channels * _norm(of(f'feed_forward.{name}'), (0,))
    else:
      channels = channels * norms[layer, 'feed_forward.down'].reshape(-1)
    found[layer, 'channels'] = channels
  return found


def chosen(
  config: ModelConfig,
  small: ModelConfig,
  scores: Mapping[tuple[int, str], np.ndarray],
  influence: Sequence[float] | None,
) -> list[dict[str, np.ndarray]]:
  """Of each layer that stays: its number in the model, and which heads, kv_heads and feed_forward
  of it stay, in order.

  influence: of each layer, where some go.
  """

  def highest(values, count):
    return np.sort(np.argsort(-np.asarray(values), kind='stable')[:count])

  layers = range(config.L) if small.L == config.L else highest(influence, small.L)
  made = []
  for layer in map(int, layers):
    groups = np.arange(config.K)
    if small.K < config.K:
      groups = highest(scores[layer, 'heads'], small.K)
    heads = (groups[:, None] * config.G + np.arange(config.G)).ravel()
    picked = {'layer': layer, 'heads': heads, 'kv_heads': groups}
    if small.F < config.F:
      picked['feed_forward'] = highest(scores[layer, 'channels'], small.F)
    made.append(picked)
  kinds = [config.kinds[picked['layer']] for picked in made]
  if kinds != list(small.kinds):
    raise ValueError(
      'layers of this model differ (windows, experts), and those that are left follow one another '
      f'in another order than model.window, model.global_every and model.moe say: {kinds}; let '
      'another number stay, or prune heads and channels'
    )
  return made


def without(model: transformer.Decoder, small: ModelConfig, picked: Sequence[Mapping], mesh):
  """The model of `small` with what is picked of each layer, on the mesh in context."""
  config, target = model.config, abstract(functools.partial(transformer.init, small, 0), mesh)
  places, before = _layers(config), _named(model)
  old = {layer: place for place, layer in places.items()}
  new = _layers(small)

  def one(path, p):
    name = _name(path)
    value = p.get_value()
    parts = name.split('.')
    if parts[:2] != ['stack', 'blocks']:
      return p.replace(before[name].get_value())
    rest, rows = '.'.join(parts[3:]), []
    for row in range(value.shape[0]):
      of = picked[new[int(parts[2]), row]]
      block, index = old[of['layer']]
      x = np.asarray(before[f'stack.blocks.{block}.{rest}'].get_value()[index])
      for axis, logical in enumerate(p.axes):
        if logical in of and x.shape[axis] != value.shape[axis + 1]:
          x = x.take(of[logical], axis)
      rows.append(x)
    return p.replace(jax.device_put(np.stack(rows), value.sharding))

  return jax.tree_util.tree_map_with_path(one, target, is_leaf=_is_param)


def _layers(config: ModelConfig) -> dict[tuple[int, int], int]:
  """(block, row in it) -> layer."""
  return {
    (block, row): layer
    for block, (_, layers) in enumerate(config.places)
    for row, layer in enumerate(layers)
  }


def _norm(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
  return np.sqrt(np.square(x).sum(axes))


def _named(model) -> dict:
  flat = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_param)
  return {_name(path): p for path, p in flat}


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _is_param(x) -> bool:
  return hasattr(x, 'get_value')
