"""How fast is generation with weights in codes, and how near to what the memory allows?

    python -m benchmarks.compression [--models bench_30m,smollm2] [--batches 1,8] [--json FILE]

f32, int8 and int4 in groups of 64 of the same model, in one process and in turn, `--rounds` times;
the best round counts. Greedy, prompts of 128 tokens, 64 new ones, none of which ends a row.
bench-30M (benchmarks.train_cpu) has random weights; smollm2 is SmolLM2-135M-Instruct, where its
package is installed. The share: bytes of weights and cache that a step reads, over what a sum over
an array reads in that time (decode.report). Where llama.cpp's llama-bench is on the path it times
the package's own file, in its own types, beside: one row, as many new tokens and threads.
"""

import json
import os
import shutil
import subprocess

import commands
from benchmarks import decode
from benchmarks.decode import Ids, prompts

NEW = 64
SCHEMES = {'f32': '', 'int8': 'int8', 'int4': 'int4:group=64'}
MODELS = ('bench_30m', 'smollm2')


def generators(name: str) -> dict:
  """Of a model, by scheme; {} where its package is not installed."""
  if name == 'bench_30m':
    return {side: decode.generator(name, weights) for side, weights in SCHEMES.items()}
  import jax

  from decode.generating import generating
  from decode.generator import Generator
  from model import checkpoint, packages
  from parallel.mesh import MeshConfig, make_mesh

  try:
    source = packages.path(name)
  except FileNotFoundError as error:
    print(f'{name} is left out: {error}')
    return {}
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    config, model = checkpoint.load(
      checkpoint.opened(source), dtype='float32', compute_dtype='float32', vocabulary_multiple=1
    )
    model.config = generating(config)
    ids = Ids(config.V)
    return {side: Generator(model, ids, mesh, weights) for side, weights in SCHEMES.items()}


def measure(sides: dict, batch: int, rounds: int) -> dict[str, dict]:
  """The best round of each side, which take turns."""
  best = {}
  for _ in range(rounds + 1):  # the first one compiles
    for side, g in sides.items():
      rows = prompts(g.vocabulary, batch)
      g(rows, max_new_tokens=NEW, temperature=0.0, logit_bias={Ids.eos: -float('inf')})
      if g.report.ms_per_token < best.get(side, {'ms_per_step': float('inf')})['ms_per_step']:
        best[side] = {
          'tokens_per_second': g.report.tokens_per_second,
          'ms_per_step': g.report.ms_per_token,
          'read_bytes': g.report.read_bytes,
          'share_of_bandwidth': g.report.share_of_bandwidth(),
        }
  return best


def llama_cpp(name: str) -> dict | None:
  """Tokens a second of one row, of llama-bench; None where there is none, or no file for it."""
  from model import packages

  program = shutil.which('llama-bench')
  if program is None or name not in packages.PACKAGES:
    return None
  flags = ['-p', '0', '-n', str(NEW), '-t', str(os.cpu_count()), '-r', '3', '-o', 'json']
  command = [program, '-m', str(packages.path(name)), *flags]
  run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
  return {'tokens_per_second': json.loads(run.stdout)[0]['avg_ts'], 'file': command[2]}


def show(name: str, batch: int, best: dict[str, dict], beside: dict | None) -> None:
  from decode import report

  rows = [
    [
      side,
      found['tokens_per_second'],
      found['ms_per_step'],
      found['read_bytes'] / 1e6,
      f'{found["share_of_bandwidth"]:.0%}',
      found['tokens_per_second'] / best['f32']['tokens_per_second'],
    ]
    for side, found in best.items()
  ]
  if beside:
    speed = beside['tokens_per_second']
    ratio = speed / best['f32']['tokens_per_second']
    rows.append(['llama.cpp', speed, 1e3 / speed, '', '', ratio])
  head = ['', 'tokens/s', 'ms a step', 'MB a step', 'of the bandwidth', 'x f32']
  bandwidth = f'{report.bandwidth() / 1e9:.1f} GB/s measured'
  commands.table(f'{name}, batch {batch}, {NEW} new tokens, {bandwidth}', head, rows)


def main():
  arguments = commands.parser(__doc__)
  arguments.add_argument('--models', default=','.join(MODELS), help='of ' + ', '.join(MODELS))
  arguments.add_argument('--batches', default='1,8', help='rows, with commas between')
  arguments.add_argument('--rounds', type=int, default=6, help='of each side')
  options = arguments.parse_args()

  results = {}
  for name in options.models.split(','):
    sides = generators(name)
    for batch in map(int, options.batches.split(',')) if sides else ():
      best = measure(sides, batch, options.rounds)
      beside = llama_cpp(name) if batch == 1 else None
      show(name, batch, best, beside)
      results[f'{name}, batch {batch}'] = best | ({'llama.cpp': beside} if beside else {})
    del sides
  commands.write_json(options.json, 'compression', results)


if __name__ == '__main__':
  main()
