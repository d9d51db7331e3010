"""How does a run go on whose optimizer state fits neither the devices nor their hosts? From disk, a
few layers at a time.

ZeRO-Infinity (Rajbhandari et al., arXiv:2104.07857): a step is one program for the gradients and
then one for each part of the parameters (training.update), a few layers of it at a time. Threads
read state ahead of the update that needs it, the first of it while gradients are computed, and
write it behind; so no more than AHEAD + BEHIND + 1 slices of state are in memory at once.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax

from model.params import named_leaves
from parallel import compiler, offload
from training import state as states, update
from training.disk import OnDisk

SLICE = (
  2**26
)  # bytes of the state of a process's devices that are updated at once, where a layer has no more
AHEAD, BEHIND = 2, 2


def on_disk(state, directory):
  """An abstract train state with the arrays of its optimizer in files that `directory` is to hold;
  scalars stay.
  """

  def place(x):
    return OnDisk(x.shape, x.dtype, x.sharding, directory) if x.ndim else x

  return dataclasses.replace(state, optimizer=jax.tree.map(place, state.optimizer))


def begin(config, state, target):
  """A train state whose optimizer, None before, is at its beginning, in the files of `target`."""
  trained, _ = states.rule(config).parted(state.models)
  leaves, model = named_leaves(target.optimizer), named_leaves(trained)
  for part, first, layers in _slices(update.split(config, trained, together=False), leaves):
    # Layers begin alike, and as zeros do: the parameters are not looked at.
    def make(p):
      return [
        x[:layers] if x.ndim else x
        for x in jax.tree.leaves(part.optimizer.init(part.model.unflatten(offload.to_device(p))))
      ]

    for name, x in zip(
      part.state_names, jax.jit(make)([model[name] for name in part.names]), strict=True
    ):
      if x.ndim:
        leaves[name].write(_like(x, leaves[name]), first)
      else:
        leaves[name] = x
  return dataclasses.replace(
    state, optimizer=jax.tree.unflatten(jax.tree.structure(target.optimizer), leaves.values())
  )


def _like(x, file):
  """x sharded as a file is."""
  return (
    x if x.sharding.is_equivalent_to(file.sharding, x.ndim) else jax.device_put(x, file.sharding)
  )


def _slices(parts, leaves):
  """(part, first layer, layers) in the order of updates; layers is None for a part that is updated
  whole.
  """
  for part in parts:
    of_layer = sum(leaves[n].nbytes for n in part.state_names if leaves[n].ndim) // max(
      1, part.layers
    )
    step = max(1, min(part.layers, SLICE // max(1, of_layer)))
    for first in range(0, max(1, part.layers), step):
      yield part, first, min(step, part.layers - first) if part.layers else None


class SpilledStep:
  """A training step with the optimizer's state on disk: the parts of training.step, of what is
  trained of a state.

  Args:
    prepared: (gradients, measured) -> gradients as the optimizer takes them.
  """

  def __init__(self, config, gradients: Callable, prepared: Callable, advance: Callable):
    self._config, self._prepared = config, prepared
    options = compiler.options(config.train.compiler)
    self._gradients = jax.jit(gradients, compiler_options=options)
    self._advance = jax.jit(advance, donate_argnums=0)
    self._threads = concurrent.futures.ThreadPoolExecutor(AHEAD + BEHIND, 'spill')
    self._programs: dict[update.Section, Callable] = {}

  def lower(self, state, frozen, batch) -> jax.stages.Lowered:
    """The program of the gradients, which is the larger one, lowered."""
    return self._gradients.lower(dataclasses.replace(state, optimizer=None), frozen, batch)

  def __call__(self, state, frozen, batch):
    bare = dataclasses.replace(state, optimizer=None)
    grads, measured, metrics, norms = self._gradients(bare, frozen, batch)
    optimizer, models = self._update(measured, grads, state.optimizer, state.models)
    del grads
    return (
      dataclasses.replace(
        self._advance(dataclasses.replace(bare, models=models), measured), optimizer=optimizer
      ),
      metrics,
      norms,
    )

  def _update(self, measured, grads, state, model):
    def program(part):
      return jax.jit(
        functools.partial(_advance_part, part, self._prepared), static_argnums=0, donate_argnums=1
      )

    self._programs = self._programs or {
      part: program(part) for part in update.split(self._config, model, together=False)
    }
    structures = jax.tree.structure(state), jax.tree.structure(model)
    grads, leaves, model = named_leaves(grads), named_leaves(state), named_leaves(model)
    scalars = {name: x for name, x in leaves.items() if not x.ndim}
    slices = [*_slices(self._programs, leaves)]
    reads, writes, coming = collections.deque(), collections.deque(), iter(slices)

    def read(part, first, layers):
      files = [leaves[name] if leaves[name].ndim else None for name in part.state_names]
      reads.append(
        self._threads.submit(lambda: [file and file.read(first, layers) for file in files])
      )

    for slice_ in itertools.islice(coming, AHEAD):
      read(*slice_)
    for part, first, layers in (
      slices if measured.finite else ()
    ):  # nothing is written of a step that is skipped
      rows = reads.popleft().result()
      for slice_ in itertools.islice(coming, 1):
        read(*slice_)
      rows = [scalars[name] if row is None else row for name, row in zip(part.state_names, rows)]
      parameters, rows = self._programs[part](
        layers,
        [model[n] for n in part.names],
        [grads[n] for n in part.names],
        rows,
        measured,
        first,
      )
      model |= zip(part.names, parameters, strict=True)
      new = dict(zip(part.state_names, rows, strict=True))
      leaves |= {name: x for name, x in new.items() if name in scalars}
      writes.append(
        self._threads.submit(
          _write,
          [(leaves[n], _like(x, leaves[n])) for n, x in new.items() if n not in scalars],
          first,
        )
      )
      del rows, new, parameters
      if not layers or first + layers == part.layers:
        for name in part.names:
          del grads[name]
      if len(writes) > BEHIND:
        writes.popleft().result()
    for future in (*reads, *writes):
      future.result()
    return structures[0].unflatten(leaves.values()), structures[1].unflatten(model.values())


def _write(rows, first):
  for file, x in rows:
    file.write(x, first)


def _advance_part(part, prepared, layers, parameters, grads, state, measured, first):
  """The parameters of a part with `layers` of them, from `first` on, updated; and the new state of
  those.
  """

  def cut(x):
    return x if layers is None else jax.lax.dynamic_slice_in_dim(x, first, layers)

  own, grads = offload.to_device(([cut(x) for x in parameters], [cut(x) for x in grads]))
  new_state, new = part.update(measured.finite, prepared(grads, measured), state, own)
  new = offload.back(new, parameters)
  if layers is not None:
    new = [jax.lax.dynamic_update_slice_in_dim(x, y, first, 0) for x, y in zip(parameters, new)]
  return new, new_state
