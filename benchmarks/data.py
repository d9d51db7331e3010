"""How fast is each stage of the data pipeline, against what the machine could do,
and does memory stay bounded?

    python -m benchmarks.data [--json FILE] [--gigabytes 1] [--engines 0.1]

Each rate is divided by that of a named peer that works on the same bytes in the same run.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import random
import runpy
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

import commands
from benchmarks import common
from data import clean, duplicates, packing, sources, tokenizers
from data.batch import Batch
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.loader import train_loader
from data.prepare import prepare

LENGTH, BATCH = 512, 8

PREPARE = """
import json, sys
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.prepare import prepare
source = SourceConfig(kind='jsonl', path=sys.argv[1], text_field='text')
tokenizer = TokenizerConfig(vocabulary=4096)
config = DataConfig(sources=(source,), tokenizer=tokenizer, cache_dir=sys.argv[2])
lines = []
prepared = prepare(config, log=lambda line: lines.append(line) or print(line, file=sys.stderr))
(said,) = [line for line in lines if line.startswith('data: seconds: ')]
seconds = dict(each.split() for each in said.removeprefix('data: seconds: ').split(', '))
seconds = {stage: float(took) for stage, took in seconds.items()}
print(json.dumps(prepared.report | {'seconds': seconds}))
"""


def stages(texts: list[str]) -> dict[str, dict]:
  """Rates of the stages on a list of documents, against peers;
  MB/s of UTF-8 text unless named otherwise.
  """
  size = sum(len(text.encode()) for text in texts) / 1e6
  sample = texts[: len(texts) // 4]
  sample_size = sum(len(text.encode()) for text in sample) / 1e6
  compressed = sample_size / common.seconds(
    lambda: [gzip.compress(text.encode(), 9) for text in sample], 1
  )
  rates = {}

  def rate(name: str, value: float, peer: str, peer_value: float) -> None:
    rates[name] = {
      'rate': value,
      'peer': peer,
      'peer_rate': peer_value,
      'ratio': value / peer_value,
    }

  for preset in ('code', 'prose'):
    config = CleanConfig(filters=preset, near_duplicates=0.0)
    took = common.seconds(lambda config=config: [clean.clean(text, config) for text in texts])
    rate(f'clean ({preset})', size / took, 'gzip -9', compressed)
  words = [text.lower().encode().split() for text in sample]
  rate(
    'minhash',
    sample_size / common.seconds(lambda: [duplicates.minhash(each) for each in words]),
    "datasketch's own loop",
    sample_size / common.seconds(lambda: [_plain_minhash(each) for each in words], 1),
  )

  config = TokenizerConfig(vocabulary=4096)
  began = time.perf_counter()
  made = tokenizers.build(config, texts, texts)
  rate('train tokenizer', size / (time.perf_counter() - began), 'gzip -9', compressed)
  encoded = made.encode_arrays(texts)
  bare = common.seconds(lambda: made._processor.encode(texts, num_threads=os.cpu_count()))
  rate(
    'encode',
    size / common.seconds(lambda: made.encode_arrays(texts)),
    'bare SentencePiece',
    size / bare,
  )

  offsets = np.concatenate([[0], np.cumsum([len(ids) + 2 for ids in encoded])])

  def pack() -> tuple[np.ndarray, np.ndarray]:
    pieces = packing.cut(offsets, LENGTH)
    return packing.pack(pieces[:, 1], LENGTH)

  tokens = np.concatenate(encoded).astype(np.uint16)
  rate(
    'pack',
    size / common.seconds(pack),
    'memcpy of the tokens',
    size / common.seconds(lambda: tokens.copy(), 20),
  )
  # Documents of 36 tokens: nothing but searching for room.
  short = np.random.default_rng(0).integers(8, 64, 200_000)
  rate(
    'pack short documents, M tokens/s',
    short.sum() / 1e6 / common.seconds(lambda: packing.pack(short, LENGTH)),
    'memcpy of the tokens',
    short.sum() / 1e6 / common.seconds(np.zeros(int(short.sum()), np.uint16).copy, 20),
  )
  return rates


def _plain_minhash(words: list[bytes]) -> np.ndarray:
  from datasketch import MinHash

  sketch = MinHash(num_perm=duplicates.HASHES)
  sketch.update_batch({b' '.join(words[i : i + 5]) for i in range(max(1, len(words) - 4))})
  return sketch.hashvalues


def appetite(directory: str) -> dict[str, dict]:
  """M tokens/s of the loader on configs/tiny.py against what its train step consumes."""
  from model import params, transformer
  from parallel import axes
  from parallel.mesh import make_mesh
  from training import state as states
  from training.optimizer import make_optimizer
  from training.step import make_step

  config = runpy.run_path('configs/tiny.py')['get_config']()
  prepared = prepare(dataclasses.replace(config.data, cache_dir=directory), lambda line: None)
  config = config.resolve(prepared.tokenizer.vocabulary)
  tokens, steps = config.data.sequence_length * config.data.batch_size / 1e6, 20
  loader = train_loader(prepared, config.data)
  first = next(loader)
  loaded = 10 * steps * tokens / common.seconds(lambda: [next(loader) for _ in range(10 * steps)])
  loader.close()
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    model = jax.eval_shape(lambda: transformer.init(config.model, config.train.seed))
    optimizer = make_optimizer(
      config.optimizer, config.train.steps, params.specs({'policy': model})
    )
    state = jax.jit(lambda: states.init(config, optimizer))()
    train_step = make_step(config, optimizer)
    batch = jax.device_put(first, jax.NamedSharding(mesh, axes.spec('batch', 'length')))

    def run() -> None:
      nonlocal state
      for _ in range(steps):
        state, metrics, _ = train_step(state, batch)
      jax.block_until_ready(metrics)

    run()
    consumed = steps * tokens / common.seconds(run)
  return {
    'load (tiny), M tokens/s': {
      'rate': loaded,
      'peer': 'what its train step consumes',
      'peer_rate': consumed,
      'ratio': loaded / consumed,
    }
  }


def loading(directory: str) -> dict[str, dict]:
  """M tokens/s of the loader, against copying batches that are there already,
  and the seconds of a warm start.
  """
  config = DataConfig(
    sequence_length=LENGTH,
    batch_size=BATCH,
    cache_dir=directory,
    tokenizer=TokenizerConfig(vocabulary=4096),
  )

  def quiet(line):
    return None

  began = time.perf_counter()
  prepare(config, quiet)
  cold = time.perf_counter() - began
  warm = common.seconds(lambda: prepare(config, quiet))
  prepared = prepare(config, quiet)
  loader = train_loader(prepared, config)

  steps = 300
  next(loader)
  rate = steps * LENGTH * BATCH / 1e6 / common.seconds(lambda: [next(loader) for _ in range(steps)])
  loader.close()

  ready = Batch.empty(BATCH, LENGTH)
  copied = LENGTH * BATCH / 1e6 / common.seconds(lambda: jax.tree.map(np.copy, ready), 50)
  return {
    'load, M tokens/s': {
      'rate': rate,
      'peer': 'copying a ready batch',
      'peer_rate': copied,
      'ratio': rate / copied,
    },
    'start, per second': {
      'rate': 1 / warm,
      'peer': 'cold start',
      'peer_rate': 1 / cold,
      'ratio': cold / warm,
    },
  }


def write_corpus(path: pathlib.Path, size: float, texts: list[str]) -> int:
  """Writes about `size` bytes of JSONL, documents of some 5 KB of random lines of `texts`;
  returns the exact size.
  """
  rng = random.Random(0)
  lines = [line for text in texts for line in text.splitlines(keepends=True) if line.strip()]
  written = 0
  with open(path, 'w') as file:
    while written < size:
      written += file.write(
        json.dumps({'text': ''.join(rng.choices(lines, k=rng.randrange(20, 230)))}) + '\n'
      )
  return path.stat().st_size


def bounded(gigabytes: float, texts: list[str]) -> dict:
  """Prepares a generated corpus in a fresh process while its memory,
  and its workers', is sampled.
  """
  with tempfile.TemporaryDirectory() as directory:
    corpus = pathlib.Path(directory) / 'corpus.jsonl'
    size = write_corpus(corpus, gigabytes * 1e9, texts)

    began = time.perf_counter()
    command = [sys.executable, '-c', PREPARE, str(corpus), directory]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with common.PeakMemory(process.pid) as memory:
      output, _ = process.communicate()
    took = time.perf_counter() - began
    if process.returncode:
      raise RuntimeError(
        f'preparing {corpus} failed with exit status {process.returncode}; see above'
      )
    report = json.loads(output)

  split = report['sources'][0]['train']
  return {
    'corpus_bytes': size,
    'documents': report['sources'][0]['read']['documents'],
    'tokens': split['tokens'],
    'shards': len(split['shards']),
    'seconds': took,
    'stage_seconds': report['seconds'],
    'peak_bytes': memory.peak,
  }


ENGINES = {
  'alone': 'prepare(config, log)',
  'local': 'prepare(config, log, functools.partial(corpus.build, engine=engine.LocalEngine(2)))',
  'ray': "prepare(config, log, functools.partial(corpus.build, engine=on_ray.RayEngine('', 2)))",
}
PREPARE_BY = """
import functools, json, re, sys, time
from data import corpus, engine, on_ray
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.prepare import prepare
source = SourceConfig(kind='jsonl', path=sys.argv[1], text_field='text')
config = DataConfig(
  sources=(source,), tokenizer=TokenizerConfig(vocabulary=4096), cache_dir=sys.argv[2]
)
lines = []
log = lambda line: lines.append(line) or print(line, file=sys.stderr)
began = time.perf_counter()
prepared = {}
seconds = time.perf_counter() - began
peaks = re.findall(r'data: (\\w+): .* at most ([\\d,]+) MB', '\\n'.join(lines))
peaks = {{stage: int(peak.replace(',', '')) for stage, peak in peaks}}
print(json.dumps({{'seconds': seconds, 'files': prepared.files, 'peak_mb': peaks}}))
"""


def engines(gigabytes: float, texts: list[str]) -> dict[str, dict]:
  """One corpus prepared by one process as `train.py` does, by two of data/engine.py, and by two of
  a Ray cluster that begins for it: seconds, MB of a worker by stage, whether the bytes are equal.
  """
  found = {}
  with tempfile.TemporaryDirectory() as directory:
    corpus = pathlib.Path(directory) / 'corpus.jsonl'
    size = write_corpus(corpus, gigabytes * 1e9, texts)
    for name, call in ENGINES.items():
      command = [sys.executable, '-c', PREPARE_BY.format(call), str(corpus), f'{directory}/{name}']
      output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
      found[name] = json.loads(output.splitlines()[-1]) | {'corpus_bytes': size}
  expected = found['alone']['files']
  for run in found.values():
    run['same_bytes'] = run.pop('files') == expected
  return found


def show_engines(found: dict[str, dict]) -> None:
  size = found['alone']['corpus_bytes'] / 1e6
  commands.table(
    f'A corpus of {size:,.0f} MB by one process, by two, and by two of a Ray cluster',
    ('engine', 'seconds', 'MB/s', 'to local', 'MB a worker', 'same bytes'),
    [
      (
        name,
        run['seconds'],
        size / run['seconds'],
        run['seconds'] / found['local']['seconds'],
        max(run['peak_mb'].values(), default=0),
        'yes' if run['same_bytes'] else 'NO',
      )
      for name, run in found.items()
    ],
  )


def main() -> None:
  parser = commands.parser(__doc__.split('\n')[0])
  parser.add_argument(
    '--gigabytes', type=float, default=1.0, help='size of the generated corpus; 0 leaves it out'
  )
  parser.add_argument(
    '--engines', type=float, default=0.0, help='only: GB of a corpus for one process, two, and Ray'
  )
  arguments = parser.parse_args()
  texts = list(sources.documents(SourceConfig(), sources.Problems()))
  if arguments.engines:
    show_engines(found := engines(arguments.engines, texts))
    commands.write_json(arguments.json, 'data', {'engines': found})
    return
  rates = stages(texts)
  with tempfile.TemporaryDirectory() as directory:
    rates |= loading(directory) | appetite(directory)
  commands.table(
    f'Stages on the standard library ({len(texts)} documents; MB/s of text unless named otherwise)',
    ('stage', 'rate', 'ratio', 'peer', "peer's rate"),
    [
      (name, row['rate'], row['ratio'], row['peer'], row['peer_rate'])
      for name, row in rates.items()
    ],
  )

  results = {'stages': rates}
  if arguments.gigabytes:
    results['bounded'] = run = bounded(arguments.gigabytes, texts)
    gzipped = rates['clean (code)']['peer_rate']
    run |= {'rate': run['corpus_bytes'] / 1e6 / run['seconds'], 'gzip_rate': gzipped}
    commands.table(
      'A corpus that need not fit in memory',
      ('', 'value'),
      [
        ('corpus, MB', run['corpus_bytes'] / 1e6),
        ('documents', run['documents']),
        ('tokens, M', run['tokens'] / 1e6),
        ('seconds', run['seconds']),
        ('MB/s', run['rate']),
        ('ratio to gzip -9', run['rate'] / gzipped),
        ('peak memory, MB', run['peak_bytes'] / 1e6),
        ('peak / corpus', run['peak_bytes'] / run['corpus_bytes']),
      ],
    )
  commands.write_json(arguments.json, 'data', results)


if __name__ == '__main__':
  main()
