"""Trains a language model: python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.a.b=value ...]

Reads top to bottom: config -> mesh -> data -> model and optimizer -> where to start -> steps -> report.
"""

from parallel import hosts

if __name__ == '__main__':
  hosts.use_huge_pages()

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging

import names
from analysis import hardware
from data import loader
from data.batch import Batch
from data.prepare import prepare
from kernels import attention, context
from model import flops, params, transformer, weights
from objectives.pretrain import check_model, pretrain, router_metrics
from parallel import axes, offload, pipeline
from parallel.mesh import make_mesh
from training import config as configs, precision, spill, state as states, update
from training.accumulate import accumulate
from training.optimizer import clip, make_optimizer, make_schedule
from workdir.checkpoint import Checkpoints
from workdir.progress import Progress, check_finite
from workdir.report import compression_baselines, write_report
from workdir.watch import ProfileWindow, Watch

CONFIG = configs.define_flag()
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
STOPPED_CODE = flags.DEFINE_integer(
  'stopped_code', 0, 'Exit code of a run that a signal stopped, for launchers that start it again.'
)
HEARTBEAT = flags.DEFINE_integer(
  'heartbeat_timeout', hosts.HEARTBEAT_TIMEOUT, 'Seconds of silence after which a process is lost.'
)


def make_train_step(config: configs.Config, optimizer: optax.GradientTransformation):
  """The step: (state, batch) -> (new state, metrics, gradient norms by parameter). The state's buffers are donated."""
  schedule = make_schedule(config.optimizer, config.train.steps)
  # What is differentiated is a sum over tokens times this, nearly a mean: sums over a large batch would pass f16's largest
  # number. A power of two costs no precision.
  unit = 2.0 ** -round(math.log2(config.data.batch_size * config.data.sequence_length))

  zero, dtype, offloaded = (
    config.mesh.zero,
    config.model.dtype,
    config.train.offload_optimizer or config.train.offload_parameters,
  )

  def gradients(state: states.TrainState, batch: Batch):
    """Of the loss summed over tokens and scaled; what an update takes of all of them; metrics, norms."""
    whole = weights.gathered(state.model, dtype) if zero == 2 else None

    def loss_fn(model, batch, scale):
      if zero < 3:
        model = weights.joined(
          model, weights.gathered(model, dtype) if zero == 1 else whole, reduce=zero == 2
        )
      total, sums = pretrain(model, batch, config.train.z_loss)
      return precision.scale(total * unit, scale), sums

    grads, sums = accumulate(loss_fn, state.model, batch, state.scale, config.train.accumulation)
    tokens = jnp.maximum(sums['tokens'], 1)
    divisor = tokens * unit * state.scale.scale

    def squares(g):
      return jnp.sum(jnp.square((g / divisor).astype(jnp.float32)))

    norms = jax.tree.map(lambda g: jnp.sqrt(offload.sum_by_layer(squares, g)), grads)
    norm = optax.tree.norm(norms)
    finite = jnp.isfinite(norm) & jnp.isfinite(sums['nll'])
    metrics = {
      'loss': sums['nll'] / tokens,
      'accuracy': sums['correct'] / tokens,
      'grad_norm': norm,
      'learning_rate': schedule(state.step - state.scale.skipped_steps),
      'predicted_tokens': sums['tokens'],
      **router_metrics(sums),
    }
    if config.model.dtype == 'float16':
      metrics |= {'loss_scale': state.scale.scale}
    return grads, update.Measured(divisor, norm, finite, sums.get('load')), metrics, norms

  def prepared(grads, measured):
    return clip(
      jax.tree.map(lambda g: g / measured.divisor, grads), measured.norm, config.optimizer.clip_norm
    )

  def advance(state: states.TrainState, measured):
    """What a step does besides updating parameters by their gradients."""
    model = state.model
    if config.model.moe.bias_rate:
      load = jnp.where(
        measured.finite, measured.load, 0
      )  # nothing moves where all experts have the same
      model = transformer.balanced(model, load, config.model.moe.bias_rate)
    return dataclasses.replace(
      state, step=state.step + 1, model=model, scale=precision.update(state.scale, measured.finite)
    )

  if config.train.offload_optimizer == 'disk':
    return spill.Step(config, gradients, prepared, advance)

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state: states.TrainState, batch: Batch):
    grads, measured, metrics, norms = gradients(state, batch)
    parts = (
      update.split(config, state.model)
      if offloaded
      else [update.whole(optimizer, state.model, state.optimizer)]
    )
    # A step that is not finite leaves no trace, whether the host then stops the run or goes on.
    optimizer_state, model = update.run(
      parts, prepared, measured, grads, state.optimizer, state.model
    )
    return (
      advance(dataclasses.replace(state, model=model, optimizer=optimizer_state), measured),
      metrics,
      norms,
    )

  return train_step


