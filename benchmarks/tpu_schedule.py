"""Is our TPU attention scheduled better than jax's?
Instruction bundles of both, compiled for TPUs that aren't here.

    python -m benchmarks.tpu_schedule [--topologies v5e:1x1,v6e:1x1] [--widths 64,128,256]
                                      [--tune] [--json FILE]

bfloat16, 8 heads; a tile is 1024 x 1024 pairs of a query and a key, forward and backward. A kernel
may have two bodies: for tiles that the mask leaves whole, and for others. The bodies do not depend
on the length: each kernel is compiled once for each kind of mask, at 2048 tokens, and the seconds
of all WORKLOADS follow from the steps that they have (Mask.blocks). Seconds: bundles of all tiles
over the clock, or what the matrix unit takes at its peak, if that is more; stalls of memory and
what a step does beside its body are not in it. The peer is jax's `splash`, in blocks of 1024 (v4:
512), with its gradients in two kernels or in one, whichever has fewer bundles; it masks every
block, and skips none for segments. --tune tries step sizes of ours first, and writes those of the
fewest bundles to kernels/tuning.json. Needs libtpu (the extra `plan`), no TPU.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import itertools
import json
import pathlib
import re
import sys

import numpy as np

import commands
import files
from analysis import aot, bundles, hardware
from kernels import tuning
from kernels.mask import FULL, PARTIAL, SKIP, Mask
from kernels.tuning import TILE

HEADS, LENGTH = 8, 2048  # LENGTH: that is compiled
KERNELS = {
  'pallas_tpu': {'forward': ('flash_forward',), 'backward': ('flash_backward',)},
  'splash': {'forward': ('splash_mha_fwd',), 'backward': ('splash_mha_dkv', 'splash_mha_dq')},
}
PRODUCTS = {'forward': 2, 'backward': 5}
MASKINGS = 'causal', 'window', 'packed'
WORKLOADS = {
  f'{length >> 10}k': ('causal', length) for length in (1 << bit for bit in range(12, 18))
} | {'16k, window 1k': ('window', 16384), '16k, packed 2k': ('packed', 16384)}
# (rows, keys, chunk) of ours.
CANDIDATES = [
  (1024, 1024, 128),
  (1024, 1024, 256),
  (1024, 1024, 512),
  (512, 1024, 128),
  (512, 1024, 256),
  (1024, 512, 256),
  (512, 512, 256),
]
SMALL = [
  (256, 256, 128),
  (512, 256, 128),
  (256, 512, 128),
  (512, 512, 128),
  (512, 512, 256),
  (1024, 256, 256),
]
SMALL_VMEM = 32 << 20  # bytes, below which SMALL are tried, and splash is given blocks of 512
TUNED_FOR = 8192  # tokens, causal


def mask_of(masking: str, length: int) -> Mask:
  """The mask of a workload: 'causal', 'window' of 1024, or 'packed', documents of 2048 tokens."""
  if masking == 'packed':
    documents = np.arange(length, dtype=np.int32)[None] // 2048
    return Mask(query_segments=documents, key_segments=documents)
  return Mask(window=1024 if masking == 'window' else 0)


def splash(q, k, v, mask: Mask, block: int, fused: bool):
  """jax's kernel, whose queries are to be scaled before."""
  import jax
  import jax.numpy as jnp
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
    splash_attention_mask as masks,
  )

  shape = (q.shape[1], k.shape[1])
  spec = masks.LocalMask(shape, (mask.window - 1, 0), 0) if mask.window else masks.CausalMask(shape)
  rest = {} if fused else {'block_q_dq': block, 'block_kv_dq': block}
  sizes = kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    use_fused_bwd_kernel=fused,
    **rest,
  )
  run = kernel.make_splash_mha(
    masks.MultiHeadMask([spec] * q.shape[2]), block_sizes=sizes, head_shards=1, q_seq_shards=1
  )
  segments = None
  if mask.query_segments is not None:
    segments = kernel.SegmentIds(
      *(jnp.asarray(x) for x in (mask.query_segments, mask.key_segments))
    )
  return jnp.swapaxes(jax.vmap(run)(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), segments), 1, 2)


