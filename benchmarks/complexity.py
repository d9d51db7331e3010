"""Do training and generation cost what every course says? Memory, operations, time and calls,
measured against length and depth.

    python -m benchmarks.complexity [--json FILE] [--plot FILE.png] [--quick] [--times]
                                  [--topology v5e:1x1]

T tokens of a sequence · L layers. Compiled for and run on the CPU, in f32, one sequence. Two small
models, each with the sizes that leave one term in sight: along T heads wider than the model, so
that attention outweighs the weights already at short lengths; along L a wide residual stream
through narrow layers, so that what is kept between layers outweighs the work inside of one. With
--topology besides compiled for such a chip (its first, if there are more) that need not be here,
larger, in bfloat16; its time is predicted.

Memory: what the compiler reserves for the program (arguments + outputs + temporaries) without
parameters and gradients. Operations: multiply-adds x 2 of the products of the compiled program, a
loop as often as it runs. Calls: evaluations of a block in the traced program / L. Time: the best of
three runs, of programs of at most MOST_TIMED operations and bytes;
or as analysis.roofline predicts.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

import commands
from analysis import aot, hardware, roofline
from analysis.hlo import Module
from benchmarks import common, taught
from configs.models import llama3_8b
from data.batch import Batch
from decode.loop import DecodeState, Rules, decode_chunk
from decode.sampling import History, make_sampling
from model import flops, params, transformer
from model.cache import init_cache
from model.config import ModelConfig
from model.execution import ExecutionConfig
from objectives.next_token import summed_loss
from parallel.mesh import MeshConfig, make_mesh

AXES = {
  'cpu': {
    'T': dict(
      base=dict(width=8, heads=2, head_width=16, feed_forward=8),
      fixed=4,
      sizes=(128, 256, 512, 1024, 2048),
    ),
    'L': dict(
      base=dict(width=64, heads=1, head_width=2, feed_forward=2),
      fixed=512,
      sizes=(64, 256, 1024, 4096),
    ),
  },
  # A TPU's tiles are 128 wide. Parameters are not cast: a copy of them all would hide what is
  # between layers.
  'tpu': {
    'T': dict(
      base=dict(
        width=128,
        heads=8,
        head_width=128,
        feed_forward=128,
        execution=ExecutionConfig(dtype='bfloat16', parameter_dtype='bfloat16'),
      ),
      fixed=4,
      sizes=(1024, 2048, 4096, 8192, 16384),
    ),
    'L': dict(
      base=dict(
        width=1024,
        heads=1,
        head_width=128,
        feed_forward=128,
        execution=ExecutionConfig(dtype='bfloat16', parameter_dtype='bfloat16'),
      ),
      fixed=512,
      sizes=(16, 64, 256, 1024),
    ),
  },
}
QUICK = 3  # sizes along each axis
# Operations and bytes: small models run these at a small part of a core's rate
MOST_TIMED = (2e10, 2**32)
STRAIGHT = 0.15  # neighbouring slopes further than this from the last one belong to another term
QUANTITIES = ('memory', 'flops', 'seconds', 'calls')


def _train(config: ModelConfig, T: int):
  loss = jax.value_and_grad(lambda model, batch: summed_loss(model, batch, 0.0), has_aux=True)
  return loss, Batch.abstract(1, T)


def _uncached(config: ModelConfig, T: int):
  def generate(model, tokens):
    def step(tokens, i):
      hidden = jax.lax.dynamic_index_in_dim(model(tokens).hidden, i, 1, keepdims=False)
      token = jnp.argmax(model.logits(hidden), -1).astype(jnp.int32)
      return tokens.at[:, i + 1].set(token, mode='drop'), token

    return jax.lax.scan(step, tokens, jnp.arange(T, dtype=jnp.int32))[1]

  return generate, jax.ShapeDtypeStruct((1, T), jnp.int32)


def _cached(config: ModelConfig, T: int):
  def generate(model, stop_at):
    state = DecodeState(
      init_cache(config, 1, T),
      jnp.zeros((1, config.V)),
      jnp.zeros((1,), bool),
      stop_at,
      History(jnp.zeros((1, config.V), jnp.int32), jnp.zeros((1, config.V), bool)),
    )
    rules = Rules(
      jax.tree.map(jnp.asarray, make_sampling(1, temperature=0.0)), jnp.full((1, 4), -1)
    )
    # The function that it compiles: options for the compiler go with a program, not with a part.
    return decode_chunk.__wrapped__(model, state, rules, steps=T, pad=0)[1].ids

  return generate, jax.ShapeDtypeStruct((1,), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Way:
  """One way to train or to generate, and what courses say that it costs.

  Attributes:
    name: as the tables have it.
    build: (config, T) -> function of a model and one more argument, and that argument, abstract.
    taught: quantity -> powers of T and L.
    calls: forward calls as taught, of T.
    execution: how the model runs.
  """

  name: str
  build: Callable
  taught: dict[str, dict[str, float]]
  calls: str
  execution: dict[str, str]

  @property
  def trains(self) -> bool:
    return self.build is _train


_TIME = {'T': 2, 'L': 1}
WAYS = (
  Way(
    'training, all scores held',
    _train,
    {'memory': {'T': 1, 'L': 1}, 'flops': _TIME},
    '1',
    {'attention': 'reference'},
  ),
  Way(
    'training, flash attention',
    _train,
    {'memory': {'T': 1, 'L': 1}, 'flops': _TIME},
    '1',
    {'attention': 'auto'},
  ),
  Way(
    'training, remat full',
    _train,
    {'memory': {'T': 1, 'L': 0.5}, 'flops': _TIME},
    '2',
    {'attention': 'auto', 'remat': 'full'},
  ),
  Way(
    'training, remat sqrt',
    _train,
    {'memory': {'T': 1, 'L': 0.5}, 'flops': _TIME},
    '2',
    {'attention': 'auto', 'remat': 'sqrt'},
  ),
  Way(
    'generation, no cache',
    _uncached,
    {'memory': {'T': 1, 'L': 0}, 'flops': {'T': 3, 'L': 1}},
    'T',
    {'attention': 'auto'},
  ),
  Way(
    'generation, cache',
    _cached,
    {'memory': {'T': 1, 'L': 1}, 'flops': _TIME},
    'T',
    {'attention': 'auto'},
  ),
)


def blocks(program) -> int:
  """How many blocks a jaxpr evaluates, recomputed ones too; loops as often as they run.

  Raises ValueError for a block inside a while loop, whose trips a program does not tell.
  """
  total = 0
  for equation in program.eqns:
    name = equation.primitive.name
    total += name == 'name' and equation.params['name'] == 'block'
    inside = sum(map(blocks, jax.extend.core.jaxprs_in_params(equation.params)))
    if name == 'while' and inside:
      raise ValueError(
        f'a while loop holds {inside} blocks, and nobody knows how often it '
        'runs; write it as a scan'
      )
    total += inside * (equation.params['length'] if name == 'scan' else 1)
  return total


def measure(
  way: Way, config: ModelConfig, timed: bool, device: jax.Device | None = None
) -> dict[str, float]:
  """QUANTITIES of one program: memory in bytes, flops, seconds (NaN where not timed), calls.
  config: without the way's changes.

  device: one of a topology, for which times are predicted; all but the calls are NaN where the
  program does not fit it. Without one, the CPU.
  """
  T, config = config.max_length, config.with_execution(**way.execution)
  function, argument = way.build(config, T)
  mesh = make_mesh(MeshConfig(), [device or jax.devices()[0]])
  with jax.set_mesh(mesh):
    init = jax.jit(functools.partial(transformer.init, config, 0))
    model = params.abstract(init, mesh)
    traced = jax.jit(function).trace(model, argument)
    lowered, calls = traced.lower(), blocks(traced.jaxpr.jaxpr) / config.L
    try:
      # LLVM's optimisations change the speed, and neither operations nor buffers.
      compiled = lowered.compile({} if device else {'xla_backend_optimization_level': '0'})
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      return dict.fromkeys(QUANTITIES, math.nan) | dict(calls=calls)
    stats, module = compiled.memory_analysis(), Module(compiled.as_text())
    parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))
    memory = (
      stats.argument_size_in_bytes
      + stats.output_size_in_bytes
      - stats.alias_size_in_bytes
      + stats.temp_size_in_bytes
      - parameters * (2 if way.trains else 1)
    )
    if device:
      chip = hardware.of_device(device)
      predicted = roofline.predict(module, mesh, chip, config.execution.dtype)
      return dict(memory=memory, flops=predicted.flops, seconds=predicted.seconds, calls=calls)
    operations, seconds = module.flops(), math.nan
    if timed and operations <= MOST_TIMED[0] and memory <= MOST_TIMED[1]:
      compiled = lowered.compile()
      arguments = (
        init(),
        jax.tree.map(lambda x: jnp.full(x.shape, T if x.ndim == 1 else 1, x.dtype), argument),
      )

      def run():
        return jax.block_until_ready(compiled(*arguments))

      run()
      seconds = common.seconds(run)
  return dict(memory=memory, flops=operations, seconds=seconds, calls=calls)


@dataclasses.dataclass(frozen=True)
class Fit:
  """exponent of y ~ size^exponent from size `first` to `last`, where the line is straight."""

  exponent: float
  first: float
  last: float


def fit(sizes: Sequence[float], values: Sequence[float]) -> Fit | None:
  """Least squares in log-log over the largest sizes whose slopes,
  from each to the next, are within STRAIGHT of the last one.

  There one term dominates: where two of powers p < q are as large as one another, a doubling of the
  size changes the slope by 0.17 (q - p)^2. None where fewer than three sizes are left. Values that
  are NaN are left out. Raises ValueError for others that are not positive.
  """
  pairs = [
    (size, value) for size, value in zip(sizes, values, strict=True) if not math.isnan(value)
  ]
  if any(size <= 0 or value <= 0 for size, value in pairs):
    raise ValueError(f'sizes and values {pairs} must be positive: they are fitted in logarithms')
  if len(pairs) < 3:
    return None
  x, y = np.log(np.array(pairs, float)).T
  slopes = np.diff(y) / np.diff(x)
  first = len(slopes) - 1
  while first and abs(slopes[first - 1] - slopes[-1]) <= STRAIGHT:
    first -= 1
  if len(x) - first < 3:
    return None
  return Fit(float(np.polyfit(x[first:], y[first:], 1)[0]), pairs[first][0], pairs[-1][0])


def crossover(config: ModelConfig) -> float:
  """Length at which attention's products are as many as all others:
  below it time grows with T, above it with T^2.
  """
  one, two = (flops.forward_flops_per_token(config, T) for T in (1, 3))  # mean keys 1 and 2
  per_key = two - one
  return 2 * (one - per_key) / per_key  # mean keys are about T / 2


def config_of(axis: str, size: int, platform: str = 'cpu') -> ModelConfig:
  """The small model of one point: `size` tokens of the model along T,
  or layers of the one along L.
  """
  known = AXES[platform][axis]
  T, L = (size, known['fixed']) if axis == 'T' else (known['fixed'], size)
  return ModelConfig(vocabulary=64, layers=L, max_length=T, **known['base'])


def sweep(
  sizes: dict[str, Sequence[int]], timed: bool, device: jax.Device | None = None, log=print
) -> dict:
  """axis -> {'sizes': [...], name of a way: quantity -> values}."""
  found = {}
  for axis, along in sizes.items():
    found[axis] = {'sizes': list(along)}
    for way in WAYS:
      points = [
        measure(way, config_of(axis, size, 'tpu' if device else 'cpu'), timed, device)
        for size in along
      ]
      found[axis][way.name] = {name: [point[name] for point in points] for name in QUANTITIES}
      log(f'{way.name}, along {axis}: done')
  return found


def _timed(found) -> bool:
  return not all(math.isnan(seconds) for seconds in found['T'][WAYS[0].name]['seconds'])


def _slopes(sizes, values) -> list[float]:
  """From each size to the next, as far as there are values."""
  pairs = [(size, value) for size, value in zip(sizes, values) if not math.isnan(value)]
  return [math.log(v / u) / math.log(t / s) for (s, u), (t, v) in itertools.pairwise(pairs)]


def _said(sizes, values) -> tuple[str, str]:
  """The exponent, or the last slope where no line is straight; and the first slope."""
  found, slopes = fit(sizes, values), _slopes(sizes, values)
  if not slopes:
    return 'none', 'none'
  said = (
    f'bends, {slopes[-1]:.2f} at last'
    if found is None
    else f'{found.exponent:.2f} ({found.first:g}-{found.last:g})'
  )
  return said, f'{slopes[0]:.2f}'


def report(found: dict, platform: str, where: str) -> None:
  """Prints taught beside measured exponents with the range of each, and the calls.
  where: in words, for the tables' titles.
  """
  for quantity in ('memory', 'flops', *(('seconds',) if _timed(found) else ())):
    rows = []
    for way in WAYS:
      taught = way.taught['flops' if quantity == 'seconds' else quantity]
      row = [way.name]
      for axis in found:
        row += [f'{taught[axis]:g}', *_said(found[axis]['sizes'], found[axis][way.name][quantity])]
      rows.append(row)
    headers = [
      text
      for axis in found
      for text in (f'taught, {axis}', f'measured, {axis} (range)', 'first slope')
    ]
    commands.table(f'{quantity}, {where}: exponents', ['', *headers], rows)
  rows = []
  for way in WAYS:
    T, last = found['T']['sizes'][-1], found['T'][way.name]
    calls, plain = last['calls'][-1], found['T'][WAYS[1].name]
    rows.append(
      [
        way.name,
        way.calls,
        f'{calls / T:g} T' if not way.trains else f'{calls:g}',
        last['memory'][-1] / 2**20,
        last['flops'][-1] / plain['flops'][-1],
      ]
    )
  commands.table(
    f'forward calls, and at T={T}, L={AXES[platform]["T"]["fixed"]}, {where}',
    ['', 'calls taught', 'counted', 'memory MiB', 'operations / flash training'],
    rows,
  )


def panels(swept: dict[str, dict]) -> list[taught.Panel]:
  """What was measured, beside what is taught: of each quantity and of each sweep by what it was
  compiled for, a panel for T and one for L.
  """
  units = {'memory': 'bytes', 'flops': 'operations', 'seconds': 's'}
  made = []
  for quantity, unit in units.items():
    for where, found in swept.items():
      if quantity == 'seconds' and not _timed(found):
        continue
      for axis, values in found.items():
        lines = []
        for way in WAYS:
          line = fit(values['sizes'], values[way.name][quantity])
          power = way.taught['flops' if quantity == 'seconds' else quantity][axis]
          lines.append(
            taught.Line(
              way.name,
              values['sizes'],
              values[way.name][quantity],
              line.exponent if line else None,
              power,
            )
          )
        made.append(taught.Panel(quantity, unit, axis, where, lines))
  return made


def main(arguments: Sequence[str] | None = None) -> dict:
  """The command; returns what `sweep` found, by what was compiled for."""
  parser = commands.parser(__doc__.splitlines()[0])
  parser.add_argument('--plot', default='', metavar='FILE', help='write log-log plots here')
  parser.add_argument('--quick', action='store_true', help='three sizes along each axis')
  parser.add_argument(
    '--topology',
    default='',
    help='of TPUs, as in v5p:1x1x1: compile for one, too, and predict the times',
  )
  parser.add_argument(
    '--times',
    action='store_true',
    help='measure times, too: minutes more, and only on a machine that does nothing else',
  )
  options = parser.parse_args(arguments)
  if options.plot and os.path.splitext(options.plot)[1] not in ('.png', '.pdf', '.svg'):
    parser.error(f'--plot={options.plot} must end in .png, .pdf or .svg')

  def sizes_of(platform):
    return {
      axis: known['sizes'][: QUICK if options.quick else None]
      for axis, known in AXES[platform].items()
    }

  if jax.default_backend() != 'cpu':
    parser.error(
      f'this measures on a CPU, and jax found {jax.default_backend()}; set JAX_PLATFORMS=cpu'
    )
  if options.times and os.getloadavg()[0] > 1.5:
    print(f'WARNING: the machine is busy (load {os.getloadavg()[0]:.1f}): times will be wrong')
  log = functools.partial(print, flush=True)
  devices = aot.topology(options.topology)[:1] if options.topology else []
  if devices and devices[0].platform != 'tpu':
    parser.error(f'--topology={options.topology}: name one of TPUs, whose compiler estimates times')
  found = {'cpu': sweep(sizes_of('cpu'), options.times, log=log)}
  report(found['cpu'], 'cpu', 'CPU')
  for device in devices:
    found[options.topology] = sweep(sizes_of('tpu'), False, device, log)
    report(found[options.topology], 'tpu', f'as compiled for a {device.device_kind}')
  small, large = crossover(config_of('T', 128)), crossover(llama3_8b.get_config().model)
  print(
    f'\nT^2 rules from {small:,.0f} tokens on in the model along T; in one as large as Llama 3 8B '
    f'from {large:,.0f} on: below, time is linear in T.'
  )
  beside = panels({{'cpu': 'CPU'}.get(where, where): values for where, values in found.items()})
  print('\n' + '\n'.join(taught.reasons(beside)))
  if options.plot:
    taught.draw(beside, options.plot)
    print(f'\nwrote {options.plot}')

  def named(values):
    return [None if math.isnan(value) else value for value in values]  # JSON has no NaN

  commands.write_json(
    options.json, 'complexity', jax.tree.map(named, found, is_leaf=lambda x: isinstance(x, list))
  )
  return found


if __name__ == '__main__':
  main()