def make_program(config: configs.Config):
  """What a run of this config executes: a function that makes its initial state, and its step. plan.py compiles the same."""
  model = jax.eval_shape(functools.partial(transformer.init, config.model, config.train.seed))
  optimizer = make_optimizer(config.optimizer, config.train.steps, params.specs(model))
  return functools.partial(states.init, config, optimizer), make_train_step(config, optimizer)


def make_target(
  config: configs.Config, make_state, mesh: jax.sharding.Mesh, directory
) -> states.TrainState:
  """Shapes and places of what make_state makes: on the mesh, in context, and on disk below `directory`."""
  state = params.abstract(make_state, mesh)
  return (
    spill.on_disk(state, config.train.spill_dir or directory)
    if config.train.offload_optimizer == 'disk'
    else state
  )


def begin_state(
  config: configs.Config, make_state, target: states.TrainState, *model
) -> states.TrainState:
  """The first state, in the places of `target`; of the model given, which is donated, or of a new one."""
  if config.train.offload_optimizer != 'disk':
    return jax.jit(make_state, donate_argnums=range(len(model)))(*model)
  bare = jax.jit(
    lambda *model: dataclasses.replace(make_state(*model), optimizer=None),
    donate_argnums=range(len(model)),
  )
  return spill.begin(config, bare(*model), target)


def abstract_state(config: configs.Config, mesh: jax.sharding.Mesh) -> states.TrainState:
  """Shapes and shardings of what a run of this config carries, on a mesh whose devices may be elsewhere.

  Raises ValueError for a batch or a size that the mesh does not divide, and for an open vocabulary.
  """
  if not config.model.vocabulary:
    raise ValueError(
      "model.vocabulary=0 is the tokenizer's, which is not read here; set it, as in --config.model.vocabulary=50257"
    )
  config = config.resolve(config.model.vocabulary)
  config.check_mesh(dict(mesh.shape))
  with jax.set_mesh(mesh):
    return make_target(config, make_program(config)[0], mesh, '.')


def lower_step(
  config: configs.Config, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Lowered, states.TrainState]:
  """The step that a run of this config takes on a mesh, lowered, and the state that it takes; raises as abstract_state does."""
  state = abstract_state(config, mesh)
  config = config.resolve(config.model.vocabulary)
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, axes.spec('batch', 'length'))
    batch = Batch.abstract(config.data.batch_size, config.data.sequence_length, rows)
    return make_program(config)[1].lower(state, batch), state


def make_evaluate(config: configs.Config, prepared, put):
  """The evaluation: (model, batches to read, 0 for all) -> validation_loss in nats per token, and bits_per_byte.

  Of all batches, it also gives what compressors make of the same documents: gzip_bits_per_byte, xz_bits_per_byte.
  """
  baselines = functools.cache(lambda: compression_baselines(prepared.validation_documents()))

  @jax.jit
  def eval_step(model, batch, sums):
    _, new = pretrain(model, batch, 0.0)
    return jax.tree.map(jnp.add, sums, {name: new[name] for name in ('nll', 'tokens')})

  def evaluate(model, batches: int = 0) -> dict[str, float]:
    sums = {'nll': jnp.float32(0), 'tokens': jnp.float32(0)}
    for i, batch in enumerate(loader.validation_batches(prepared, config.data, put.rows)):
      if batches and i == batches:
        break
      before, sums = sums, eval_step(model, put(batch), sums)
      jax.block_until_ready(
        before
      )  # one batch ahead; with hundreds, XLA's virtual devices on a CPU wait for each other for good
    nll, tokens = (float(sums[name]) for name in ('nll', 'tokens'))
    # Bytes of the tokens read: exact for all of them, in proportion for a part.
    bytes_read = (
      prepared.validation_bytes * tokens / prepared.report['packing']['validation']['pairs']
    )
    found = {'validation_loss': nll / tokens, 'bits_per_byte': nll / math.log(2) / bytes_read}
    return found | (
      {}
      if batches or jax.process_index()
      else {f'{name}_bits_per_byte': value for name, value in baselines().items()}
    )

  return evaluate


