"""What does it cost that rows lie in pages? Decoding by a table beside decoding from slots side by
side, of as many rows of the same length.

    python -m benchmarks.pages [--rows=16 --held=400 --chunks=12] [--json FILE]

bench-30M (benchmarks.train_cpu) on a CPU, random weights, greedy. Both engines are in one process
and take turns, chunk by chunk; the medians of their CPU time (on another machine: of time) count.
The ids and log-probabilities of both have to be the same, or it ends with 1.
"""

import argparse
import statistics
import sys
import time

import numpy as np

import commands
from benchmarks import decode

PAGE, CAPACITY = 128, 1024


def engine_of(model, mesh, rows: int, pages: int):
  """An engine whose rows have read nothing so far."""
  from decode.engine import Engine
  from decode.paged import PagedEngine
  from decode.sizes import Sizes

  sizes = Sizes(rows=rows, capacity=CAPACITY, read_tokens=PAGE, steps=8, block=PAGE, pages=pages)
  return (PagedEngine if pages else Engine)(model.config, mesh, sizes)


def read(engine, model, held: int) -> None:
  """All rows have prompts of so many tokens."""
  from decode.sampling import make_sampling
  from decode.sizes import Request

  draw = np.random.default_rng(0)
  for row in range(engine.sizes.rows):
    prompt = draw.integers(3, model.config.V, held).tolist()
    engine.join(row, Request(prompt, CAPACITY - held, make_sampling(1, temperature=0.0)))
  while engine.reading:
    engine.read(model)


def measured(rows: int, held: int, chunks: int) -> dict:
  """Milliseconds a step of slots and of pages, and whether they wrote the same."""
  import jax

  made = decode.generator('bench_30m')
  clock = time.process_time if jax.default_backend() == 'cpu' else time.perf_counter
  whole = rows * CAPACITY // PAGE
  engines = {
    'slots': engine_of(made.model, made.mesh, rows, 0),
    'pages': engine_of(made.model, made.mesh, rows, whole),
  }
  seconds, written = {name: [] for name in engines}, {name: [] for name in engines}
  for engine in engines.values():
    read(engine, made.model, held)
  for _ in range(chunks):
    for name, engine in engines.items():
      began = clock()
      chunk = jax.device_get(engine.decode(made.model, 8))
      seconds[name].append((clock() - began) / 8 * 1e3)
      written[name].append((chunk.ids, chunk.raw))
  found = {name: statistics.median(times[1:]) for name, times in seconds.items()}
  same = all(
    np.array_equal(x, y)
    for of_slots, of_pages in zip(*written.values())
    for x, y in zip(of_slots, of_pages)
  )
  return found | {'ratio': found['pages'] / found['slots'], 'same': same}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rows', type=int, default=16)
  parser.add_argument('--held', type=int, default=400, help='tokens of each prompt')
  parser.add_argument('--chunks', type=int, default=12, help='of 8 tokens')
  parser.add_argument('--json', help='file for the figures')
  arguments = parser.parse_args()
  found = measured(arguments.rows, arguments.held, arguments.chunks)
  print(
    f'{arguments.rows} rows of {arguments.held} tokens: slots {found["slots"]:.2f}, pages '
    f'{found["pages"]:.2f} ms a step, {found["ratio"]:.3f}x; '
    f'{"the same" if found["same"] else "NOT the same"} bytes'
  )
  commands.write_json(arguments.json, 'pages', found)
  sys.exit(not found['same'])


if __name__ == '__main__':
  commands.end(main)
