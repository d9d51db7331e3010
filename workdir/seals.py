"""Is what lies in a run's directory of the same run as its checkpoints?

A checkpoint's record binds the rest: with which config it was trained (`config`), and under `run`
which run that was, digests of its tokenizer and of where it ends texts, and how far metrics.jsonl
was written. Records of older versions lack some of this, and what they lack is not looked at.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import files
import names
from data import tokenizers
from data.generation import GENERATION
from data.tokenizer import Tokenizer
from training import config as configs
from training.config import Config
from workdir import metrics
from workdir.checkpoint import Checkpoints

TOKENIZER = 'tokenizer'
FACTS = 'run.json'  # what a report needs besides config and metrics
ORIGIN = 'origin.json'  # of an imported model, see model.families.origin
INHERITED = (GENERATION, ORIGIN)  # by runs that begin with this one's model
OWN = (TOKENIZER, *INHERITED)  # what else of a directory is read back
SEAL = 'python convert.py seal --workdir'


def run_of(record: Mapping[str, Any]) -> str:
  """The name of the run that a record is of, or a new one where it has none."""
  return record.get('run', {}).get('id') or uuid.uuid4().hex


def bound(run: str, workdir: pathlib.Path, mark: Mapping[str, Any]) -> dict:
  """What a record holds under `run`; mark: see workdir.watch.Watch.mark."""
  return {'id': run, 'metrics': dict(mark), **own(workdir)}


def begun(workdir: str | os.PathLike) -> Config | None:
  """The config that a directory's last checkpoint was trained with, or, where no record tells,
  config.json; None in a directory without either.

  Raises ValueError for a config.json that is not one.
  """
  kept = last_config(Checkpoints(workdir))
  if kept is not None:
    return kept
  return configs.load(workdir) if (files.place(workdir) / configs.FILE).exists() else None


def sized(config: Config, workdir: str | os.PathLike) -> Config:
  """The config with the sizes that it leaves open as the run in the directory had them."""
  kept = begun(workdir)
  if kept is None:
    return config
  before = kept.model
  return dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model,
      vocabulary=config.model.vocabulary or before.vocabulary,
      max_length=config.model.max_length or before.max_length,
    ),
  )


def check_unchanged(config: Config, workdir: str | os.PathLike, allow_change: bool = False) -> None:
  """Raises ValueError where the directory was begun with another model or data order, unless that
  is allowed.
  """
  before = begun(workdir)
  lines = configs.differences(before, config) if before else []
  if lines and not allow_change:
    raise ValueError(
      f'{workdir} was begun with another model or data order:\n  '
      + '\n  '.join(lines)
      + '\nUse another --workdir, or --allow_config_change to go on all the same.'
    )


def check_tokenizer(record: Mapping[str, Any], workdir: pathlib.Path, tokenizer: Tokenizer) -> None:
  """Raises ValueError where a run would go on with other tokens than those of its checkpoint."""
  digest = record.get('run', {}).get('tokenizer')
  with tempfile.TemporaryDirectory() as directory:
    tokenizer.save(directory)
    now = _digest(pathlib.Path(directory))
  if digest and now != digest:
    raise ValueError(
      f'the tokenizer of the data (digest {now[:12]}) is not the one that checkpoint '
      f'{record["step"]} in {workdir} was trained with ({digest[:12]}); prepare the data with that '
      'one, data.tokenizer.path, or begin another run'
    )


def check_inherited(init: str, tokenizer: Tokenizer) -> None:
  """Raises ValueError where a model would be tuned on other ids than the run at `init` knows; where
  that run is gone, nothing is known.
  """
  place = files.place(init) / TOKENIZER
  if not place.is_dir():
    return
  base = tokenizers.load(place)
  if not names.imported('data.extra.same_ids')(base, tokenizer):
    raise ValueError(
      f'the tokenizer of the data ({tokenizer.kind}, {tokenizer.vocabulary:,} ids) is not that of '
      f'config.init={init} ({base.kind}, {base.vocabulary:,} ids), whose model knows its own ids '
      'only; leave data.tokenizer out'
    )


def keep_tokenizer(tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
  """Makes a tokenizer the run's own, with no file of one that was there before."""
  where = workdir / TOKENIZER
  with tempfile.TemporaryDirectory() as directory:
    tokenizer.save(directory)
    if _digest(where) == _digest(pathlib.Path(directory)):
      return
  # The one that is there may be the only copy, which the new one was read from.
  files.replace_directory(where, tokenizer.save)


def metrics_problem(record: Mapping[str, Any], workdir: pathlib.Path) -> str:
  """What is wrong with metrics.jsonl by a checkpoint's record; or ''."""
  mark = record.get('run', {}).get('metrics')
  return metrics.problem(workdir / metrics.FILE, mark) if mark else ''


def settle_metrics(
  record: Mapping[str, Any], workdir: pathlib.Path, log: Callable[[str], Any]
) -> None:
  """Sees to it that metrics.jsonl holds what it held when a checkpoint was written, or begins
  another one from the checkpoint's totals, and says so. Raises ValueError for a line behind that
  which is none, naming it.
  """
  problem = metrics_problem(record, workdir)
  if problem:
    totals = record['run']['metrics']['totals']
    aside = metrics.begin_anew(workdir / metrics.FILE, record['step'], totals)
    log(
      f'WARNING: {problem}'
      + (f'; it is now {aside}' if aside else '')
      + f'. The curve begins at step {record["step"]}; tokens and hours count from its checkpoint'
    )
  # What was written behind the checkpoint is dropped by its steps, line by line.
  metrics.read_metrics(workdir / metrics.FILE)


def last_config(checkpoints: Checkpoints) -> Config | None:
  """Of the last record that can be read, where it has one."""
  for step in reversed(checkpoints.steps()):
    try:
      record = checkpoints.record(step)
    except ValueError:
      continue  # Checkpoints.latest reports it
    if 'config' in record:
      return configs.of(record['config'], f'checkpoint {step} in {checkpoints.directory}')
  return None


def own(workdir: pathlib.Path) -> dict[str, str]:
  return {name: _digest(workdir / name) for name in OWN}


def _digest(place: pathlib.Path) -> str:
  """Of a file, or of the files in a directory, hex; '' where there is none."""
  paths = [place] if place.is_file() else [path for path in place.rglob('*') if path.is_file()]
  if not paths:
    return ''
  total = hashlib.sha256()
  for path in sorted(paths):
    name = str(path.relative_to(place))
    total.update(json.dumps([name, path.stat().st_size]).encode() + path.read_bytes())
  return total.hexdigest()
