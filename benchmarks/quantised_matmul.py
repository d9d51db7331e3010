"""Is the TPU's product with codes as fast as its memory? Bundles of a step, compiled for TPUs that
aren't here.

    python -m benchmarks.quantised_matmul [--topologies v5e:1x1,v6e:1x1] [--rows 8] [--write]
                                          [--json FILE]

A matrix of 4,096 x 4,096 in groups of 128, rows in bfloat16. Beside the time of all steps by their
bundles (analysis.bundles; stalls are not in it) stands what reading codes and scales takes at the
peak of the memory: the kernel waits for memory where that is more. --write puts the bundles of a
number where plan.py looks. Needs libtpu (the extra `plan`).
"""

import json
import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import commands
import files
from analysis import aot, bundles, hardware
from benchmarks import train_step

TOPOLOGIES = 'v5e:1x1,v5p:1x1x1,v6e:1x1,tpu7x:1x1x1'
SIZE, GROUP = 4096, 128
BITS = {'int4': GROUP, 'int8': 0}  # inputs that are packed together


def measure(topology: str, rows: int, grid: str) -> dict:
  """Of a process that has not loaded libtpu: seconds by bundles and by memory, and spills."""
  with tempfile.TemporaryDirectory() as directory:
    os.environ['LIBTPU_INIT_ARGS'] = bundles.dump_flags(directory)
    device, temporary = compiled(topology, rows, grid)
    blocks = bundles.kernels(directory)['quantised_matmul']
  inputs, outputs = sizes(grid)
  body, chip = max(blocks, key=lambda block: block.bundles), hardware.of_device(device)
  clock = chip.clock * (chip.cores // chip.devices)  # of cores, which share the outputs
  stored = SIZE * SIZE // (2 if BITS[grid] else 1) + 4 * SIZE * SIZE // GROUP
  return {
    'kind': device.device_kind,
    'bundles': body.bundles,
    'bundles_of_a_number': body.bundles / (inputs * outputs),
    'step': f'{inputs} x {outputs}',
    'seconds': SIZE // inputs * (SIZE // outputs) * body.bundles / clock,
    'memory_seconds': stored / chip.hbm_bandwidth * chip.devices,
    'spills': body.uses.get('VSTORE:SPILL', 0.0),
    'temporary_bytes': temporary,
  }


def coded(grid: str, array):
  """The matrix, of arrays of a shape and a dtype."""
  from kernels.quantised_matmul import CodedOperand

  stored = array((1, SIZE // 2, SIZE), 'uint8') if BITS[grid] else array((1, SIZE, SIZE), 'int8')
  return CodedOperand(stored, array((1, SIZE // GROUP, SIZE), 'float32'), None, BITS[grid])


def sizes(grid: str) -> tuple[int, int]:
  """Inputs and outputs of a step."""
  import jax

  from kernels import quantised_matmul_tpu

  return quantised_matmul_tpu._sizes(coded(grid, jax.ShapeDtypeStruct))


def compiled(topology: str, rows: int, grid: str):
  """The device, and temporary bytes of the program."""
  import jax
  import jax.numpy as jnp

  from kernels import quantised_matmul_tpu
  from parallel.mesh import MeshConfig, make_mesh

  device = aot.topology(topology)[0]
  place = jax.sharding.SingleDeviceSharding(device)

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def run(x, w):
    return quantised_matmul_tpu.product(x, w, jnp.zeros((1,), jnp.int32))

  with jax.set_mesh(make_mesh(MeshConfig(), [device])):
    lowered = jax.jit(run).lower(array((1, rows, SIZE), 'bfloat16'), coded(grid, array))
    return device, lowered.compile().memory_analysis().temp_size_in_bytes


def main():
  arguments = commands.parser(__doc__)
  arguments.add_argument('--topologies', default=TOPOLOGIES, help='chips')
  arguments.add_argument('--rows', type=int, default=8, help='of a product')
  arguments.add_argument('--write', action='store_true', help='put bundles where plan.py looks')
  arguments.add_argument('--run', help='measure in this process: topology,grid')
  options = arguments.parse_args()
  if options.run:
    topology, grid = options.run.split(',')
    print(json.dumps(measure(topology, options.rows, grid)))
    return
  results, table = {}, []
  for topology in options.topologies.split(','):
    for grid in BITS:
      flags = ['--rows', str(options.rows), '--run', f'{topology},{grid}']
      found = train_step.in_process('benchmarks.quantised_matmul', *flags, environment={})
      results[f'{topology} {grid}'] = found
      microseconds = [found[name] * 1e6 for name in ('seconds', 'memory_seconds')]
      spills = f'{found["spills"]:.0%}'
      table.append([topology, grid, found['step'], found['bundles'], *microseconds, spills])
  head = ['chip', 'grid', 'step', 'bundles', 'us by bundles', 'us by memory', 'stores that spill']
  commands.table(f'{options.rows} rows times {SIZE} x {SIZE}, groups of {GROUP}', head, table)
  if options.write:
    write(results)
  commands.write_json(options.json, 'quantised_matmul', results)


def write(results: dict[str, dict]) -> None:
  """Bundles of a number into kernels/coded.json, in the place of what it has of these chips."""
  from kernels import tuning

  table = json.loads(tuning.CODED_TABLE.read_text()) if tuning.CODED_TABLE.exists() else {}
  for name, of in results.items():
    table.setdefault(of['kind'], {})[name.split()[1]] = float(f'{of["bundles_of_a_number"]:.3g}')
  files.replace(tuning.CODED_TABLE, json.dumps(table, indent=1) + '\n')


if __name__ == '__main__':
  main()
