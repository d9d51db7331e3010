"""How long would a compiled program take? The roofline, and a walk along its schedule.

TPU: XLA operations take their estimated cycles / clock, Pallas kernels what they declare on the roofline, collectives what their
bytes take on the links, less what runs beside them. Against hardware this came within 10% on forward attention kernels and was
optimistic backward; stalls of memory, throttling and imbalance are not modelled: it ranks, it does not certify.
GPU: no cycles are estimated; every operation takes its roofline at EFFICIENCY.
"""
import collections
import dataclasses
import functools
import math
import re

from jax.sharding import Mesh

from analysis import hlo, schedule
from analysis.hardware import Chip, peak
from analysis.hlo import Instruction, Module

# Of the peaks, what large products and copies reach on a GPU (H100 SXM: 798 of 989 TFLOP/s, 3.0 of 3.35 TB/s).
EFFICIENCY = {'compute': 0.8, 'memory': 0.9}
# jax's splash attention declares no cost. Products over pairs of a query and a key, by what a kernel's name says; and what share of the
# peak its instruction bundles come to at 8k tokens and head width 128, where a 256-wide matrix unit is half empty.
ATTENTION_PRODUCTS = {f'splash_{heads}_{part}': n for heads in ('mha', 'mqa') for part, n in (('fwd', 2), ('dkv', 4), ('dq', 3))}
ATTENTION_EFFICIENCY = {'TPU v4': 0.7, 'TPU v5e': 0.7, 'TPU v5p': 0.7, 'TPU v6e': 0.26, 'TPU 7x': 0.26}
HOST_BANDWIDTH = 16e9  # bytes/s a device to its host's memory and back: half of PCIe 4 x16, which neighbours share
ERROR = {'tpu': 'expect 10% on products and forward kernels, more where kernels or memory stalls dominate; it ranks, it does not certify',
         'gpu': f'no cycles are estimated for GPUs: the roofline at {EFFICIENCY["compute"]:.0%} of peak compute and '
                f'{EFFICIENCY["memory"]:.0%} of memory bandwidth; expect 30%'}
_SLICES = ('dynamic-slice', 'slice', 'gather')
_UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}  # which operand is the part that is written
_NOTABLE = 1e6  # bytes of an operation from which it is said that nothing else is known of it


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Seconds of a step on each chip.

  Attributes:
    seconds: of the whole step = operations + kernels + exposed collectives + exposed copies.
    operations: XLA operations. kernels: Pallas kernels. copies: waits for transfers to and from host memory or VMEM.
    links: (kind, mesh axes) -> seconds that those collectives take. exposed: of these, what a chip waits for them, beside no work.
    roofline: 'compute', 'memory', 'links AXES' and 'network AXES' (between slices or nodes) -> seconds that each would take alone;
      `bound` names the largest.
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


def declared(i: Instruction) -> tuple[float, float] | None:
  """(FLOPs, bytes) of a kernel's own cost estimate, or None where it declares none."""
  found = re.search(r'"cost_estimate":\{([^}]*)\}', i.attributes)
  if not found:
    return None
  costs = {name: float(value) for name, value in re.findall(r'"(\w+)":"?([\d.e+]+)"?', found[1])}
  return costs.get('flops', 0.0), costs.get('bytes_accessed', 0.0)


def attention_flops(module: Module, computation: str, i: Instruction) -> float | None:
  """FLOPs of one of jax's splash attention kernels under a causal mask, half of all pairs; None for another kernel."""
  products = next((n for name, n in ATTENTION_PRODUCTS.items() if i.name.startswith(name)), None)
  shapes = [module[computation, name].shape for name in i.operands]
  arrays = [hlo.dims(shape) for shape in shapes if shape.startswith(('bf16', 'f32')) and len(hlo.dims(shape)) > 2]
  if products is None or len(arrays) < 2:
    return None
  queries, keys = arrays[:2]  # [.. N T H] and [.. K S H]
  return products * math.prod(queries) * keys[-2]  # 2 of a multiply-add, half of the pairs


def traffic(module: Module, computation: str, i: Instruction) -> int:
  """Bytes that an instruction reads from and writes to main memory: of what it slices or updates in place, only the part."""
  if i.opcode in _SLICES:
    return 2 * _main(i.shape)
  if i.opcode in _UPDATES:
    return 2 * _main(module[computation, i.operands[_UPDATES[i.opcode]]].shape)
  read, written = [_main(module[computation, name].shape) for name in i.operands], _main(i.shape)
  if i.opcode == 'fusion':
    for number, whole in enumerate(read):
      part, rewritten = _used(module, i.called[0], module.parameter(i.called[0], number).name)
      read[number] = min(whole, part)
      written -= max(0, whole - rewritten) if rewritten else 0  # the result is the operand, of which a part is new
  return sum(read) + max(0, written)


