"""How much of the matrix unit does the experts' kernel use? Instruction bundles of ours and of
jax's megablox, compiled for TPUs that aren't here.

    python -m benchmarks.grouped_schedule [--topologies v5e:1x1,v6e:1x1] [--models qwen3_30b_a3b]
                                          [--write] [--json FILE]

Rows and matrices as a device has them in the models' configs, in bfloat16: the products of tokens
with the inner matrices (D to F) and with the outer ones (F to D), each forward, by rows (with the
matrix transposed; of the inner ones added to what the rows have from another matrix) and by
matrices. A share is what a chunk of rows takes at the peak of the matrix unit, over the bundles of
the loop that computes it, and 100% where these are fewer: then it is the unit that takes the time.
Fetches that nothing hides, a visit's first bundles and chunks that two groups share are not in it.
megablox is given tiles of 512 rows, 1,024 inputs and 1,024 outputs, or all where there are fewer.
--write puts the smallest share of each kernel where plan.py looks, for each kind of TPU that was
asked for (kernels/grouped.json). Needs libtpu (the extra `plan`).
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import itertools
import json
import pathlib
import sys

import commands
import files
from analysis import aot, bundles, hardware
from kernels import tuning

TOPOLOGIES = 'v5e:1x1', 'v5p:1x1x1', 'v6e:1x1', 'tpu7x:1x1x1'
# Rows, experts, D, F of a device.
MODELS = {
  'mixtral_8x7b': (16384, 8, 4096, 3584),
  'qwen3_30b_a3b': (131072, 16, 2048, 768),
  'deepseek_v3': (32768, 32, 7168, 2048),
}
KERNELS = {  # by direction: of ours, and of the peer
  'forward': ('grouped_forward', 'gmm'),
  'rows': ('grouped_rows', 'gmm'),
  'matrices': ('grouped_matrices', 'tgmm'),
}
BACKENDS = 'pallas_tpu', 'megablox'
PEER_TILE = 512, 1024, 1024


def compile_here(topology: str, model: str, outer: bool, direction: str, backend: str):
  """Compiles one kernel; (multiply-adds of a step, the chip's kind)."""
  import jax
  import jax.numpy as jnp

  from kernels import grouped_matmul_tpu as ours
  from parallel.mesh import MeshConfig, make_mesh

  device = aot.topology(topology)[0]
  M, E, D, F = MODELS[model]
  K, N = (F, D) if outer else (D, F)
  place = jax.sharding.SingleDeviceSharding(device)

  def array(*shape, dtype='bfloat16'):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  x, w, dy, sizes = array(M, K), array(E, K, N), array(M, N), array(E, dtype='int32')

  def by_rows(x, w, dy, sizes):
    # As rows of the gate are, which the up-projection has, too (model.moe).
    return ours.products(dy, w, sizes, M, False, transposed=True, onto=None if outer else x)

  if backend == 'megablox':
    run, step = megablox(direction, K, N)
  else:
    run = {
      'forward': lambda x, w, dy, sizes: ours.products(x, w, sizes, M, False),
      'rows': by_rows,
      'matrices': lambda x, w, dy, sizes: ours.outer_products(
        x, dy, jnp.bfloat16.dtype, sizes, M, False
      ),
    }[direction]
  with jax.set_mesh(make_mesh(MeshConfig(), [device])):
    if backend != 'megablox':
      if direction == 'matrices':
        steps = ours.outer_steps_of(x, dy)
      else:
        steps = ours.steps_of(*((dy, w, True) if direction == 'rows' else (x, w)))
      step = steps.chunk * steps.inputs * steps.columns
    jax.jit(run).lower(x, w, dy, sizes).compile()
  return step, device.device_kind


def megablox(direction: str, K: int, N: int):
  """jax's kernel, and the multiply-adds of its step."""
  import jax
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

  rows, *most = PEER_TILE
  inputs, outputs = (min(n, m) for n, m in zip((N, K) if direction == 'rows' else (K, N), most))
  tile = dict(tiling=(rows, inputs, outputs), preferred_element_type=jax.numpy.bfloat16)
  run = {
    'forward': lambda x, w, dy, sizes: gmm(x, w, sizes, **tile),
    'rows': lambda x, w, dy, sizes: gmm(dy, w, sizes, transpose_rhs=True, **tile),
    'matrices': lambda x, w, dy, sizes: tgmm(x.swapaxes(0, 1), dy, sizes, **tile),
  }[direction]
  return run, rows * inputs * outputs


def child(directory: str) -> None:
  """Compiles what each line of its input asks for; a line of its output has what was found."""
  for line in sys.stdin:
    for path in pathlib.Path(directory).iterdir():
      path.unlink()
    job = json.loads(line)
    try:
      step, kind = compile_here(**job)
    except Exception as error:  # most often: VMEM does not suffice
      print(json.dumps(job | {'error': f'{type(error).__name__}: {str(error)[:300]}'}), flush=True)
      continue
    blocks = max(
      bundles.kernels(directory).values(),
      key=lambda blocks: max((block.matrix for block in blocks), default=0),
    )
    body, chip = bundles.bodies(blocks)[0], hardware.lookup(kind)
    ideal = step * 2 / (chip.bfloat16 / chip.cores) * chip.clock
    measured = {
      'kind': kind,
      'bundles': body.bundles,
      'ideal': round(ideal),
      'share': min(1.0, ideal / body.bundles),
      'spills': body.uses.get('VSTORE:SPILL', 0.0),
    }
    print(json.dumps(job | measured), flush=True)


def measure(jobs: list[dict]) -> list[dict]:
  """What `child` finds, of a process that loads libtpu anew."""
  return bundles.dumped('benchmarks.grouped_schedule', jobs)


def main():
  arguments = commands.parser(__doc__)
  arguments.add_argument('--topologies', default=','.join(TOPOLOGIES), help='of one chip each')
  arguments.add_argument('--models', default=','.join(MODELS), help=f'of {", ".join(MODELS)}')
  arguments.add_argument('--backends', default=','.join(BACKENDS), help=f'of {", ".join(BACKENDS)}')
  arguments.add_argument('--write', action='store_true', help='put the shares where plan.py looks')
  arguments.add_argument('--child', help='compile what is asked for on standard input; a directory')
  options = arguments.parse_args()
  if options.child:
    child(options.child)
    return

  fields = 'topology', 'model', 'outer', 'direction', 'backend'
  backends, results, rows = options.backends.split(','), [], []
  for topology in options.topologies.split(','):
    cells = itertools.product(
      [topology], options.models.split(','), (False, True), KERNELS, backends
    )
    results += measure([dict(zip(fields, cell)) for cell in cells])
  for at in range(0, len(results), len(backends)):
    peers = results[at : at + len(backends)]
    said = [f'{of["share"]:.0%}' if 'share' in of else 'does not compile' for of in peers]
    first = [peers[0].get(name, '') for name in ('bundles', 'ideal', 'spills')]
    product = 'F to D' if peers[0]['outer'] else 'D to F'
    names = [peers[0][name] for name in ('topology', 'model', 'direction')]
    rows.append([*names, product, *said, *first])
  commands.table(
    'Share of the matrix unit, by bundles',
    [
      'TPU',
      'model',
      'direction',
      'product',
      *backends,
      'bundles',
      'at the peak',
      'stores that spill',
    ],
    rows,
  )
  for of in results:
    if 'error' in of:
      said = ', '.join(str(of[name]) for name in fields)
      print(f'does not compile: {said}: {of["error"]}')
  commands.write_json(options.json, 'grouped_schedule', results)
  if options.write:
    with commands.mendable():
      write(results)


def write(results: list[dict]) -> None:
  """The smallest share of each kernel, of the kinds of TPU that were asked for. Raises ValueError
  where a product of one of MODELS is missing: what is smallest of the others says too much.
  """
  measured = [of for of in results if of['backend'] == BACKENDS[0] and 'share' in of]
  names = 'topology', 'model', 'outer', 'direction'
  there = {tuple(of[name] for name in names) for of in measured}
  wanted = itertools.product({of['topology'] for of in results}, MODELS, (False, True), KERNELS)
  for cell in sorted({*wanted} - there):
    said = ', '.join(f'{name} {value}' for name, value in zip(names, cell))
    raise ValueError(
      f'--write needs every product of {", ".join(MODELS)}, and {said} is missing; leave --models '
      f'and --backends as they are. {tuning.GROUPED_TABLE} stays as it is'
    )
  path = tuning.GROUPED_TABLE
  table = json.loads(path.read_text()) if path.exists() else {'shares': {}}
  table['made with'] = {name: commands.machine()[name] for name in ('jax', 'libtpu')}
  shares: dict[str, dict[str, float]] = {}
  for of in measured:
    cells, name = shares.setdefault(of['kind'], {}), KERNELS[of['direction']][0]
    cells[name] = min(cells.get(name, 1.0), round(of['share'], 3))
  table['shares'] |= shares
  files.replace(path, json.dumps(table, indent=1) + '\n')


if __name__ == '__main__':
  main()
