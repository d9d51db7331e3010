"""Prepares a config's corpus by many workers, here or on a Ray cluster, before a run reads it:

  python -m data.prepare --config=NAME --engine=local [--workers=8] [--config.data...]
  python -m data.prepare --config=NAME --engine=ray [--ray_address=auto]

train.py with the same --config finds what it wrote: the bytes are those that train.py would write.
"""

import functools

from absl import app, flags

import commands
import files
import names
from data import corpus
from data.engine import LocalEngine, TaskEngine
from data.prepare import prepare
from data.processes import cpus
from training import overrides

ENGINES = 'local', 'ray'

CONFIG = overrides.define_flag()
ENGINE = flags.DEFINE_enum(
  'engine', ENGINES[0], ENGINES, 'Who does the work: processes of this machine, or a Ray cluster.'
)
WORKERS = flags.DEFINE_integer(
  'workers', 0, 'How many at once; 0: one for each CPU, of this machine or of the cluster.', 0
)
RAY_ADDRESS = flags.DEFINE_string(
  'ray_address', '', "Of the cluster: auto, HOST:PORT or ray://HOST:PORT; '' begins one here."
)


def engine_of(kind: str, workers: int, ray_address: str) -> TaskEngine:
  """Raises ValueError for flags that do not go together, and where there is no Ray."""
  here = workers or cpus()
  if kind == 'local':
    if ray_address:
      raise ValueError(f'--ray_address={ray_address} is of --engine=ray; set that, or leave it out')
    return LocalEngine(here)
  return names.imported('data.on_ray.RayEngine')(ray_address, workers if ray_address else here)


def run(arguments) -> None:
  """The command."""
  names.only_flags(arguments, '--engine=local')
  if CONFIG.value is None:
    raise app.UsageError('give --config=NAME, as to train.py')
  with commands.mendable():
    config = overrides.from_flag(CONFIG.value)
    records = [source for source in config.data.sources if source.format]
    if config.objective.of_records or records:
      raise ValueError(
        f'objective.kind={config.objective.kind!r} reads records, which are few: train.py prepares '
        'them by itself; this is for documents (objective.kind=next_token, denoise)'
      )
    if ENGINE.value == 'ray' and RAY_ADDRESS.value and files.remote(config.data.cache_dir):
      raise ValueError(
        f'data.cache_dir={config.data.cache_dir} is a bucket, of which each machine has a copy of '
        'its own: give a directory that all machines share, and copy the corpus from there'
      )
    engine = engine_of(ENGINE.value, WORKERS.value, RAY_ADDRESS.value)
    log = functools.partial(print, flush=True)
    try:
      prepare(config.data, log, functools.partial(corpus.build, engine=engine))
    finally:
      engine.close()


def main() -> None:
  commands.end(lambda: app.run(run, flags_parser=overrides.parsed))
