"""What moves between chips, and when does each chip wait?
Collectives and the timeline of a compiled program.

The compiler's text is the schedule: instructions run in order, collectives that are split into a
start and a done run beside what stands between. libtpu has a second form: a fusion that starts one
(AsyncCollectiveStart), fusions that carry it on beside their own products, one that ends it
(AsyncCollectiveDone). And a third: a call that its SparseCore runs, started and done as others are.
Between slices it sends and receives: its runtime does what the send asks for.
"""

import collections
import dataclasses
import itertools
import math
import re

import numpy as np
from jax.sharding import Mesh

import names
from analysis.hardware import Chip
from analysis.hlo import Module
from analysis.instruction import Instruction, arrays, nbytes

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
_CALLS = ('async-start', 'call-start')  # asynchronous ones, of a SparseCore too


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of KINDS.
    axes: mesh axes that the members of a group differ in.
    size: members of a group.
    count: how often it runs in a step.
    nbytes: that a chip sends in one run, as a ring (or a direct exchange) does it; see `sent`.
    started: whether it is split into a start and a done, so that other work can run beside it.
    scope: where it comes from in the Python program.
    group: devices of one group, as indices into mesh.devices.flat.
    rings: of one that a SparseCore runs, along how many one-way rings it does, each with its part
      of the bytes; 0: of a TensorCore.
    pairs: of a permute within a slice all that run at once, as `group` is.
  """

  kind: str
  axes: tuple[str, ...]
  size: int
  count: int
  nbytes: int
  started: bool
  scope: str
  group: tuple[int, ...]
  rings: int = 0
  pairs: tuple[tuple[int, ...], ...] = ()

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

  # {{0,1},{2,3}}: pairs and lists, spelled out; {} is one group of all.
  if spelled := re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', attributes):
    return _spelled(spelled[1])
  if spelled := re.search(r'replica_groups=\{((?:\{[\d,]+\},?)*)\}', attributes):
    return _spelled(spelled[1]) or [tuple(range(devices))]

  # [2,4]<=[4,2]T(1,0): 0 .. 7 as [4, 2], transposed, as rows of [2, 4].
  if iota := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
    rows = _iota(iota[2], iota[3]).reshape(_ints(iota[1]))
    return [tuple(row) for row in rows.tolist()]

  if of_mesh := _MESH_GROUPS.search(attributes):
    if rows := _of_mesh(*of_mesh.groups()):
      return rows
  raise ValueError(f'replica groups in an unknown form: {attributes[:300]}')


# mesh['a'=2,'b'=4], device_ids=([8]T(0)) {'b'}: the axes of a mesh, and those that a group spans.
_MESH_GROUPS = re.compile(
  r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
  r'\{([^}]*)\}'
)


def _of_mesh(mesh: str, dims: str | None, order: str | None, spanned: str):
  """The groups that span some axes of a mesh, or parts of axes; [] for what is not understood."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
  ids = _iota(dims, order) if dims else np.arange(math.prod(sizes.values()))

  # 'fsdp', or 'fsdp':(4)2, the part of 2 behind (more minor than) a part of 4 of it.
  parts = [re.fullmatch(r"'([^']+)'(?::\((\d+)\)(\d+))?", part) for part in spanned.split(',')]
  if not all(parts):
    return []
  # Of each part: its axis, how many it counts outside of it, and how many with it.
  taken = []
  for axis, outside, size in (part.groups() for part in parts):
    outside = int(outside or 1)
    taken.append((axis, outside, outside * int(size or sizes[axis])))

  # Every axis is cut where a part of it begins or ends, outermost first: each piece becomes a
  # dimension of its own, which a group either spans or doesn't.
  cuts = {
    name: sorted({1, size, *(end for axis, *ends in taken for end in ends if axis == name)})
    for name, size in sizes.items()
  }
  pieces = [(name, low, high) for name in sizes for low, high in zip(cuts[name], cuts[name][1:])]
  inner = [
    i
    for axis, begin, end in taken
    for i, (name, low, high) in enumerate(pieces)
    if name == axis and begin <= low and high <= end
  ]
  outer = [i for i in range(len(pieces)) if i not in inner]
  ids = ids.reshape([high // low for _, low, high in pieces]).transpose(outer + inner)
  size = math.prod(ids.shape[len(outer) :])
  return [tuple(row) for row in ids.reshape(-1, size).tolist()]


def _ints(text: str) -> list[int]:
  return [int(n) for n in text.split(',') if n]


def _spelled(text: str) -> list[tuple[int, ...]]:
  return [tuple(_ints(group)) for group in re.findall(r'\{([\d,]+)\}', text)]


def _iota(dims: str, order: str | None) -> np.ndarray:
  shape = _ints(dims)
  ids = np.arange(math.prod(shape)).reshape(shape)
  return ids.transpose(_ints(order)) if order else ids


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
  where, inner = _carried(module, computation, i)
  kind = _kind(inner) if inner is not None else None
  if kind is None or inner.opcode.endswith('-done'):
    return None

  operand = sum(nbytes(module[where, name].shape) for name in inner.operands)
  result = _result(inner)
  if kind == 'all-reduce' and i.opcode == 'fusion' and nbytes(i.shape) < operand:
    kind = 'reduce-scatter'  # of which libtpu makes an all-reduce of which a part is kept

  numbers = _numbers(mesh)
  members = [tuple(numbers[n] for n in group) for group in groups(inner.attributes, len(numbers))]
  pairs = ()
  if kind == 'collective-permute':
    # Pairs of a device with itself move nothing. Of the others one names the axes.
    pairs = tuple(pair for pair in members if pair[0] != pair[1])
    group, size = max(pairs or members[:1], key=lambda pair: len(axes_of(pair, mesh))), 2
  else:
    group, size = members[0], len(members[0])

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
    _rings(inner),
    pairs,
  )


def _rings(i) -> int:
  """Along how many rings a SparseCore runs a collective; 0 where none does. A ring may have phases,
  one dimension of the torus after the other: it is one link at a time.
  """
  if 'DEVICE_TYPE_SPARSECORE' not in i.attributes:
    return 0
  return max(1, i.attributes.count('"phase_rings"'))


def _carried(module, computation, i):
  """(computation, instruction) of the collective itself: what an instruction is, or holds if it is
  a fusion or starts something asynchronous. (None, None): there is none, or the instruction carries
  on what another has started.
  """
  if i.opcode == 'fusion' or (i.opcode in _CALLS and i.called):
    if ends(module, i) or i.called[0].startswith('async_collective_fusion'):
      return None, None
    inside = [(where, x) for where, x in module.inside(i) if _kind(x)]
    # A call that runs several is no collective: they are found where they are.
    alone = len(inside) == 1 or (inside and i.opcode == 'fusion')
    return inside[0] if alone else (None, None)
  return computation, i


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
  """What a send asks libtpu's runtime to do between slices."""
  target, kind = re.search(
    r'_xla_megascale_target="?(\{.*?\})"?,_xla_megascale_transfer_type="(\w+)"', send.attributes
  ).groups()
  kind = {'ONE_TO_ONE': 'collective-permute'}.get(kind, kind.lower().replace('_', '-'))
  names.check('kind of transfer between slices', kind, KINDS)

  # {1,3:4}x{0:3}: of slices 1, 3 and 4 the device 0 and its like; a device's id is
  # 100,000 x slice + place. Or ids, spelled out: {{100000,200000},...}.
  if every := re.fullmatch(r'\{([\d,:]+)\}x\{(\d+)[\d,:]*\}', target):
    first_last = [part.split(':') for part in every[1].split(',')]
    slices = [n for ends in first_last for n in range(int(ends[0]), int(ends[-1]) + 1)]
    ids = [100_000 * n + int(every[2]) for n in slices]
  else:
    ids = [int(n) for n in re.findall(r'\d+', target[: target.index('}')])]

  places = {device.id: n for n, device in enumerate(mesh.devices.flat)}
  group = tuple(places[n] for n in ids)
  operand = nbytes(module[computation, send.operands[0]].shape)
  moved = sent(kind, operand, operand * len(group), len(group))
  return Collective(kind, axes_of(group, mesh), len(group), count, moved, True, send.scope, group)


def ends(module: Module, i: Instruction) -> bool:
  """Whether it is the last fusion of a chain that carries a collective."""
  return i.opcode == 'fusion' and _target(module.inside(i)) == 'AsyncCollectiveDone'


def _kind(i):
  name = i.opcode.removesuffix('-start')
  return name if name in KINDS else None


def _target(inside):
  """What libtpu's fusion does with a collective, by a mark that it holds."""
  for _, i in inside:
    if mark := re.search(r'custom_call_target="(AsyncCollective\w+)"', i.attributes):
      return mark[1]
  return None


def _result(i):
  """Bytes of a collective's result; a start's shape holds its operands first, and then as many
  results, where collectives were combined.
  """
  pair = i.opcode.endswith('-start') and i.shape.startswith('(') and i.opcode != 'all-reduce-start'
  if not pair:
    return nbytes(i.shape)
  n = len(i.operands)
  return sum(size for size, _ in itertools.islice(arrays(i.shape), n, 2 * n))


def collectives(program: str | Module, mesh: Mesh) -> list[Collective]:
  """Every collective of a compiled program on this mesh, with how often a step runs it."""
  module = program if isinstance(program, Module) else Module(program)
  every = (
    find(module, computation, i, mesh, times)
    for computation, i, times in module.walk()
    if not _in_a_call(module, computation)
  )
  return [collective for collective in every if collective]


def _in_a_call(module, computation) -> bool:
  """Whether a computation is the one collective of an asynchronous call, which counts as that."""
  where, call = module.caller(computation)
  return bool(call and call.opcode in _CALLS and _carried(module, where, call)[1])


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
    its peers in the others; of an all-to-all, which has nothing in common with its neighbours',
    all that is for other slices. Latencies are not counted. Raises ValueError where it crosses a
    network whose bandwidth is not tabled.
    """
    if not c.nbytes:
      return 0.0, 0.0
    slices = len({self._place(self.mesh.devices.flat[i]) for i in c.group})
    if slices == 1:
      within = max(
        c.nbytes / self.bandwidth(c.group), self._through_cuts(c, c.group), self._over_links(c)
      )
      return max(within, c.nbytes / (c.rings * self._link) if c.rings else 0.0), 0.0
    if self.chip.network is None:
      raise ValueError(
        f'no bandwidth between slices is tabled for a {self.chip.name}; add it to '
        'analysis/hardware.py (network=)'
      )
    network = self.chip.network / self.chip.devices
    if c.kind == 'collective-permute':
      return 0.0, c.nbytes / network

    # c.nbytes is of a ring over all c.size members. Over n of them, of what each holds then, a ring
    # sends (n - 1) / n of it: the two stages are shares of the whole.
    def share(n):
      return (n - 1) / n * c.size / (c.size - 1)

    inside = max(1, c.size // slices)  # members in a slice
    first = self._place(self.mesh.devices.flat[c.group[0]])
    near = tuple(i for i in c.group if self._place(self.mesh.devices.flat[i]) == first)
    if inside == 1:
      return 0.0, c.nbytes * share(slices) / network
    within = max(c.nbytes * share(inside) / self.bandwidth(near), self._through_cuts(c, near))
    sharing = 1 if 'all-to-all' in c.kind else inside
    return within, c.nbytes * share(slices) / sharing / network

  @property
  def _link(self) -> float:
    """Bytes/s of one link of a torus, one way."""
    return self.chip.interconnect / 2 / self.chip.devices / (2 * self.chip.torus)

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

    # How many places of each side of the whole topology the group has.
    coords, sides = self._places(group)
    spans = [len(set(column)) for column in coords.T]
    rings = sum(
      1 if span == side and side % chip.wraps == 0 else 0.5
      for span, side in zip(spans, sides)
      if span > 1
    )
    # A group that does not fill the box that it spans, as a diagonal, shares it with its like.
    sharing = math.prod(spans) / len({tuple(place) for place in coords})
    # Two cores of a chip span nothing, and their link is as fast as any.
    return out * (rings or 0.5) / chip.torus / sharing

  def _through_cuts(self, c: Collective, group: tuple[int, ...]) -> float:
    """Seconds, at least, of an all-to-all within a group: what has to cross the middle of each
    dimension, over the links that do. 0 of all else, whose members pass on what they get.

    Of s chips in a row half are on either side, and each sends half of its x bytes across: s x / 4,
    one way, over the one link of a line or the two of a ring. A group with gaps leaves these to its
    like, whose bytes take the same links.
    """
    chip = self.chip
    if 'all-to-all' not in c.kind or not chip.torus:
      return 0.0
    if self.mesh.devices.flat[group[0]].platform != 'tpu':
      return 0.0
    operand = c.nbytes * c.size / (c.size - 1)
    times = [0.0]
    coords, sides = self._places(group)
    for column, side in zip(coords.T, sides):
      places = sorted(set(column.tolist()))
      if len(places) > 1:
        span, gap = len(places), int(np.diff(places).min())
        links = 2 if span * gap == side and side % chip.wraps == 0 else 1
        across = gap * (span // 2) * (span - span // 2) / span * operand
        times.append(across / links / self._link)
    return max(times)

  def _over_links(self, c: Collective) -> float:
    """Seconds of a permute on a torus: what takes the busiest link. Each pair's bytes go along one
    dimension after the other, the shorter way round where it is a ring, half of them either way
    where both are as long. 0 of all else.
    """
    chip = self.chip
    if not c.pairs or not chip.torus or self.mesh.devices.flat[0].platform != 'tpu':
      return 0.0
    coords, sides = self._places(tuple(range(self.mesh.devices.size)))
    taken = collections.Counter()
    for source, target in c.pairs:
      at = coords[source].tolist()
      for dimension, (end, side) in enumerate(zip(coords[target].tolist(), sides.tolist())):
        hops = end - at[dimension]
        ways = [hops, hops - side, hops + side] if side % chip.wraps == 0 else [hops]
        ways = [way for way in ways if abs(way) == min(map(abs, ways))]
        for way in ways:
          step, place = (1 if way > 0 else -1), at[dimension]
          for n in range(abs(way)):
            row = (*at[:dimension], (place + n * step) % side, *at[dimension + 1 :])
            taken[row, dimension, step] += 1 / len(ways)
        at[dimension] = end
    # Devices of a chip share its links, of which `_link` is one's part.
    return max(taken.values(), default=0.0) * c.nbytes / (self._link * chip.devices)

  def _places(self, group: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where the members of a group sit, [members, dimensions], and the topology's sides."""
    coords = np.array([self.mesh.devices.flat[i].coords for i in group])
    everywhere = np.array([device.coords for device in self.mesh.devices.flat])
    return coords, everywhere.max(0) - everywhere.min(0) + 1
