"""How much of a grouped product's work is wasted? Compiled ahead of time for a TPU and an H100, against 2 M D F; and on this CPU.

    python -m benchmarks.grouped_matmul [--json FILE]

Counts the products in the optimised programs, loops times their trip counts (XLA's cost analysis counts a loop's body once), for
`kernels.grouped_matmul` and for `lax.ragged_dot`; both cost the same however the rows are divided among the experts. Needs no
accelerator: libtpu (the extra `plan`), and for the H100 `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt` in jax's version;
what is missing is named in the table.
On this CPU: seconds of a layer's three dispatches, forward and backward, against one expert that computes as many rows.
"""
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
for variable, value in {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5p-8', 'TPU_WORKER_HOSTNAMES': 'localhost',
                    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}.items():
  os.environ.setdefault(variable, value)

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from benchmarks import common
from kernels.grouped_matmul import block_rows, grouped_matmul
from model.config import ModelConfig, MoEConfig
from model.layers import FeedForward
from model.moe import MoE

ROWS, WIDTH, FEED_FORWARD, EXPERTS = 16384, 4096, 2048, (8, 64, 128)
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TARGETS = {'TPU v5p': dict(platform='tpu', topology_name='v5p:2x2x1'),
           'H100': dict(platform='cuda', topology_name='', topology='1x1x1', target_config=H100)}
BACKENDS = {'blocked': functools.partial(grouped_matmul, backend='blocked'), 'ragged_dot': jax.lax.ragged_dot}


def flops(program: str) -> tuple[int, int]:
  """Of an optimised HLO module: floating-point operations of its products, and kernels in it whose products it doesn't show.

  A loop counts as often as it runs, a conditional as its dearest branch, a convolution where its window meets an input.
  Raises ValueError for a loop whose trip count the program doesn't tell.
  """
  computations, entry = {}, ''
  for line in program.splitlines():
    if found := re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line):
      lines = computations[found[2]] = []
      entry = found[2] if found[1] else entry
    elif line.startswith('  '):
      lines.append(line.strip())

  @functools.cache
  def of(name):
    total, kernels = 0, 0
    shapes = {found[1]: _shape(found[2]) for line in computations[name] if (found := re.match(r'(?:ROOT )?%?([\w.-]+) = (\S+)', line))}
    for line in computations[name]:
      times, called = _called(line, computations)
      parts = [of(other) for other in called]
      if 'branch_computations=' in line or 'true_computation=' in line:
        parts = [max(parts)]
      total += times * sum(part[0] for part in parts) + _product(line, shapes)
      kernels += sum(part[1] for part in parts) + ('custom_call_target="tpu_custom_call"' in line and 'metadata(' not in line
                                                   and 'ragged-dot-metadata =' not in line)
    return total, kernels
  return of(entry)


def _called(line, computations):
  """How often, and which computations an instruction runs."""
  called = re.findall(r'(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)', line)
  for names in re.findall(r'branch_computations=\{([^}]*)\}', line):
    called += [name.strip().lstrip('%') for name in names.split(',')]
  if ' while(' not in line:
    return 1, called
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
    return int(known[1]), called
  condition = computations[re.search(r'condition=%?([\w.-]+)', line)[1]]
  limits = [int(found[1]) for other in condition if (found := re.search(r' constant\((\d+)\)', other))]
  if len(limits) != 1:
    raise ValueError(f'no trip count in {line[:200]}, whose condition compares with {limits}')
  return limits[0], called


def _product(line, shapes):
  """Operations of a dot, a convolution or cuBLAS's gemm; 0 of all else."""
  found = re.match(r'(?:ROOT )?%?([\w.-]+) = .* (dot|convolution|custom-call)\(([^)]*)\)', line)
  if not found or (found[2] == 'custom-call' and '__cublas' not in line):
    return 0
  left, right = (shapes[name] for name in re.findall(r'%([\w.-]+)', found[3])[:2])
  if found[2] == 'dot':
    summed = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line)[1]
    return 2 * math.prod(shapes[found[1]]) * math.prod(left[int(i)] for i in summed.split(',') if i)
  if found[2] == 'custom-call':
    numbers = json.loads(re.search(r'backend_config=(\{.*\})', line)[1])['gemm_backend_config']['dot_dimension_numbers']
    out = re.search(r'= \(?(\w+\[[\d,]*\])', line)[1]
    return 2 * math.prod(_shape(out)) * math.prod(left[int(i)] for i in numbers['lhs_contracting_dimensions'])
  labels = re.match(r'(\w+)_(\w+)->(\w+)', re.search(r'dim_labels=(\S+?),? *(?:metadata|$|\w+=)', line + ' ')[1])
  taps = math.prod(_taps(line, int(axis), left[labels[1].index(axis)], shapes[found[1]][labels[3].index(axis)])
                   for axis in labels[3] if axis.isdigit())
  out = dict(zip(labels[3], shapes[found[1]]))
  return 2 * out['b'] * out['f'] * right[labels[2].index('i')] * taps


