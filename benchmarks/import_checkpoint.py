"""What memory does importing a checkpoint take, and how fast is it?
Of a generated one, 2 GB in bfloat16.

    python -m benchmarks.import_checkpoint [--json FILE] [--gb 2.0] [--devices 1 4] [--codes awq]

Each import runs in a fresh process that is watched from inside: resident memory, anonymous
(RssAnon) and of mapped files (RssFile), sampled every 5 ms. On CPU devices the model itself lies in
that memory, so what an import adds is what exceeds the model's bytes; the target is 1.2 times the
largest tensor. `load` brings tensors onto the mesh; `import` is the command,
which writes the run as well.

With --codes the matrices are those of Llama 3 8B, as many layers as --gb has room for in bfloat16,
in 4 bits; they stay so, and the target is the largest matrix as it is packed, beside a piece
(model.checkpoint.PIECE) of UNPACKED bytes a number. The programs that take codes apart, which are
there once for all layers, are no part of that: the checkpoint is loaded once before, let go, and
what malloc keeps of it given back.
"""

import ctypes
import gc
import json
import math
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
WIDE = CONFIG | dict(
  hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14_336
)
GROUP = 128  # inputs that share a scale, of a checkpoint in codes
UNPACKED = 48  # bytes, at most, that a number of a piece takes on its way
CODES = {
  'awq': {'quant_method': 'awq', 'bits': 4, 'group_size': GROUP},
  'gptq': {'quant_method': 'gptq', 'bits': 4, 'group_size': GROUP, 'sym': False},
}
RUN = """
import sys
from benchmarks.import_checkpoint import watched
watched(*sys.argv[1:])
"""


def generate(directory: pathlib.Path, gigabytes: float, codes: str) -> dict:
  """Writes a random checkpoint; its bytes, and those of its largest tensor.

  gigabytes: in bfloat16. codes: of CODES; '': bfloat16.
  """
  from model import checkpoint, families
  from model.tensorfiles import DTYPES, WIDTHS, write

  hf = WIDE if codes else CONFIG
  kv = hf['hidden_size'] * hf['num_key_value_heads'] // hf['num_attention_heads']
  layer = 2 * hf['hidden_size'] * (3 * hf['intermediate_size'] + 2 * hf['hidden_size'] + 2 * kv)
  table = 2 * hf['vocab_size'] * hf['hidden_size']
  hf = hf | {'num_hidden_layers': max(1, round((gigabytes * 1e9 - 2 * table) / layer))}
  family, config = families.read(hf)
  shapes, kinds = {}, {}
  for name, parts in checkpoint.parts_of(family, config).items():
    shape = parts[0].layout.shape
    if codes and '.layers.' in name and len(shape) == 2:
      for tensor, kind, size in _packed(codes, name.removesuffix('.weight'), shape):
        shapes[tensor], kinds[tensor] = size, kind
    else:
      shapes[name], kinds[name] = shape, 'BF16'
  rng = np.random.default_rng(0)

  def produce(name):
    for start in range(0, shapes[name][0], 1024):
      size = min(1024, shapes[name][0] - start), *shapes[name][1:]
      if kinds[name] == 'I32':
        yield rng.integers(-(2**31), 2**31, size, np.int32)
      else:
        yield rng.standard_normal(size, np.float32).astype(DTYPES[kinds[name]])

  directory.mkdir()
  write(directory, shapes, kinds, produce, 500_000_000)
  told = {'quantization_config': CODES[codes]} if codes else {}
  (directory / 'config.json').write_text(json.dumps(hf | told))
  # Of a checkpoint in codes tables are larger, but read row by row.
  sizes = {name: WIDTHS[kinds[name]] * math.prod(shape) for name, shape in shapes.items()}
  largest = [size for name, size in sizes.items() if not codes or kinds[name] == 'I32']
  return {
    'bytes': sum(sizes.values()),
    'largest_tensor': max(largest),
    'target': max(largest) + UNPACKED * checkpoint.PIECE if codes else 1.2 * max(largest),
    'tensors': len(sizes),
    'layers': hf['num_hidden_layers'],
  }