def train_steps(
  config,
  state,
  steps,
  progress,
  batches,
  put,
  train_step,
  evaluate,
  checkpoints,
  watch,
  profile,
  signal,
) -> str:
  """Runs `steps`; step n is dispatched before n - 1 is looked at. Returns why it stopped before the last one, or ''."""

  def every(n, step):
    return bool(n) and step % n == 0

  tokens = config.data.batch_size * config.data.sequence_length
  norms, impatient = None, ''
  for step in steps:
    profile.before(step)
    state, metrics, step_norms = train_step(state, put(next(batches)))
    profile.after(step, metrics)
    check_finite(watch.step(step, metrics, tokens), norms, config, checkpoints)
    norms = step_norms
    final, evaluation = step == config.train.steps, {}
    if final or every(config.train.eval_every, step):
      with watch.pause() as done:
        check_finite(done, norms, config, checkpoints)
        # What decides about the best checkpoint and about stopping is of the same batches each time; the last number is of all.
        evaluation = evaluate(state.model, config.train.eval_batches)
        progress = progress.after(evaluation['validation_loss'])
        impatient = progress.impatient(config.train.patience)
        watch.log(
          step,
          evaluate(state.model, 0)
          if config.train.eval_batches and (final or impatient)
          else evaluation,
        )
    reason = impatient or signal.after(step)
    if (
      final
      or reason
      or every(config.train.save_every, step)
      or (evaluation and progress.waited == 0)
    ):
      with watch.pause() as done:
        check_finite(done, norms, config, checkpoints)
        checkpoints.save(
          step, state, batches.state(), progress.record(), evaluation.get('validation_loss')
        )
    if reason:
      break
  checkpoints.wait()
  return '' if final else reason


def beginning(config, workdir, checkpoints, make_state, target, batches, allow_change, log):
  """The step that the run has reached, the state there (None where nothing is left to do), and its progress; `batches` go on from there."""
  latest = checkpoints.latest()
  first = latest or 0
  progress = Progress.resume(checkpoints, first)
  ended = progress.impatient(config.train.patience) or (
    f'train.steps={config.train.steps}' if first >= config.train.steps else ''
  )
  begin = (
    workdir if latest == 0 else config.init
  )  # checkpoint 0 is an imported model, without a state of training
  if ended:
    log(f'nothing to do: checkpoint {first} has reached {ended}; raise it to go on')
    state = None
  elif first:
    state = checkpoints.restore(first, target)
    restore_order(batches, checkpoints.record(first)['data'], allow_change, log)
    log(f'going on from checkpoint {first}')
  elif begin:
    log(f'beginning with the parameters of {begin}')
    model = params.abstract(
      functools.partial(transformer.init, config.model, config.train.seed), jax.sharding.get_mesh()
    )
    state = begin_state(config, make_state, target, Checkpoints(begin, log=log).model(model))
  else:
    state = begin_state(config, make_state, target)
  return first, state, progress


def restore_order(batches: loader.Loader, position: dict, allow_change: bool, log) -> None:
  """Goes on in the data where `position` was taken; in other data, if that is allowed, from its beginning."""
  try:
    batches.restore(position)
  except ValueError as error:
    if not allow_change:
      raise
    log(
      f'WARNING: {error}. Because of --allow_config_change, the new order starts at its beginning'
    )


def claim(workdir: pathlib.Path, config: configs.Config, tokenizer) -> None:
  """Writes what makes the directory this run's. Raises ValueError where another process does not see it."""
  if jax.process_index() == 0:
    configs.save(config, workdir)
    tokenizer.save(workdir / 'tokenizer')
  hosts.check_shared(workdir / configs.FILE)


@contextlib.contextmanager
def mendable():
  """What the person who started the run can mend ends it with one message, not with a traceback."""
  try:
    yield
  except (ValueError, NotImplementedError, FileNotFoundError) as error:
    sys.exit(f'error: {error}')


def main(arguments):
  # 1. Config: what is asked for.
  names.only_flags(arguments, '--config.train.steps=100')
  if CONFIG.value is None or not WORKDIR.value:
    raise app.UsageError('give --config=configs/NAME.py and --workdir=runs/NAME')
  logging.set_verbosity(logging.WARNING)
  with mendable():
    config = configs.from_flag(CONFIG.value)
    together = hosts.connect(COORDINATOR.value, PROCESSES.value, PROCESS.value, HEARTBEAT.value)
  with together:
    interrupted = run(config, pathlib.Path(WORKDIR.value), PROFILE.value, ALLOW_CHANGE.value)
  return STOPPED_CODE.value if interrupted else 0


