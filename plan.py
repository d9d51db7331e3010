"""Says what a run costs before it starts:

    python plan.py --config=configs/models/llama3_8b.py --topology=v5p:4x4x4 [--search]

Compiles the very step that train.py would run (or with --mode=prefill, --mode=decode what
generates, with --mode=serve what serve.py writes and reads with, in as many rows as fit, and with
--mode=rollout what a policy writes with, beside all that its training holds), for hardware that
need not be here, and reads the compiled program: does it fit, what does it compute and move, how
long does it take, what does that cost. Topologies: v5e:16x16, v6e:8x8, v5p:4x4x4, 2*v5e:16x16 (two
slices), h100:1x4x8 (four nodes of eight).
"""

import os
import signal
import threading

from parallel import hosts

if __name__ == '__main__':
  # A compilation answers no signal, and libtpu would answer with its own stack: a thread waits for
  # them, and all that start after it get none.
  stopping = hosts.heeded(hosts.STOPPING)
  signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
  waiting = threading.Thread(target=lambda: hosts.leave_by(signal.sigwait(stopping)), daemon=True)
  waiting.start()
  # What is compiled for is asked of the compiler, not of this machine
  os.environ['JAX_PLATFORMS'] = 'cpu'

import dataclasses
import functools
import json
import re
import time

import jax
from absl import app, flags, logging
from jax.sharding import AxisType

import commands
import files
import names
import train
from analysis import aot, candidates, enough, hardware, memory, modes, roofline, schedule, tables
from analysis.hlo import Module
from analysis.served import PlannedServer, serve
from kernels import cudnn
from kernels.attention import choose, too_few
from model import flops as counts
from parallel import compiler
from parallel.mesh import make_mesh
from training import config as configs, overrides

SEARCHED = 3  # meshes whose remat policies and microbatches --search tries

TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'KIND:SHAPE of the hardware, as in v5p:4x4x4, 2*v5e:16x16 or h100:1x4x8.'
)
SLICES = flags.DEFINE_integer(
  'slices', 1, 'How many such slices; `data` crosses them.', lower_bound=1
)
MODE = flags.DEFINE_string('mode', 'train', f'What runs: {", ".join(modes.MODES)}.')
BATCH = flags.DEFINE_integer(
  'batch',
  0,
  'Rows that prefill, decode or a server works on (train takes config.data.batch_size); of a '
  'server 0 is as many as fit, and no more than 256.',
  lower_bound=0,
)
WEIGHTS = flags.DEFINE_string(
  'weights', '', 'Of what generates: matrices in codes, as of generate.py: int8, int4:group=64.'
)
CONTEXT = flags.DEFINE_integer(
  'context', 0, 'Tokens of a row: of the prompt, or of the cache.', lower_bound=0
)
SEARCH = flags.DEFINE_bool(
  'search',
  False,
  'Compile a small set of meshes, remat policies, microbatches and compiler options; print them, '
  'fastest first.',
)
NEAREST = flags.DEFINE_bool(
  'nearest', True, 'Of a step that does not fit, look for the nearest change that does.'
)
JSON = flags.DEFINE_string('json', '', 'Write what was found to this file.')
DOLLARS = flags.DEFINE_float(
  'dollars_per_chip_hour', None, 'Price; without one no cost is printed.', lower_bound=0
)
WATTS = flags.DEFINE_float(
  'watts_per_chip',
  None,
  "Power; default: the chip's published maximum, where there is one.",
  lower_bound=0,
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A program on a topology and its cost.
  Bytes, FLOPs of hardware and seconds are of one device and one run of the program.

  Attributes:
    mode: one of analysis.modes.MODES; a run is a training step, the prefill of all rows, a part of
      prompts, or CHUNK tokens of every row.
    config: with the mesh's sizes resolved. chip: what a device belongs to. devices: of the mesh.
    problem: why the compiler refused, '' where it did not; then memory and prediction are None.
      After REFUSED: whatever the memory.
    held: bytes of the arguments by name, known in any case.
    row: tokens of one that a step trains on, or a prefill reads.
    tokens, model_flops: of a run, on all devices. collectives: each as found.
    compile_seconds: tracing, lowering and compiling.
  """

  mode: str
  config: configs.Config
  chip: hardware.Chip
  devices: int
  row: int
  problem: str
  held: dict[str, int]
  memory: memory.Memory | None
  tokens: int
  model_flops: float
  collectives: list[schedule.Collective]
  prediction: roofline.Prediction | None
  compile_seconds: float

  @property
  def available(self) -> float:
    """Bytes of main memory that a program can have of a device."""
    return self.chip.available

  @property
  def fits(self) -> bool:
    return self.memory is not None and self.memory.peak <= self.available

  @property
  def refused(self) -> bool:
    """Whether it cannot be planned, for another reason than memory."""
    return self.problem.startswith(REFUSED)

  @property
  def seconds(self) -> float:
    """Predicted, of a run; infinite where nothing is predicted."""
    return self.prediction.seconds if self.prediction else float('inf')

  @property
  def mfu(self) -> float | None:
    """Model FLOPs utilisation at the predicted time, 0 to 1; None where there is none."""
    if self.prediction is None:
      return None
    return counts.mfu(
      self.model_flops / self.seconds,
      self.devices,
      hardware.peak(self.chip, self.config.model.execution.dtype),
    )

  @property
  def chips(self) -> int:
    return self.devices // self.chip.devices

  @property
  def attention(self) -> str:
    """The backend of kernels.attention that the program runs; as configured where devices share
    rows, which ask it for parts of them.

    'cached': kernels.cached.
    """
    model = self.config.model
    if self.mode in (*modes.WRITE, modes.READ):
      return 'cached'
    if model.execution.attention != 'auto' or self.config.mesh.context > 1:
      return model.execution.attention
    spec = model.attention_spec if self.mode == 'train' else model.attention_spec - {'segments'}
    platform = 'tpu' if self.chip.torus else 'gpu'
    without = too_few(self.row)
    if not without and platform == 'gpu' and spec <= cudnn.FIELDS:
      without = frozenset({'pallas_gpu'})
    return choose(spec, platform, without=without)

  @property
  def compiled_with(self) -> compiler.ChosenOptions:
    """The table of compiler options, and the options; none but for a step of training."""
    entries = self.config.train.compiler if self.mode == modes.TRAIN else (compiler.NONE,)
    return compiler.chosen(entries, self.chip.kinds[0], self.config.mesh.sizes())

  def to_dict(self) -> dict:
    """JSON-able."""
    known = self.memory is not None
    return {
      'mode': self.mode,
      'chip': self.chip.name,
      'chips': self.chips,
      'mesh': self.config.mesh.sizes(),
      'fits': self.fits,
      'remat': self.config.model.execution.remat,
      'attention': self.attention,
      'compiler': self.compiled_with._asdict(),
      'accumulation': self.config.train.accumulation,
      'problem': self.problem,
      'available_bytes': self.available,
      'argument_bytes': self.held,
      'memory': dataclasses.asdict(self.memory) if known else None,
      'tokens': self.tokens,
      'model_flops': self.model_flops,
      'collectives': [
        dataclasses.asdict(c) | {'group': None, 'pairs': None} for c in self.collectives
      ],
      'prediction': tables.json_able(dataclasses.asdict(self.prediction)) if known else None,
      'mfu': self.mfu,
      'compile_seconds': self.compile_seconds,
      'error': tables.error(self.chip),
      'config': configs.to_dict(self.config),
    }


def make_plan(
  config: configs.Config,
  devices: list[jax.Device],
  mode: str = 'train',
  rows: int = 0,
  context: int = 0,
  axis_type: AxisType = AxisType.Explicit,
  weights: str = '',
) -> Plan:
  """Compiles what `config` runs in this mode on these devices.

  Args:
    rows, context, weights: of what generates; see the flags --batch, --context, --weights.
    axis_type: Auto for the twin that XLA's partitioner lays out.
  Raises ValueError or NotImplementedError for what cannot run there whatever the memory;
  too little memory is a Plan's `problem`.
  """
  names.check('mode', mode, modes.MODES)
  mesh, config = make_mesh(config.mesh, devices, axis_type), resolved(config, devices)
  began, chip = time.perf_counter(), chip_of(devices)
  if mode == modes.TRAIN:
    with jax.set_mesh(mesh):
      compiler.check(compiler.options(config.train.compiler))
  made = modes.lower(config, mesh, mode, rows, context, weights)
  arrays, tokens, model_flops = made.arrays, made.tokens, made.model_flops
  beside = {name: memory.shard_bytes(tree) for name, tree in made.beside.items()}
  bytes_held = beside | {name: memory.shard_bytes(tree) for name, tree in arrays.items()}
  row = context if mode == modes.PREFILL else config.objective.longest_row(config.data)
  plan = functools.partial(Plan, mode, config, chip, mesh.size, row)

  def seconds():
    return time.perf_counter() - began

  try:
    compiled = made.lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    problem = re.sub(r'^RESOURCE_EXHAUSTED: ', '', str(error).splitlines()[0])
    return plan(problem, bytes_held, None, tokens, model_flops, [], None, seconds())

  module = Module(compiled.as_text())
  return plan(
    '',
    bytes_held,
    memory.parts(compiled, arrays, arrays['parameters'] if mode == 'train' else (), beside),
    tokens,
    model_flops,
    schedule.collectives(module, mesh),
    roofline.predict(module, mesh, chip, config.model.execution.dtype),
    seconds(),
  )


def resolved(config: configs.Config, devices: list[jax.Device]) -> configs.Config:
  """The config with the size of every mesh axis on these devices.
  Raises ValueError where they do not fit.
  """
  sizes = config.mesh.resolve(len(devices))
  return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))


def chip_of(devices: list[jax.Device]) -> hardware.Chip:
  """The chip that devices are of. Raises ValueError for one that is not tabled."""
  chip = hardware.of_device(devices[0])
  if chip is None:
    raise ValueError(
      f'device kind {devices[0].device_kind!r} is not in analysis/hardware.py; add its peaks there'
    )
  return chip


def nearest_that_fits(plan: Plan, devices: list[jax.Device], log=print) -> Plan | None:
  """The nearest change of a training config that fits, found by compiling; None where none does."""
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  hopeless = set()
  for config in candidates.nearest(plan.config, plan.config.mesh.sizes(), len(devices), slices):
    # Where what is carried from step to step is too much, no recomputing and no microbatch helps.
    carried = config.mesh, config.optimizer.name, config.train.offload_optimizer
    if carried in hopeless:
      continue
    tried = attempt(config, devices)
    verdict = 'fits' if tried.fits else tables.shortage(tried)
    if tried.problem.startswith(ALONE):
      hopeless.add(carried)
      verdict += ', whatever is recomputed'
    log(f'  tried {candidates.flags(plan.config, config)}: {verdict}')
    if tried.fits:
      return tried
  return None


ALONE = 'parameters, optimizer state and gradients alone take'
REFUSED = 'cannot be planned: '


def attempt(config: configs.Config, devices: list[jax.Device]) -> Plan:
  """The plan for training; without compiling where parameters,
  optimizer state and gradients alone are too much. What cannot be planned is a `problem`, too:
  other candidates may be.
  """
  sizes = enough.state_bytes(config, make_mesh(config.mesh, devices))
  chip, least = chip_of(devices), sum(sizes.values())
  problem = f'{ALONE} {least / 1e9:.2f} GB'
  short = Plan('train', config, chip, len(devices), 1, problem, sizes, None, 1, 0.0, [], None, 0.0)
  if least > short.available:
    return short
  try:
    return make_plan(config, devices)
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
    return dataclasses.replace(short, problem=REFUSED + (str(error).splitlines() or [''])[0])


def more_chips(plan: Plan) -> str:
  """What to do where nothing else helps: how many chips hold what a step carries."""
  found = enough.smallest(plan.config, TOPOLOGY.value, SLICES.value, plan.available)
  if found is None:
    return (
      'none of these fits, nor does a larger slice of this kind over which the batch divides; use '
      'another kind, or a larger batch'
    )
  fsdp = plan.config.mesh.fsdp * found.devices // plan.devices
  return (
    f'none of these fits; use more chips: of {found.devices // plan.chip.devices}, parameters, '
    f'optimizer state and gradients take {found.least / 1e9:.2f} of {plan.available / 1e9:.2f} GB '
    f'each. Plan it with --topology={found.topology} --config.mesh.fsdp={fsdp}'
  )


def search(config: configs.Config, devices: list[jax.Device], log=print) -> list[Plan]:
  """Plans of a small set of candidates that fit, fastest first; those that don't follow.

  All meshes with the config's own remat policy and microbatches; then, on the SEARCHED best ones,
  the other policies, each with the fewest microbatches that fit; then, of the best of all, the
  other tables of compiler options. Raises ValueError where no mesh divides the config's sizes, and
  where nothing can be planned.
  """
  config = resolved(config, devices)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  tried: dict[str, Plan] = {}

  def compiled(candidate):
    flags_ = candidates.flags(config, candidate) or '(as given)'
    if flags_ not in tried:
      plan = tried[flags_] = attempt(candidate, devices)
      if plan.fits:
        log(f'  {flags_}: {plan.seconds:.3f} s, {plan.memory.peak / 1e9:.2f} GB')
      else:
        log(f'  {flags_}: {tables.shortage(plan)}')
    return tried[flags_]

  ranked = [
    compiled(candidates.change(config, mesh))
    for mesh in candidates.meshes(config, len(devices), slices)
  ]

  def order(plan):
    return not plan.fits, plan.seconds, plan.refused

  ranked.sort(key=order)
  if ranked and ranked[0].refused:
    raise ValueError(f'of {len(ranked)} meshes all are refused; the first {ranked[0].problem}')
  for plan in ranked[:SEARCHED]:
    for policy in candidates.policies(config):
      candidate = candidates.change(plan.config, policy=policy)
      for n in (0, *candidates.microbatches(candidate, plan.config.mesh.sizes())):
        if compiled(candidates.change(candidate, accumulation=n)).fits:
          break
  if not tried:
    raise ValueError(
      f'no mesh of {len(devices)} devices divides data.batch_size={config.data.batch_size} / '
      f'train.accumulation={config.train.accumulation} and the sizes of the model; change the batch'
    )
  best = min(tried.values(), key=order)
  for table in candidates.compilers(best.config, devices[0].device_kind) if best.fits else ():
    compiled(candidates.change(best.config, compiler=table))
  return sorted(tried.values(), key=order)


def make_served(
  config: configs.Config,
  devices: list[jax.Device],
  rows: int = 0,
  context: int = 0,
  weights: str = '',
  log=print,
) -> PlannedServer:
  """A server on these devices, of so many rows of `context` tokens; 0: of as many as fit, and of
  as many as the model has positions for. Raises as served.serve and make_plan do.
  """
  context, chip = context or config.model.max_length, chip_of(devices)

  def plan(mode, rows):
    made = make_plan(config, devices, mode, rows, context, weights=weights)
    verdict = 'fits' if made.fits else tables.shortage(made)
    log(f'  {rows} rows of {context:,} tokens, what {modes.DOES[mode]}: {verdict}')
    return made

  mesh = make_mesh(config.mesh, devices)
  return serve(config.model, mesh, plan, chip.available, rows, context, weights)


def main(arguments):
  names.only_flags(arguments, '--config.train.steps=100')
  if train.CONFIG.value is None or not TOPOLOGY.value:
    raise app.UsageError('give --config=configs/NAME.py and --topology=KIND:SHAPE')
  # Defined with train.py, whose --config this is.
  for flag in (
    train.WORKDIR,
    train.PROFILE,
    train.SHOW,
    train.ALLOW_CHANGE,
    train.COORDINATOR,
    train.PROCESSES,
    train.PROCESS,
    train.STOPPED_CODE,
    train.HEARTBEAT,
    train.MEETING,
  ):
    if flag.present:
      raise app.UsageError(f'--{flag.name} is of train.py; a plan writes nothing but --json')
  logging.set_verbosity(logging.WARNING)
  with commands.mendable():
    names.check('mode', MODE.value, modes.MODES)
    if JSON.value:
      files.check_writable(JSON.value)
    rate = 0.0  # of tokens, where a plan is of more programs than one
    apart = MODE.value in (modes.TRAIN, modes.ROLLOUT)
    if apart and (BATCH.present or CONTEXT.present or WEIGHTS.present):
      raise ValueError(
        f'--batch, --context and --weights are of what generates; {MODE.value} takes '
        '--config.data.batch_size and .sequence_length'
      )
    if SEARCH.value and MODE.value != 'train':
      raise NotImplementedError(
        '--search looks for meshes, remat policies and microbatches of training, not of '
        f'--mode={MODE.value}'
      )

    config = overrides.from_flag(train.CONFIG.value)
    with commands.mendable(ImportError):
      devices = aot.topology(TOPOLOGY.value, SLICES.value)
    if SEARCH.value:
      print('compiling candidates:', flush=True)
      plans = search(config, devices, log=functools.partial(print, flush=True))
      tables.ranking(resolved(config, devices), plans)
      plan, extra = plans[0], {'candidates': [p.to_dict() for p in plans]}
    elif MODE.value == modes.SERVE:
      print('compiling servers:', flush=True)
      asked = BATCH.value, CONTEXT.value, WEIGHTS.value
      server = make_served(config, devices, *asked, functools.partial(print, flush=True))
      plan, extra = server.write, {'read': server.read.to_dict(), 'times': server.times()}
      extra['rows'], extra['context'] = server.rows, server.context
      # Prompts are read between, which is another program.
      rate = server.times().get('tokens/s', 0.0)
    else:
      plan = make_plan(
        config, devices, MODE.value, BATCH.value, CONTEXT.value, weights=WEIGHTS.value
      )
      extra = {}

    cost = tables.cost(plan, DOLLARS.value, WATTS.value, rate)
    tables.show(plan, cost)
    if MODE.value == modes.SERVE:
      tables.served(server)
    if not plan.fits and MODE.value == 'train' and NEAREST.value and not SEARCH.value:
      print('\nlooking for the nearest change that fits:', flush=True)
      other = nearest_that_fits(plan, devices, functools.partial(print, flush=True))
      print('add ' + candidates.flags(plan.config, other.config) if other else more_chips(plan))
      extra = {'nearest': other and other.to_dict()}

  if JSON.value:
    whole = plan.to_dict() | {'cost': cost} | extra
    files.replace(JSON.value, json.dumps(whole, indent=1) + '\n')
    print(f'\nwrote {JSON.value}')


if __name__ == '__main__':
  commands.end(lambda: app.run(main, flags_parser=overrides.parsed))