def _packed(codes: str, module: str, shape: tuple[int, int]):
  """(tensor, kind, shape) of a matrix [outputs, inputs] in 4 bits, eight in a word."""
  outputs, inputs = shape
  words = (inputs, outputs // 8) if codes == 'awq' else (inputs // 8, outputs)
  yield f'{module}.qweight', 'I32', words
  yield f'{module}.qzeros', 'I32', (inputs // GROUP, outputs // 8)
  yield f'{module}.scales', 'F16', (inputs // GROUP, outputs)


def resident() -> dict[str, int]:
  """This process's resident bytes, anonymous and of mapped files."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  found = {
    line.split(':')[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith('Rss')
  }
  return {'anonymous': found['RssAnon'] + found['RssShmem'], 'file': found['RssFile']}


def watched(command: str, source: str, workdir: str, codes: str) -> None:
  """Imports in this process and prints, as JSON, seconds, by how much its memory rose at most, and
  the model's bytes.
  """
  import jax

  import convert
  from model import checkpoint, transformer
  from training import config as configs

  # What jax itself takes is no part of an import.
  jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
  if codes:
    jax.block_until_ready(jax.tree.leaves(checkpoint.load(source)))
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)
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
    config, model = checkpoint.load(source)
    jax.block_until_ready(jax.tree.leaves(model))
  else:
    convert.main(['import', '--from', source, '--workdir', workdir, '--tokenizer', 'none'])
  took = time.perf_counter() - began
  done.set()
  watcher.join()
  if command != 'load':
    config = configs.load(workdir).model
  leaves = jax.tree.leaves(jax.eval_shape(lambda: transformer.init(config, 0)))
  size = sum(x.size * x.dtype.itemsize for x in leaves)
  rose = {kind: peak[kind] - before[kind] for kind in peak}
  print(json.dumps({'seconds': took, 'model': size} | rose))


def main():
  parser = commands.parser(__doc__)
  parser.add_argument('--gb', type=float, default=2.0, help='size of the checkpoint, 10^9 bytes')
  parser.add_argument(
    '--devices', type=int, nargs='+', default=[1, 4], help='CPU devices to split the model over'
  )
  parser.add_argument(
    '--codes', default='', choices=('', *CODES), help='of matrices in 4 bits; default: in bfloat16'
  )
  options = parser.parse_args()

  rows, results = [], {}
  with tempfile.TemporaryDirectory() as directory:
    source = pathlib.Path(directory) / 'hf'
    made = generate(source, options.gb, options.codes)
    size, largest = made['bytes'], made['largest_tensor']
    print(
      f'{size / 1e9:.2f} GB in {made["tensors"]} tensors, the largest '
      f'{"matrix in codes " if options.codes else ""}{largest / 1e6:.0f} MB, the target '
      f'{made["target"] / 1e6:.0f} MB'
    )
    for command in ('load', 'import'):
      for devices in options.devices:
        environment = os.environ | {
          'JAX_PLATFORMS': 'cpu',
          'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        }
        place = f'{directory}/{command}{devices}'
        ran = subprocess.run(
          [sys.executable, '-c', RUN, command, str(source), place, options.codes],
          env=environment,
          check=True,
          stdout=subprocess.PIPE,
          text=True,
        )
        run = json.loads(ran.stdout.splitlines()[-1])
        above = run['anonymous'] + run['file'] - run['model']
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
            f'{above / made["target"]:.2f}',
          ]
        )

  commands.table(
    'Peak memory above what the process had (MB)',
    ['', 's', 'MB/s', 'anonymous', 'file pages', 'above the model', '/ largest', '/ target'],
    rows,
  )
  commands.write_json(options.json, 'import_checkpoint', results)


if __name__ == '__main__':
  main()
