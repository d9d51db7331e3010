"""How long would a compiled program take? The roofline, and a walk along its schedule.

TPU: XLA operations take their estimated cycles / clock, Pallas kernels what they declare on the
roofline, our attention the bundles of its tiles if that is more, collectives what their bytes take
on the links, less what runs beside them. Against hardware this came within 10% on forward attention
kernels and was optimistic backward; stalls of memory, throttling and imbalance are not modelled: it
ranks, it does not certify.

GPU: no cycles are estimated; every operation takes its roofline at EFFICIENCY.
"""

import collections
import dataclasses
import functools
import re
from typing import NamedTuple

from jax.sharding import Mesh

from analysis import flops as counts, hlo, schedule
from analysis.hardware import Chip, peak
from analysis.hlo import Instruction, Module
from decode.sampling import FILTER
from kernels import tuning
from kernels.tuning import TILE

# Of the peaks, what large products and copies reach
# on a GPU (H100 SXM: 798 of 989 TFLOP/s, 3.0 of 3.35 TB/s).
EFFICIENCY = {'compute': 0.8, 'memory': 0.9}
# Kernels of kernels.flash_tpu, by name.
ATTENTION = {'flash_forward': 'forward', 'flash_backward': 'backward'}
# cuDNN's attention: products by direction, and the share of an H100's peak that was published for
# head width 128 and 4k tokens or more: 499 to 539 of 989 TFLOP/s, forward under a causal mask and
# backward (arXiv:2407.08608, figures 5 and 6).
CUDNN_PRODUCTS = {'fmhaSoftmax': 2, 'fmhaSoftmaxBackward': 5}
# Ours: 47 to 60% forward, 31 to 51% backward, 4k to 16k (benchmarks/README.md)
CUDNN_EFFICIENCY = FLASH_EFFICIENCY = 0.52
# Bytes/s of a device to its host's memory and back: half of PCIe 4 x16, which neighbours share
HOST_BANDWIDTH = 16e9
ERROR = {
  'tpu': 'expect 10% on products and forward kernels, more where kernels or memory stalls '
  'dominate; it ranks, it does not certify',
  'gpu': f'no cycles are estimated for GPUs: the roofline at {EFFICIENCY["compute"]:.0%} of peak '
  f'compute and {EFFICIENCY["memory"]:.0%} of memory bandwidth; expect 30%',
}
_SLICES = ('dynamic-slice', 'slice', 'gather')
_UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}  # which operand is the part that is written
_NOTABLE = 1e6  # bytes of an operation from which it is said that nothing else is known of it


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Seconds of a step on each chip.

  Attributes:
    seconds: of the whole step = operations + kernels + exposed collectives + exposed copies.
    operations: XLA operations. kernels: Pallas kernels.
      copies: waits for transfers to and from host memory or VMEM.
    links: (kind, mesh axes) -> seconds that those collectives take.
      exposed: of these, what a chip waits for them, beside no work.
    roofline: 'compute', 'memory', 'links AXES' and 'network AXES' (between slices or nodes) ->
      seconds that each would take alone; `bound` names the largest.
    flops: hardware FLOPs of a chip. memory_bytes: moved to and from main memory.
    assumptions: what was assumed for lack of information, in words.
  """

  seconds: float
  operations: float
  kernels: float
  copies: float
  links: dict[tuple[str, tuple[str, ...]], float]
  exposed: dict[tuple[str, tuple[str, ...]], float]
  roofline: dict[str, float]
  flops: float
  memory_bytes: float
  assumptions: tuple[str, ...]

  @property
  def bound(self) -> str:
    return max(self.roofline, key=self.roofline.get)


class Cost(NamedTuple):
  flops: float
  moved: float  # bytes
  transcendentals: float


def declared(i: Instruction) -> Cost | None:
  """A kernel's own cost estimate, or None where it declares none; on GPUs it is in the name of its
  scope (kernels.mosaic_gpu_compat).
  """
  found = re.search(
    r'"cost_estimate":\{([^}]*)\}|op_name="[^"]*?(flash_\w+ flops=.*?) end', i.attributes
  )
  if not found:
    return None
  costs = {
    name: float(value)
    for name, value in re.findall(r'(\w+)"?[:=]"?([\d.e+]+)"?', found[1] or found[2])
  }
  return Cost(
    costs.get('flops', 0.0), costs.get('bytes_accessed', 0.0), costs.get('transcendentals', 0.0)
  )


def attention_seconds(module: Module, computation: str, i: Instruction, chip: Chip) -> float | None:
  """What the matrix unit and the softmax of one of our attention kernels take,
  by the bundles that its tiles have (kernels.tuning).

  It declares an exponential for each pair of a query and a key. None for another kernel. Raises
  LookupError for one without an entry.
  """
  direction = next(
    (direction for name, direction in ATTENTION.items() if i.name.startswith(name)), None
  )
  if direction is None:
    return None
  if chosen := re.match(r'flash_[a-z]+_(\d+x\d+)', i.name):
    raise LookupError(
      f'{direction} attention in chosen steps of {chosen[1]}: no bundles are tabled for them, so '
      'its FLOPs at the peak'
    )
  shapes = [hlo.dims(module[computation, name].shape) for name in i.operands]
  queries, keys, values = [dims for dims in shapes if len(dims) > 3][:3]
  width = max(keys[-1], values[-1])
  step = next(filter(None, (tuning.lookup(kind, direction, width) for kind in chip.kinds)), None)
  if step is None or not step.whole:
    raise LookupError(
      f'{direction} attention with heads {width} wide: no bundles are tabled for a {chip.name}, so '
      'its FLOPs at the peak'
    )
  cores = min(chip.cores // chip.devices, queries[1])  # cores share the heads
  return (
    declared(i).transcendentals / TILE**2 * (step.whole + step.masked) / 2 / (chip.clock * cores)
  )


def cudnn_flops(i: Instruction) -> float | None:
  """FLOPs of one of cuDNN's attention calls, of the pairs of a query and a key that its mask
  leaves; None for another instruction.
  """
  found = re.search(r'custom_call_target="__cudnn\$(\w+)"', i.attributes)
  if not found or found[1] not in CUDNN_PRODUCTS:
    return None

  def setting(name, value):
    return re.search(rf'"{name}": ?{value}', i.attributes)[1]

  B, N, T, S = (int(n) for n in re.findall(r'\d+', setting('dimensions', r'\[([^\]]*)\]')))
  H = hlo.dims(re.match(r'\(?([^,]*\[[\d,]*\])', i.shape)[1])[-1]
  keys = (
    counts.mean_keys(T, int(setting('sliding_window_length', r'(\d+)')))
    if setting('mask_type', r'"(\w+)"') == 'CAUSAL'
    else S
  )
  return CUDNN_PRODUCTS[found[1]] * 2 * B * N * T * keys * H


def traffic(module: Module, computation: str, i: Instruction) -> int:
  """Bytes that an instruction reads from and writes to main memory:
  of what it slices or updates in place, only the part.
  """
  if i.opcode in _SLICES:
    return 2 * _main(i.shape)
  if i.opcode in _UPDATES:
    return 2 * _main(module[computation, i.operands[_UPDATES[i.opcode]]].shape)
  read, written = [_main(module[computation, name].shape) for name in i.operands], _main(i.shape)
  if i.opcode == 'fusion':
    for number, whole in enumerate(read):
      part, rewritten = _used(module, i.called[0], module.parameter(i.called[0], number).name)
      read[number] = min(whole, part)
      # The result is the operand, of which a part is new
      written -= max(0, whole - rewritten) if rewritten else 0
  return sum(read) + max(0, written)


def _used(module: Module, computation: str, name: str) -> tuple[int, int]:
  """Of an array of a fusion: bytes that are read of it,
  and bytes that are written to it in place.
  """
  read, rewritten = 0, 0
  for user in module.users(computation, name):
    if user.opcode in _SLICES and user.operands[0] == name:
      read += hlo.nbytes(user.shape)
    elif user.opcode in _UPDATES and user.operands[0] == name:
      rewritten += hlo.nbytes(module[computation, user.operands[_UPDATES[user.opcode]]].shape)
    elif user.opcode in ('bitcast', 'fusion'):
      inside = (
        (computation, user.name)
        if user.opcode == 'bitcast'
        else (user.called[0], module.parameter(user.called[0], user.operands.index(name)).name)
      )
      found = _used(module, *inside)
      read, rewritten = read + found[0], rewritten + found[1]
    elif not (user.opcode == 'tuple' and user.root):
      return hlo.nbytes(module[computation, name].shape), 0
  return read, rewritten


def _main(shape: str) -> int:
  return sum(size for size, space in hlo.arrays(shape) if space == 0)


class _Walk:
  """Sums of one program, built up by `run`."""

  def __init__(self, module: Module, mesh: Mesh, chip: Chip, dtype: str):
    self.module, self.mesh, self.chip = module, mesh, chip
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
    pending, free, dma_free = {}, collections.Counter(), 0.0
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
        if collective.started:
          pending[i.name] = (free[lane], waited)
        else:
          sums[waited] += free[lane] - self_time
          self_time = free[lane]
      elif i.opcode.endswith('-start'):
        dma_free = max(self_time, dma_free) + self._transfer(computation, i)
        pending[i.name] = (dma_free, 'copies')
      elif i.opcode.endswith('-done') or schedule.ends(self.module, i):
        ready, kind = pending[self._origin(computation, i, pending)]
        sums[kind] += max(0.0, ready - self_time)
        self_time = max(self_time, ready)
      else:
        kind, seconds = self._cost(computation, i)
        sums[kind] += seconds
        self_time += seconds
    sums['time'] = self_time
    return sums

  def _inner(self, computation, i):
    """Of a loop, a conditional or a call: the seconds of what it runs."""
    if i.opcode == 'while':
      trips = self.module.trips(computation, i)
      if self.module.routed(i):
        self.assumptions[
          'experts were taken to be balanced: their devices exchange rows in one round'
        ] += 1
      return _times(self.run(self.module.body(i)), trips)
    if i.opcode == 'conditional':
      off = FILTER in i.scope
      self.assumptions[
        'top-k and top-p were taken to be off'
        if off
        else 'a conditional was taken to run its dearest branch'
      ] += 1
      return self.run(self.module.branch(i))
    return self.run(i.called[0]) if i.opcode == 'call' else None

  def _transfer(self, computation, i):
    """Seconds of an asynchronous copy, slice or call."""
    if i.called and i.opcode in ('call-start', 'async-start'):
      return self.run(i.called[0])['time'] or self._bytes(i, hlo.nbytes(i.shape))
    sizes = list(hlo.arrays(i.shape))
    moved = min((size for size, _ in sizes[:2]), default=0)
    if any(space == hlo.HOST for _, space in sizes):
      return moved / HOST_BANDWIDTH
    return moved / self.memory

  def _bytes(self, i, moved):
    return moved / (self.memory * (1 if self.tpu else EFFICIENCY['memory']))

  def _origin(self, computation, done, pending):
    """The start that a done waits for: its operands, followed back;
    a loop may carry them in its tuple. Of a recv it is the send.
    """
    i, place = done, 0
    while i.name not in pending:
      if not i.operands:
        raise ValueError(f'{done.name} in {computation} ends nothing that was started there')
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
    moved = traffic(self.module, computation, i)
    flops = (
      sum(self.module.flops(name) for name in i.called)
      if i.called
      else self.module.product(computation, i)
    )
    kind, least = 'operations', 0.0
    if i.kernel:
      kind, cost = 'kernels', declared(i)
      if cost is None:
        self.assumptions[
          f'kernel {i.name.rstrip(".0123456789")} declares no cost: '
          'only its operands and results were counted'
        ] += 1
      else:
        flops, moved = cost.flops, cost.moved
        least = (
          self._attention(computation, i) if self.tpu else flops / (self.peak * FLASH_EFFICIENCY)
        )
        if not self.tpu:
          self.assumptions[
            f'our attention kernels at {FLASH_EFFICIENCY:.0%} of the peak, which is what was '
            "published of cuDNN's"
          ] += 1
    elif self.tpu and i.cycles is not None:
      return kind, i.cycles / self.chip.clock
    elif (products := cudnn_flops(i)) is not None:
      self.assumptions[
        f'cuDNN attention: the pairs that its mask leaves, at {CUDNN_EFFICIENCY:.0%} of the peak; '
        'its working memory, which nothing but a GPU can tell, was not counted'
      ] += 1
      flops = products * EFFICIENCY['compute'] / CUDNN_EFFICIENCY
    elif i.opcode == 'custom-call' and '__cudnn' in i.attributes:
      self.assumptions[
        'cuDNN calls: only their operands and results were counted, not their products'
      ] += 1
    elif self.tpu and moved > _NOTABLE:
      self.assumptions[
        f'{i.opcode} without an estimate of the compiler: its bytes at the memory\'s bandwidth'
      ] += 1
    scale = 1 if self.tpu else EFFICIENCY['compute']
    return kind, max(flops / (self.peak * scale), self._bytes(i, moved), least)

  def _attention(self, computation, i):
    try:
      seconds = attention_seconds(self.module, computation, i, self.chip)
    except LookupError as error:
      self.assumptions[str(error)] += 1
      return 0.0
    if seconds is not None:
      self.assumptions[
        'attention kernels: the bundles of their tiles, half of which a mask cuts'
      ] += 1
    return seconds or 0.0


def _times(sums, n):
  return collections.Counter({key: value * n for key, value in sums.items()})


def predict(program: str | Module, mesh: Mesh, chip: Chip, dtype: str = 'bfloat16') -> Prediction:
  """The prediction for one run of a compiled program (the text of compiled.as_text())
  on a mesh of such chips.

  dtype: of the products' operands, for the peak. Raises ValueError for a loop without a known trip
  count, a network without a bandwidth, or a dtype without a peak.
  """
  module = program if isinstance(program, Module) else Module(program)
  walk = _Walk(module, mesh, chip, dtype)
  sums = walk.run(module.entry)
  flops, moved = module.flops(), 0
  for computation, i, times in module.walk():
    if i.kernel:
      cost = declared(i) or (0.0, traffic(module, computation, i))
      flops, moved = flops + times * cost[0], moved + times * cost[1]
    elif not (
      i.free
      or i.opcode in ('while', 'conditional', 'call')
      or i.opcode.endswith(('-start', '-done', '-update'))
    ):
      moved += times * traffic(module, computation, i)
      flops += times * (cudnn_flops(i) or 0.0)
  roofline = collections.Counter({'compute': flops / walk.peak, 'memory': moved / walk.memory})
  links, exposed = collections.Counter(), {}
  for key, value in sums.items():
    if key[0] in ('links', 'network') and value:
      links[key[1:]] += value
      roofline[f'{key[0]} {" x ".join(key[2]) or "of one device"}'] += value
    elif key[0] == 'exposed':
      exposed[key[1:]] = value
  return Prediction(
    sums['time'],
    sums['operations'],
    sums['kernels'],
    sums['copies'],
    dict(links),
    exposed,
    dict(roofline),
    flops,
    moved,
    tuple(f'{text} ({count} x)' for text, count in walk.assumptions.items()),
  )
