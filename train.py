"""Trains a language model: python train.py --config=configs/tiny.py --workdir=runs/tiny
[--config.a.b=value ...]

Reads top to bottom: config -> mesh -> data -> model and optimizer -> where to start -> steps ->
report.
"""

from parallel import hosts

if __name__ == '__main__':
  hosts.use_huge_pages()
  hosts.leave_at_signals()

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging

import commands
import files
import names
from analysis import hardware
from commands import mendable
from data.tokenizer import Tokenizer
from model import params
from objectives.objective import Batches
from parallel import axes, pipeline
from parallel.mesh import make_mesh
from training import config as configs, overrides, program
from training.evaluation import make_evaluate
from training.program import begin_state, make_program, make_target
from training.state import TrainState
from workdir import seals
from workdir.checkpoint import Checkpoints
from workdir.frozen import Frozen, begin
from workdir.progress import LOSS, Progress, check_finite, cost_of
from workdir.watch import Watch

CONFIG = overrides.define_flag()
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run: config, tokenizer, checkpoints, metrics, report.'
)
PROFILE = flags.DEFINE_string('profile', '', 'Steps to trace with the XLA profiler, as in 10-12.')
ALLOW_CHANGE = flags.DEFINE_bool(
  'allow_config_change', False, 'Resume although model or data order changed.'
)
COORDINATOR = flags.DEFINE_string(
  'coordinator',
  '',
  'HOST:PORT of process 0, for several processes that no cluster manager introduces.',
)
PROCESSES = flags.DEFINE_integer(
  'processes', 0, 'With --coordinator: how many processes there are.'
)
PROCESS = flags.DEFINE_integer('process', -1, 'With --coordinator: which one this is, from 0.')
SHOW = flags.DEFINE_integer(
  'show', 0, 'Prints so many training examples, what is learned of them in colour, and ends.'
)
STOPPED_CODE = flags.DEFINE_integer(
  'stopped_code',
  0,
  'Exit code of a run that a signal stopped, for launchers that start it again. Without it: 0 '
  'where all was saved, 128 + the number of the signal where it came before the first step, or '
  'twice.',
)
HEARTBEAT = flags.DEFINE_integer(
  'heartbeat_timeout', hosts.HEARTBEAT_TIMEOUT, 'Seconds of silence after which a process is lost.'
)
MEETING = flags.DEFINE_integer(
  'meeting_timeout',
  hosts.MEETING_TIMEOUT,
  'Seconds that each process waits for all of them at the start.',
  lower_bound=1,
)


LOCK = 'lock'  # in a run's directory while a process trains there


class Feed(NamedTuple):
  """The batches of a run: `batches` of this process's rows, `put`, which makes global arrays of
  them, and whose ids they hold.
  """

  batches: Batches
  put: hosts.RowShards
  tokenizer: Tokenizer

  def take(self, state) -> Any:
    """The next batch on the devices, for a step from this state."""
    return self.put(self.batches.take(state))


class Beginning(NamedTuple):
  """Where a run starts: the step that it has reached, the state there (None where nothing is left
  to do), what of its models is kept elsewhere, its progress, and the record of the checkpoint
  ({} at the beginning).
  """

  step: int
  state: TrainState | None
  frozen: Frozen
  progress: Progress
  record: dict


def every(n: int, step: int) -> bool:
  """Whether it is due at a step, every n; 0: never."""
  return bool(n) and step % n == 0


class Visits(NamedTuple):
  """What looks at the models on their way: `evaluate`, of the validation data
  (training.evaluation), and, where there are to be some, `ask`, of tasks (workdir.tasks.TaskAsker),
  and `sample` (workdir.samples.Sampler).
  """

  evaluate: Callable
  ask: Callable | None
  sample: Callable | None

  @classmethod
  def of(cls, evaluate: Callable, config: configs.Config, *place) -> 'Visits':
    """What the config asks for. Raises ValueError and NotImplementedError for what cannot be."""
    ask = names.imported('workdir.tasks.TaskAsker') if config.evaluation.tasks else None
    sample = names.imported('workdir.samples.Sampler') if config.train.sample_every else None
    return cls(evaluate, *(make and make(config, *place) for make in (ask, sample)))

  def due(self, config: configs.Config, step: int) -> bool:
    """Whether a step is followed by a judgement."""
    asked = self.ask and every(config.evaluation.every, step)
    return bool(asked) or step == config.train.steps or every(config.train.eval_every, step)

  def judged(self, config, step: int, models, progress: Progress, watch: Watch):
    """(progress, the cost by train.best, or None where it is not said) after a step, which is
    logged; step 0: before the first one.
    """
    final, evaluation = step == config.train.steps, {}
    validated = final or every(config.train.eval_every, step)
    if validated:
      # What decides about the best checkpoint and about stopping is of the same batches each time;
      # the last number is of all.
      evaluation = self.evaluate(models, config.train.eval_batches)
    if self.ask and (final or every(config.evaluation.every, step)):
      evaluation |= self.ask(step, models, watch.print)
    with mendable():
      cost = cost_of(config.train.best, evaluation)
    progress = progress if cost is None else progress.after(cost)
    if validated and (final or progress.impatient(config.train.patience)):
      evaluation |= self.evaluate(models, 0, go_on=True)
    if evaluation:
      watch.log(step, evaluation)
    return progress, cost


