"""Can a run generate while it trains? What asks for it, and what is in its way."""

import os

import jax

import files
from training.config import Config


def check(config: Config, workdir: str | os.PathLike) -> None:
  """Raises NotImplementedError where a run that is to generate cannot, naming what asks for it.

  All of it is known before the data is.
  """
  asks = []
  if config.evaluation.tasks:
    asked = f'evaluation.tasks={",".join(config.evaluation.tasks)}'
    remedy = 'leave evaluation.tasks empty, and ask its checkpoints by evaluate.py'
    if files.remote(workdir):
      raise NotImplementedError(
        f'{asked} with --workdir={workdir}: what is answered is kept in files of a disk; {remedy}, '
        'or give a --workdir on a disk'
      )
    asks.append((asked, remedy))
  if config.train.sample_every:
    remedy = 'leave train.sample_every at 0, and write with generate.py from its checkpoints'
    asks.append((f'train.sample_every={config.train.sample_every}', remedy))
  for asked, remedy in asks:
    _check_generates(config, asked, remedy)


def _check_generates(config: Config, asked: str, remedy: str) -> None:
  if jax.process_count() > 1:
    raise NotImplementedError(
      f'{asked} in {jax.process_count()} processes, each of which holds a part of the texts; '
      f'{remedy}'
    )
  if config.train.offload_parameters:
    raise NotImplementedError(
      f"{asked} with train.offload_parameters, which keeps the weights in the host's memory, where "
      f'nothing generates; {remedy}'
    )
  if not config.model.causal:
    raise NotImplementedError(
      f'{asked} with model.causal=False: an encoder writes no text; {remedy}'
    )
