"""How is what was changed in a run's directory said to be meant, by a person or by training?"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import files
from training import config as configs
from workdir import seals
from workdir.checkpoint import Checkpoints


def reseal(workdir: str | os.PathLike, log: Callable[[str], Any]) -> None:
  """Makes config.json and seals.OWN, as a person has edited them, those of the run's checkpoints;
  without a config.json, writes it anew from the last one's record.

  Raises FileNotFoundError where neither is there, ValueError for a file that is no config.
  """
  checkpoints = Checkpoints(workdir)
  path = files.place(workdir) / configs.FILE
  if not path.exists():
    kept = seals.last_config(checkpoints)
    if kept is None:
      raise FileNotFoundError(f'{path} does not exist, and no checkpoint there tells what it was')
    configs.save(kept, workdir)
    log(f'{path}: written anew from the last checkpoint')
    return
  values = files.json_object(path.read_bytes(), path)
  values.pop(files.SEAL, None)
  config = configs.of(values, str(path))
  before = seals.last_config(checkpoints)
  configs.save(config, workdir)
  unnamed = seals.bound(seals.run_of({}), path.parent, {})  # of checkpoints of older versions
  for step in checkpoints.steps():
    run = checkpoints.record(step).get('run', unnamed) | seals.own(path.parent)
    checkpoints.amend(step, {'config': configs.to_dict(config), 'run': run})
  changed = configs.changes(before, config).values() if before else ()
  log(f'{path}: sealed, with {len(checkpoints.steps())} checkpoints')
  for line in changed:
    log(f'  {line}')


def bind_import(record: Mapping[str, Any], workdir: pathlib.Path) -> None:
  """Binds the checkpoint of an import to the files that training on with it has: a template of
  another's, or ids behind the tokenizer's own, are no change that nobody meant.

  record: of checkpoint 0.
  """
  run = record.get('run', {})
  if run and run != run | seals.own(workdir):
    Checkpoints(workdir).amend(0, {'run': run | seals.own(workdir)})
