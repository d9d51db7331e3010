"""What fills a chip's memory? The compiler's bytes of a program, divided among what they hold."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from training.disk import OnDisk

HOST_KINDS = ('pinned_host', 'unpinned_host')


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each chip while a program runs.

  Attributes:
    parts: what holds how many, in order; their sum is `peak`. Arguments are exact, by their
      shardings; the compiler's padding of them is a part of its own. `gradients` are as large as
      the parameters that they belong to (all are alive before the update, which needs their norm)
      and are taken out of the compiler's temporaries.
    peak: arguments + outputs that take no argument's place + temporaries + code:
      what the compiler reserves.
    alive: the most that is alive at once by the compiler's own account (its peak_memory_in_bytes),
      None where it gives none or counts the host's memory with the chip's; the difference is lost
      between buffers of unequal sizes.
    host, disk: bytes in the host's memory and on its disk for each chip. (A run whose optimizer
      state is on disk has other programs besides, which update a few layers and are smaller.)
  """

  parts: dict[str, int]
  peak: int
  alive: int | None
  host: int
  disk: int = 0

  def share(self, available: float) -> float:
    """Of the memory that a chip has: above 1 it does not fit."""
    return self.peak / available


def shard_bytes(tree: Any, where: str = 'device') -> int:
  """Bytes of one device's shards of abstract or concrete arrays with shardings;
  of those on the 'device', its 'host' or 'disk'.
  """

  def place(x):
    if isinstance(x, OnDisk):
      return 'disk'
    kind = getattr(getattr(x, 'sharding', None), 'memory_kind', None)
    return 'host' if kind in HOST_KINDS else 'device'

  total = 0
  for x in jax.tree.leaves(tree):
    shape = x.sharding.shard_shape(x.shape) if getattr(x, 'sharding', None) is not None else x.shape
    if place(x) == where:
      total += math.prod(shape) * x.dtype.itemsize
  return total


def parts(
  compiled: jax.stages.Compiled,
  arguments: Mapping[str, Any],
  gradients_of: Any = (),
  beside: Mapping[str, int] = MappingProxyType({}),
) -> Memory:
  """Divides a compiled program's memory.

  Args:
    arguments: name -> tree of the arrays (abstract ones with shardings) that are passed. What is
      passed beyond them is named 'other arguments'.
    gradients_of: the parameters that the program differentiates.
    beside: bytes, by name, of what lies there meanwhile and is not passed.
  """
  stats = compiled.memory_analysis()
  passed = {name: shard_bytes(tree) for name, tree in arguments.items()}
  padding = max(0, stats.argument_size_in_bytes - sum(passed.values()))
  sizes = {**beside, **passed, 'padding and other arguments': padding}

  # Gradients are returned, by a program that leaves the update to others, or lie among temporaries.
  outputs = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
  gradients = shard_bytes(gradients_of)
  returned = min(gradients, outputs)
  inside = min(gradients - returned, stats.temp_size_in_bytes)
  if gradients:
    sizes['gradients'] = returned + inside
  sizes['activations and workspace'] = stats.temp_size_in_bytes - inside
  sizes['outputs in new memory'] = outputs - returned
  sizes['code'] = stats.generated_code_size_in_bytes
  apart = sum(beside.values())
  peak = apart + stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes + sizes['code']

  host = (
    stats.host_argument_size_in_bytes
    + max(0, stats.host_output_size_in_bytes - stats.host_alias_size_in_bytes)
    + stats.host_temp_size_in_bytes
  )
  disk = sum(shard_bytes(tree, 'disk') for tree in arguments.values())
  alive = 0 if host else getattr(stats, 'peak_memory_in_bytes', 0)
  return Memory(sizes, peak, alive + apart if alive else None, host, disk)
