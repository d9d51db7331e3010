"""How is a model changed layer by layer, each by what it sees? Rows of calibration go through the
layers one after another; a layer's statistics are taken, it is changed, and what the changed one
makes of the rows is what the next one sees.

On the device are one layer, its statistics, and a batch; hidden states of all rows lie in the
host's memory. A layer that is done is kept in a file (compression.kept), so that a process that is
killed goes on behind it, with the same bits.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from compression import calibration
from compression.calibration import InputStatistics
from compression.kept import Kept
from data.batch import Batch
from model.config import Kind, ModelConfig
from model.params import by_name, is_param, name_of
from model.transformer import Decoder, Output
from model.weights.weight import Weight
from parallel.remat import Remat

Log = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class LayerChange:
  """What is done to each layer.

  Attributes:
    make: (prefix, layer, statistics by name) -> the changed layer. Traced, once for all layers that
      are alike; every array of the layer has a first dimension of 1, and with the prefix its
      parameters have the names that they have in the model.
    wanted: (name, parameter) -> whether its statistics are taken.
    products: whether these have X^T X.
    instead: what the same command does without calibration, for errors.
  """

  make: Callable[[str, Any, Mapping[str, InputStatistics]], Any]
  wanted: Callable[[str, Any], bool]
  products: bool = True
  instead: str = '--method=rtn or mse'


def by_matrix(change: Callable[[str, Any, InputStatistics], Weight]) -> Callable:
  """A LayerChange's `make` of what is done to each wanted matrix by itself.

  change: (name, parameter, statistics) -> the weight in its place; here the parameter has no
    dimension of layers.
  """

  def make(prefix, layer, statistics):
    def one(path, p):
      name = f'{prefix}.{name_of(path)}'
      if name not in statistics:
        return p
      alone = p.replace(jax.tree.map(lambda x: x[0], p.get_value()))
      made = change(name, alone, statistics[name])
      return p.replace(jax.tree.map(lambda x: x[None], made))

    return jax.tree_util.tree_map_with_path(one, layer, is_leaf=is_param)

  return make


class Layer(NamedTuple):
  """Where a layer is: `side` is 'encoder' or 'stack', `number` counts there."""

  side: str
  place: int
  repeat: int
  number: int

  @property
  def prefix(self) -> str:
    return f'{self.side}.blocks.{self.place}'

  def __str__(self):
    return f'{"encoder " * (self.side == "encoder")}layer {self.number}'


def walk(
  model: Decoder, batches: Sequence[Batch], change: LayerChange, log: Log, kept: Kept | None = None
) -> Decoder:
  """The model with all its layers changed, on the mesh in context, of one device.

  batches: rows of calibration, all of one shape, on the host; an encoder-decoder's with sources.
  kept: where layers that are done lie; None: nowhere.
  Raises NotImplementedError for what is not walked through; ValueError for too few tokens, and
    where a matrix is multiplied with what is no number, or becomes that.
  """
  _check(model.config, change.instead)
  check_tokens(model, batches, change)
  every = layers_of(model.config)
  done: dict[tuple[str, int], list] = {}
  memory = [None] * len(batches)
  seen = jax.jit(_statistics, static_argnames=('layer', 'change'))
  run = jax.jit(through, static_argnames='side')
  make = jax.jit(change.make, static_argnums=0)
  add = jax.jit(_added, donate_argnums=0)
  shell, began, here = without_layers(model), time.perf_counter(), 0

  @functools.lru_cache
  def shapes(layer):
    block = getattr(model, layer.side).blocks[layer.place]
    block = jax.eval_shape(lambda block: jax.tree.map(lambda x: x[:1], block), block)
    zeros = jax.eval_shape(functools.partial(_zeros, block, layer.prefix, change))
    return jax.eval_shape(functools.partial(change.make, layer.prefix), block, zeros)

  for side in dict.fromkeys(layer.side for layer in every):
    enter = jax.jit(functools.partial(entered, side=side))
    states = [np.asarray(enter(shell, batch, read)) for batch, read in zip(batches, memory)]
    stack = getattr(model, side)
    for layer in (layer for layer in every if layer.side == side):
      block = jax.tree.map(lambda x: x[layer.repeat : layer.repeat + 1], stack.blocks[layer.place])
      place = layer._replace(repeat=0, number=0)  # what programs are made of
      made = None if kept is None else kept.read(str(layer), shapes(place), log)
      if made is None:
        sums = None
        for x, batch, read in zip(states, batches, memory):
          now = seen(shell, block, x, batch, read, layer=place, change=change)
          sums = now if sums is None else add(sums, now)
        sums = _checked(layer, block, sums, log)
        made = jax.device_get(make(layer.prefix, block, sums))
        _check_made(layer, made, change.instead)
        if kept is not None:
          kept.write(str(layer), made)
        here += 1
        behind = len(every) - 1 - every.index(layer)
        left = (time.perf_counter() - began) / here * behind
        log(f'{layer} of {len(every)}: done; about {left / 60:.1f} minutes more')
      done.setdefault((side, layer.place), []).append(made)
      states = [
        np.asarray(run(shell, made, x, batch, read, side=side))
        for x, batch, read in zip(states, batches, memory)
      ]
    if side == 'encoder':
      normed = jax.jit(lambda shell, x: shell.encoder.normed(x))
      memory = [np.asarray(normed(shell, x)) for x in states]
  return _joined(model, done)


def layers_of(config: ModelConfig) -> list[Layer]:
  """In the order in which tokens meet them."""
  encoder, first = [], 0
  for place, (_, repeats) in enumerate(config.encoder_stacks if config.encoder_layers else ()):
    encoder += [Layer('encoder', place, r, first + r) for r in range(repeats)]
    first += repeats
  decoder = [
    Layer('stack', place, repeat, number)
    for place, (_, numbers) in enumerate(config.places)
    for repeat, number in enumerate(numbers)
  ]
  return encoder + sorted(decoder, key=lambda layer: layer.number)


def check_tokens(model: Decoder, batches: Sequence[Batch], change: LayerChange) -> None:
  """Raises ValueError where a matrix sums over more numbers than there are tokens, so that they
  cannot tell its inputs apart. Experts, who see a part of them, are looked at in the walk.
  """
  if not change.products:
    return
  for layer in layers_of(model.config):
    block = getattr(model, layer.side).blocks[layer.place]
    for name, p in calibration.matrices(block, layer.prefix).items():
      field = 'source_segments' if _of_source(name) else 'segments'
      tokens = sum(int((getattr(batch, field) > 0).sum()) for batch in batches)
      _, inputs = calibration.sizes_of(p)
      if change.wanted(name, p) and tokens < inputs and 'experts' not in p.axes:
        raise ValueError(
          f'{tokens:,} tokens of calibration are fewer than the {inputs:,} inputs of {name}, which '
          'they would leave undetermined; give more samples, longer ones, or more text'
        )


def estimate(model: Decoder, batches: Sequence[Batch], change: LayerChange) -> dict[str, int]:
  """Bytes of `layer` and `statistics`, of the largest layer, on the device, and of `states` on the
  host; `flops` of all.
  """
  layer_bytes = statistics = flops = 0
  tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
  for layer in layers_of(model.config):
    block = getattr(model, layer.side).blocks[layer.place]
    leaves, repeats = jax.tree.leaves(block), jax.tree.leaves(block)[0].shape[0]
    layer_bytes = max(layer_bytes, sum(x.size * x.dtype.itemsize for x in leaves) // repeats)
    sums = jax.eval_shape(functools.partial(_zeros, block, layer.prefix, change))
    statistics = max(statistics, sum(4 * math.prod(x.shape) for x in jax.tree.leaves(sums)))
    # Twice through the layer, a sum of outer products, and about as much to invert it.
    flops += 4 * tokens * sum(x.size for x in leaves) // repeats
    for name, p in calibration.matrices(block, layer.prefix).items():
      if name in sums and change.products:
        (lead, inputs), size = calibration.sizes_of(p), math.prod(p.shape) // repeats
        flops += 2 * tokens * inputs**2 + 2 * inputs * size + 4 * math.prod(lead) * inputs**3
  config = model.config
  rows = sum(batch.tokens.size for batch in batches)
  if config.encoder_layers:
    rows += sum(batch.source.size for batch in batches)
  width = config.D * jnp.dtype(config.stream_dtype).itemsize
  return {
    'layer': layer_bytes,
    'statistics': statistics,
    'states': rows * width,
    'flops': flops,
  }


def _check(config: ModelConfig, instead: str) -> None:
  if config.shared_layers > 1:
    raise NotImplementedError(
      f'model.shared_layers={config.shared_layers}: a layer that is used again and again sees more '
      f'than one thing; use {instead}, without calibration'
    )
  sizes = jax.sharding.get_abstract_mesh().shape
  if math.prod(sizes.values() or [1]) > 1:
    raise NotImplementedError(f'calibration is on one device, and the mesh has {dict(sizes)}')


def _of_source(name: str) -> bool:
  return name.startswith('encoder.') or '.cross.k' in name or '.cross.v' in name


class _Given:
  """In the place of an embedding or a stack: what comes out of it."""

  def __init__(self, x):
    self.x = x

  def __call__(self, x, *_):
    return self.x if self.x is not None else Output(x, None, None)

  def prefix(self, tokens):
    return None


def without_layers(model: Decoder) -> Decoder:
  """The model without its layers."""
  shell = jax.tree.map(lambda x: x, model)  # a copy, to be written to
  for side in ('stack', 'encoder'):
    if hasattr(shell, side):
      getattr(shell, side).blocks = nnx.List([])
  shell.config = dataclasses.replace(model.config, logit_scale=1.0)
  return shell


def entered(shell: Decoder, batch: Batch, memory, side: str):
  """What the first layer of a side sees. Traced."""
  return _called(shell, batch, side, memory, _Given(None))


def through(shell: Decoder, block, x, batch: Batch, memory, side: str):
  """What a layer makes of x. Traced."""
  model = jax.tree.map(lambda x: x, shell)
  stack = getattr(model, side)
  stack.blocks = nnx.List([block])
  # A stack of it alone, whose result no norm and no cast follows.
  stack.periods, stack.shared, stack.remat = (((Kind(),), 1),), 1, Remat()
  stack.norm, stack.dtype = None, model.config.stream_dtype
  model.embedding = _Given(x)
  return _called(model, batch, side, memory, stack)


def _called(model: Decoder, batch: Batch, side: str, memory, stack):
  """What `stack` makes of the model's tokens, or sources."""
  model = jax.tree.map(lambda x: x, model)
  setattr(model, side, stack)
  if side == 'encoder':
    return model.encode(batch.source, batch.source_positions, batch.source_segments)
  more = {}
  if memory is not None:
    model.encoder = _Given(Output(memory, None, None))
    more = {
      name: getattr(batch, name) for name in ('source', 'source_positions', 'source_segments')
    }
  return model(batch.tokens, batch.positions, batch.segments, **more).hidden


