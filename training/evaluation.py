"""How good is a model now? What its objective says of the validation batches, and what compressors
make of the same documents.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from data.compressors import compression_baselines
from training import state as states
from training.config import Config


def make_evaluate(config: Config, prepared, put):
  """The evaluation: (models, batches to read, 0 for all) -> `validation_loss` and what else the
  objective says. With go_on=True, of the same models as the last call, it reads only the batches
  behind those of that call, and is of all together.

  Of all batches, it also gives what compressors make of the same documents: gzip_bits_per_byte,
  xz_bits_per_byte.
  """
  objective = config.objective
  shapes = []  # of the sums, once a batch has shown them
  rows, sums = iter(()), None  # batches to come, and of those read so far

  @functools.cache
  def baselines():
    documents = iter(prepared.validation_documents())
    first = next(documents, None)
    return {} if first is None else compression_baselines(itertools.chain([first], documents))

  def judged(models, batch):
    return objective.judged(states.applied(config, models), batch)

  @jax.jit
  def eval_step(models, batch, sums):
    return jax.tree.map(jnp.add, sums, judged(models, batch))

  def evaluate(models, batches: int = 0, go_on: bool = False) -> dict[str, float]:
    nonlocal shapes, rows, sums
    if not go_on:
      rows, sums = iter(objective.validation_batches(prepared, config.data, put.rows)), None
    for batch in itertools.islice(rows, batches or None):
      batch = put(batch)
      if sums is None:
        shapes = shapes or jax.eval_shape(judged, models, batch)
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      before, sums = sums, eval_step(models, batch, sums)
      # One batch ahead; with hundreds, XLA's virtual devices on a CPU wait for each other for good.
      jax.block_until_ready(before)
    verdict = objective.verdict({name: float(total) for name, total in sums.items()}, prepared)
    if batches or jax.process_index():
      return verdict
    return verdict | {f'{name}_bits_per_byte': value for name, value in baselines().items()}

  return evaluate