def run(
  config: configs.Config, workdir: pathlib.Path, profile: str = '', allow_change: bool = False
) -> bool:
  """Trains in `workdir`, from its last whole checkpoint on; profile and allow_change are as the flags. Returns whether a signal ended it."""
  hosts.cache_compilations(pathlib.Path(config.data.cache_dir) / 'xla')
  log = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda _: None

  # 2. Mesh: every device of every process, six explicit axes.
  with mendable():
    check_model(config.model)
    mesh = make_mesh(config.mesh)
  jax.set_mesh(mesh)
  device, devices = jax.devices()[0], jax.device_count()
  chip = hardware.lookup(
    device.device_kind, getattr(device, 'num_cores', None) if device.platform == 'tpu' else None
  )
  log(f'mesh: {devices} x {device.device_kind}, {dict(mesh.shape)}')

  # 3. Data: text to token shards, once; then batches, from any position.
  with mendable():
    prepared = hosts.first_alone(lambda: prepare(config.data, log=log), 'data')
    config = config.resolve(prepared.tokenizer.vocabulary)
    config.check_mesh(dict(mesh.shape))
    configs.check_unchanged(config, workdir, allow_change)
    hosts.check_same('config and data', f'{config} {prepared.key}')
    if mesh.shape['stage'] > 1:
      log(pipeline.describe(config.model.stacks, config.model.pipeline, mesh.shape['stage']))
    put = hosts.RowShards(
      jax.NamedSharding(mesh, axes.spec('batch', 'length')),
      (config.data.batch_size, config.data.sequence_length),
    )
    batches = loader.train_loader(prepared, config.data, put.rows)

  # 4. Model and optimizer: abstract first, so that shapes, shardings and costs are known before memory is taken.
  make_state, train_step = make_program(config)
  target = make_target(config, make_state, mesh, workdir)
  parameters = params.count(jax.eval_shape(make_state).model)
  flops_per_token = flops.train_flops_per_token(
    config.model, config.data.sequence_length, prepared.document_length
  )
  in_parts = context.in_parts(config.model.context, config.model.N, config.model.K)
  chosen = (
    config.model.attention
    if config.model.attention != 'auto'
    else attention.choose(config.model.attention_spec, in_parts=in_parts)
  )
  split = f', rows split by {config.model.context!r}' if axes.size('length') > 1 else ''
  log(
    f'model: {parameters:,} parameters, {flops_per_token:.3g} training FLOPs a token, attention {chosen!r}{split}'
  )

  # 5. Where to start: the last whole checkpoint of this directory, or step 0. Nothing is written before it is known to fit.
  checkpoints = Checkpoints(workdir, config.train.keep_last, log=log)
  with mendable():
    first, state, progress = beginning(
      config, workdir, checkpoints, make_state, target, batches, allow_change, log
    )

  # 6. Steps, watched; a signal ends them after the one in flight.
  if state is not None:
    steps = range(first + 1, config.train.steps + 1)
    with mendable():
      window = ProfileWindow(profile, workdir / 'profile', steps)
      claim(workdir, config, prepared.tokenizer)
    watching = Watch(
      workdir,
      steps=steps,
      log_every=config.train.log_every,
      flops_per_token=flops_per_token,
      devices=devices,
      peak=hardware.peak(chip, config.model.dtype),
    )
    with watching as watch, hosts.StopSignal() as signal:
      stopped = train_steps(
        config,
        state,
        steps,
        progress,
        batches,
        put,
        train_step,
        make_evaluate(config, prepared, put),
        checkpoints,
        watch,
        window,
        signal,
      )
      window.close()
    interrupted = stopped != '' and stopped == signal.name
    if stopped and jax.process_index() == 0:
      log(
        f'stopped after step {checkpoints.steps()[-1]}: {stopped}'
        + ('; the same command goes on from there' if interrupted else '')
      )
    if interrupted:
      return True

  # 7. Report: what it achieved and what it cost.
  if jax.process_index() == 0:
    report = write_report(
      workdir,
      config.report,
      parameters=parameters,
      flops_per_token=flops_per_token,
      chips=devices // (chip.devices if chip else 1),
      hardware=device.device_kind,
    )
    log(report.read_text() + f'\nwrote {report}')
  return False


if __name__ == '__main__':
  app.run(main)
