"""Is our TPU attention scheduled better than jax's? Instruction bundles of both, compiled for TPUs that aren't here.

    python -m benchmarks.tpu_schedule [--topologies v5e:1x1,v6e:1x1] [--widths 64,128,256] [--length 8192] [--json FILE]

Causal, bfloat16, 8 heads; a tile is 1024 x 1024 pairs of a query and a key, forward and backward. A kernel may have two bodies: for
tiles that the mask leaves whole, and for others. Seconds: bundles of all tiles over the clock, or what the matrix unit takes at its
peak, if that is more; stalls of memory are not in it. The peer is `splash`, as kernels.attention sets it up. Needs libtpu (the extra
`plan`), no TPU.
"""
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import subprocess
import sys
import tempfile

from analysis import aot, bundles, hardware
from benchmarks import common

TILE, HEADS = 1024, 8
KERNELS = {'pallas_tpu': {'forward': ('flash_forward',), 'backward': ('flash_backward',)},
           'splash': {'forward': ('splash_mha_fwd',), 'backward': ('splash_mha_dkv', 'splash_mha_dq')}}
PRODUCTS = {'forward': 2, 'backward': 5}


def compile_here(topology: str, backend: str, width: int, length: int) -> None:
  """The child's part: compiles attention and its gradient for a chip."""
  import jax
  import jax.numpy as jnp

  from kernels.attention import attention
  from kernels.mask import Mask
  from parallel.mesh import MeshConfig, make_mesh
  mesh = make_mesh(MeshConfig(), aot.topology(topology)[:1])
  with jax.set_mesh(mesh):
    x = jax.ShapeDtypeStruct((1, length, HEADS, width), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P()))
    loss = lambda q, k, v: jnp.sum(attention(q, k, v, Mask(), backend=backend)[0], dtype=jnp.float32)
    jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()


def measure(topology: str, backend: str, width: int, length: int) -> dict[str, dict]:
  """direction -> bundles of a tile that is whole and of one that is masked, shares of slots, and predicted seconds."""
  with tempfile.TemporaryDirectory() as directory:
    environment = os.environ | aot.LIBTPU | {'LIBTPU_INIT_ARGS': bundles.dump_flags(directory)}
    done = subprocess.run([sys.executable, '-m', 'benchmarks.tpu_schedule', '--child', topology, backend, str(width), str(length)],
                          env=environment, capture_output=True, text=True)
    if done.returncode:
      raise RuntimeError(f'{backend} does not compile for {topology}:\n{done.stderr[-2000:]}')
    found = bundles.kernels(directory)
  device = aot.topology(topology)[0]
  chip = hardware.lookup(device.device_kind, device.num_cores)
  n = length // TILE
  whole_tiles, masked_tiles = n * (n - 1) // 2 * HEADS, n * HEADS
  results = {}
  for direction, kernels in KERNELS[backend].items():
    parts = [bundles.bodies(next(blocks for name, blocks in found.items() if name.startswith(kernel))) for kernel in kernels]
    whole, masked = (sum(part[at].bundles for part in parts) for at in (0, -1))
    floor = PRODUCTS[direction] * 2 * TILE * TILE * width / hardware.peak(chip, 'bfloat16') * chip.clock
    cycles = whole_tiles * max(whole, floor) + masked_tiles * max(masked, floor)
    results[direction] = {'whole': whole, 'masked': masked, 'matrix unit': parts[0][0].uses.get('MXU', 0.0),
                          'spill': parts[0][0].uses.get('VSTORE:SPILL', 0.0), 'seconds': cycles / chip.clock}
  return results


def main():
  if sys.argv[1:2] == ['--child']:
    topology, backend, width, length = sys.argv[2:]
    return compile_here(topology, backend, int(width), int(length))
  parser = common.parser(__doc__)
  parser.add_argument('--topologies', default='v5e:1x1,v6e:1x1')
  parser.add_argument('--widths', default='64,128,256')
  parser.add_argument('--length', type=int, default=8192, help=f'tokens, a multiple of {TILE}')
  options = parser.parse_args()
  if options.length % TILE:
    parser.error(f'--length={options.length} is no multiple of {TILE}')
  rows, results = [], {}
  for topology in options.topologies.split(','):
    for width in map(int, options.widths.split(',')):
      both = {backend: measure(topology, backend, width, options.length) for backend in KERNELS}
      results[f'{topology} {width}'] = both
      for direction in PRODUCTS:
        ours, theirs = (both[backend][direction] for backend in KERNELS)
        rows.append([f'{topology}, {width}, {direction}', *(f'{x["whole"]:,} / {x["masked"]:,}' for x in (ours, theirs)),
                     f'{ours["matrix unit"]:.0%}', f'{ours["spill"]:.0%}', ours['seconds'] * 1e3, theirs['seconds'] * 1e3,
                     ours['seconds'] / theirs['seconds']])
  common.table(f'causal attention, {options.length} tokens, {HEADS} heads, bfloat16: bundles of a whole / a masked tile',
               ['TPU, head width', 'ours', 'splash', 'matrix unit', 'spills', 'ours ms', 'splash ms', 'ratio'], rows)
  common.write_json(options.json, 'tpu_schedule', results)


if __name__ == '__main__':
  main()
