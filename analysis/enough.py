"""How many chips hold what a training run carries? Known without compiling, from shapes and where
they lie.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

from analysis import aot, candidates, memory
from parallel.mesh import make_mesh
from training import program, state as states
from training.config import Config


def state_bytes(config: Config, mesh: jax.sharding.Mesh) -> dict[str, int]:
  """What a device holds of a run between and within steps whatever else it needs: parameters,
  optimizer state, and gradients, which are as large as what is trained.

  Raises as training.program.abstract_state does.
  """
  held = program.abstract_state(config, mesh)
  trained, _ = states.rule(config).parted(held.models)
  return {
    'parameters': memory.shard_bytes(held.models),
    'optimizer state': memory.shard_bytes(held.optimizer),
    'gradients': memory.shard_bytes(trained),
  }


class Enough(NamedTuple):
  """A topology over which the state of a run fits; least: bytes of it on each of its devices."""

  topology: str
  devices: int
  least: int


def smallest(config: Config, topology: str, slices: int, available: float) -> Enough | None:
  """The first topology, doubling from this one, where parameters, optimizer state and gradients
  alone fit, split further by fsdp; None where there is none, or where the batch does not divide.

  config: with its mesh resolved. available: bytes of a device.
  """
  sizes = config.mesh.sizes()
  count = math.prod(sizes.values())
  for name in larger(topology):
    try:
      devices = aot.topology(name, slices)
    except ValueError:  # there is no such slice
      return None
    mesh = sizes | {'fsdp': sizes['fsdp'] * len(devices) // count}
    if candidates.refused(config, mesh):
      return None
    grown = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
    least = sum(state_bytes(grown, make_mesh(grown.mesh, devices)).values())
    if least <= available:
      return Enough(name, len(devices), least)
  return None


def larger(topology: str) -> Iterator[str]:
  """Names of twice as many chips, of twice as many again: the smallest side of a slice grows, or
  the nodes of GPUs.
  """
  slices, kind, shape = re.fullmatch(r'(?:(\d+)\*)?(\w+):([\dx]+)', topology).groups()
  sizes = [int(n) for n in shape.split('x')]
  while 2 * int(slices or 1) * math.prod(sizes) <= aot.MOST_CHIPS:
    at = 1 if kind in aot.GPUS else min(reversed(range(len(sizes))), key=sizes.__getitem__)
    sizes[at] *= 2
    yield f'{slices}*' * bool(slices) + f'{kind}:' + 'x'.join(map(str, sizes))
