"""How long would a compiled program take? The roofline, and a walk along its schedule.

TPU: XLA operations take their estimated cycles / clock, Pallas kernels what they declare on the
roofline, ours their bundles if that is more (analysis.declared), collectives what their bytes take
on the links, less what runs beside them. Against hardware this came within 10% on forward attention
kernels and was optimistic backward; stalls of memory, throttling and imbalance are not modelled: it
ranks, it does not certify.

GPU: no cycles are estimated; every operation takes its roofline at EFFICIENCY.
"""

import collections
import dataclasses
import functools
import re

from jax.sharding import Mesh

from analysis import schedule
from analysis.declared import attention_seconds, coded_seconds, declared, grouped_seconds
from analysis.hardware import Chip, peak
from analysis.hlo import Module
from analysis.instruction import HOST, Instruction, arrays, dims, nbytes
from decode.sampling import FILTER
from model import flops as counts

# Of the peaks, what large products and copies reach
# on a GPU (H100 SXM: 798 of 989 TFLOP/s, 3.0 of 3.35 TB/s).
EFFICIENCY = {'compute': 0.8, 'memory': 0.9}
# cuDNN's attention: products by direction, and the share of an H100's peak that was published for
# head width 128 and 4k tokens or more: 499 to 539 of 989 TFLOP/s, forward under a causal mask and
# backward (arXiv:2407.08608, figures 5 and 6).
CUDNN_PRODUCTS = {'fmhaSoftmax': 2, 'fmhaSoftmaxBackward': 5}
# Ours: 47 to 60% forward, 31 to 51% backward, 4k to 16k (docs/measured.md)
CUDNN_EFFICIENCY = FLASH_EFFICIENCY = 0.52
# Bytes/s of a device to its host's memory and back: half of PCIe 4 x16, which neighbours share
HOST_BANDWIDTH = 16e9
GPU_ERROR = (
  f'no cycles are estimated for GPUs: the roofline at {EFFICIENCY["compute"]:.0%} of peak compute '
  f'and {EFFICIENCY["memory"]:.0%} of memory bandwidth; expect 30%'
)
_SLICES = ('dynamic-slice', 'slice', 'gather')
_UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}  # which operand is the part that is written
_NOTABLE = 1e6  # bytes of an operation from which it is said that nothing else is known of it


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Seconds of a step on each chip.

  Attributes:
    seconds: of the whole step = operations + kernels + exposed collectives + exposed copies.
    operations: XLA operations.
    kernels: Pallas kernels.
    copies: waits for transfers to and from host memory or VMEM.
    links: (kind, mesh axes) -> seconds that those collectives take.
    exposed: of these, what a chip waits for them, beside no work.
    between: of these, what passes from the starts of those that are started to what waits for them.
    roofline: 'compute', 'memory', 'links AXES' and 'network AXES' (between slices or nodes) ->
      seconds that each would take alone; `bound` names the largest.
    flops: hardware FLOPs of a chip.
    memory_bytes: moved to and from main memory.
    assumptions: what was assumed for lack of information, in words.
  """

  seconds: float
  operations: float
  kernels: float
  copies: float
  links: dict[tuple[str, tuple[str, ...]], float]
  exposed: dict[tuple[str, tuple[str, ...]], float]
  between: dict[tuple[str, tuple[str, ...]], float]
  roofline: dict[str, float]
  flops: float
  memory_bytes: float
  assumptions: tuple[str, ...]

  @property
  def bound(self) -> str:
    return max(self.roofline, key=self.roofline.get)

  @property
  def exposed_share(self) -> float:
    """Of the time that collectives take, what a chip waits for them; 0 where there are none."""
    return sum(self.exposed.values()) / (sum(self.links.values()) or 1.0)


def cudnn_flops(i: Instruction) -> float | None:
  """FLOPs of one of cuDNN's attention calls, of the pairs of a query and a key that its mask
  leaves; None for another instruction.
  """
  call = re.search(r'custom_call_target="__cudnn\$(\w+)"', i.attributes)
  if not call or call[1] not in CUDNN_PRODUCTS:
    return None

  def setting(name, value):
    return re.search(rf'"{name}": ?{value}', i.attributes)[1]

  B, N, T, S = (int(n) for n in re.findall(r'\d+', setting('dimensions', r'\[([^\]]*)\]')))
  H = dims(re.match(r'\(?([^,]*\[[\d,]*\])', i.shape)[1])[-1]
  if setting('mask_type', r'"(\w+)"') == 'CAUSAL':
    keys = counts.mean_keys(T, int(setting('sliding_window_length', r'(\d+)')))
  else:
    keys = S
  return CUDNN_PRODUCTS[call[1]] * 2 * B * N * T * keys * H


def traffic(module: Module, computation: str, i: Instruction) -> int:
  """Bytes that an instruction reads from and writes to main memory:
  of what it slices or updates in place, only the part.
  """
  if i.opcode in _SLICES:
    return 2 * _main(i.shape)
  if i.opcode in _UPDATES:
    return 2 * _main(module[computation, i.operands[_UPDATES[i.opcode]]].shape)
  read = [_main(module[computation, name].shape) for name in i.operands]
  written = _main(i.shape)
  if i.opcode == 'fusion':
    # A fusion names whole arrays of which it may slice or update a part: a layer of the stacked
    # weights, a slot of the cache.
    for number, whole in enumerate(read):
      part, rewritten = _used(module, i.called[0], module.parameter(i.called[0], number).name)
      read[number] = min(whole, part)
      # The result is the operand, of which a part is new.
      written -= max(0, whole - rewritten) if rewritten else 0
  return sum(read) + max(0, written)


def _used(module: Module, computation: str, name: str) -> tuple[int, int]:
  """Of an array of a fusion: bytes that are read of it,
  and bytes that are written to it in place.
  """
  read, rewritten = 0, 0
  for user in module.users(computation, name):
    if user.opcode in _SLICES and user.operands[0] == name:
      read += nbytes(user.shape)
    elif user.opcode in _UPDATES and user.operands[0] == name:
      rewritten += nbytes(module[computation, user.operands[_UPDATES[user.opcode]]].shape)
    elif user.opcode in ('bitcast', 'fusion'):
      # The same array under another name: here, or as a parameter of a fusion in the fusion.
      if user.opcode == 'bitcast':
        more = _used(module, computation, user.name)
      else:
        inner = user.called[0]
        more = _used(module, inner, module.parameter(inner, user.operands.index(name)).name)
      read, rewritten = read + more[0], rewritten + more[1]
    elif not (user.opcode == 'tuple' and user.root):
      return nbytes(module[computation, name].shape), 0
  return read, rewritten


def _main(shape: str) -> int:
  return sum(size for size, space in arrays(shape) if space == 0)


class _Walk:
  """Sums of one program, built up by `run`."""

  def __init__(self, module: Module, mesh: Mesh, chip: Chip, dtype: str):
    self.module = module
    self.mesh = mesh
    self.chip = chip
    self.links = schedule.Links(mesh, chip)
    self.tpu = mesh.devices.flat[0].platform == 'tpu'
    self.peak, self.memory = peak(chip, dtype), chip.hbm_bandwidth / chip.devices
    if self.peak is None:
      raise ValueError(
        f'no peak for {dtype} is tabled for a {chip.name}; use a dtype that it computes in'
      )
    self.assumptions = collections.Counter()

  @functools.cache
  def run(self, computation: str) -> collections.Counter:
    """Seconds by what they go to, of one run of a computation;
    'time' is their sum, the clock's advance.
    """
    sums, self_time = collections.Counter(), 0.0
    # Links, network and copies each do one thing at a time, beside the computation: `free` and
    # `dma_free` say when they are done with what they have been given. What was started is pending,
    # as when it is ready, what the wait for it would be counted as, and when it was started.
    pending = {}
    free = collections.Counter()
    dma_free = 0.0
    for i in self.module.computations[computation]:
      if i.free or i.opcode.endswith('-update'):
        continue

      inner = self._inner(computation, i)
      if inner is not None:
        sums += inner
        self_time += inner['time']
        continue

      collective = schedule.find(self.module, computation, i, self.mesh)
      if collective is not None:
        near, far = self.links.seconds(collective)
        lane = 'links' if near else 'network'
        sums['links', collective.kind, collective.axes] += near
        sums['network', collective.kind, collective.axes] += far
        waited = ('exposed', collective.kind, collective.axes)
        free[lane] = max(self_time, free[lane]) + near + far
        if collective.rings:
          self._assume(
            'collectives on the SparseCore take what the links of their rings do, beside the '
            'TensorCore; what they read and write of main memory meanwhile was not counted'
          )
        if collective.started:
          pending[i.name] = (free[lane], waited, self_time)
        else:
          sums[waited] += free[lane] - self_time
          self_time = free[lane]
      elif i.opcode.endswith('-start'):
        dma_free = max(self_time, dma_free) + self._transfer(computation, i)
        pending[i.name] = (dma_free, 'copies', self_time)
      elif i.opcode.endswith('-done') or schedule.ends(self.module, i):
        ready, kind, began = pending[self._origin(computation, i, pending)]
        if kind != 'copies':
          sums['between', *kind[1:]] += self_time - began
        sums[kind] += max(0.0, ready - self_time)
        self_time = max(self_time, ready)
      else:
        kind, seconds = self._cost(computation, i)
        sums[kind] += seconds
        self_time += seconds
    sums['time'] = self_time
    return sums

  def _assume(self, text: str) -> None:
    self.assumptions[text] += 1

  def _inner(self, computation, i):
    """Of a loop, a conditional or a call: the seconds of what it runs."""
    if i.opcode == 'while':
      trips = self.module.trips(computation, i)
      if self.module.routed(i):
        self._assume('experts were taken to be balanced: their devices exchange rows in one round')
      return _times(self.run(self.module.body(i)), trips)
    if i.opcode == 'conditional':
      if FILTER in i.scope:
        self._assume('top-k and top-p were taken to be off')
      else:
        self._assume('a conditional was taken to run its dearest branch')
      return self.run(self.module.branch(i))
    return self.run(i.called[0]) if i.opcode == 'call' else None

  def _transfer(self, computation, i):
    """Seconds of an asynchronous copy, slice or call."""
    if i.called and i.opcode in ('call-start', 'async-start'):
      return self.run(i.called[0])['time'] or self._bytes(nbytes(i.shape))
    # The shape of a start is a tuple of source and destination, of which a slice is the smaller.
    sizes = list(arrays(i.shape))
    moved = min((size for size, _ in sizes[:2]), default=0)
    if any(space == HOST for _, space in sizes):
      return moved / HOST_BANDWIDTH
    return moved / self.memory

  def _bytes(self, moved):
    """Seconds that bytes to and from main memory take."""
    return moved / (self.memory * (1 if self.tpu else EFFICIENCY['memory']))

  def _origin(self, computation, done, pending):
    """The start that a done waits for: its operands, followed back;
    a loop may carry them in its tuple. Of a recv it is the send.
    """
    i, place = done, 0
    while i.name not in pending:
      if not i.operands:
        raise ValueError(f'{done.name} in {computation} ends nothing that was started there')
      # `place` is the element of i that is followed: into a tuple's operand of that place, past a
      # get-tuple-element (whose place it then is) and a loop (which keeps places) to the operand.
      carried = place if i.opcode == 'tuple' else 0
      place = {'get-tuple-element': i.index, 'while': place}.get(i.opcode, 0)
      i = self.module[computation, i.operands[carried]]
      if i.opcode == 'recv':
        i = next(
          other
          for other in self.module.computations[computation]
          if other.opcode == 'send' and other.rendezvous == i.rendezvous
        )
    return i.name

  def _cost(self, computation, i):
    """What an instruction of its own counts as, and its seconds."""
    moved = traffic(self.module, computation, i)
    if i.kernel:
      return 'kernels', self._kernel(computation, i, moved)
    if self.tpu and i.cycles is not None:
      return 'operations', i.cycles / self.chip.clock

    flops = self._products(computation, i)
    if (products := cudnn_flops(i)) is not None:
      self._assume(
        f'cuDNN attention: the pairs that its mask leaves, at {CUDNN_EFFICIENCY:.0%} of the peak; '
        'its working memory, which nothing but a GPU can tell, was not counted'
      )
      flops = products * EFFICIENCY['compute'] / CUDNN_EFFICIENCY
    elif i.opcode == 'custom-call' and '__cudnn' in i.attributes:
      self._assume('cuDNN calls: only their operands and results were counted, not their products')
    elif self.tpu and moved > _NOTABLE:
      self._assume(
        f"{i.opcode} without an estimate of the compiler: its bytes at the memory's bandwidth"
      )
    return 'operations', self._roofline(flops, moved)

  def _products(self, computation, i):
    """FLOPs of an instruction and of what it calls."""
    if i.called:
      return sum(self.module.flops(name) for name in i.called)
    return self.module.product(computation, i)

  def _roofline(self, flops, moved):
    """Seconds of whichever takes longer, products or bytes."""
    scale = 1 if self.tpu else EFFICIENCY['compute']
    return max(flops / (self.peak * scale), self._bytes(moved))

  def _kernel(self, computation, i, moved):
    """Seconds of a Pallas kernel: what it declares on the roofline, ours no less than is known."""
    cost = declared(i)
    if cost is None:
      self._assume(
        f'kernel {i.name.rstrip(".0123456789")} declares no cost: only its operands and results '
        'were counted'
      )
      return self._roofline(self._products(computation, i), moved)
    if self.tpu:
      least = self._by_bundles(computation, i)
    else:
      least = cost.flops / (self.peak * FLASH_EFFICIENCY)
      self._assume(
        f'our attention kernels at {FLASH_EFFICIENCY:.0%} of the peak, which is what was '
        "published of cuDNN's"
      )
    return max(self._roofline(cost.flops, cost.moved), least)

  def _by_bundles(self, computation, i):
    """Seconds by the bundles of its tiles; 0 of a kernel of which that is not known."""
    try:
      seconds = attention_seconds(self.module, computation, i, self.chip)
      if seconds is not None:
        self._assume('attention kernels: the bundles of their tiles, half of which a mask cuts')
        return seconds
      seconds = coded_seconds(self.module, computation, i, self.chip)
      if seconds is not None:
        self._assume('products of codes: the bundles that make numbers of them')
        return seconds
      seconds = grouped_seconds(self.module, computation, i, self.chip)
    except LookupError as error:
      self._assume(str(error))
      return 0.0
    if seconds is not None:
      self._assume(
        'experts: rows of a balanced routing, each group with a chunk of rows more, by bundles'
      )
    return seconds or 0.0


def _times(sums, n):
  return collections.Counter({key: value * n for key, value in sums.items()})


def _totals(module: Module) -> tuple[float, float]:
  """FLOPs of a program, and bytes that it moves to and from main memory."""
  flops, moved = module.flops(), 0
  for computation, i, times in module.walk():
    if i.kernel:
      cost = declared(i) or (0.0, traffic(module, computation, i))
      flops, moved = flops + times * cost[0], moved + times * cost[1]
      continue
    # What a loop, a branch or a call runs is walked itself; of a copy or a collective that is
    # started, the links' and the host's bandwidths are the bound.
    inner = i.opcode in ('while', 'conditional', 'call')
    if not (i.free or inner or i.opcode.endswith(('-start', '-done', '-update'))):
      moved += times * traffic(module, computation, i)
      flops += times * (cudnn_flops(i) or 0.0)
  return flops, moved


def predict(program: str | Module, mesh: Mesh, chip: Chip, dtype: str = 'bfloat16') -> Prediction:
  """The prediction for one run of a compiled program (the text of compiled.as_text())
  on a mesh of such chips.

  dtype: of the products' operands, for the peak. Raises ValueError for a loop without a known trip
  count, a network without a bandwidth, or a dtype without a peak.
  """
  module = program if isinstance(program, Module) else Module(program)
  walk = _Walk(module, mesh, chip, dtype)
  sums = walk.run(module.entry)
  flops, moved = _totals(module)
  roofline = collections.Counter({'compute': flops / walk.peak, 'memory': moved / walk.memory})
  links, exposed, between = collections.Counter(), {}, {}
  for key, value in sums.items():
    if key[0] in ('links', 'network') and value:
      links[key[1:]] += value
      roofline[f'{key[0]} {" x ".join(key[2]) or "of one device"}'] += value
    elif key[0] == 'exposed':
      exposed[key[1:]] = value
    elif key[0] == 'between':
      between[key[1:]] = value

  return Prediction(
    sums['time'],
    sums['operations'],
    sums['kernels'],
    sums['copies'],
    dict(links),
    exposed,
    between,
    dict(roofline),
    flops,
    moved,
    tuple(f'{text} ({count} x)' for text, count in walk.assumptions.items()),
  )
