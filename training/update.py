"""How is a large model updated in little memory? A part of its parameters at a time, with its part
of the optimizer's state.

Optimizers here look at one parameter at a time (the gradient's norm, which is of all, is taken
before), and most of them at one element at a time. So the parts of a model can be updated one after
another, and of stacked parameters a layer at a time, with the same result.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import optax

from model import params
from model.params import named_leaves
from parallel import axes as ax, offload
from training import precision
from training.optimizer import make_optimizer

# They look at one element of a parameter, or a block, at a time, whatever its shape.
LAYERWISE = ('adamw', 'adam8bit', 'lion', 'sgd')


class Measured(NamedTuple):
  """What an update takes of all gradients together: what they are to be divided by, the norm that
  they then have, whether they are finite; and what fell on each expert (None without experts).
  """

  divisor: Any
  norm: Any
  finite: Any
  load: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
  """Some parameters of a model.

  Attributes:
    names: of the parameters. state_names: of the leaves of their optimizer state, scalars, which
      all parts share, among them.
    layers: how many layers all of these are stacks of; 0 where they are none, or the optimizer
      needs them whole.
    optimizer: their transformation. model, state: structures of what it works on.
  """

  names: tuple[str, ...]
  state_names: tuple[str, ...]
  layers: int
  optimizer: optax.GradientTransformation
  model: Any
  state: Any

  def update(self, finite, grads: list, state: list, parameters: list) -> tuple[list, list]:
    """The new state and parameters; those before where the step is not `finite`."""
    before = self.model.unflatten(parameters)
    updates, after = self.optimizer.update(
      self.model.unflatten(grads), self.state.unflatten(state), before
    )
    # State keeps its type, which gradients wider than their parameters would widen.
    kept = [x.astype(old.dtype) for x, old in zip(jax.tree.leaves(after), state)]
    moved = jax.tree.leaves(optax.apply_updates(before, updates))
    return precision.select(finite, (kept, moved), (state, parameters))


def whole(optimizer: optax.GradientTransformation, model, state) -> Section:
  """A model in one part."""
  return Section(
    tuple(named_leaves(model)),
    tuple(named_leaves(state)),
    0,
    optimizer,
    jax.tree.structure(model),
    jax.tree.structure(state),
  )


def split(config, model, together: bool = True) -> list[Section]:
  """A model, abstract or not, in parts of one parameter; or of all that are stacks of as many
  layers, where that makes no difference.

  config: of the run.
  """
  specs, groups, parts = params.specs(model), {}, []
  by_layer = config.optimizer.name in LAYERWISE and ax.size('layers') == 1
  for name, spec in named_leaves(specs).items():
    layers = spec.shape[0] if by_layer and spec.axes[0] == 'layers' else 0
    groups.setdefault((layers, '' if layers and together else name), []).append(name)
  for (layers, _), names in groups.items():
    # What is of another part is None in both.
    picked = jax.tree.unflatten(
      jax.tree.structure(specs),
      [spec if name in names else None for name, spec in named_leaves(specs).items()],
    )
    part = jax.tree.map(lambda spec, p: spec and p, picked, model, is_leaf=lambda x: x is None)
    optimizer = make_optimizer(config.optimizer, config.train.steps, picked, whole=False)
    parts.append(
      dataclasses.replace(
        whole(optimizer, part, jax.eval_shape(optimizer.init, part)), layers=layers
      )
    )
  return parts


def run(parts: Iterable[Section], prepared: Callable, measured: Measured, grads, state, model):
  """The new state and model, each array where it lay before; of what lies in the host's memory a
  layer is on the device at a time.

  prepared: (gradients, measured) -> gradients as the optimizer takes them.
  """
  leaves = [named_leaves(tree) for tree in (grads, state, model)]
  new_state, new_model = dict(leaves[1]), {}

  for part in parts:
    of_part = [
      [tree[name] for name in names]
      for tree, names in zip(leaves, (part.names, part.state_names, part.names))
    ]
    advance = _by_layer if part.layers else _at_once
    part_state, part_model = advance(part, prepared, measured, *of_part)
    new_state |= zip(part.state_names, part_state, strict=True)
    new_model |= zip(part.names, part_model, strict=True)

  def rebuilt(tree, leaves):
    return jax.tree.unflatten(
      jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)]
    )

  return rebuilt(state, new_state), rebuilt(model, new_model)


def _at_once(part, prepared, measured, grads, state, parameters):
  before = state, parameters
  after = part.update(
    measured.finite, prepared(offload.to_device(grads), measured), *offload.to_device(before)
  )
  return offload.back(after, before)


def _by_layer(part, prepared, measured, grads, state, parameters):
  def cut(tree, i):
    return [jax.lax.dynamic_index_in_dim(x, i, keepdims=False) if x.ndim else x for x in tree]

  def put(tree, rows, i):
    return [
      jax.lax.dynamic_update_index_in_dim(x, y, i, 0) if x.ndim else y for x, y in zip(tree, rows)
    ]

  def layer(i, carry):
    # Scalars as they were before.
    rows = [x if before.ndim else before for x, before in zip(cut(carry[0], i), state)]
    after = _at_once(part, prepared, measured, cut(grads, i), rows, cut(carry[1], i))
    return tuple(put(tree, updated, i) for tree, updated in zip(carry, after))

  # Written in place: what a scan collects would be a second copy of all.
  return jax.lax.fori_loop(0, part.layers, layer, (state, parameters))