def train_steps(
  config,
  begun: Beginning,
  feed: Feed,
  train_step,
  visits: Visits,
  checkpoints: Checkpoints,
  watch: Watch,
  profile,
  signal: hosts.StopSignal,
) -> str:
  """Runs the steps that are left; step n is dispatched before n - 1 is looked at. Returns why it
  stopped early, or ''.
  """
  state, progress = begun.state, begun.progress
  count = jax.jit(config.objective.tokens)
  norms, impatient, run = None, '', seals.run_of(begun.record)
  if config.init and not begun.step:
    # What it could do before, to compare with.
    visits.judged(config, 0, state.models, Progress(), watch)
  for step in range(begun.step + 1, config.train.steps + 1):
    profile.before(step)
    batch = feed.take(state)
    tokens = count(batch)
    lossy = (
      step == begun.step + 1
      and config.model.execution.parameter_dtype != 'float32'
      and not config.adapter.kind
    )
    moved = names.imported('training.moved.Moved')(config, state) if lossy else None
    state, metrics, step_norms = train_step(state, batch)
    profile.after(step, metrics)
    done = watch.step(step, metrics, tokens)
    check_finite(done, norms, config, checkpoints)
    if hint := names.imported('training.hints.worse_than_guessing')(done, config):
      watch.print(hint)
    norms = step_norms
    for said in moved.lines(state) if moved else ():
      watch.print(said)
    final, cost = step == config.train.steps, None

    if visits.due(config, step):
      with watch.pause() as done:
        check_finite(done, norms, config, checkpoints)
        progress, cost = visits.judged(config, step, state.models, progress, watch)
        impatient = progress.impatient(config.train.patience)

    if visits.sample and (final or every(config.train.sample_every, step)):
      with watch.pause() as done:
        check_finite(done, norms, config, checkpoints)
        watch.write_text(step, 'samples', visits.sample(step, state.models))

    reason = impatient or signal.after(step)
    better = cost is not None and progress.waited == 0
    if final or reason or better or every(config.train.save_every, step):
      with watch.pause() as done:
        check_finite(done, norms, config, checkpoints)
        checkpoints.save(
          step,
          begun.frozen.kept(state),
          feed.batches.state(),
          progress.record(),
          cost,
          references=begun.frozen.references,
          config=configs.to_dict(config),
          run=seals.bound(run, watch.path.parent, watch.mark()),
        )
    if reason:
      break
  checkpoints.wait()
  return '' if final else reason


def beginning(
  config, workdir, checkpoints, make_state, target, feed, allow_change, log
) -> Beginning:
  """Where the run starts; the feed's batches go on from there."""
  latest = checkpoints.latest()
  first = latest or 0
  record = {} if latest is None else checkpoints.record(latest)
  progress = Progress.resume(checkpoints, first, config.train.best)
  ended = progress.impatient(config.train.patience)
  if first >= config.train.steps:
    ended = ended or f'train.steps={config.train.steps}'
  if ended:
    log(f'nothing to do: checkpoint {first} has reached {ended}; raise it to go on')
    return Beginning(first, None, Frozen(config, {}), progress, record)
  if record and not allow_change:
    # Of a run's own the tokenizer is compared with that of the data, and written anew.
    own = seals.INHERITED if first else seals.OWN
    names.imported('workdir.open.check_own')(record, workdir, own)
  if first:
    if 'run' not in record:
      log(
        f'WARNING: checkpoint {first} is of an older version, which does not tell whether '
        'config.json, the tokenizer and metrics.jsonl are its own; the next one will'
      )
    if not allow_change:
      seals.check_tokenizer(record, workdir, feed.tokenizer)
    frozen = Frozen(config, record.get('references', {}))
    state = frozen.completed(checkpoints.restore(first, frozen.kept(target)), log)
    names.imported('workdir.changes.restore_order')(feed.batches, record['data'], allow_change, log)
    log(f'going on from checkpoint {first}')
    if (before := seals.begun(workdir)) is not None:
      updates = int(state.step) - int(state.scale.skipped_steps)
      changed = names.imported('workdir.changes.described')
      for line in changed(before, config, first, updates):
        log(line)
    return Beginning(first, state, frozen, progress, record)
  # Checkpoint 0 is an imported model, without a state of training.
  models, frozen = begin(config, log, workdir if latest == 0 else '')
  state = begin_state(config, make_state, target, models)
  return Beginning(first, state, frozen, progress, record)


