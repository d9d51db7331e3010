"""How near to one large product are the products of a mixture of experts on a GPU?

    python -m benchmarks.grouped_matmul_gpu [--budget 90] [--json FILE]
    python -m benchmarks.grouped_matmul_gpu --rehearse

The first needs a GPU; --rehearse runs all of it at toy sizes on this CPU, to test it.

16,384 rows, 4096 x 2048, bfloat16, divided among 8, 64 or 128 experts at random, unevenly: each
backend of kernels.grouped_matmul that a GPU has, but its oracle, `lax.ragged_dot`, and as the bound
a plain product of as many rows with one matrix. TFLOP/s count 2 M D F forward, three times that
with the backward pass, and nothing that is computed in vain. A program runs many calls one after
the other, each waiting for the one before. Errors are of rows of a few experts, each multiplied by
its own matrix in f32; one of more than ERROR fails the command.
"""

import dataclasses
import sys
import time

import numpy as np

import commands
from benchmarks.gpu_environment import LATE, begun

ERROR = 1e-2  # root mean square of the error over that of the exact values
CHECKED = 3  # experts


@dataclasses.dataclass(frozen=True)
class Grouped:
  """What is multiplied, and how often."""

  rows: int = 16384
  width: int = 4096
  feed_forward: int = 2048
  experts: tuple[int, ...] = (8, 64, 128)
  calls: int = 8

  @property
  def flops(self) -> float:
    return 2 * self.rows * self.width * self.feed_forward

  def sizes(self, experts: int) -> np.ndarray:
    """Rows of each expert: all rows, divided as a router that has favourites does."""
    draw = np.random.default_rng(experts)
    return draw.multinomial(self.rows, draw.dirichlet(np.full(experts, 2.0))).astype(np.int32)


TOY = Grouped(rows=64, width=16, feed_forward=8, experts=(4,), calls=2)


def backends() -> dict:
  """What multiplies (x, w, sizes), by name; the plain product first."""
  import functools

  import jax

  from kernels import grouped_matmul as kernels

  mine = {
    name: functools.partial(kernels.grouped_matmul, backend=name)
    for name in kernels.BACKENDS
    if name != 'reference' and not name.endswith('_tpu')
  }
  return {'one matrix': lambda x, w, _: x @ w[0]} | mine | {'ragged_dot': jax.lax.ragged_dot}


def programs(function, setting: Grouped) -> dict:
  """Of a call: (x, w, sizes, dy) -> what comes out; many times forward, and with the backward
  pass.
  """
  import jax

  from benchmarks.attention_peers import repeated

  def both(x, w, sizes, dy):
    y, pull = jax.vjp(lambda x, w: function(x, w, sizes), x, w)
    return y, *pull(dy)

  def forward(x, w, sizes, dy):
    return function(x, w, sizes)

  return {
    'forward': jax.jit(repeated(forward, setting.calls)),
    'both': jax.jit(repeated(both, setting.calls)),
  }


def error_of(found, x, w, sizes, one: bool) -> float:
  """Of the rows of some experts, those that have most and least among them."""
  order, ends = np.argsort(sizes), np.cumsum(sizes)
  wrong = total = 0.0
  for expert in {int(order[0]), *map(int, order[-CHECKED + 1 :])}:
    mine = slice(int(ends[expert] - sizes[expert]), int(ends[expert]))
    right = np.asarray(x[mine], np.float32) @ np.asarray(w[0 if one else expert], np.float32)
    wrong += float(np.sum((np.asarray(found[mine], np.float32) - right) ** 2, dtype=np.float64))
    total += float(np.sum(right**2, dtype=np.float64))
  return (wrong / total) ** 0.5


def measure(name: str, experts: int, setting: Grouped) -> dict:
  """Seconds and TFLOP/s of a call, and the error, or {'error': why there is none of that}."""
  import jax

  from benchmarks.attention_cases import in_a_line, seconds_of

  keys = jax.random.split(jax.random.key(experts), 3)
  M, D, F = setting.rows, setting.width, setting.feed_forward
  matrices = 1 if name == 'one matrix' else experts
  shapes = (M, D), (matrices, D, F), (M, F)
  x, w, dy = (jax.random.normal(key, of, 'bfloat16') for key, of in zip(keys, shapes))
  sizes, result = setting.sizes(experts), {}
  arguments = x, w, jax.numpy.asarray(sizes), dy
  try:
    of = programs(backends()[name], setting)
    found = jax.block_until_ready(of['forward'](*arguments))
    result['error_rms'] = error_of(*jax.device_get((found, x, w)), sizes, matrices == 1)
    for direction, products in (('forward', 1), ('both', 3)):
      run = of[direction]
      jax.block_until_ready(run(*arguments))
      seconds = seconds_of(lambda: run(*arguments), jax.block_until_ready) / setting.calls
      result |= {f'{direction}_seconds': seconds, direction: products * setting.flops / seconds}
  except Exception as error:  # a compiler's or a kernel's; the others are still wanted
    result['error'] = in_a_line(error)
  return result


def show(results: dict[int, dict[str, dict]], device: str, setting: Grouped) -> list[str]:
  """Prints the table; returns what is wrong."""
  rows, wrong = [], []
  for experts, of in results.items():
    bound = of['one matrix']
    for name, run in of.items():
      if 'error' in run:
        print(f'not measured: {name}, {experts} experts: {run["error"]}')
        continue
      shares = [
        run[direction] / bound[direction] if direction in bound else float('nan')
        for direction in ('forward', 'both')
      ]
      each = [run['forward'] / 1e12, shares[0], run['both'] / 1e12, shares[1]]
      rows.append([str(experts), name, *each, f'{run["error_rms"]:.1e}'])
      if not run['error_rms'] <= ERROR:
        wrong.append(f'{name}, {experts} experts')
  commands.table(
    f'{setting.rows} rows, {setting.width} x {setting.feed_forward}, bfloat16, {device}: TFLOP/s',
    ['experts', '', 'forward', 'x one matrix', 'and backward', 'x one matrix', 'error'],
    rows,
  )
  return wrong


def main() -> int:
  if not (given := begun(__doc__, 90)):
    return 1
  options, device, ends = given
  setting, results = TOY if options.rehearse else Grouped(), {}
  found = {'rehearsal': options.rehearse, 'device': device.device_kind}
  found |= {'setting': dataclasses.asdict(setting), 'experts': results}
  for experts in setting.experts:
    results[experts] = {}
    for name in backends():
      late = time.time() > ends
      results[experts][name] = dict(LATE) if late else measure(name, experts, setting)
      commands.write_json(options.json, 'grouped_matmul_gpu', found, partial=True)
  wrong = show(results, device.device_kind, setting)
  if wrong:
    print(f'\nNOT THE PRODUCTS: {"; ".join(wrong)}')
  commands.write_json(options.json, 'grouped_matmul_gpu', found | {'wrong': wrong})
  return 1 if wrong else 0


if __name__ == '__main__':
  sys.exit(main())
