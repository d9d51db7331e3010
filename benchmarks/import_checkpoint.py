"""What memory does importing a checkpoint take, and how fast is it?
Of a generated one, 2 GB in bfloat16.

    python -m benchmarks.import_checkpoint [--json FILE] [--gb 2.0] [--devices 1 4]

Each import runs in a fresh process that is watched from inside: resident memory, anonymous
(RssAnon) and of mapped files (RssFile), sampled every 5 ms. On CPU devices the model itself lies in
that memory, so what an import adds is what exceeds the model's bytes; the target is 1.2 times the
largest tensor. `load` brings tensors onto the mesh; `import` is the command,
which writes the run as well.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

import commands

CONFIG = dict(
  model_type='llama',
  architectures=['LlamaForCausalLM'],
  vocab_size=32_000,
  hidden_size=2048,
  num_attention_heads=16,
  num_key_value_heads=8,
  intermediate_size=8192,
  max_position_embeddings=2048,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
)
RUN = """
import sys
from benchmarks.import_checkpoint import watched
watched(*sys.argv[1:])
"""


def generate(directory: pathlib.Path, gigabytes: float) -> dict:
  """Writes a random checkpoint; its bytes, and those of its largest tensor."""
  from model import checkpoint, families
  from model.tensorfiles import DTYPES, write

  layer = 2 * (
    CONFIG['hidden_size'] * (3 * CONFIG['intermediate_size'] + 3 * CONFIG['hidden_size'])
  )
  table = 2 * CONFIG['vocab_size'] * CONFIG['hidden_size']
  hf = CONFIG | {'num_hidden_layers': max(1, round((gigabytes * 1e9 - 2 * table) / layer))}
  family, config = families.read(hf)
  shapes = {
    name: parts[0].layout.shape for name, parts in checkpoint.parts_of(family, config).items()
  }
  rng = np.random.default_rng(0)

  def produce(name):
    for start in range(0, shapes[name][0], 1024):
      rows = min(1024, shapes[name][0] - start)
      yield rng.standard_normal((rows, *shapes[name][1:]), np.float32).astype(DTYPES['BF16'])

  directory.mkdir()
  write(directory, shapes, 'BF16', produce, 500_000_000)
  (directory / 'config.json').write_text(json.dumps(hf))
  sizes = [2 * int(np.prod(shape)) for shape in shapes.values()]
  return {
    'bytes': sum(sizes),
    'largest_tensor': max(sizes),
    'tensors': len(sizes),
    'layers': hf['num_hidden_layers'],
  }


def resident() -> dict[str, int]:
  """This process's resident bytes, anonymous and of mapped files."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  found = {
    line.split(':')[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith('Rss')
  }
  return {'anonymous': found['RssAnon'] + found['RssShmem'], 'file': found['RssFile']}


def watched(command: str, source: str, workdir: str) -> None:
  """Imports in this process and prints, as JSON,
  seconds and by how much its memory rose at most.
  """
  import jax

  import convert
  from model import checkpoint

  # What jax itself takes is no part of an import.
  jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
  before = resident()
  peak = {'anonymous': 0, 'file': 0}
  done = threading.Event()

  def sample():
    while not done.wait(0.005):
      for kind, value in resident().items():
        peak[kind] = max(peak[kind], value)

  watcher = threading.Thread(target=sample)
  watcher.start()
  began = time.perf_counter()
  if command == 'load':
    _, model = checkpoint.load(source)
    jax.block_until_ready(jax.tree.leaves(model))
  else:
    convert.main(['import', '--from', source, '--workdir', workdir, '--tokenizer', 'none'])
  took = time.perf_counter() - began
  done.set()
  watcher.join()
  print(json.dumps({'seconds': took} | {kind: peak[kind] - before[kind] for kind in peak}))


def main():
  parser = commands.parser(__doc__)
  parser.add_argument('--gb', type=float, default=2.0, help='size of the checkpoint, 10^9 bytes')
  parser.add_argument(
    '--devices', type=int, nargs='+', default=[1, 4], help='CPU devices to split the model over'
  )
  options = parser.parse_args()

  rows, results = [], {}
  with tempfile.TemporaryDirectory() as directory:
    source = pathlib.Path(directory) / 'hf'
    made = generate(source, options.gb)
    size, largest = made['bytes'], made['largest_tensor']
    print(f'{size / 1e9:.2f} GB in {made["tensors"]} tensors, the largest {largest / 1e6:.0f} MB')
    for command in ('load', 'import'):
      for devices in options.devices:
        environment = os.environ | {
          'JAX_PLATFORMS': 'cpu',
          'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        }
        ran = subprocess.run(
          [sys.executable, '-c', RUN, command, str(source), f'{directory}/{command}{devices}'],
          env=environment,
          check=True,
          stdout=subprocess.PIPE,
          text=True,
        )
        run = json.loads(ran.stdout.splitlines()[-1])
        above = run['anonymous'] + run['file'] - made['bytes']
        results[f'{command}, {devices} devices'] = (
          run | made | {'above_the_model': above, 'ratio': above / made['largest_tensor']}
        )
        rows.append(
          [
            f'{command}, {devices} device{"s" * (devices > 1)}',
            f'{run["seconds"]:.1f}',
            f'{made["bytes"] / 1e6 / run["seconds"]:,.0f}',
            f'{run["anonymous"] / 1e6:,.0f}',
            f'{run["file"] / 1e6:,.0f}',
            f'{above / 1e6:,.0f}',
            f'{above / made["largest_tensor"]:.2f}',
          ]
        )

  commands.table(
    'Peak memory above what the process had (MB)',
    ['', 's', 'MB/s', 'anonymous', 'file pages', 'above the model', '/ largest tensor'],
    rows,
  )
  commands.write_json(options.json, 'import_checkpoint', results)


if __name__ == '__main__':
  main()