def claim(workdir: pathlib.Path, config: configs.Config, tokenizer, record: dict, log) -> None:
  """Writes what makes the directory this run's, which goes on from a checkpoint of this record.

  Raises ValueError where another process does not see it.
  """
  if jax.process_index() == 0:
    # Of a run that goes on they are its own, and an edit that was sealed there is meant.
    for name in seals.INHERITED if config.init and not record else ():
      if (inherited := files.place(config.init) / name).is_file():
        files.replace(workdir / name, inherited.read_bytes())
    configs.save(config, workdir)
    seals.keep_tokenizer(tokenizer, workdir)
    if record.get('step') == 0:
      names.imported('workdir.reseal.bind_import')(record, workdir)
    seals.settle_metrics(record, workdir, log)
  hosts.check_shared(workdir / configs.FILE)


def keep_facts(workdir: pathlib.Path, facts: dict) -> None:
  """Writes what a report made later needs."""
  if jax.process_index() == 0:
    files.replace(workdir / seals.FACTS, json.dumps(files.sealed(facts)) + '\n')


def main(arguments):
  # 1. Config: what is asked for.
  names.only_flags(arguments, '--config.train.steps=100')
  if CONFIG.value is None or not WORKDIR.value:
    raise app.UsageError('give --config=configs/NAME.py and --workdir=runs/NAME')
  logging.set_verbosity(logging.WARNING)
  with mendable():
    files.check_local('--workdir', WORKDIR.value, buckets=True)
    config = overrides.from_flag(CONFIG.value)
    together = hosts.connect(
      COORDINATOR.value, PROCESSES.value, PROCESS.value, HEARTBEAT.value, MEETING.value
    )
  with together:
    interrupted = run(
      config, files.place(WORKDIR.value), PROFILE.value, ALLOW_CHANGE.value, SHOW.value
    )
  return STOPPED_CODE.value if interrupted else 0


def run(
  config: configs.Config,
  workdir: pathlib.Path,
  profile: str = '',
  allow_change: bool = False,
  show: int = 0,
) -> bool:
  """Trains in `workdir`, from its last whole checkpoint on; returns whether a signal ended it.

  profile, allow_change, show: as the flags. No other process trains there meanwhile.
  """
  with contextlib.ExitStack() as held:
    with mendable():
      files.check_local('--workdir', workdir, buckets=True)
      names.imported('workdir.outside.check')(config, workdir)
      names.imported('workdir.able.check')(config, workdir)
      if jax.process_index() == 0:
        remedy = 'wait until it ends, end it, or give another --workdir'
        held.enter_context(files.locked(workdir / LOCK, str(workdir), remedy))
    return train(config, workdir, profile, allow_change, show)


