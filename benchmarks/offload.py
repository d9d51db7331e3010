"""What does training hold in memory, and how long is a step, with the optimizer's state on the
device, in the host's memory and on disk?

    python -m benchmarks.offload [--layers 8] [--limit GB] [--json FILE]

A process each, on the CPU, whose devices' memory is the host's: only the disk can spare it any.
Resident is the peak of the process, with compilers and all; with --limit the kernel refuses each
process more data than that (RLIMIT_DATA), and those that need more end.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import commands

PLACES = ('', 'host', 'disk')
CHILD = """
import dataclasses, json, resource, sys, time
import jax, numpy as np
from data.batch import Batch
from data.config import DataConfig
from model import params
from model.config import ModelConfig
from model.execution import ExecutionConfig
from parallel.mesh import make_mesh
from training.config import Config, TrainConfig
from training.program import begin_state, make_program, make_target

place, directory, layers = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = ModelConfig(
  vocabulary=1024,
  width=1024,
  layers=layers,
  heads=8,
  feed_forward=4096,
  max_length=16,
  execution=ExecutionConfig(remat='full'),
)
config = Config(
  model=model,
  data=DataConfig(sequence_length=16, batch_size=1),
  train=TrainConfig(offload_optimizer=place),
)
jax.set_mesh(make_mesh(config.mesh))
make_state, step = make_program(config)
target = make_target(config, make_state, jax.sharding.get_mesh(), directory)
shapes = jax.eval_shape(make_state)
sizes = {
  name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(getattr(shapes, name)))
  for name in ('models', 'optimizer')
}
state = begin_state(config, make_state, target)
draw = np.random.default_rng(0).integers(0, 1024, (2, 1, 16)).astype(np.int32)
batch = Batch(*draw, np.arange(16, dtype=np.int32)[None], np.ones_like(draw[0]),
              np.ones((1, 16), np.float32))
seconds = []
for _ in range(4):
  began = time.perf_counter()
  state, metrics, _ = step(state, batch)
  jax.block_until_ready((state.models['policy'], metrics))
  seconds.append(time.perf_counter() - began)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({'peak': peak, 'seconds': min(seconds), 'loss': float(metrics['loss']), **sizes}))
"""


def measure(place: str, layers: int, limit: float = 0) -> dict | None:
  """Peak resident bytes of a process, seconds of its shortest step, bytes of parameters and
  optimizer state, loss of the last step.

  limit: GB of data that it may have, 0 for all; None where it ran out of them.
  """
  allowed = int(limit * 1e9) or resource.RLIM_INFINITY
  with tempfile.TemporaryDirectory() as directory:
    done = subprocess.run(
      [sys.executable, '-c', CHILD, place, directory, str(layers)],
      capture_output=True,
      text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed)),
    )
  if done.returncode:
    if limit and any(
      sign in done.stderr
      for sign in ('RESOURCE_EXHAUSTED', 'bad_alloc', 'MemoryError', 'Out of memory')
    ):
      return None
    raise RuntimeError(
      f'offload_optimizer={place!r} ended with {done.returncode}:\n{done.stderr[-2000:]}'
    )
  return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> dict:
  """The command; returns place -> what `measure` gives."""
  parser = commands.parser(__doc__.splitlines()[0])
  parser.add_argument('--layers', type=int, default=8, help='of 16.8 million parameters each')
  parser.add_argument(
    '--limit', type=float, default=0, metavar='GB', help='of data of each process'
  )
  options = parser.parse_args(arguments)
  measured = {place or 'device': measure(place, options.layers, options.limit) for place in PLACES}
  rows = [
    [place, *(m[key] / 1e9 for key in ('models', 'optimizer', 'peak')), m['seconds'], m['loss']]
    if m
    else [place, '', '', 'out of memory', '', '']
    for place, m in measured.items()
  ]
  commands.table(
    'GB, and seconds of a step',
    ['state in', 'parameters', 'optimizer state', 'peak resident', 'seconds', 'loss'],
    rows,
  )
  commands.write_json(options.json, 'offload', measured)
  return measured


if __name__ == '__main__':
  main()
