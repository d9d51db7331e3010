"""How long until something happens? Start to first step, start to first token,
and compile time against depth.

    python -m benchmarks.startup [--json FILE]

Whole processes of train.py and generate.py on configs/tiny.py, timed from outside, data prepared
and compilation cache warm, beside the floor that no program on jax gets under: a process that
imports jax and flax and runs one compiled addition. Then the compile time of a train step with 4
and with 32 layers: the block is scanned, so that it should not grow.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import commands

FLOOR = 'import jax, flax.nnx; print(jax.jit(lambda x: x + 1)(1))'
TINY = ('--config=configs/tiny.py', '--config.train.log_every=1')
REPEATS = 5

COMPILE = """
import sys, time
import jax
from model.params import abstract
from data.batch import Batch
from data.config import DataConfig
from model import params, transformer
from model.config import ModelConfig
from parallel import axes
from parallel.mesh import MeshConfig, make_mesh
from training import config as configs, state as states
from training.optimizer import make_optimizer
from training.step import make_step
model = ModelConfig(vocabulary=512, width=128, layers=int(sys.argv[1]), heads=4, max_length=128)
config = configs.Config(model=model, data=DataConfig(sequence_length=128))
mesh = make_mesh(MeshConfig())
jax.set_mesh(mesh)
specs = params.specs({'policy': jax.eval_shape(lambda: transformer.init(model, 0))})
optimizer = make_optimizer(config.optimizer, 100, specs)
state = abstract(lambda: states.init(config, optimizer), mesh)
rows = jax.NamedSharding(mesh, axes.spec('batch', 'length'))
lowered = make_step(config, optimizer).lower(state, Batch.abstract(8, 128, rows))
began = time.perf_counter()
lowered.compile()
print(time.perf_counter() - began)
"""


def until(command: list[str], sign: str) -> float:
  """Seconds from the start of a process to the first output that contains `sign`, read character
  by character; what it says aside (stderr) is none, and shown where it fails.
  """
  began = time.perf_counter()
  process = subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    stderr=(aside := tempfile.TemporaryFile()),
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  seen = b''
  while sign.encode() not in seen:
    character = process.stdout.read(1)
    if not character:
      aside.seek(0)
      raise RuntimeError(f'{command} ended without {sign!r}:\n{(seen + aside.read()).decode()}')
    seen += character
  took = time.perf_counter() - began
  process.stdout.read()
  if process.wait():
    raise RuntimeError(f'{command} ended with code {process.returncode}')
  return took


def compile_seconds(layers: int) -> float:
  """Seconds that XLA takes for the train step of a small model, in a fresh process,
  without a cache.
  """
  ran = subprocess.run(
    [sys.executable, '-c', COMPILE, str(layers)],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  return float(ran.stdout)


def main():
  options = commands.parser(__doc__).parse_args()
  python, results = sys.executable, {}
  with tempfile.TemporaryDirectory() as directory:
    work = pathlib.Path(directory)
    data = f'--config.data.cache_dir={work / "cache"}'

    def train(name, steps):
      return [
        python,
        'train.py',
        *TINY,
        data,
        f'--workdir={work / name}',
        f'--config.train.steps={steps}',
        '--config.optimizer.warmup_steps=1',
      ]

    generate = [
      python,
      'generate.py',
      f'--workdir={work / "warm"}',
      '--prompt=',
      '--max_new_tokens=1',
      '--temperature=0',
    ]

    # Prepares the data, fills the cache.
    subprocess.run(train('warm', 3), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(generate, check=True, stdout=subprocess.DEVNULL)

    floor, step, token = ([] for _ in range(3))
    for i in range(REPEATS):
      floor.append(until([python, '-c', FLOOR], '2'))
      step.append(until(train(f'run{i}', 3), 'step 1/3'))
      token.append(until(generate, '\n'))
  compiled = {layers: min(compile_seconds(layers) for _ in range(3)) for layers in (4, 32)}

  base = statistics.median(floor)
  rows = [['floor: import jax and flax, add two numbers', base, 1.0]]
  for name, seconds in (
    ('train.py: first completed step', step),
    ('generate.py: first token', token),
  ):
    rows.append([name, statistics.median(seconds), statistics.median(seconds) / base])
  commands.table(
    'From the start of the process, warm compilation cache, configs/tiny.py (medians)',
    ['', 'seconds', 'x floor'],
    rows,
  )
  commands.table(
    'Compiling the train step',
    ['layers', 'seconds', 'x 4 layers'],
    [[str(layers), seconds, seconds / compiled[4]] for layers, seconds in compiled.items()],
  )

  results = {
    'floor_seconds': floor,
    'first_step_seconds': step,
    'first_token_seconds': token,
    'compile_seconds': compiled,
    'compile_ratio': compiled[32] / compiled[4],
  }
  commands.write_json(options.json, 'startup', results)


if __name__ == '__main__':
  main()
