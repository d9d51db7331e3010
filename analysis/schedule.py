"""What moves between chips, and when does each chip wait?
Collectives and the timeline of a compiled program.

The compiler's text is the schedule: instructions run in order, collectives that are split into a
start and a done run beside what stands between. libtpu has a second form: a fusion that starts one
(AsyncCollectiveStart), fusions that carry it on beside their own products, one that ends it
(AsyncCollectiveDone). Between slices it sends and receives:
its runtime does what the send asks for.
"""

import collections
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

import names
from analysis import hlo
from analysis.hardware import Chip
from analysis.hlo import Instruction, Module

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of KINDS. axes: mesh axes that the members of a group differ in.
      size: members of a group.
    count: how often it runs in a step. nbytes: that a chip sends in one run,
      as a ring (or a direct exchange) does it; see `sent`.
    started: whether it is split into a start and a done, so that other work can run beside it.
    scope: where it comes from in the Python program.
      group: devices of one group, as indices into mesh.devices.flat.
  """

  kind: str
  axes: tuple[str, ...]
  size: int
  count: int
  nbytes: int
  started: bool
  scope: str
  group: tuple[int, ...]

  @property
  def total(self) -> int:
    """Bytes that a chip sends in a step."""
    return self.count * self.nbytes


def sent(kind: str, operand: int, result: int, size: int) -> int:
  """Bytes that each chip of a group sends over its links.

  Ring algorithms, bandwidth-optimal (Thakur et al. 2005): all-gather and reduce-scatter (n - 1) / n
  of the whole array, all-reduce both; all-to-all (n - 1) / n of what a chip holds;
  a permute all of it.
  """
  if size == 1:
    return 0
  whole = {
    'all-gather': result,
    'reduce-scatter': operand,
    'all-reduce': 2 * operand,
    'all-to-all': operand,
    'ragged-all-to-all': operand,
  }.get(kind)
  return operand if whole is None else whole * (size - 1) // size


def groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
  """The groups of a collective, from any of the forms in which XLA writes them;
  of a permute one pair each.

  Raises ValueError for a form that is not known.
  """

  def ints(text):
    return [int(n) for n in text.split(',') if n]

  if found := re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', attributes):
    return [tuple(ints(pair)) for pair in re.findall(r'\{([\d,]+)\}', found[1])]
  if found := re.search(r'replica_groups=\{((?:\{[\d,]+\},?)*)\}', attributes):
    return [tuple(ints(group)) for group in re.findall(r'\{([\d,]+)\}', found[1])] or [
      tuple(range(devices))
    ]
  if found := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
    return [tuple(row) for row in _iota(found[2], found[3]).reshape(ints(found[1])).tolist()]
  if found := re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
    attributes,
  ):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    ids = _iota(found[2], found[3]) if found[2] else np.arange(math.prod(sizes.values()))
    # 'fsdp', or 'fsdp':(4)2, the part of 2 behind (more minor than)
    # a part of 4 of it: cut into parts, outermost first.
    parts = [re.fullmatch(r"'([^']+)'(?::\((\d+)\)(\d+))?", part) for part in found[4].split(',')]
    if all(parts):
      taken = [
        (part[1], int(part[2] or 1), int(part[2] or 1) * int(part[3] or sizes[part[1]]))
        for part in parts
      ]
      cuts = {
        name: sorted({1, size, *(end for axis, *ends in taken for end in ends if axis == name)})
        for name, size in sizes.items()
      }
      dims = [(name, low, high) for name in sizes for low, high in zip(cuts[name], cuts[name][1:])]
      inner = [
        i
        for axis, begin, end in taken
        for i, (name, low, high) in enumerate(dims)
        if name == axis and begin <= low and high <= end
      ]
      outer = [i for i in range(len(dims)) if i not in inner]
      ids = ids.reshape([high // low for _, low, high in dims]).transpose(outer + inner)
      return [tuple(row) for row in ids.reshape(-1, math.prod(ids.shape[len(outer) :])).tolist()]
  raise ValueError(f'replica groups in an unknown form: {attributes[:300]}')


def _iota(dims: str, order: str | None) -> np.ndarray:
  shape = [int(n) for n in dims.split(',')]
  ids = np.arange(math.prod(shape)).reshape(shape)
  return ids.transpose([int(n) for n in order.split(',')]) if order else ids


def axes_of(group: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
  """Mesh axes that the members of a group differ in."""
  places = np.stack(np.unravel_index(np.asarray(group), mesh.devices.shape))
  return tuple(axis for axis, row in zip(mesh.axis_names, places) if (row != row[0]).any())


def find(
  module: Module, computation: str, i: Instruction, mesh: Mesh, count: int = 1
) -> Collective | None:
  """The collective that an instruction runs or starts, or None; of a chain of libtpu's fusions only
  the first one, of a send and a recv that meet the send.
  """
  if i.opcode == 'send' and 'xla_megascale' in i.attributes:
    return _between_slices(module, computation, i, mesh, count)
  where, inner = computation, i
  if i.opcode == 'fusion' or (i.opcode == 'async-start' and i.called):
    held = list(module.inside(i))
    if ends(module, i) or i.called[0].startswith('async_collective_fusion'):
      return None
    where, inner = next(((where, other) for where, other in held if _kind(other)), (None, None))
  if inner is None or not _kind(inner) or inner.opcode.endswith('-done'):
    return None
  kind = _kind(inner)
  operand = sum(hlo.nbytes(module[where, name].shape) for name in inner.operands)
  result = _result(inner)
  if kind == 'all-reduce' and i.opcode == 'fusion' and hlo.nbytes(i.shape) < operand:
    kind = 'reduce-scatter'  # of which libtpu makes an all-reduce of which a part is kept
  numbers = _numbers(mesh)
  found = [tuple(numbers[n] for n in group) for group in groups(inner.attributes, len(numbers))]
  if kind == 'collective-permute':
    found = [pair for pair in found if pair[0] != pair[1]] or found[:1]
    group, size = max(found, key=lambda pair: len(axes_of(pair, mesh))), 2
  else:
    group, size = found[0], len(found[0])
  started = i.opcode.endswith('-start') or (
    i.opcode == 'fusion' and _target(module.inside(i)) == 'AsyncCollectiveStart'
  )
  return Collective(
    kind,
    axes_of(group, mesh),
    size,
    count,
    sent(kind, operand, result, size),
    started,
    inner.scope or i.scope,
    group,
  )


def _numbers(mesh):
  """Of the devices as a program numbers them, the indices into mesh.devices.flat: each TPU slice
  runs one of its own, as the first does.
  """
  slices = [
    getattr(device, 'slice_index', 0) if device.platform == 'tpu' else 0
    for device in mesh.devices.flat
  ]
  return [n for n, of in enumerate(slices) if of == slices[0]]


def _between_slices(module, computation, send, mesh, count):
  target, kind = re.search(
    r'_xla_megascale_target="?(\{.*?\})"?,_xla_megascale_transfer_type="(\w+)"', send.attributes
  ).groups()
  kind = {'ONE_TO_ONE': 'collective-permute'}.get(kind, kind.lower().replace('_', '-'))
  names.check('kind of transfer between slices', kind, KINDS)
  # Slices x devices; a device's id is 100,000 x slice + place
  if every := re.fullmatch(r'\{([\d,:]+)\}x\{(\d+)[\d,:]*\}', target):
    first_last = [part.split(':') for part in every[1].split(',')]
    ids = [
      100_000 * n + int(every[2])
      for part in first_last
      for n in range(int(part[0]), int(part[-1]) + 1)
    ]
  else:
    ids = [int(n) for n in re.findall(r'\d+', target[: target.index('}')])]
  places = {device.id: n for n, device in enumerate(mesh.devices.flat)}
  group, operand = (
    tuple(places[n] for n in ids),
    hlo.nbytes(module[computation, send.operands[0]].shape),
  )
  nbytes = sent(kind, operand, operand * len(group), len(group))
  return Collective(kind, axes_of(group, mesh), len(group), count, nbytes, True, send.scope, group)


def ends(module: Module, i: Instruction) -> bool:
  """Whether it is the last fusion of a chain that carries a collective."""
  return i.opcode == 'fusion' and _target(module.inside(i)) == 'AsyncCollectiveDone'


def _kind(i):
  name = i.opcode.removesuffix('-start')
  return name if name in KINDS else None


def _target(held):
  for _, i in held:
    if found := re.search(r'custom_call_target="(AsyncCollective\w+)"', i.attributes):
      return found[1]
  return None


def _result(i):
  """Bytes of a collective's result; a start's shape holds its operands too."""
  if (
    not i.opcode.endswith('-start') or not i.shape.startswith('(') or i.opcode == 'all-reduce-start'
  ):
    return hlo.nbytes(i.shape)
  return max(size for size, _ in hlo.arrays(i.shape))


def collectives(program: str | Module, mesh: Mesh) -> list[Collective]:
  """Every collective of a compiled program on this mesh, with how often a step runs it."""
  module = program if isinstance(program, Module) else Module(program)
  return [
    found
    for computation, i, times in module.walk()
    if (found := find(module, computation, i, mesh, times))
  ]


def total_bytes(found: list[Collective]) -> dict[tuple[str, tuple[str, ...]], int]:
  """(kind, mesh axes) -> bytes that a chip sends in a step."""
  sums = collections.Counter()
  for c in found:
    sums[c.kind, c.axes] += c.total
  return dict(sums)


def cycles(program: str | Module) -> int:
  """Estimated cycles of the XLA operations in a step,
  loops times their trip counts (TPU programs only).

  Collectives, kernels and copies have no estimate and count 0.
  """
  module = program if isinstance(program, Module) else Module(program)
  return sum((i.cycles or 0) * times for _, i, times in module.walk())


@dataclasses.dataclass(frozen=True)
class Links:
  """How fast bytes leave a chip along the axes of a mesh:
  what is known of the chip and of where its devices sit.
  """

  mesh: Mesh
  chip: Chip

  def seconds(self, c: Collective) -> tuple[float, float]:
    """Of one run of a collective: on the links within slices (GPUs: nodes),
    and on the network between them.

    Across slices it is done in two stages: within each, then each member exchanges its part with
    its peers in the others. Latencies are not counted. Raises ValueError where it crosses a network
    whose bandwidth is not tabled.
    """
    if not c.nbytes:
      return 0.0, 0.0
    slices = len({self._place(self.mesh.devices.flat[i]) for i in c.group})
    if slices == 1:
      return c.nbytes / self.bandwidth(c.group), 0.0
    if self.chip.network is None:
      raise ValueError(
        f'no bandwidth between slices is tabled for a {self.chip.name}; add it to '
        'analysis/hardware.py (network=)'
      )
    network = self.chip.network / self.chip.devices
    if c.kind == 'collective-permute':
      return 0.0, c.nbytes / network
    inside = max(1, c.size // slices)

    def share(n):
      return (n - 1) / n * c.size / (c.size - 1)

    first = self._place(self.mesh.devices.flat[c.group[0]])
    near = tuple(i for i in c.group if self._place(self.mesh.devices.flat[i]) == first)
    return (
      c.nbytes * share(inside) / self.bandwidth(near) if inside > 1 else 0.0
    ), c.nbytes * share(slices) / inside / network

  def _place(self, device):
    return (
      getattr(device, 'slice_index', 0),
      device.process_index if device.platform == 'gpu' else 0,
    )

  def bandwidth(self, group: tuple[int, ...]) -> float:
    """Bytes/s that a chip sends to the others of its group, all in one slice or node.

    A TPU sends along the dimensions of the torus that the group spans, each with its share of the
    links: both directions where the group closes into a ring, else one (the ends of a line have one
    neighbour). Groups that lie across each other share those links.
    GPUs of a node send through a switch.
    """
    chip, devices = self.chip, [self.mesh.devices.flat[i] for i in group]
    out = chip.interconnect / 2 / chip.devices
    if not chip.torus or devices[0].platform != 'tpu':
      return out
    coords = np.array([device.coords for device in devices])  # [group, dimension]
    everywhere = np.array([device.coords for device in self.mesh.devices.flat])
    sides = everywhere.max(0) - everywhere.min(0) + 1
    spans = [len(set(column)) for column in coords.T]
    rings = sum(
      1 if span == side and side % chip.wraps == 0 else 0.5
      for span, side in zip(spans, sides)
      if span > 1
    )
    sharing = math.prod(spans) / len({tuple(place) for place in coords})
    # Two cores of a chip span nothing, and their link is as fast as any
    return out * (rings or 0.5) / chip.torus / sharing
