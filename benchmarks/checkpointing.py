"""Is activation checkpointing 30% slower for a fifth of the memory? Each remat policy, one model.

    python -m benchmarks.checkpointing [--steps 5] [--json FILE]              run on the CPU
    python -m benchmarks.checkpointing --topology v5p:1x1x1 [--json FILE]     compiled, predicted

On the CPU: bench-30M of benchmarks.train_cpu, f32, 8 rows of 512, a step of each policy in turn,
the shortest of --steps. With --topology: configs/bench_1b.py, bfloat16, 4 rows of 4k, compiled for
such a chip that need not be here; its time is predicted by analysis.roofline.

Kept: what the forward pass leaves for the backward pass, read off the traced program. Temporary:
what the compiler reserves besides arguments and results, so gradients and one block's own work are
in it. FLOPs: of the products of the compiled program. CPU seconds are of all the process's threads:
other programs on the machine lengthen wall time more than them.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import commands
from analysis import aot, hardware, roofline
from analysis.hlo import Module
from benchmarks import train_cpu, train_step, zero
from configs import bench_1b
from model import params
from parallel.mesh import make_mesh

# 'dots' keeps products with weights; what attention gives is named besides, for it has none.
WAYS = {
  'none': dict(remat='none', remat_save=()),
  'dots': dict(remat='dots', remat_save=()),
  'dots + attention': dict(remat='dots', remat_save=('attention',)),
  'full': dict(remat='full', remat_save=()),
  'sqrt': dict(remat='sqrt', remat_save=()),
}


def changed(config, way: str):
  """The config with a policy of WAYS."""
  return dataclasses.replace(config, model=config.model.with_execution(**WAYS[way]))


def compiled(config, device: jax.Device):
  """The step that train.py takes, compiled; the function that makes its state; and its figures.

  Figures: bytes 'kept' and 'temporary', 'flops', and 'seconds', predicted, on a chip of a topology.
  """
  mesh = make_mesh(config.mesh, [device])
  with jax.set_mesh(mesh):
    make_state, step, shapes = train_step.tandem_step(config)
    program = step.lower(params.abstract(make_state, mesh), shapes()).compile()
  module = Module(program.as_text())
  figures = dict(
    kept=zero.measure(config, 1).parts['activations'],
    temporary=program.memory_analysis().temp_size_in_bytes,
    flops=module.flops(),
  )
  if device.platform != 'cpu':
    chip = hardware.of_device(device)
    figures['seconds'] = roofline.predict(module, mesh, chip, config.model.execution.dtype).seconds
  return program, (make_state, shapes, mesh), figures


def run(programs: dict, steps: int) -> dict[str, tuple[float, float]]:
  """Wall and CPU seconds of a step of each program, the shortest of `steps`, taken in turn."""
  states, batches = {}, {}
  for way, (_, (make_state, shapes, mesh), _) in programs.items():
    with jax.set_mesh(mesh):
      states[way] = jax.jit(make_state)()
      batches[way] = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes())
  best = {way: (float('inf'), float('inf')) for way in programs}
  for _ in range(steps + 1):  # the first step warms caches, and is beaten
    for way, (program, (_, _, mesh), _) in programs.items():
      wall, busy = time.perf_counter(), time.process_time()
      with jax.set_mesh(mesh):
        states[way], *_ = jax.block_until_ready(program(states[way], batches[way]))
      spent = time.perf_counter() - wall, time.process_time() - busy
      best[way] = tuple(map(min, best[way], spent))
  return best


def main(arguments: Sequence[str] | None = None) -> dict:
  """The command; returns way -> figures."""
  parser = commands.parser(__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=5, help='timed steps of each policy')
  parser.add_argument('--topology', default='', help='compile for its first chip; run nothing')
  options = parser.parse_args(arguments)
  if jax.default_backend() != 'cpu':
    parser.error(
      f'this measures on a CPU, jax found {jax.default_backend()}; set JAX_PLATFORMS=cpu'
    )
  config = bench_1b.get_config() if options.topology else train_cpu.config()
  device = (aot.topology(options.topology) if options.topology else jax.devices())[0]
  programs = {way: compiled(changed(config, way), device) for way in WAYS}
  results = {way: figures for way, (_, _, figures) in programs.items()}
  if not options.topology:
    for way, (wall, busy) in run(programs, options.steps).items():
      results[way] |= dict(seconds=wall, cpu_seconds=busy)
  columns = ('kept', 'temporary', 'flops', 'seconds', 'cpu_seconds')
  columns = tuple(name for name in columns if name in results['none'])
  rows = []
  for way, figures in results.items():
    cells = []
    for name in columns:
      value, ratio = figures[name], figures[name] / results['none'][name]
      cells.append(f'{value / 1e9 if "seconds" not in name else value:,.3g} ({ratio:.2f}x)')
    rows.append([way, *cells])
  commands.table(
    f'{device.device_kind}: GB kept, GB temporary, 1e9 FLOPs, seconds of a step'
    + (', predicted' if options.topology else ''),
    ['remat', *columns],
    rows,
  )
  commands.write_json(options.json, 'checkpointing', results)
  return results


if __name__ == '__main__':
  main()