def compile_here(
  topology: str, width: int, masking: str, backend: str, options: dict, dtype: str = 'bfloat16'
) -> None:
  """Attention and its gradient for a chip. options: of ours, the step of each direction;
  of splash, its arguments.
  """
  import jax
  import jax.numpy as jnp

  from kernels.attention import attention
  from kernels.scoring import Scoring
  from parallel.mesh import MeshConfig, make_mesh

  jax.clear_caches()  # which know nothing of steps
  mesh, mask = make_mesh(MeshConfig(), aot.topology(topology)[:1]), mask_of(masking, LENGTH)
  if backend == 'pallas_tpu':
    tuning.lookup = lambda kind, direction, width: tuning.Tuning(
      **options[direction], vmem=tuning.VMEM[kind]
    )

    def run(q, k, v):
      return attention(q, k, v, Scoring(mask), backend=backend)[0]
  else:

    def run(q, k, v):
      return splash(q, k, v, mask, **options)

  with jax.set_mesh(mesh):
    x = jax.ShapeDtypeStruct(
      (1, LENGTH, HEADS, width), dtype, sharding=jax.NamedSharding(mesh, jax.P())
    )
    gradient = jax.grad(lambda *x: jnp.sum(run(*x), dtype=jnp.float32), (0, 1, 2))
    jax.jit(gradient).lower(x, x, x).compile()


def child(directory: str) -> None:
  """Compiles what each line of its input asks for;
  a line of its output has what a tile takes, or why it does not compile.
  """
  for line in sys.stdin:
    for path in pathlib.Path(directory).iterdir():
      path.unlink()
    job = json.loads(line)
    try:
      compile_here(**job)
    except Exception as error:  # most often: VMEM does not suffice
      print(json.dumps({'error': f'{type(error).__name__}: {str(error)[:300]}'}), flush=True)
      continue
    dumped, results = bundles.kernels(directory), {}
    for direction, kernels in KERNELS[job['backend']].items():
      # A direction may have several kernels, and a kernel two bodies: the first for whole tiles,
      # the last for those that a mask cuts.
      made = [blocks for name, blocks in dumped.items() if name.startswith(kernels)]
      bodies = [bundles.bodies(blocks) for blocks in made]
      block = job['options'].get('block')
      step = {'rows': block, 'keys': block} if block else job['options'][direction]
      tiles = step['rows'] * step['keys'] / TILE**2
      whole, masked = (sum(body[at].bundles for body in bodies) for at in (0, -1))
      in_all = sum(block.bundles for blocks in made for block in blocks)
      beside = in_all - sum(block.bundles for body in bodies for block in body)

      results[direction] = {
        'step': step,
        'whole': round(whole / tiles),
        'masked': round(masked / tiles),
        'beside': beside,
        'matrix unit': bodies[0][0].uses.get('MXU', bodies[0][0].uses.get('MATMUL', 0.0)),
        'spill': max(part.uses.get('VSTORE:SPILL', 0.0) for body in bodies for part in body),
      }
    print(json.dumps(results), flush=True)


def measure(jobs: list[dict]) -> list[dict]:
  """For arguments of compile_here each: direction -> step, bundles of a tile that is whole and of
  one that is masked, and those of a step beside them (at most: some run once a row only), shares of
  slots: of the matrix unit in a whole tile, of stores that spill in the body that has most; or
  {'error': why}.
  """
  return bundles.dumped('benchmarks.tpu_schedule', jobs)


def chip_of(topology: str):
  device = aot.topology(topology)[0]
  return device.device_kind, hardware.of_device(device)


