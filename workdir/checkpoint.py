"""What survives a crash? Checkpoints that are complete and unharmed, or are not used.

    checkpoints/00000100/       arrays of the train state, written by orbax in the background; below
                                spilled/ those that lie on disk (training.disk), copied from there a
                                few layers at a time while the run waits
    checkpoints/00000100.json   the record: written last, so that without it the directory does not
                                count; holds the loader's state, its cost (see `best`), size and
                                digest of every file, and its own digest

A kill while saving leaves a directory without a record; a truncated or changed file no longer
matches its digest.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

import commands
import files
import names
from model.params import named_leaves
from objectives.objective import MAIN
from parallel import hosts
from training import disk
from training.trainable import divided, joined
from workdir.metrics import lowest
from workdir.progress import LOSS

SPILLED = 'spilled'
ORBAX = '_METADATA'  # in a checkpoint that orbax wrote
SAVE_TIMEOUT = 3600  # seconds
# A checkpoint, what it has on disk until orbax has made its directory, and orbax's own.
WRITTEN = re.compile(r'\d{8,}(\.spilled|\.orbax-checkpoint-tmp.*)?')


class Checkpoints:
  """The checkpoints of one run: the last `keep_last` and the one with the lowest validation loss.

  Args:
    directory: of the run; checkpoints/ is made below it.
    log: receives a line for everything that a reader of the run should know.
    chunk_bytes: size of a file of a checkpoint, at most; larger ones are written faster and take
      more host memory.
    timeout: seconds that a save may take, from its beginning to its record.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    keep_last: int = 2,
    log: Callable[[str], Any] = print,
    chunk_bytes: int = 2**26,
    timeout: float = SAVE_TIMEOUT,
  ):
    self.directory = files.place(directory).absolute() / 'checkpoints'
    self._keep_last, self._log, self._chunk_bytes = keep_last, log, chunk_bytes
    self._timeout = timeout
    self._writer = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._writing: concurrent.futures.Future | None = None
    self._saving, self._deadline = 0, 0.0  # the step that is being written, and until when
    self._orbax = None

  def save(
    self,
    step: int,
    state,
    data: dict,
    progress: dict,
    cost: float | None = None,
    donated: bool = True,
    references: dict | None = None,
    config: dict | None = None,
    run: dict | None = None,
  ) -> None:
    """Starts writing; returns once the state may be donated. Waits for the save before it, and
    raises what that raised; raises as `wait`.

    data, progress: JSON-able; of the data loader, and of what the run has achieved. cost: what the
      best checkpoint has the lowest of; None where it was not judged. donated: False promises that
      the state stays as it is until `wait`, which saves a copy. references: of models whose frozen
      parameters are not in `state`, where these are (workdir/frozen.py). config: what the state was
      trained with, JSON-able. run: what else of the directory it belongs to (workdir/seals.py),
      JSON-able.
    """
    self.wait()
    if self._orbax is None:
      kind = 'arrays.BucketWriter' if files.remote(self.directory) else 'writer.Writer'
      self._orbax = names.imported(f'workdir.{kind}')(self._chunk_bytes)
    leaves = named_leaves(state)
    shapes = {name: [list(x.shape), str(x.dtype)] for name, x in leaves.items()}
    spilled = {name: x for name, x in leaves.items() if isinstance(x, disk.OnDisk)}
    leaves = {name: x for name, x in leaves.items() if name not in spilled}
    if donated and jax.default_backend() == 'cpu':
      # A host copy of a CPU array is a view of it; what is written must not hang on donation
      # sparing viewed buffers.
      leaves = {name: jnp.copy(x) for name, x in leaves.items()}
    record = {
      'step': step,
      'cost': cost,
      'data': data,
      'progress': progress,
      'leaves': shapes,
      'spilled': {name: x.parts for name, x in spilled.items()},
      'references': references or {},
    }
    record |= {name: x for name, x in (('config', config), ('run', run)) if x is not None}
    # All that touches the disk is the writer's: here, nobody could give up waiting for it.
    self._saving, self._deadline = step, time.monotonic() + self._timeout
    self._writing = self._writer.submit(self._begin, step, leaves, spilled)
    self.wait()
    self._writing = self._writer.submit(self._commit, step, record)

  def wait(self) -> None:
    """Returns when nothing is being written. Raises what the last save raised, and TimeoutError
    when it has taken too long: then, it is still being waited for.
    """
    if self._writing is None:
      return
    left = max(self._deadline - time.monotonic(), 0)
    if concurrent.futures.wait([self._writing], left).not_done:
      raise commands.unanswered(
        f'checkpoint {self._saving} in {self.directory} is not written after {self._timeout:,} s: '
        'does its disk answer? What was saved before is whole. Mend the disk and run the same '
        'command again, or, where it is only slow, raise train.save_timeout'
      )
    writing, self._writing = self._writing, None
    writing.result()

  def steps(self) -> list[int]:
    """Steps with a record, ascending; says nothing of their files."""
    names_ = [path.stem for path in self.directory.glob('*.json') if path.stem.isdecimal()]
    return sorted(int(name) for name in names_ if name == self._path(int(name)).name)

  def record(self, step: int | None) -> dict:
    """What the record of `step` holds.

    Raises ValueError where it cannot be read, FileNotFoundError for None: there is no checkpoint.
    """
    if step is None:
      raise FileNotFoundError(
        f'{self.directory} holds no checkpoint; train with train.py '
        f'--workdir={self.directory.parent} first'
      )
    path = self._path(step).with_suffix('.json')
    try:
      sealed = json.loads(path.read_text())
      record = sealed['record']
      if _seal(record) != sealed:
        raise ValueError('it was changed since it was written')
      if record['step'] != step:
        raise ValueError(f'it is of step {record["step"]}, under another name')
      return record
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError) as error:
      # Where a disk or a bucket does not answer nothing is known, and no checkpoint is given up.
      raise ValueError(f'{path} is damaged: {error}') from error

  def amend(self, step: int, values: dict) -> None:
    """Puts other values into the record of `step`. It stays what others refer to, but where its
    model computes something else now: its arrays are what they were. Raises as `record`.
    """
    before = self.record(step)
    same = _network(before | values) == _network(before)
    known_by = self.reference(step)['digest'] if same else ''
    self._write_record(step, before | values | {'known_by': known_by})

  def best(self, among: Iterable[int] | None = None) -> int | None:
    """The step with the lowest cost (of all, or of those given), which is the validation loss, or
    what train.best named when the last of them was saved; None where none was judged by that, or
    none to a finite cost.
    """
    costs, of = {}, None
    for step in sorted(self.steps() if among is None else among, reverse=True):
      try:
        record = self.record(step)
      except ValueError:
        continue  # restore() reports it
      of = of or _cost_of(record)
      cost = record.get('cost', record.get('validation_loss'))
      if cost is not None and of == _cost_of(record):
        costs[step] = cost
    return lowest(dict(sorted(costs.items())))

  def problems(self, step: int) -> list[str]:
    """What is wrong with a checkpoint: files that are missing, truncated or changed since they were
    written.
    """
    try:
      record = self.record(step)
    except ValueError as error:
      return [str(error)]
    if files.remote(self.directory):
      return names.imported('workdir.arrays.problems')(self._path(step), record['files'])
    found = []
    for name, (size, digest) in record['files'].items():
      path = self._path(step) / name
      if not path.exists():
        found.append(f'{path} is missing')
      elif path.stat().st_size != size:
        found.append(f'{path} has {path.stat().st_size} bytes, {size} were written')
      elif _digest(path, digest.partition(':')[0]) != digest.rpartition(':')[2]:
        found.append(f'{path} was changed: its digest is not the one recorded')
    return found

  def latest(self) -> int | None:
    """The last step whose checkpoint is whole, None if there never was one. Damaged ones are named
    in the log.

    With several processes, the first one looks, for all. Raises ValueError when there are
    checkpoints and all are damaged: starting over must be asked for.
    """
    return hosts.from_first(self._latest)

  def _latest(self) -> int | None:
    for left in self._unfinished():
      self._log(
        f'WARNING: {left} has no record: it is being written, or its writer was killed; it will '
        'not be used'
      )
    steps = self.steps()
    for step in reversed(steps):
      problems = self.problems(step)
      if not problems:
        self._check_one_run()
        return step
      self._log(
        f'WARNING: checkpoint {step} is damaged and will not be used: ' + '; '.join(problems)
      )
    if steps:
      raise ValueError(
        f'all checkpoints in {self.directory} are damaged: {steps}; remove that directory to '
        'start over'
      )
    return None

  def _check_one_run(self) -> None:
    """Raises ValueError where checkpoints of several runs lie beside each other."""
    runs: dict[str, list[int]] = {}
    for step in self.steps():
      with contextlib.suppress(ValueError):  # `problems` tells of it
        run = self.record(step).get('run', {}).get('id')
        runs.setdefault(run, []).append(step)
    runs.pop(None, None)  # of older versions, and of an import
    if len(runs) > 1:
      of = ', '.join(f'{steps} of run {run[:8]}' for run, steps in runs.items())
      raise ValueError(
        f'{self.directory} holds checkpoints of different runs: {of}; move away those that are not '
        'of this one, directory and record'
      )

  def restore(self, step: int | None, target, only: str = '', some: bool = False):
    """The state of `step` in the shape of `target`, an abstract tree with shardings (see
    `abstract`).

    only: 'models.policy', as an example, restores that model alone; `target` is then the abstract
      model.
    some: whether the checkpoint may have more than `target` asks for.
    Raises as `record`, and ValueError that lists what is missing, left over or of another shape or
    type.
    """
    saved = {
      name: (tuple(shape), dtype) for name, (shape, dtype) in self.record(step)['leaves'].items()
    }
    wanted, spilled = named_leaves(target, only), self.record(step).get('spilled', {})
    if isinstance(spilled, list):  # of older versions, a file of each
      spilled = dict.fromkeys(spilled)
    if not any(name.startswith('models.') for name in saved):
      former = names.imported('workdir.former.name')
      wanted, only = {former(name): x for name, x in wanted.items()}, former(only)
    scope = {name: leaf for name, leaf in saved.items() if not only or name.startswith(only + '.')}
    # What was kept narrow is read so, and widened.
    asked = dict(wanted)
    wanted |= names.imported('workdir.former.narrow')(wanted, scope)
    wrong = [f'{name}: not in the checkpoint' for name in wanted if name not in scope]
    wrong += [
      f'{name}: in the checkpoint only' for name in scope if name not in wanted and not some
    ]
    wrong += [
      f'{name}: {scope[name]} in the checkpoint, {(x.shape, str(x.dtype))} in the model'
      for name, x in wanted.items()
      if name in scope and scope[name] != (tuple(x.shape), str(x.dtype))
    ]
    if wrong:
      raise ValueError(
        f'checkpoint {step} in {self.directory} does not fit the config:\n  ' + '\n  '.join(wrong)
      )
    path, leaves = self._path(step), {}
    for name in spilled.keys() & wanted:
      where, x = path / SPILLED / name, wanted[name]
      if isinstance(x, disk.OnDisk):
        leaves[name] = x.load(where, spilled[name])
      else:
        leaves[name] = _as_asked(disk.stored(where, x, spilled[name]), asked[name])
    # What goes to disk is read one by one, the rest together.
    rest = {name: x for name, x in wanted.items() if name not in spilled}
    alone = [name for name in rest if isinstance(asked[name], disk.OnDisk)]
    together = {name: x for name, x in rest.items() if name not in alone}
    kind = 'writer' if (path / ORBAX).exists() and not files.remote(path) else 'arrays'
    read = names.imported(f'workdir.{kind}.read')
    there = [name for name in saved if name not in spilled]
    for group in (together, *({name: wanted[name]} for name in alone)):
      kept = read(path, group, there)
      leaves |= {name: _as_asked(x, asked[name]) for name, x in kept.items()}
    return jax.tree.unflatten(jax.tree.structure(target), [leaves[name] for name in wanted])

  def model(self, target, step: int | None = None, some: bool = False):
    """The main model of `step`, by default the last whole one, in the shape and the types of
    `target`, whatever types it was kept in; what of it is by reference, from there.

    some: whether `target` may be a part of it. Raises as `record`.
    """
    step = self.latest() if step is None else step
    record = self.record(step)
    # The policy, or the only model that there is.
    kept = {
      *(name.split('.')[1] for name in record['leaves'] if name.startswith('models.')),
      *record.get('references', {}),
    }
    main = MAIN if MAIN in kept or len(kept) != 1 else kept.pop()
    reference = record.get('references', {}).get(main)
    if not reference:
      return self._converted(step, target, f'models.{main}', some)
    here, there = divided({main: target}, lambda name: f'models.{name}' in record['leaves'])
    base = Checkpoints(reference['directory'], log=self._log)
    base.check(reference)
    if jax.tree.leaves(here):
      here = {main: self._converted(step, here[main], f'models.{main}', some)}
    there = base.model(there[main], reference['step'], some=True)
    return joined(here, {main: there})[main]

  def _converted(self, step: int, target, only: str, some: bool):
    """As restore, but floats kept in another type become those of `target`: exactly, where they
    get wider.
    """
    types = {name: dtype for name, (_, dtype) in self.record(step)['leaves'].items()}
    former = names.imported('workdir.former.name')

    def kept(name, x):
      dtype = types.get(name, types.get(former(name), x.dtype))
      float_ = all(jnp.issubdtype(d, jnp.floating) for d in (dtype, x.dtype))
      return jax.ShapeDtypeStruct(x.shape, dtype if float_ else x.dtype, sharding=x.sharding)

    leaves = named_leaves(target, only)
    as_kept = jax.tree.unflatten(
      jax.tree.structure(target), [kept(name, x) for name, x in leaves.items()]
    )
    model = self.restore(step, as_kept, only, some)
    if jax.tree.map(lambda x: x.dtype, as_kept) == jax.tree.map(lambda x: x.dtype, target):
      return model
    return jax.tree.map(
      lambda x, wanted: x if x.dtype == wanted.dtype else _cast(x, wanted.dtype), model, target
    )

  def reference(self, step: int | None) -> dict:
    """What `check` knows a checkpoint by, JSON-able: its directory, step and digest. Raises as
    `record`.
    """
    record = self.record(step)
    digest = record.get('known_by') or _seal(record)['sha256']
    return {'directory': str(self.directory.parent), 'step': step, 'digest': digest}

  def check(self, reference: dict) -> None:
    """Raises ValueError where the checkpoint of a reference is not there, is damaged, or is another
    one than it was.
    """
    step = reference['step']
    problems = self.problems(step)
    if not problems and self.reference(step)['digest'] != reference['digest']:
      problems = [
        f'its digest was {reference["digest"][:12]}, it is {self.reference(step)["digest"][:12]} '
        'now'
      ]
    if problems:
      raise ValueError(
        f'frozen parameters of this run are those of checkpoint {step} in '
        f'{reference["directory"]}, which is not what it '
        f'was: {"; ".join(problems)}. Bring it back; where it was moved, say where it is: '
        'python convert.py rebase --workdir RUN --base DIR'
      )

  def _begin(self, step: int, leaves: dict, spilled: dict) -> None:
    """Makes room, copies what lies on disk, and has orbax copy the rest and begin to write it."""
    path = self._path(step)
    self._orbax.finish(path)  # what was given up, and began after all
    if jax.process_index() == 0:
      self._remove(step)
      path.parent.mkdir(parents=True, exist_ok=True)
      for name, x in spilled.items():
        disk.reserve(_aside(path) / name, x)
    hosts.barrier(f'checkpoint {step} may be written')
    for name, x in spilled.items():  # the next step changes them
      x.export(_aside(path) / name)
    if spilled:
      hosts.barrier(f'checkpoint {step} holds what was on disk')
    self._orbax.begin(path, leaves)

  def _commit(self, step: int, record: dict) -> None:
    self._orbax.finish(self._path(step))
    if jax.process_index() == 0:
      self._seal_and_tidy(step, record)
    hosts.barrier(f'checkpoint {step} is whole')

  def _seal_and_tidy(self, step: int, record: dict) -> None:
    path = self._path(step)
    if record['spilled']:
      _aside(path).rename(path / SPILLED)
    record['files'] = self._orbax.files() or {
      str(p.relative_to(path)): [p.stat().st_size, _digest(p, '')]
      for p in sorted(path.rglob('*'))
      if p.is_file()
    }
    self._write_record(step, record)
    # Later steps are of a past that was gone back from, because its checkpoints were damaged.
    known = [old for old in self.steps() if old <= step]
    keep = {*known[-self._keep_last :], self.best(known)}
    for old in self.steps():
      if old not in keep:
        self._remove(old)
    for left in self._unfinished():
      files.remove(left)

  def _write_record(self, step: int, record: dict) -> None:
    files.replace(self._path(step).with_suffix('.json'), json.dumps(_seal(record)))

  def _remove(self, step: int) -> None:
    self._path(step).with_suffix('.json').unlink(
      missing_ok=True
    )  # first: what has no record does not count
    for path in (self._path(step), _aside(self._path(step))):
      if path.exists():
        files.remove(path)

  def _unfinished(self) -> list[pathlib.Path]:
    """Directories without a record, of those whose names a run writes: others are a person's."""
    names_ = {self._path(step).name for step in self.steps()}
    return sorted(
      path
      for path in self.directory.glob('*')
      if path.is_dir() and path.name not in names_ and WRITTEN.fullmatch(path.name)
    )

  def _path(self, step: int) -> pathlib.Path:
    return self.directory / f'{step:08d}'


def _aside(path: pathlib.Path) -> pathlib.Path:
  """Where files of a checkpoint are until orbax has made its directory."""
  return path.with_suffix('.' + SPILLED)


def _as_asked(x: jax.Array, asked):
  if x.dtype != asked.dtype:
    x = names.imported('workdir.former.widened')(x, asked)
  return asked.filled(x) if isinstance(asked, disk.OnDisk) else x


@functools.partial(jax.jit, static_argnums=1)
def _cast(x: jax.Array, dtype) -> jax.Array:
  return x.astype(dtype)


def _cost_of(record: dict) -> str:
  """What a checkpoint was judged by."""
  return record['progress'].get('of', LOSS)


def _network(record: dict) -> str:
  """A digest of what the model of a record computes, and not of how."""
  return files.digest(record.get('config', {}).get('model', {}) | {'execution': None})


def _seal(record: dict) -> dict:
  """A record with the digest by which it is known to be unharmed."""
  return {'sha256': files.digest(record), 'record': record}


def _digest(path: pathlib.Path, kind: str) -> str:
  """kind: what comes before the digest of a record that a bucket's was; older ones are plain."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'md5' if kind == 'tag' else 'sha256').hexdigest()
