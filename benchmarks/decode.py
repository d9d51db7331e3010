"""How fast is generation, and how near to what the memory allows?
Ours beside HF transformers' generate, of the same Llama shape.

    python -m benchmarks.decode [--json FILE]
    python -m benchmarks.decode --model=bench_1b --batches=1,8,64
                                --json benchmarks/results/decode_h100.json
    python -m benchmarks.decode --capacity

The first needs torch and transformers (make .venv/installed-oracle), the second is for a GPU, the
third prints ms a token against the cache's capacity.

On a CPU bench-30M (benchmarks.train_cpu) in f32, on a GPU bench_1b or llama3_8b in bfloat16; random
weights, greedy, a prompt of 128 tokens and 256 new ones, none of which ends a row. Each side runs
in a process of its own, in turn, `--runs` times; the best run counts, and one that fails loses
itself alone. The bound: all weights and the cached tokens are read once a step, at the bandwidth of
a sum over an array, of which every process measures its own; the median counts, because the best
one is that of a moment (on a shared machine 81 GB/s once, where the others saw 43 to 51).
"""

import dataclasses
import importlib
import json
import statistics
import time

import commands
from benchmarks import common, train_cpu, train_step

PROMPT, NEW = 128, 256
CAPACITIES = (1024, 2048, 4096, 8192, 16384)
SIDES = {
  'ours': 'Tandem',
  'int8': 'Tandem, int8 weights',
  'dynamic': 'transformers, dynamic cache',
  'static': 'transformers, static cache',
}


def model_config(name: str):
  """The ModelConfig of a benchmark's model."""
  if name in ('bench_30m', 'toy'):
    made = train_cpu.config().model
    small = dict(vocabulary=64, width=32, layers=2, heads=2, kv_heads=1, feed_forward=64)
    return made if name == 'bench_30m' else dataclasses.replace(made, **small)
  module = importlib.import_module(
    f'configs.{name}' if name.startswith('bench') else f'configs.models.{name}'
  )
  return module.get_config().model.with_execution(dtype='bfloat16', parameter_dtype='bfloat16')


class Ids:
  """In place of a tokenizer: the model's own ids, one byte each."""

  pad = 0
  bos = 1
  eos = 2
  generation = {}

  def __init__(self, vocabulary: int):
    self.vocabulary = vocabulary

  def decode_bytes(self, ids) -> bytes:
    return b'.' * len(ids)


def generator(name: str, weights: str = ''):
  import jax

  from decode.generating import generating
  from decode.generator import Generator
  from model import transformer
  from parallel.mesh import MeshConfig, make_mesh

  config = generating(model_config(name))
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    return Generator(
      jax.jit(transformer.init, static_argnums=(0, 1))(config, 0), Ids(config.V), mesh, weights
    )


def prompts(V: int, batch: int):
  import numpy as np

  return np.random.default_rng(0).integers(3, V, (batch, PROMPT)).tolist()


def ours(name: str, batch: int, weights: str = '') -> dict:
  import jax

  from decode import report

  g = generator(name, weights)
  rows = prompts(g.vocabulary, batch)
  runs = []
  for _ in range(3):
    began = time.perf_counter()
    found = g(rows, max_new_tokens=NEW, temperature=0.0, logit_bias={Ids.eos: -float('inf')})
    runs.append((time.perf_counter() - began, g.report))
  assert all(len(row.ids) == NEW for row in found)
  seconds, best = min(runs[1:], key=lambda run: run[0])
  return {
    'seconds': seconds,
    'first_token': best.first_token,
    'ms_per_step': best.ms_per_token,
    'read_bytes': best.read_bytes,
    'cache_bytes': best.cache_bytes,
    'compile_seconds': runs[0][1].compile_seconds,
    'bandwidth': report.bandwidth(),
    'device': jax.devices()[0].device_kind,
  }


def theirs(name: str, batch: int, cache: str) -> dict:
  import torch
  import transformers

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  m = model_config(name)
  dtype = torch.bfloat16 if m.execution.dtype == 'bfloat16' else torch.float32
  torch.manual_seed(0)
  with torch.device(device):
    made = train_step.llama(m, 4 * (PROMPT + NEW), use_cache=True)
    model = transformers.AutoModelForCausalLM.from_config(
      made, attn_implementation='sdpa', dtype=dtype
    ).eval()
  tokens = torch.tensor(prompts(m.V, batch), device=device)
  how = dict(
    do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones_like(tokens)
  )
  if cache == 'static':
    how |= dict(cache_implementation='static') | (
      {} if device == 'cuda' else dict(disable_compile=True)
    )

  def run(new):
    began = time.perf_counter()
    with torch.no_grad():
      found = model.generate(tokens, max_new_tokens=new, min_new_tokens=new, **how)
      found.cpu()
    assert found.shape[1] == PROMPT + new
    return time.perf_counter() - began

  run(NEW)
  first, seconds = min(run(1) for _ in range(3)), min(run(NEW) for _ in range(2))
  x, times = (torch.ones(2**28, device=device), 16) if device == 'cuda' else (torch.ones(2**26), 1)

  def total():
    return float(sum(x.sum() for _ in range(times)))  # a GPU's sums are queued one behind the other

  total()
  return {
    'seconds': seconds,
    'first_token': first,
    'ms_per_step': (seconds - first) / (NEW - 1) * 1e3,
    'bandwidth': times * x.nbytes / common.seconds(total, 8),
    'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
  }


