"""What is this device, and what are its limits? Bandwidth and large products, which shares of
other benchmarks are taken of.

    python -m benchmarks.gpu_environment [--json FILE]

The bandwidth is that of a sum over an array (decode/report.py), a product of 8192^3 is in bfloat16;
on a CPU both are of toys.
"""

import os
import subprocess
import time

import commands
from benchmarks.attention_cases import seconds_of

SIZE, TOY = 8192, 256
CALLS = 20
BUSY = 1.0  # seconds
LATE = {'error': 'skipped: no time left'}  # of a side that a budget has no time for
CLOCKS = 'clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used,ecc.mode.current'


def lacking(kind: str, platform: str, rehearsed: bool) -> bool:
  """Whether there is nothing to measure on: no GPU, and no rehearsal; which is said."""
  if platform == 'gpu' or rehearsed:
    return False
  print(
    f'not measured: no GPU at hand, jax sees {kind!r} ({platform}); --rehearse runs the harness '
    'without one'
  )
  return True


def begun(description: str, budget: float):
  """Of a benchmark for a GPU: its options, the device, and when its time is over; None where there
  is nothing to measure on. budget: seconds, where --budget does not say them.
  """
  parser = commands.parser(description)
  parser.add_argument('--budget', type=float, default=budget, help='seconds for everything')
  parser.add_argument(
    '--rehearse', action='store_true', help='toy sizes on this CPU, to test the harness'
  )
  options = parser.parse_args()
  if options.rehearse:
    os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax

  device, ends = jax.devices()[0], time.time() + options.budget
  missing = lacking(device.device_kind, device.platform, options.rehearse)
  return None if missing else (options, device, ends)


def clocks() -> str:
  """What the driver says of the GPU just now, or why it says nothing."""
  asked = ['nvidia-smi', f'--query-gpu={CLOCKS}', '--format=csv,noheader']
  try:
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError) as error:
    return f'not known: {error}'


def found() -> dict:
  import jax

  from benchmarks.attention_peers import repeated
  from decode import report

  device = jax.devices()[0]
  gpu = device.platform == 'gpu'
  size = SIZE if gpu else TOY
  a, b = (jax.random.normal(jax.random.key(i), (size, size), 'bfloat16') for i in range(2))
  run, idle = jax.jit(repeated(jax.numpy.matmul, CALLS)), clocks()
  jax.block_until_ready(run(a, b))
  seconds = seconds_of(lambda: run(a, b), jax.block_until_ready) / CALLS
  # Asked while products are queued, for longer than nvidia-smi takes to answer.
  queued = [run(a, b) for _ in range(max(1, round(BUSY / seconds / CALLS)) if gpu else 1)]
  busy = clocks()
  jax.block_until_ready(queued)
  return {
    'platform': device.platform,
    'kind': device.device_kind,
    'compute_capability': getattr(device, 'compute_capability', None),
    'memory_bytes': (device.memory_stats() or {}).get('bytes_limit'),
    'bandwidth': report.bandwidth(),
    'product_flops': 2 * size**3 / seconds,
    'clocks_idle': idle,
    'clocks_busy': busy,
    'flags': {name: os.environ.get(name, '') for name in ('XLA_FLAGS', 'JAX_PLATFORMS')},
  }


def main():
  options = commands.parser(__doc__).parse_args()
  results = found()
  print(
    f'{results["kind"]}: {results["bandwidth"] / 1e9:,.0f} GB/s, '
    f'{results["product_flops"] / 1e12:,.3g} TFLOP/s of a large product in bfloat16'
  )
  for name in ('clocks_idle', 'clocks_busy'):
    print(f'{CLOCKS}: {results[name]}')
  commands.write_json(options.json, 'gpu_environment', results)


if __name__ == '__main__':
  main()