def train(
  config: configs.Config, workdir: pathlib.Path, profile: str, allow_change: bool, show: int
) -> bool:
  """What `run` does, in a directory that is this process's."""
  hosts.cache_compilations(pathlib.Path(config.data.cache_dir) / 'xla')
  log = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda _: None

  # 2. Mesh: every device of every process, six explicit axes.
  with mendable():
    program.check_models(config)
    mesh = make_mesh(config.mesh)
    # What can be known without the data is, and again with it.
    config.check_mesh(dict(mesh.shape))
    seals.check_unchanged(seals.sized(config, workdir), workdir, allow_change)
    jax.set_mesh(mesh)
    log(f'mesh: {mesh.size} x {jax.devices()[0].device_kind}, {dict(mesh.shape)}')
    names.imported('parallel.compiler.tell')(config.train.compiler, log)

  # 3. Data: text to token shards, once; then batches, from any position.
  with mendable():
    prepared, config = read(config, workdir, mesh, allow_change, log)
    if show:
      log(names.imported('data.showing.examples')(config, prepared, show))
      return False
    if completed := config.objective.completed_by:
      prepared = names.imported(completed)(config, prepared, workdir, log)
    feed = fed(config, prepared, mesh)

  # 4. Models and optimizer: abstract first, so that shapes, shardings and costs are known before
  # memory is taken.
  with mendable():
    make_state, train_step = make_program(config)
  target = make_target(config, make_state, mesh, workdir)
  cost = costs(config, make_state, prepared)
  log(names.imported('training.hints.described')(config, cost))
  if hint := names.imported('training.hints.hint')(config):
    log(hint)

  # 5. Where to start: the last whole checkpoint of this directory, or step 0. Nothing is written
  # before it is known to fit.
  checkpoints = Checkpoints(workdir, config.train.keep_last, log, timeout=config.train.save_timeout)
  with mendable():
    if config.train.best != LOSS:
      names.imported('training.best.check')(config, prepared, feed.put, target)
    begun = beginning(config, workdir, checkpoints, make_state, target, feed, allow_change, log)

  # 6. Steps, watched; a signal ends them after the one in flight.
  interrupted = False
  if begun.state is not None:
    steps = range(begun.step + 1, config.train.steps + 1)
    with mendable():
      window = names.imported('workdir.profile.ProfileWindow')(profile, workdir / 'profile', steps)
      claim(workdir, config, prepared.tokenizer, begun.record, log)
      keep_facts(workdir, facts := cost.facts(mesh))
      place = config, prepared.tokenizer, mesh, workdir, begun.step
      visits = Visits.of(make_evaluate(config, prepared, feed.put, log), *place)
    watching = Watch(
      workdir,
      steps=steps,
      log_every=config.train.log_every,
      flops_per_token=cost.flops_per_token,
      chips=facts['chips'],
      peak=cost.peak(config, mesh),
    )
    with watching as watch, hosts.StopSignal() as signal:
      watch.write_text(begun.step, 'config', names.imported('workdir.report.described')(config))
      stopped = train_steps(
        config, begun, feed, train_step, visits, checkpoints, watch, window, signal
      )
      window.close()
    interrupted = stopped != '' and stopped == signal.name
    if stopped:
      again = '; the same command goes on from there' if interrupted else ''
      log(f'stopped after step {checkpoints.steps()[-1]}: {stopped}{again}')
  # 7. Report: what it achieved and what it cost.
  if jax.process_index() == 0:
    conclude = names.imported('workdir.report.conclude')
    before = begun.record if begun.state is None else None
    log(conclude(workdir, config, cost.facts(mesh), before, interrupted))
  return interrupted


def read(config: configs.Config, workdir: pathlib.Path, mesh, allow_change: bool, log):
  """The data that the objective makes batches of, and the config with the sizes that it leaves open
  filled in from there.

  Raises ValueError for what does not fit the mesh, other processes, or what the directory was begun
    with.
  """
  prepared = hosts.first_alone(lambda: program.read(config, log), 'data')
  epochs = config.train.epochs
  config = config.resolve(prepared.tokenizer.vocabulary, prepared.rows)
  if epochs:
    log(names.imported('training.epochs.described')(epochs, config, prepared))
  config.check_mesh(dict(mesh.shape))
  program.check_models(config)  # whose vocabulary may have been open
  if config.objective.of_records and config.init:
    seals.check_inherited(config.init, prepared.tokenizer)
  seals.check_unchanged(config, workdir, allow_change)
  hosts.check_same('config and data', f'{config} {prepared.key}')
  if mesh.shape['stage'] > 1:
    log(
      pipeline.describe(config.model.stacks, config.model.execution.pipeline, mesh.shape['stage'])
    )
  return prepared, config


def fed(config: configs.Config, prepared, mesh: jax.sharding.Mesh) -> Feed:
  """The batches of prepared data, from the first one on."""
  B, T = config.data.batch_size, config.data.sequence_length
  put = hosts.RowShards(jax.NamedSharding(mesh, axes.spec('batch', 'length')), (B, T))
  return Feed(config.objective.batches(prepared, config.data, put.rows), put, prepared.tokenizer)


class RunCost(NamedTuple):
  """What a run is known to cost before it starts: parameters of the main model, FLOPs a token, and
  the chip that does them.
  """

  parameters: int
  flops_per_token: float
  chip: hardware.Chip | None

  def peak(self, config: configs.Config, mesh: jax.sharding.Mesh) -> float | None:
    """FLOP/s of all devices together, where it is known."""
    of_device = hardware.peak(self.chip, config.model.execution.dtype)
    return of_device and of_device * mesh.size

  def facts(self, mesh: jax.sharding.Mesh) -> dict:
    """What a report says besides what was measured, JSON-able."""
    return {
      'parameters': self.parameters,
      'flops_per_token': self.flops_per_token,
      'chips': mesh.size // (self.chip.devices if self.chip else 1),
      'hardware': jax.devices()[0].device_kind,
    }


def costs(config: configs.Config, make_state, prepared) -> RunCost:
  """On the devices here."""
  return RunCost(
    params.count(jax.eval_shape(make_state).models[config.objective.main]),
    names.imported('training.spent.flops_per_token')(config, prepared.document_length),
    hardware.of_device(jax.devices()[0]),
  )


if __name__ == '__main__':
  hosts.heed_interrupts(hosts.STOPPING)
  commands.end(lambda: app.run(main, flags_parser=overrides.parsed), hosts.stopped_code())