def cycles(
  result: dict,
  direction: str,
  width: int,
  chip: hardware.Chip,
  masking: str,
  length: int,
  skips: bool,
  beside: bool = False,
) -> float:
  """Of a core, for one head. skips: blocks between segments.
  beside: with what a step does beside its body.
  """
  mask = mask_of(masking if skips or masking != 'packed' else 'causal', length)
  rows, keys = result['step']['rows'], result['step']['keys']
  kinds, tiles = np.asarray(mask.blocks(length, length, rows, keys)), rows * keys / TILE**2
  # The matrix unit's own time for a tile, at its peak: no body takes less.
  floor = PRODUCTS[direction] * 2 * TILE * TILE * width / (chip.bfloat16 / chip.cores) * chip.clock
  body = sum(
    int((kinds == kind).sum()) * tiles * max(result[name], floor)
    for kind, name in ((FULL, 'whole'), (PARTIAL, 'masked'))
  )
  return body + beside * result['beside'] * int((kinds != SKIP).sum())


def seconds(
  result: dict,
  direction: str,
  width: int,
  chip: hardware.Chip,
  masking: str,
  length: int,
  skips: bool,
) -> float:
  """Of a device, whose cores share the heads."""
  each = cycles(result, direction, width, chip, masking, length, skips)
  return HEADS * chip.devices / chip.cores * each / chip.clock


def best_steps(topology: str, width: int) -> dict[str, dict]:
  """direction -> the step of the fewest cycles, those beside the bodies counted, of those that
  compile, in f32 too; with its bundles.
  """
  kind, chip = chip_of(topology)
  sizes = SMALL if tuning.VMEM[kind] < SMALL_VMEM else CANDIDATES
  steps = [dict(zip(('rows', 'keys', 'chunk'), size)) for size in sizes]
  forward = [
    step | {'ones': ones} for step in steps for ones in ((False, True) if width % 256 else (False,))
  ]
  pairs = itertools.zip_longest(
    forward, [step | {'ones': False} for step in steps], fillvalue=steps[0] | {'ones': False}
  )

  def job(forward, backward):
    return {
      'topology': topology,
      'width': width,
      'masking': 'causal',
      'backend': 'pallas_tpu',
      'options': {'forward': forward, 'backward': backward},
    }

  measured, best = measure([job(*pair) for pair in pairs]), {}
  for direction in PRODUCTS:

    def cost(result):
      return cycles(result, direction, width, chip, 'causal', TUNED_FOR, True, beside=True)

    smallest = min(forward, key=lambda step: step['rows'] * step['keys'])
    for result in sorted(
      (results[direction] for results in measured if direction in results), key=cost
    ):
      steps = dict.fromkeys(PRODUCTS, smallest) | {direction: result['step']}
      if 'error' not in measure([job(**steps) | {'dtype': 'float32'}])[0]:
        best[direction] = result
        break
    else:
      raise RuntimeError(
        f'no {direction} step of {sizes} compiles for {topology} with heads {width} wide, in '
        'bfloat16 and in f32'
      )
  return best


def tune(topologies: list[str], widths: list[int]) -> None:
  """Puts the best steps of these cells into the table."""
  table = json.loads(tuning.TABLE.read_text()) if tuning.TABLE.exists() else {'steps': {}}
  table['made with'] = {name: commands.machine()[name] for name in ('jax', 'libtpu')}
  for topology, width in itertools.product(topologies, widths):
    for direction, best in best_steps(topology, width).items():
      cells = table['steps'].setdefault(chip_of(topology)[0], {}).setdefault(direction, {})
      cells[str(width)] = best['step'] | {'whole': best['whole'], 'masked': best['masked']}
      print(f'{topology}, {width}, {direction}: {cells[str(width)]}', flush=True)
    files.replace(
      str(tuning.TABLE),
      re.sub(r'\{[^{}]*\}', lambda cell: ' '.join(cell[0].split()), json.dumps(table, indent=1))
      + '\n',
    )