def _used(module: Module, computation: str, name: str) -> tuple[int, int]:
  """Of an array of a fusion: bytes that are read of it, and bytes that are written to it in place."""
  read, rewritten = 0, 0
  for user in module.users(computation, name):
    if user.opcode in _SLICES and user.operands[0] == name:
      read += hlo.nbytes(user.shape)
    elif user.opcode in _UPDATES and user.operands[0] == name:
      rewritten += hlo.nbytes(module[computation, user.operands[_UPDATES[user.opcode]]].shape)
    elif user.opcode in ('bitcast', 'fusion'):
      inside = (computation, user.name) if user.opcode == 'bitcast' else (
          user.called[0], module.parameter(user.called[0], user.operands.index(name)).name)
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
      raise ValueError(f'no peak for {dtype} is tabled for a {chip.name}; use a dtype that it computes in')
    self.assumptions = collections.Counter()

  @functools.cache
  def run(self, computation: str) -> collections.Counter:
    """Seconds by what they go to, of one run of a computation; 'time' is their sum, the clock's advance."""
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
        self.assumptions['experts were taken to be balanced: their devices exchange rows in one round'] += 1
      return _times(self.run(self.module.body(i)), trips)
    if i.opcode == 'conditional':
      self.assumptions['a conditional was taken to run its dearest branch'] += 1
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
    """The start that a done waits for: its operands, followed back; a loop may carry them in its tuple. Of a recv it is the send."""
    i, place = done, 0
    while i.name not in pending:
      if not i.operands:
        raise ValueError(f'{done.name} in {computation} ends nothing that was started there')
      carried = place if i.opcode == 'tuple' else 0
      place = {'get-tuple-element': i.index, 'while': place}.get(i.opcode, 0)
      i = self.module[computation, i.operands[carried]]
      if i.opcode == 'recv':
        i = next(other for other in self.module.computations[computation] if other.opcode == 'send' and other.rendezvous == i.rendezvous)
    return i.name

  def _cost(self, computation, i):
    moved = traffic(self.module, computation, i)
    flops = sum(self.module.flops(name) for name in i.called) if i.called else self.module.product(computation, i)
    kind = 'operations'
    if i.kernel:
      kind, cost, attention = 'kernels', declared(i), attention_flops(self.module, computation, i)
      if cost is None and attention:
        share = ATTENTION_EFFICIENCY[self.chip.name]
        self.assumptions[f'attention kernels: half of all pairs (a causal mask), at {share:.0%} of the peak'] += 1
        flops = attention / share
      elif cost is None:
        self.assumptions[f'kernel {i.name.rstrip(".0123456789")} declares no cost: only its operands and results were counted'] += 1
      else:
        flops, moved = cost
    elif self.tpu and i.cycles is not None:
      return kind, i.cycles / self.chip.clock
    elif i.opcode == 'custom-call' and '__cudnn' in i.attributes:
      self.assumptions['cuDNN calls: only their operands and results were counted, not their products'] += 1
    elif self.tpu and moved > _NOTABLE:
      self.assumptions[f'{i.opcode} without an estimate of the compiler: its bytes at the memory\'s bandwidth'] += 1
    scale = 1 if self.tpu else EFFICIENCY['compute']
    return kind, max(flops / (self.peak * scale), self._bytes(i, moved))


def _times(sums, n):
  return collections.Counter({key: value * n for key, value in sums.items()})


def predict(program: str | Module, mesh: Mesh, chip: Chip, dtype: str = 'bfloat16') -> Prediction:
  """The prediction for one run of a compiled program (the text of compiled.as_text()) on a mesh of such chips.

  dtype: of the products' operands, for the peak. Raises ValueError for a loop without a known trip count, a network without a
  bandwidth, or a dtype without a peak.
  """
  module = program if isinstance(program, Module) else Module(program)
  walk = _Walk(module, mesh, chip, dtype)
  sums = walk.run(module.entry)
  flops, moved = module.flops(), 0
  for computation, i, times in module.walk():
    if i.kernel:
      cost = declared(i) or (attention_flops(module, computation, i) or 0.0, traffic(module, computation, i))
      flops, moved = flops + times * cost[0], moved + times * cost[1]
    elif not (i.free or i.opcode in ('while', 'conditional', 'call') or i.opcode.endswith(('-start', '-done', '-update'))):
      moved += times * traffic(module, computation, i)
  roofline = collections.Counter({'compute': flops / walk.peak, 'memory': moved / walk.memory})
  links, exposed = collections.Counter(), {}
  for key, value in sums.items():
    if key[0] in ('links', 'network') and value:
      links[key[1:]] += value
      roofline[f'{key[0]} {" x ".join(key[2]) or "of one device"}'] += value
    elif key[0] == 'exposed':
      exposed[key[1:]] = value
  return Prediction(sums['time'], sums['operations'], sums['kernels'], sums['copies'], dict(links), exposed, dict(roofline), flops, moved,
                    tuple(f'{text} ({count} x)' for text, count in walk.assumptions.items()))
