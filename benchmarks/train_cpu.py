"""Does training use the CPU better than torch does?
The same Llama-shaped model, trained by us and by HF transformers.

    python -m benchmarks.train_cpu [--json FILE] [--steps 8]

Needs torch and transformers: make .venv/installed-oracle.

bench-30M: vocabulary 8192, width 512, 8 layers, 8 heads, 4 kv heads, head width 64, feed-forward
1408, f32, batch 8 x 512, AdamW, clipping. Each side runs in a process of its own, in turn, twice,
with the same allocator settings (parallel/hosts.py); the better run counts. A run that fails loses
itself alone, and the command ends with 1. The machine's own f32 GEMM rate, the faster library's, is
the physical limit that both are held to.
"""

import json

import commands
from benchmarks import common, train_step

NAMES = {'ours': 'Tandem', 'theirs': 'transformers + torch'}


def config():
  from data.config import DataConfig
  from model.config import ModelConfig
  from model.execution import ExecutionConfig
  from training.config import Config
  from training.optimizer import OptimizerConfig

  return Config(
    model=ModelConfig(
      vocabulary=8192,
      width=512,
      layers=8,
      heads=8,
      kv_heads=4,
      feed_forward=1408,
      execution=ExecutionConfig(remat='dots'),
    ),
    data=DataConfig(sequence_length=512, batch_size=8),
    optimizer=OptimizerConfig(schedule='constant'),
  )


def ours(steps: int) -> dict:
  import jax
  import jax.numpy as jnp

  found = train_step.tandem(config(), steps)
  a, b = (jax.random.normal(jax.random.key(i), (2048, 2048)) for i in range(2))
  product = jax.jit(jnp.matmul)
  product(a, b).block_until_ready()
  return found | {
    'gemm': 2 * 2048**3 / common.seconds(lambda: product(a, b).block_until_ready(), 20)
  }


def theirs(steps: int) -> dict:
  import torch

  found = train_step.transformers_torch(config(), steps)
  a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
  a @ b
  return found | {'gemm': 2 * 2048**3 / common.seconds(lambda: a @ b, 20)}


def show(runs: dict[str, list[dict]]) -> dict:
  """Prints the better run of each side that was measured, and returns what they found."""
  from model import flops

  best = train_step.best_of(runs, 'step_seconds')
  if not best:
    return {'best': best, 'runs': runs}
  gemm = max(run['gemm'] for of in runs.values() for run in of if 'error' not in run)
  made, rows = config(), []
  needed = flops.train_flops_per_token(made.model, made.data.sequence_length)
  for side, run in best.items():
    run['tokens_per_second'] = (
      made.data.batch_size * made.data.sequence_length / run['step_seconds']
    )
    run['share_of_gemm'] = run['tokens_per_second'] * needed / gemm
    rows.append(
      [
        NAMES[side],
        run['tokens_per_second'],
        f'{run["share_of_gemm"]:.0%}',
        run['gemm'] / 1e9,
        run['peak_bytes'] / 2**30,
        run['first_step_seconds'],
      ]
    )
  found = {'best': best, 'runs': runs}
  if len(best) == len(NAMES):
    a, b = rows
    rows.append(['ratio', a[1] / b[1], '', a[3] / b[3], a[4] / b[4], a[5] / b[5]])
    found |= {'ratio': a[1] / b[1], 'memory_ratio': a[4] / b[4]}

  parameters = next(iter(best.values()))['parameters']
  commands.table(
    f'bench-30M, {parameters:,} parameters, f32, batch {made.data.batch_size} x '
    f'{made.data.sequence_length}',
    ['', 'tokens/s', 'of the fastest GEMM', 'own GEMM GFLOP/s', 'peak RSS GiB', 'first step s'],
    rows,
  )
  return found


def main() -> int:
  arguments = commands.parser(__doc__)
  arguments.add_argument('--steps', type=int, default=8, help='timed steps of each run')
  arguments.add_argument('--side', choices=('ours', 'theirs'), help='run one side in this process')
  options = arguments.parse_args()
  if options.side:
    print(json.dumps({'ours': ours, 'theirs': theirs}[options.side](options.steps)))
    return 0

  runs = {side: [] for side in NAMES}
  for _ in range(2):
    for side, taken in runs.items():
      flags = ['--side', side, '--steps', str(options.steps)]
      environment = {'JAX_PLATFORMS': 'cpu'}
      taken.append(train_step.attempted('benchmarks.train_cpu', *flags, environment=environment))
      commands.write_json(options.json, 'train_cpu', {'runs': runs}, partial=True)
  commands.write_json(options.json, 'train_cpu', show(runs))
  failed = train_step.failed(runs)
  for line in failed:
    print(line)
  return int(bool(failed))


if __name__ == '__main__':
  raise SystemExit(main())
