"""How does a run begin that nobody has trained? With checkpoint 0, its config, and their seals."""

import os
from collections.abc import Callable
from typing import Any

import files
from training import config as configs
from workdir import seals
from workdir.checkpoint import Checkpoints

TIMEOUT = 24 * 3600  # seconds that it may take to write, whatever the model's size


def write_run(
  directory: str | os.PathLike,
  config: configs.Config,
  state: dict[str, Any],
  log: Callable[[str], Any],
  references: dict[str, dict] | None = None,
) -> None:
  """Writes checkpoint 0 and config.json, sealed with what else of seals.OWN is there already.

  state: {'model': ..} of a whole model, or {'models': {name: ..}}. references: of models that are
    elsewhere (Checkpoints.reference).
  """
  # Small, because a file lies in memory while it is written.
  checkpoints = Checkpoints(directory, log=log, chunk_bytes=2**21, timeout=TIMEOUT)
  checkpoints.save(
    0,
    state,
    data={},
    progress={},
    donated=False,
    references=references,
    config=configs.to_dict(config),
    run=seals.bound(seals.run_of({}), files.place(directory), {}),
  )
  checkpoints.wait()
  configs.save(config, directory)