def _zeros(block, prefix: str, change: LayerChange):
  return calibration.begun(block, change.wanted, prefix, change.products)


def _statistics(shell, block, x, batch, memory, layer: Layer, change: LayerChange):
  """Of a layer's matrices, by name. Traced."""
  real = {'': batch.segments > 0}
  if hasattr(batch, 'source'):
    real['cross'] = batch.source_segments > 0
    real[''] = real['cross'] if layer.side == 'encoder' else real['']

  def total(zeros):
    watched = calibration.watched(block, layer.prefix, real, zeros)
    return through(shell, watched, x, batch, memory, layer.side).sum(dtype=jnp.float32)

  return jax.grad(total)(_zeros(block, layer.prefix, change))


def _added(sums, more):
  return {name: sums[name].and_of(more[name]) for name in sums}


def _checked(
  layer: Layer, block, sums: dict[str, InputStatistics], log: Log
) -> dict[str, InputStatistics]:
  """Statistics that can be used: of numbers, and of experts that saw something.

  An expert that saw fewer tokens than it has inputs gets the sums of all experts where these have
  the same inputs, and otherwise (down, whose inputs are its own) ones as if its inputs were all
  alike and independent, by which its numbers are rounded.
  """
  parameters = calibration.matrices(block, layer.prefix)
  for name, found in sums.items():
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found)):
      raise ValueError(
        f'{name} of {layer} is multiplied with NaN or infinity, on rows of calibration; look at '
        'the model (python generate.py), or at the layers before it, and leave out by a pattern '
        'what overflows'
      )
    p = parameters[name]
    (_, inputs) = calibration.sizes_of(p)
    if 'experts' not in p.axes:
      if dead := int((found.squares == 0).sum()):
        log(
          f'NOTE: {dead} of the {inputs} inputs of {name} are 0 for all tokens of calibration: '
          f'nothing is known of what they are multiplied with in {layer}'
        )
      continue
    few = np.flatnonzero(np.asarray(found.count) < inputs)
    if len(few):
      own = name.endswith('.down')
      instead = 'as if its inputs were independent' if own else 'by what all experts see'
      log(
        f'NOTE: {name} of {layer}: of {len(found.count)} experts, {_listed(few)} saw fewer tokens '
        f'than the {inputs} inputs: {"they are" if len(few) > 1 else "it is"} changed {instead}'
      )
      sums[name] = calibration.filled(found, few, own)
  return sums


def _check_made(layer: Layer, block, instead: str) -> None:
  """Raises ValueError where what made up for the rest is no number."""
  for name, p in by_name(block).items():
    floats = (x for x in jax.tree.leaves(p) if jnp.issubdtype(x.dtype, jnp.floating))
    if not all(np.isfinite(x).all() for x in floats):
      raise ValueError(
        f'{layer.prefix}.{name} of {layer} holds NaN or infinity now: its inputs are too much '
        f'alike for f32 to tell them apart; give more samples, or use {instead}'
      )


def _listed(numbers: np.ndarray) -> str:
  shown = ', '.join(map(str, numbers[:8]))
  return shown + (f' and {len(numbers) - 8} more' if len(numbers) > 8 else '')


def _joined(model: Decoder, done: Mapping[tuple[str, int], list]) -> Decoder:
  """The model with other layers in the place of its own."""
  model = jax.tree.map(lambda x: x, model)
  for side in dict.fromkeys(side for side, _ in done):
    getattr(model, side).blocks = nnx.List(
      [
        jax.tree.map(lambda *xs: jnp.asarray(np.concatenate(xs)), *done[side, place])
        for place in range(len(getattr(model, side).blocks))
      ]
    )
  return model
