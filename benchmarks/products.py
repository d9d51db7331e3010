"""How fast does one CPU multiply few tokens by a matrix, by how it lies and which side goes first?

    python -m benchmarks.products [--json FILE]
    python -m benchmarks.products --steps [--json FILE]
    python -m benchmarks.products --large [--json FILE]

Products in f32 of matrices that pass no cache together, in turns: with the inputs in front, as
training holds them (`x @ w`), with the outputs in front (`x @ w.T`), and these first, as generation
holds them (parallel.one_cpu.of_rows); torch's beside them, if it is there. `--steps` has a step of
generation instead, of bench-30M (benchmarks.train_cpu), with matrices as generation holds them and
as training does; both have to write the same ids, or it ends with 1. `--large` has the products of
many tokens that a training step has, `x @ w` and both gradients, in GFLOP/s, by XLA as it comes, by
XLA with oneDNN, and by torch. Medians.
"""

import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

import commands

SHAPES = ((512, 512), (512, 2048), (2048, 512), (512, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
BYTES = 64_000_000  # of all matrices of a shape
ROWS = (1, 2, 4, 8, 16, 32)
PROMPT, CHUNKS, CHUNK = 64, 8, 16
OURS = 'rows first'
LARGE, LARGE_TOKENS = ((512, 1408), (1408, 512), (512, 8192)), 4096  # of bench-30M's step
# Of x [tokens, K], w [K, N] and dy [tokens, N]: which two, and how they are multiplied.
TRAINED = {
  'x w': ('x', 'w', lambda x, w: x @ w),
  'dy w.T': ('dy', 'w', lambda dy, w: dy @ w.T),
  'x.T dy': ('x', 'dy', lambda x, dy: x.T @ dy),
}
LIBRARIES = {'XLA': {}, 'XLA, oneDNN': {'xla_cpu_use_onednn': True}}


def in_turns(
  runs: Mapping[str, Callable], times: int, clock: Callable = time.perf_counter
) -> dict[str, float]:
  """The median milliseconds of each, after one that is not counted."""
  taken = {name: [] for name in runs}
  for _ in range(times + 1):
    for name, run in runs.items():
      began = clock()
      run()
      taken[name].append((clock() - began) * 1e3)
  return {name: statistics.median(each[1:]) for name, each in taken.items()}


def products(K: int, N: int, tokens: int) -> dict[str, float]:
  """Milliseconds of the products of so many tokens [tokens, K] with all matrices [K, N]."""
  from parallel.one_cpu import of_rows

  draw, count = np.random.default_rng(0), max(4, BYTES // (4 * K * N))
  numbers = [draw.standard_normal((K, N), np.float32) for _ in range(count)]
  x = draw.standard_normal((tokens, K), np.float32)
  forms = {
    'inputs in front': (lambda x, w: x @ w, numbers),
    'outputs in front': (lambda x, w: x @ w.T, [w.T.copy() for w in numbers]),
    OURS: (of_rows, [w.T.copy() for w in numbers]),
  }
  runs = {}
  for name, (form, matrices) in forms.items():
    of_all = jax.jit(lambda x, matrices, form=form: [form(x, w) for w in matrices])
    given = jnp.asarray(x), [*map(jnp.asarray, matrices)]
    runs[name] = lambda of_all=of_all, given=given: jax.block_until_ready(of_all(*given))
  if importlib.util.find_spec('torch'):
    import torch

    theirs = torch.from_numpy(x), [*map(torch.from_numpy, numbers)]
    runs['torch'] = lambda: [theirs[0] @ w for w in theirs[1]]
  return in_turns(runs, 15)


def large(K: int, N: int, tokens: int) -> dict[str, dict[str, float]]:
  """GFLOP/s of each product that training has of a matrix [K, N], by library."""
  draw = np.random.default_rng(0)
  shapes = {'x': (tokens, K), 'w': (K, N), 'dy': (tokens, N)}
  numbers = {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
  of_torch = importlib.util.find_spec('torch') and importlib.import_module('torch').from_numpy
  made = {}
  for name, (left, right, form) in TRAINED.items():
    given = numbers[left], numbers[right]
    runs = {}
    for library, options in LIBRARIES.items():
      compiled = jax.jit(form, compiler_options=options)
      arrays = [*map(jnp.asarray, given)]
      runs[library] = lambda f=compiled, arrays=arrays: jax.block_until_ready(f(*arrays))
    if of_torch:
      tensors = [*map(of_torch, given)]
      runs['torch'] = lambda form=form, tensors=tensors: form(*tensors)
    taken = in_turns(runs, 9)
    made[name] = {of: 2 * tokens * K * N / (1e6 * each) for of, each in taken.items()}
  return made


def steps(rows: int) -> tuple[dict[str, float], bool]:
  """Milliseconds of processor time of a step of so many rows, and whether both wrote the same."""
  from benchmarks import decode
  from decode.engine import Engine
  from decode.sampling import make_sampling
  from decode.sizes import Request, Sizes
  from model import params
  from model.weights.turned import Turned

  def as_trained(p):
    value = p.get_value()
    return p.replace(value.numbers('float32')) if isinstance(value, Turned) else p

  made = decode.generator('bench_30m')
  models = {OURS: made.model}
  models['as trained'] = jax.tree.map(as_trained, made.model, is_leaf=params.is_param)
  room = PROMPT + (CHUNKS + 2) * CHUNK
  sizes = Sizes(rows=rows, capacity=room, read_tokens=PROMPT, steps=CHUNK)
  engines, ids = {}, {name: [] for name in models}
  for name, model in models.items():
    engine = engines[name] = Engine(model.config, made.mesh, sizes)
    draw = np.random.default_rng(0)
    for row in range(rows):
      prompt = draw.integers(3, model.config.V, PROMPT).tolist()
      engine.join(row, Request(prompt, room - PROMPT, make_sampling(1, temperature=0.0)))
    while engine.reading:
      engine.read(model)

  def written(name):
    ids[name].append(jax.device_get(engines[name].decode(models[name], CHUNK)).ids)

  runs = {name: lambda name=name: written(name) for name in models}
  taken = in_turns(runs, CHUNKS, time.process_time)
  same = np.array_equal(*(np.concatenate(each, 1) for each in ids.values()))
  return {name: each / CHUNK for name, each in taken.items()}, same


def main() -> None:
  arguments = commands.parser(__doc__)
  arguments.add_argument('--steps', action='store_true', help='of generation, instead of products')
  arguments.add_argument(
    '--large', action='store_true', help='of many tokens, as training has them'
  )
  options = arguments.parse_args()
  if options.large:
    found = {f'{K} x {N}': large(K, N, LARGE_TOKENS) for K, N in LARGE}
    for shape, made in found.items():
      table = [[name, *rates.values()] for name, rates in made.items()]
      headers = ['product', *next(iter(made.values()))]
      commands.table(f'{LARGE_TOKENS} tokens, {shape}, f32: GFLOP/s', headers, table)
    commands.write_json(options.json, 'products', {'large': found})
    return
  if options.steps:
    made = {rows: steps(rows) for rows in ROWS}
    table = [[rows, *of.values()] for rows, (of, _) in made.items()]
    headers = ['rows', *next(iter(made.values()))[0]]
    commands.table('bench-30M, f32: ms of processor time a step', headers, table)
    commands.write_json(options.json, 'products', {'steps': {n: of for n, (of, _) in made.items()}})
    sys.exit(not all(same for _, same in made.values()))

  results = {}
  for K, N in SHAPES:
    results[f'{K} x {N}'] = of_shape = {tokens: products(K, N, tokens) for tokens in TOKENS}
    table = [[tokens, *of.values()] for tokens, of in of_shape.items()]
    headers = ['tokens', *next(iter(of_shape.values()))]
    commands.table(f'matrices of {K} x {N}, f32, {BYTES / 1e6:.0f} MB: ms', headers, table)
  commands.write_json(options.json, 'products', results)


if __name__ == '__main__':
  commands.end(main)
