"""How good is a model now? What its objective says of the validation batches, and what compressors
make of the same documents.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import names
from training import state as states
from training.config import Config

OF_EACH = ('validation_loss', 'validation_accuracy', 'bits_per_byte')  # said of each source, too


def make_evaluate(config: Config, prepared, put, log: Callable[[str], Any] = print):
  """The evaluation: (models, batches to read, 0 for all) -> `validation_loss` and what else the
  objective says. With go_on=True, of the same models as the last call, it reads only the batches
  behind those of that call, and is of all together. Of several sources it reads batches in turn, at
  least one of each, and says the same of each, as `validation_loss/NAME`.

  With go_on=True, which ends a run, it also gives what compressors make of the same documents:
  gzip_bits_per_byte, xz_bits_per_byte. The first process asks them from now on, beside the steps.
  """
  objective = config.objective
  shapes = []  # of the sums, once a batch has shown them
  rows, sums = iter(()), {}  # batches to come, and the sums of those read so far, by source

  first = jax.process_index() == 0
  baselines = names.imported('data.compressors.beside')(prepared, log) if first else dict

  def judged(models, batch):
    return objective.judged(states.applied(config, models), batch)

  @jax.jit
  def eval_step(models, batch, sums):
    return jax.tree.map(jnp.add, sums, judged(models, batch))

  def evaluate(models, batches: int = 0, go_on: bool = False) -> dict[str, float]:
    nonlocal shapes, rows, sums
    if not go_on:
      held_out = objective.validation_batches(prepared, config.data, put.rows)
      held_out = held_out.of(models) if hasattr(held_out, 'of') else held_out
      parts = held_out.parts() if hasattr(held_out, 'parts') else {}
      rows, sums = _in_turn(parts or {'': held_out}), {}
      # The losses of some sources only would be compared with those of all.
      batches = batches and max(batches, len(parts))
    for source, batch in itertools.islice(rows, batches or None):
      batch = put(batch)
      if source not in sums:
        shapes = shapes or jax.eval_shape(judged, models, batch)
        sums[source] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      before = sums[source]
      sums[source] = eval_step(models, batch, before)
      # One batch ahead; with hundreds, XLA's virtual devices on a CPU wait for each other for good.
      jax.block_until_ready(before)
    verdict = verdict_of(objective, prepared, jax.device_get(sums))
    if not go_on:
      return verdict
    return verdict | {f'{name}_bits_per_byte': value for name, value in baselines().items()}

  return evaluate


def _in_turn(parts: Mapping[str, Iterable]) -> Iterator[tuple[str, Any]]:
  """Batches with the names of their sources: of each one, again and again, until none has more, so
  that the first few are of all of them.
  """
  left = {name: iter(part) for name, part in parts.items()}
  while left:
    for name in list(left):
      batch = next(left[name], None)
      if batch is None:
        del left[name]
      else:
        yield name, batch


def verdict_of(objective, prepared, sums: dict[str, Mapping]) -> dict[str, float]:
  """What the objective says of all sources together, and of each where there are several."""
  sums = {source: {name: float(x) for name, x in of.items()} for source, of in sums.items()}
  total = {name: sum(of[name] for of in sums.values()) for name in next(iter(sums.values()))}
  apart = {
    source: {f'{name}/{source}': x for name, x in of.items()}
    for source, of in sums.items()
    if len(sums) > 1
  }
  for of in apart.values():
    total |= of
  verdict = objective.verdict(total, prepared)
  for source, of in apart.items():
    said = objective.verdict(sums[source] | of, prepared)
    verdict |= {f'{name}/{source}': said[name] for name in OF_EACH if name in said}
  return verdict
