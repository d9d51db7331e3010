"""How are squared gradients kept in little memory? Adafactor: of each matrix its mean by row and by
column.

Shazeer and Stern, arXiv:1804.04235: algorithm 4, without momentum, its decay 1 - t^-0.8 and updates
clipped to RMS 1. optax's looks at arrays as they are stored: heads of 64 are too narrow for it to
factor, and layers that are stacked share factors and a clip. Here a matrix is one of one layer.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from parallel import axes as ax
from training.adam import wide_zeros

DECAY = 0.8  # of the schedule, section 7.2
SMALLEST = 128  # a matrix with less inputs or outputs is kept whole: there is little to save
LARGEST = 1.0  # RMS of an update, section 6


class Squares(NamedTuple):
  """Means of a parameter's squared gradients, decayed: by row (over outputs) and by column (over
  inputs), or of every element; None for what is not kept.
  """

  rows: Any
  columns: Any
  elements: Any


class _Step(NamedTuple):
  update: Any
  squares: Squares


class AdafactorState(NamedTuple):
  """count: updates so far. squares: a Squares in the place of each parameter."""

  count: Any
  squares: Any


def rescaling(settings: dict[str, float], specs, whole: bool) -> optax.GradientTransformation:
  """Gradients to updates at learning rate 1, before decay; see training.optimizer.OWN."""
  del whole
  return scale_by_adafactor(settings['epsilon'], specs)


def scale_by_adafactor(epsilon: float, specs) -> optax.GradientTransformation:
  """Gradients over the root of their factored squares, each matrix's clipped to RMS 1.

  epsilon: added to squared gradients. specs: see optimizer.make_optimizer.
  """

  def init(parameters):
    def squares(spec, p):
      # In bfloat16 they could only rise, as Adam's.
      return _squares(wide_zeros(p), spec)

    return AdafactorState(jnp.int32(0), _below(squares, specs, parameters))

  def update(updates, state, parameters=None):
    del parameters
    decay = 1 - (state.count + 1.0) ** -DECAY

    def step(spec, g, before):
      now = _squares(jnp.square(g) + epsilon, spec)
      kept = jax.tree.map(
        lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype), before, now
      )
      return _Step(_clipped(g * _inverse_root(kept, spec), spec), kept)

    steps = _below(step, specs, updates, state.squares)

    def pick(field):
      return jax.tree.map(
        lambda step: getattr(step, field), steps, is_leaf=lambda x: isinstance(x, _Step)
      )

    return pick('update'), AdafactorState(optax.safe_increment(state.count), pick('squares'))

  return optax.GradientTransformation(init, update)


def _below(function, specs, *trees):
  """function(spec, ..) of each parameter; specs may be a prefix, see muon.scale_by_muon."""

  def each(spec, *nodes):
    return jax.tree.map(lambda *leaves: function(spec, *leaves), *nodes)

  return jax.tree.map(each, specs, *trees)


def _dimensions(spec, shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The dimensions of a matrix that are its inputs and its outputs; () and all where it is none,
  or too small.
  """
  first = ax.stacks(spec.axes)
  # An embedding's rows are its inputs.
  split = first + (spec.inputs if spec.kind == 'matrix' else 1)
  inputs, outputs = tuple(range(first, split)), tuple(range(split, len(shape)))
  sizes = [math.prod(shape[i] for i in dimensions) for dimensions in (inputs, outputs)]
  if spec.kind == 'vector' or min(sizes) < SMALLEST:
    return (), tuple(range(first, len(shape)))
  return inputs, outputs


def _squares(squared, spec) -> Squares:
  inputs, outputs = _dimensions(spec, squared.shape)
  if not inputs:
    return Squares(None, None, squared)
  return Squares(squared.mean(outputs), squared.mean(inputs), None)


def _inverse_root(squares: Squares, spec):
  """1 / sqrt of what the squares stand for: rows times columns over their common mean, eq. 4."""
  rows, columns, elements = squares
  if elements is not None:
    return jax.lax.rsqrt(elements)
  first = ax.stacks(spec.axes)
  mean = rows.mean(range(first, rows.ndim), keepdims=True)
  rows = jax.lax.rsqrt(rows / mean)
  columns = jax.lax.rsqrt(columns)
  outputs = columns.ndim - first
  inputs = rows.ndim - first
  rows = jnp.expand_dims(rows, range(rows.ndim, rows.ndim + outputs))
  return rows * jnp.expand_dims(columns, range(first, first + inputs))


def _clipped(update, spec):
  """Each matrix, or vector, of a layer scaled down to an RMS of at most LARGEST."""
  one_layer = tuple(range(ax.stacks(spec.axes), update.ndim))
  rms = jnp.sqrt(jnp.mean(jnp.square(update), one_layer, keepdims=True))
  return update / jnp.maximum(1.0, rms / LARGEST)
