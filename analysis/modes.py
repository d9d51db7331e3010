"""Which program does a mode of planning run, and what lies in memory meanwhile?"""

import dataclasses
from typing import Any

import jax

from analysis import aot, generation_flops as counts, served
from decode.generating import generating
from decode.options import CHUNK
from objectives.rollout import WHOLE
from parallel import axes
from training import program, spent, state as states
from training.config import Config

TRAIN, PREFILL, DECODE, ROLLOUT = 'train', 'prefill', 'decode', 'rollout'
# What a server writes with, and reads with, which plan.py's --mode=serve compiles beside it.
SERVE, READ = 'serve', 'read'
MODES = TRAIN, PREFILL, DECODE, ROLLOUT, SERVE, READ
WRITE = DECODE, ROLLOUT, SERVE  # CHUNK tokens of every row
DOES = {SERVE: 'writes', READ: 'reads'}


@dataclasses.dataclass(frozen=True)
class Lowered:
  """A mode's program.

  Attributes:
    lowered: the program. arrays: what is passed to it, by name. beside: what lies there, too.
    tokens, model_flops: of a run on all devices.
  """

  lowered: jax.stages.Lowered
  arrays: dict[str, Any]
  tokens: int
  model_flops: float
  beside: dict[str, Any] = dataclasses.field(default_factory=dict)


def lower(
  config: Config, mesh: jax.sharding.Mesh, mode: str, rows: int, context: int, weights: str
) -> Lowered:
  """A step of training; the prefill of all rows; CHUNK tokens of every row; the same of a rollout,
  beside all that training holds; the same of a server, and the part of prompts that it reads at a
  time.

  rows, context, weights: of all but training and rollouts. Raises ValueError and
  NotImplementedError for what does not split over the mesh, and for what writes nothing.
  """
  if mode == TRAIN:
    return _step(config, mesh)
  if config.model.encoder_layers or not config.model.causal:
    raise NotImplementedError(
      f'--mode={mode} with model.encoder_layers={config.model.encoder_layers}, '
      f'model.causal={config.model.causal}: only what a decoder generates is planned so far'
    )
  if mode == ROLLOUT:
    return _rollout(config, mesh)
  if rows < 1 or context < 1:
    raise ValueError(f'--mode={mode} needs --batch={rows} and --context={context} to be at least 1')
  _check(config, mesh, rows, f'--batch={rows}')
  model = generating(config.resolve(config.model.vocabulary).model)
  if mode == PREFILL:
    lowered = aot.prefill(model, mesh, rows, context, weights)
    return Lowered(*lowered, rows * context, counts.prefill_flops(model, rows, context))
  if mode in (SERVE, READ):
    return _serve(model, mesh, mode, rows, context, weights)
  return _decode(model, mesh, rows, context, weights)


def _step(config, mesh):
  lowered, state = program.lower_step(config, mesh)
  tokens = config.data.batch_size * config.objective.row_tokens(config.data)
  model_flops = tokens * spent.flops_per_token(config)
  return Lowered(lowered, _training(config, state), tokens, model_flops)


def _training(config, state) -> dict[str, Any]:
  """What training holds from step to step."""
  trained, frozen = states.rule(config).parted(state.models)
  arrays = {'parameters': trained, 'optimizer state': state.optimizer}
  return ({'frozen parameters': frozen} if jax.tree.leaves(frozen) else {}) | arrays


def writes(objective) -> bool:
  """Whether a run of it learns from what it writes."""
  return hasattr(objective, 'rollout_rows')


def _rollout(config, mesh):
  objective, data = config.objective, config.data
  if not writes(objective):
    raise ValueError(
      f'--mode=rollout is of objectives that learn from what they write, and objective.kind='
      f'{objective.kind!r} does not; use --config=configs/grpo.py, or --mode=decode'
    )
  rows = objective.rollout_rows or data.batch_size * objective.minibatches
  _check(config, mesh, rows, f'objective.rollout_rows (or a rollout)={rows}')
  model = generating(config.resolve(config.model.vocabulary).model)
  made = _decode(model, mesh, rows, data.sequence_length, '', objective.rollout_weights == WHOLE)
  beside = _training(config, program.abstract_state(config, mesh))
  return dataclasses.replace(
    made,
    arrays={
      'weights that write': made.arrays['parameters'],
      'cache': made.arrays['cache'],
    },
    beside=beside,
  )


def _decode(model, mesh, rows, context, weights, whole=False):
  lowered = aot.decode(model, mesh, rows, context, weights, whole=whole)
  return Lowered(*lowered, rows * CHUNK, CHUNK * counts.decode_flops(model, rows, context))


def _serve(model, mesh, mode, rows, context, weights):
  lowered, arrays, sizes = served.lowered(model, mesh, rows, context, weights, mode == READ)
  if mode == SERVE:
    return Lowered(lowered, arrays, rows * CHUNK, CHUNK * counts.decode_flops(model, rows, context))
  prompts = sizes.read_rows or served.parts_of(mesh)
  model_flops = counts.read_flops(model, prompts, sizes.read_tokens, context)
  return Lowered(lowered, arrays, prompts * sizes.read_tokens, model_flops)


def _check(config, mesh, rows, named) -> None:
  with jax.set_mesh(mesh):
    over, parts = axes.mesh_axes('batch'), axes.size('batch')
  if rows % parts:
    raise ValueError(
      f'{named} does not split over '
      + ' x '.join(f'mesh.{axis}={mesh.shape[axis]}' for axis in over)
      + f'; make it a multiple of {parts}'
    )
  if not config.model.vocabulary:
    raise ValueError(
      "model.vocabulary=0 is the tokenizer's, which is not read here; set it, as in "
      '--config.model.vocabulary=50257'
    )
  config.model.check_parameters(dict(mesh.shape))
