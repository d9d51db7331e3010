"""Does a server give the same bytes on this machine, whatever else it does?

    python -m benchmarks.same_bytes --workdir=runs/tiny [--mesh=tensor=2 --weights=int8 --calls=24
                                   --pages=40 --host_pages=40]

The promise of `serving/` is held by tests on CPUs. Of a TPU, a GPU and their compilers it is to be
seen: calls of random ids, whose prompts begin alike or not, are answered one by one with nothing
read before; again, with the beginnings of their prompts there; and among all others at once, in
several orders, while more come and are cancelled. Ids and log-probabilities of every token must be
those of the first time, bit for bit. Ends with 1 where one is not.
"""

import argparse
import collections
import dataclasses
import sys
import time

import numpy as np

import commands
from decode.generator import Generator
from decode.options import Options
from parallel.flag import mesh_of
from serving.call import Call
from serving.rows import BLOCK
from serving.running import Running

ORDERS = 4
LAWS = (
  dict(temperature=0.0),
  dict(temperature=1.0),
  dict(temperature=0.8, top_p=0.9, top_k=40),
  dict(temperature=1.0, repetition_penalty=1.2, min_p=0.02),
)


def calls(count: int, vocabulary: int, capacity: int, new: int, seed: int = 0) -> list[Call]:
  """So many, of prompts that have 0 to 3 blocks in common with others, and more behind them."""
  draw, room = np.random.default_rng(seed), capacity - new
  common = draw.integers(vocabulary, size=3 * BLOCK + 1)
  made = []
  for i in range(count):
    shared = common[: BLOCK * int(draw.integers(4)) + int(draw.integers(2))]
    own = draw.integers(vocabulary, size=int(draw.integers(1, min(2 * BLOCK, room))))
    prompt = np.concatenate([shared[: room - len(own)], own]).tolist()
    options = Options(max_new_tokens=new, seed=i, **LAWS[i % len(LAWS)])
    made.append(Call(prompt=prompt, options=options, ignore_end=True))
  return made


def answer(ticket) -> tuple[list[int], list[float]]:
  """Ids, and the log-probability of each. Raises RuntimeError for a call that has failed."""
  ids, logprobs = [], []
  for event in ticket:
    if event.error is not None:
      raise RuntimeError(event.error.message)
    ids += event.ids
    logprobs += event.logprobs
  return ids, logprobs


def check(served: Running, asked: list[Call], seed: int = 0) -> dict[str, list[int]]:
  """What differs from the first time, by when: numbers of calls."""
  expected = [answer(served.submit(_apart(call, i))) for i, call in enumerate(asked)]
  differing = collections.defaultdict(list)
  for i, call in enumerate(asked):
    if answer(served.submit(_apart(call, i))) != expected[i]:
      differing['read before'].append(i)

  draw = np.random.default_rng(seed)
  for number in range(ORDERS):
    when = f'among others, order {number + 1}'
    differing[when] = []
    gone = []
    tickets = {}
    for i in draw.permutation(len(asked)).tolist():
      tickets[i] = served.submit(asked[i])
      if draw.random() < 0.3:
        gone.append(served.submit(asked[int(draw.integers(len(asked)))]))
    for i, ticket in tickets.items():
      if answer(ticket) != expected[i]:
        differing[when].append(i)
      if gone:
        gone.pop().cancel()
  return {'read before': [], **differing}


def _apart(call: Call, number: int) -> Call:
  """The same, of whose prompt nobody else has read anything."""
  return dataclasses.replace(call, salt=str(number))


def measured(arguments: argparse.Namespace) -> dict:
  """Opens, serves, and checks."""
  model = Generator.load(arguments.workdir, mesh=mesh_of(arguments.mesh), weights=arguments.weights)
  capacity = min(model.context, 5 * BLOCK + arguments.new)
  pages = dict(pages=arguments.pages, host_pages=arguments.host_pages)
  served = Running(model, rows=arguments.rows * model.parts, capacity=capacity, **pages)
  if not served.ready():
    raise ValueError(f'the server is {served.state}: {served.error}')
  new = min(arguments.new, capacity // 2)
  asked = calls(arguments.calls, model.vocabulary, capacity, new)
  began = time.perf_counter()
  differing = check(served, asked)
  stats = served.stats()
  served.close()
  return {
    'differing': differing,
    'calls': len(asked),
    'tokens': stats.generated_tokens,
    'prefix_hits': stats.prefix_hits,
    'prefix_queries': stats.prefix_queries,
    'seconds': time.perf_counter() - began,
  }


def main():
  parser = commands.parser(__doc__)
  parser.add_argument('--workdir', required=True, help='of a run')
  parser.add_argument('--mesh', default='data=1', help='as of generate.py')
  parser.add_argument('--weights', default='', help='as of generate.py')
  parser.add_argument('--rows', type=int, default=8, help='on each part of the mesh')
  parser.add_argument('--pages', type=int, default=0, help='as of serve.py')
  parser.add_argument('--host_pages', type=int, default=0, help='as of serve.py')
  parser.add_argument('--calls', type=int, default=24)
  parser.add_argument('--new', type=int, default=48, help='tokens of each answer')
  arguments = parser.parse_args()
  with commands.mendable():
    results = measured(arguments)

  rows = [
    [when, results['calls'], len(differing), ', '.join(map(str, differing[:8])) or '-']
    for when, differing in results['differing'].items()
  ]
  commands.table('Bytes of the first time', ('', 'calls', 'other bytes', 'which'), rows)
  print(
    f'{results["tokens"]:,} tokens in {results["seconds"]:.0f} s; '
    f'{results["prefix_hits"]:,} of {results["prefix_queries"]:,} of prompts were read before'
  )
  commands.write_json(arguments.json, 'same_bytes', results)
  sys.exit(any(results['differing'].values()))


if __name__ == '__main__':
  main()