def _taps(line, axis, inputs, outputs):
  """Pairs of an output and a place of the window that meet an input rather than padding or the holes of a dilation."""
  window = dict(re.findall(r'(\w+)=(\S+)', re.search(r'window=\{([^}]*)\}', line)[1]))
  of = lambda field, default: int(window[field].split('x')[axis]) if field in window else default
  stride, left, right = of('stride', 1), of('lhs_dilate', 1), of('rhs_dilate', 1)
  low = int(window['pad'].split('x')[axis].split('_')[0]) if 'pad' in window else 0
  places = (out * stride + tap * right - low for out in range(outputs) for tap in range(of('size', 1)))
  return sum(0 <= place <= (inputs - 1) * left and place % left == 0 for place in places)


def _shape(text):
  found = re.match(r'\w+\[([\d,]*)\]', text)
  return tuple(int(n) for n in found[1].split(',') if n) if found else ()


def wasted(target: str, backend: str, experts: int) -> dict:
  """Floating-point operations over the ideal, forward alone and with the backward pass, and bytes of temporaries."""
  device = topologies.get_topology_desc(**TARGETS[target]).devices[0]
  shape = lambda *dims, dtype='bfloat16': jax.ShapeDtypeStruct(dims, dtype, sharding=jax.sharding.SingleDeviceSharding(device))
  x, w, sizes = shape(ROWS, WIDTH), shape(experts, WIDTH, FEED_FORWARD), shape(experts, dtype='int32')

  def both(x, w, sizes, dy):
    y, pull = jax.vjp(lambda x, w: BACKENDS[backend](x, w, sizes), x, w)
    return y, pull(dy)
  results = {}
  for name, function, arguments, products in (('forward', BACKENDS[backend], (x, w, sizes), 1),
                                              ('both', both, (x, w, sizes, shape(ROWS, FEED_FORWARD)), 3)):
    compiled = jax.jit(function).trace(*arguments).lower(lowering_platforms=(TARGETS[target]['platform'],)).compile()
    found, kernels = flops(compiled.as_text())
    # A kernel's products are not in the program; where there is one (and no loop) the cost analysis knows what it declares.
    found = compiled.cost_analysis()['flops'] if kernels else found
    results |= {name: found / (products * 2 * ROWS * WIDTH * FEED_FORWARD), f'{name}_kernels': kernels,
                f'{name}_temporary_bytes': compiled.memory_analysis().temp_size_in_bytes}
  return results


def seconds_on_cpu(experts: int, tokens: int = 2048, width: int = 256, feed_forward: int = 512) -> dict:
  """Seconds forward and backward of a layer's dispatches, two experts a token, and of one expert with as many rows."""
  x = jax.random.normal(jax.random.key(0), (4, tokens // 4, width))

  def time_of(layer, x):
    run = jax.jit(jax.grad(lambda layer, x: jax.tree.leaves(layer(x))[0].sum(), argnums=(0, 1)))
    jax.block_until_ready(run(layer, x))
    return common.seconds(lambda: jax.block_until_ready(run(layer, x)), 5)
  config = ModelConfig(width=width, feed_forward=feed_forward)
  results = {'one expert': time_of(FeedForward(config, nnx.Rngs(0)), jnp.concatenate([x, x]))}
  for dispatch in ('dropless', 'capacity', 'dense'):
    mixture = dataclasses.replace(config, moe=MoEConfig(experts=experts, dispatch=dispatch))
    results[dispatch] = time_of(MoE(mixture, nnx.Rngs(0)), x)
  return results


def main():
  options = common.parser(__doc__).parse_args()
  results, rows = {'rows': ROWS, 'width': WIDTH, 'feed_forward': FEED_FORWARD, 'compiled': [], 'cpu': {}}, []
  for target in TARGETS:
    try:
      topologies.get_topology_desc(**TARGETS[target])
    except Exception as error:  # whatever a missing or unfit plugin raises
      rows.append([target, 'not compiled:', str(error).splitlines()[0][:80], '', '', '', ''])
      results['compiled'].append({'target': target, 'error': str(error)})
      continue
    for experts in EXPERTS:
      for backend in BACKENDS:
        found = wasted(target, backend, experts)
        results['compiled'].append({'target': target, 'experts': experts, 'backend': backend, **found})
        block = str(block_rows(ROWS, experts)) if backend == 'blocked' else 'kernel' if found['forward_kernels'] else '-'
        rows.append([target, str(experts), backend, block, found['forward'], found['both'], found['both_temporary_bytes'] / 2**20])
  common.table(f'Work over ideal: {ROWS} rows, {WIDTH} x {FEED_FORWARD}, bfloat16, compiled ahead of time',
               ['target', 'experts', 'backend', 'block', 'forward', 'and backward', 'temporary MiB'], rows)
  rows = []
  for experts in (8, 64):
    found = results['cpu'][experts] = seconds_on_cpu(experts)
    rows += [[name, str(experts), 1e3 * seconds, seconds / found['one expert']] for name, seconds in found.items()]
  common.table('This CPU: 2048 tokens, 2 experts each, 256 x 512, f32, forward and backward', ['', 'experts', 'ms', 'x one expert'], rows)
  common.write_json(options.json, 'grouped_matmul', results)


if __name__ == '__main__':
  main()