def by_capacity(name: str) -> None:
  """Prints ms a token of one row that holds PROMPT to PROMPT + NEW tokens,
  by the capacity of its cache.
  """
  g, rows = generator(name), []
  for capacity in CAPACITIES:
    session = g.session(capacity).append(prompts(g.vocabulary, 1)[0])

    def run():
      session.truncate(PROMPT)
      session(max_new_tokens=NEW, temperature=0.0, logit_bias={Ids.eos: -float('inf')})

    run()
    rows.append([f'{capacity:,}', common.seconds(run, 5) / NEW * 1e3])
  rows = [[*row, row[1] / rows[0][1]] for row in rows]
  commands.table(
    f'{name}: a token against the capacity of the cache',
    ['capacity', 'ms a token', f'x that of {CAPACITIES[0]:,}'],
    rows,
  )
  return {row[0]: row[1] for row in rows}


def show(model: str, batch: int, runs: dict[str, list[dict]]) -> dict:
  """Prints the best run of each side that was measured, and returns what was."""
  best = train_step.best_of(runs, 'seconds')
  if not best:
    return {'best': best, 'runs': runs}
  bandwidth = statistics.median(
    run['bandwidth'] for taken in runs.values() for run in taken if 'error' not in run
  )
  rows = []
  for side, run in best.items():
    run['tokens_per_second'] = batch * NEW / run['seconds']
    read = run.get('read_bytes', best['ours']['read_bytes'] if 'ours' in best else float('nan'))
    run['share_of_bandwidth'] = read / bandwidth / run['ms_per_step'] * 1e3
    rows.append(
      [
        SIDES[side],
        run['tokens_per_second'],
        run['first_token'] * 1e3,
        run['ms_per_step'],
        f'{run["share_of_bandwidth"]:.0%}',
        run['peak_bytes'] / 2**30,
      ]
    )
  rows = [[*row, row[1] / rows[0][1]] for row in rows]

  commands.table(
    f'{model}, batch {batch}, {PROMPT} + {NEW} tokens, '
    f'{best[next(iter(best))]["device"]}, {bandwidth / 1e9:.1f} GB/s measured',
    [
      '',
      'tokens/s',
      'first token ms',
      'ms a step',
      'of the bandwidth',
      'peak RSS GiB',
      'x the first',
    ],
    rows,
  )
  return {'best': best, 'runs': runs, 'bandwidth': bandwidth}


def main() -> int:
  arguments = commands.parser(__doc__)
  arguments.add_argument(
    '--model', default='bench_30m', help='toy, bench_30m, bench_1b, or one of configs/models'
  )
  arguments.add_argument('--batches', default='1,8', help='rows, with commas between')
  arguments.add_argument('--sides', default=','.join(SIDES), help='of ' + ', '.join(SIDES))
  arguments.add_argument('--runs', type=int, default=2, help='of each side')
  arguments.add_argument(
    '--capacity', action='store_true', help='time a token against the capacity of the cache instead'
  )
  arguments.add_argument('--run', help='run one side in this process: side,batch')
  options = arguments.parse_args()
  if options.capacity:
    commands.write_json(options.json, 'decode_capacity', by_capacity(options.model))
    return 0
  if options.run:
    side, batch = options.run.split(',')
    run = {
      'ours': lambda: ours(options.model, int(batch)),
      'int8': lambda: ours(options.model, int(batch), 'int8'),
    }.get(side, lambda: theirs(options.model, int(batch), side))
    print(json.dumps(run()))
    return 0

  results = {}
  for batch in map(int, options.batches.split(',')):
    runs = {side: [] for side in options.sides.split(',')}
    for _ in range(options.runs):
      for side, taken in runs.items():
        flags = ['--model', options.model, '--run', f'{side},{batch}']
        taken.append(train_step.attempted('benchmarks.decode', *flags, environment={}))
        partly = results | {batch: {'runs': runs}}
        commands.write_json(options.json, 'decode', partly, partial=True)
    results[batch] = show(options.model, batch, runs)
  commands.write_json(options.json, 'decode', results)
  failed = [
    f'{line} ({batch} rows)'
    for batch, of in results.items()
    for line in train_step.failed(of['runs'])
  ]
  for line in failed:
    print(line)
  return int(bool(failed))


if __name__ == '__main__':
  raise SystemExit(main())