def compare(topology: str, width: int) -> dict[str, dict[str, dict]]:
  """backend -> kind of mask -> what measure() gives;
  of splash, for each direction, the best of those that compile.
  """
  kind, _ = chip_of(topology)
  ours = {}
  for direction in PRODUCTS:
    step = tuning.lookup(kind, direction, width)
    ours[direction] = {name: getattr(step, name) for name in ('rows', 'keys', 'chunk', 'ones')}
  block = 512 if tuning.VMEM[kind] < SMALL_VMEM else 1024
  options = {
    'pallas_tpu': [ours],
    'splash': [{'block': block, 'fused': fused} for fused in (False, True)],
  }
  jobs = [
    {
      'topology': topology,
      'width': width,
      'masking': masking,
      'backend': backend,
      'options': choice,
    }
    for backend in KERNELS
    for masking in MASKINGS
    for choice in options[backend]
  ]
  measured = list(zip(jobs, measure(jobs), strict=True))

  def best(backend, masking, direction):
    results = [
      result[direction]
      for job, result in measured
      if direction in result and job['backend'] == backend and job['masking'] == masking
    ]
    return min(results, key=lambda result: result['whole'] + result['masked'])

  return {
    backend: {
      masking: {direction: best(backend, masking, direction) for direction in PRODUCTS}
      for masking in MASKINGS
    }
    for backend in KERNELS
  }


def body_row(both: dict, direction: str) -> list:
  """Bundles of ours and of splash for a causal tile, their ratio, and shares of slots."""
  ours, theirs = (both[backend]['causal'][direction] for backend in KERNELS)
  return [
    *(f'{result["whole"]:,} / {result["masked"]:,}' for result in (ours, theirs)),
    ours['whole'] / theirs['whole'],
    *(f'{ours[share]:.0%} / {theirs[share]:.0%}' for share in ('matrix unit', 'spill')),
  ]


def workload_seconds(both: dict, direction: str, width: int, chip: hardware.Chip) -> dict:
  """workload -> seconds of ours and of splash."""

  def of(backend, masking, length):
    result, skips = both[backend][masking][direction], backend == 'pallas_tpu'
    return seconds(result, direction, width, chip, masking, length, skips)

  return {
    workload: [of(backend, masking, length) for backend in KERNELS]
    for workload, (masking, length) in WORKLOADS.items()
  }


def main():
  if sys.argv[1:2] == ['--child']:
    return child(sys.argv[2])
  parser = commands.parser(__doc__)
  parser.add_argument('--topologies', default='v4:1x1x1,v5e:1x1,v5p:1x1x1,v6e:1x1,tpu7x:1x1x1')
  parser.add_argument('--widths', default='64,128,256')
  parser.add_argument(
    '--tune',
    action='store_true',
    help='try steps, and write the best to kernels/tuning.json, before',
  )
  options = parser.parse_args()
  topologies = options.topologies.split(',')
  widths = [int(width) for width in options.widths.split(',')]
  if options.tune:
    tune(topologies, widths)

  bodies, times = {}, {}
  results = {}
  for topology, width in itertools.product(topologies, widths):
    both, (_, chip) = compare(topology, width), chip_of(topology)
    for direction in PRODUCTS:
      name = f'{topology.partition(":")[0]}, {width}, {direction}'
      bodies[name] = body_row(both, direction)
      each = workload_seconds(both, direction, width, chip)
      times[name] = [f'{ours * 1e3:.3g} {ours / theirs:.2f}x' for ours, theirs in each.values()]
      results[name] = {
        'seconds': each,
        'bundles': {
          backend: {masking: both[backend][masking][direction] for masking in MASKINGS}
          for backend in KERNELS
        },
      }

  commands.table(
    f'attention, {HEADS} heads, bfloat16: bundles of a causal tile, whole / masked',
    [
      'TPU, head width',
      'ours',
      'splash',
      'ratio',
      'matrix unit, ours / splash',
      'stores that spill, at most',
    ],
    [[name, *row] for name, row in bodies.items()],
  )
  commands.table(
    'ms of ours by them, and ratio to splash',
    ['TPU, head width', *WORKLOADS],
    [[name, *row] for name, row in times.items()],
  )
  commands.write_json(options.json, 'tpu_schedule', results)


if __name__ == '__main__':
  main()
