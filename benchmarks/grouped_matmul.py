"""How much of a grouped product's work is wasted?
Compiled ahead of time for a TPU and an H100, against 2 M D F; and on this CPU.

    python -m benchmarks.grouped_matmul [--json FILE]

Counts the products in the optimised programs, loops times their trip counts (XLA's cost analysis
counts a loop's body once), for `kernels.grouped_matmul` and for `lax.ragged_dot`; both cost the
same however the rows are divided among the experts. Needs no accelerator: libtpu (the extra
`plan`), and for the H100 `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt` in jax's
version; what is missing is named in the table. On this CPU: seconds of a layer's three dispatches,
forward and backward, against one expert that computes as many rows.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

import commands
from analysis import aot, hlo
from benchmarks import common
from kernels.grouped_blocks import block_rows
from kernels.grouped_matmul import grouped_matmul
from model.config import ModelConfig, MoEConfig
from model.layers import FeedForward
from model.moe import MoE

ROWS = 16384
WIDTH = 4096
FEED_FORWARD = 2048
EXPERTS = (8, 64, 128)
TARGETS = {'TPU v5p': 'v5p:2x2x1', 'H100': 'h100:1x1x1'}
BACKENDS = {
  'blocked': functools.partial(grouped_matmul, backend='blocked'),
  'ragged_dot': jax.lax.ragged_dot,
}


def wasted(target: str, backend: str, experts: int) -> dict:
  """Floating-point operations over the ideal, forward alone and with the backward pass,
  and bytes of temporaries.
  """
  device = aot.topology(TARGETS[target])[0]

  def shape(*dims, dtype='bfloat16'):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

  x = shape(ROWS, WIDTH)
  w = shape(experts, WIDTH, FEED_FORWARD)
  sizes = shape(experts, dtype='int32')

  def both(x, w, sizes, dy):
    y, pull = jax.vjp(lambda x, w: BACKENDS[backend](x, w, sizes), x, w)
    return y, pull(dy)

  results = {}
  for name, function, arguments, products in (
    ('forward', BACKENDS[backend], (x, w, sizes), 1),
    ('both', both, (x, w, sizes, shape(ROWS, FEED_FORWARD)), 3),
  ):
    compiled = jax.jit(function).lower(*arguments).compile()
    program = hlo.Module(compiled.as_text())
    found, kernels = program.flops(), program.kernels()
    # A kernel's products are not in the program; where there is one (and no loop)
    # the cost analysis knows what it declares.
    found = compiled.cost_analysis()['flops'] if kernels else found
    results |= {
      name: found / (products * 2 * ROWS * WIDTH * FEED_FORWARD),
      f'{name}_kernels': kernels,
      f'{name}_temporary_bytes': compiled.memory_analysis().temp_size_in_bytes,
    }
  return results


def seconds_on_cpu(
  experts: int, tokens: int = 2048, width: int = 256, feed_forward: int = 512
) -> dict:
  """Seconds forward and backward of a layer's dispatches, two experts a token,
  and of one expert with as many rows.
  """
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


def ahead_of_time() -> list[dict]:
  """Prints and returns the work over the ideal of every target, number of experts and backend."""
  results, rows = [], []
  for target in TARGETS:
    try:
      aot.topology(TARGETS[target])
    except ImportError as error:
      rows.append([target, 'not compiled:', str(error).splitlines()[0][:80], '', '', '', ''])
      results.append({'target': target, 'error': str(error)})
      continue
    for experts, backend in itertools.product(EXPERTS, BACKENDS):
      work = wasted(target, backend, experts)
      results.append({'target': target, 'experts': experts, 'backend': backend, **work})
      block = 'kernel' if work['forward_kernels'] else '-'
      if backend == 'blocked':
        block = str(block_rows(ROWS, experts))
      memory = work['both_temporary_bytes'] / 2**20
      rows.append([target, str(experts), backend, block, work['forward'], work['both'], memory])

  commands.table(
    f'Work over ideal: {ROWS} rows, {WIDTH} x {FEED_FORWARD}, bfloat16, compiled ahead of time',
    ['target', 'experts', 'backend', 'block', 'forward', 'and backward', 'temporary MiB'],
    rows,
  )
  return results


def on_this_cpu() -> dict[int, dict]:
  """Prints and returns the seconds of a layer's dispatches, by the number of experts."""
  results, rows = {}, []
  for experts in (8, 64):
    times = results[experts] = seconds_on_cpu(experts)
    rows += [
      [name, str(experts), 1e3 * seconds, seconds / times['one expert']]
      for name, seconds in times.items()
    ]
  commands.table(
    'This CPU: 2048 tokens, 2 experts each, 256 x 512, f32, forward and backward',
    ['', 'experts', 'ms', 'x one expert'],
    rows,
  )
  return results


def main():
  options = commands.parser(__doc__).parse_args()
  results = {
    'rows': ROWS,
    'width': WIDTH,
    'feed_forward': FEED_FORWARD,
    'compiled': ahead_of_time(),
    'cpu': on_this_cpu(),
  }
  commands.write_json(options.json, 'grouped_matmul', results)


if __name__ == '__main__':
  main()
