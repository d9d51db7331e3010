"""How do gradients become updates? Optimizers, schedules and clipping, built from one config
through optax.

Every optimizer is the same chain: its own rescaling of the gradient, decoupled weight decay, the
schedule. A rescaling that optax has not is a file of its own, imported when a run names it.
"""

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import names
from parallel import axes as ax

# What each optimizer and each schedule reads, with its defaults; a field that is set but not read
# is an error.
_ADAM = {'b1': 0.9, 'b2': 0.95, 'epsilon': 1e-8}
OPTIMIZERS = {
  'adamw': _ADAM,
  'adam8bit': _ADAM,
  'adafactor': {'epsilon': 1e-30},
  'lion': {'b1': 0.95, 'b2': 0.98},
  'muon': {**_ADAM, 'momentum': 0.95, 'adam_ratio': 1.0},
  'sgd': {'momentum': 0.9},
}
# Those whose rescaling is ours and not optax's: a function (settings, specs, whole) ->
# optax.GradientTransformation, of OptimizerConfig.settings() and what make_optimizer is given.
OWN = {
  'adamw': 'training.adam.rescaling',
  'adam8bit': 'training.adam8bit.rescaling',
  'adafactor': 'training.adafactor.rescaling',
  'muon': 'training.muon.rescaling',
}
SCHEDULES = {
  'constant': {},
  'cosine': {'final_fraction': 0.1},
  'linear': {'final_fraction': 0.0},
  'wsd': {'final_fraction': 0.0, 'decay_fraction': 0.2},
}
KINDS = ('matrix', 'embedding', 'vector')
DEFAULT = -1.0

_SHARE = (0, 1, 'a share from 0 to 1')
_DECAY = (0, math.nextafter(1, 0), 'a decay rate, at least 0 and below 1')
_POSITIVE = (sys.float_info.min, sys.float_info.max, 'finite and above 0')
_OFF_OR_POSITIVE = (0, sys.float_info.max, 'finite and at least 0 (0 turns it off)')
LIMITS = {
  'learning_rate': _POSITIVE,
  'warmup_steps': _OFF_OR_POSITIVE,
  'warmup_fraction': _SHARE,
  'final_fraction': _SHARE,
  'decay_fraction': _SHARE,
  'weight_decay': _OFF_OR_POSITIVE,
  'clip_norm': _OFF_OR_POSITIVE,
  'b1': _DECAY,
  'b2': _DECAY,
  'epsilon': _POSITIVE,
  'momentum': _DECAY,
  'adam_ratio': _POSITIVE,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Which optimizer, at which learning rate. A field left -1 takes its default in OPTIMIZERS or
  SCHEDULES.

  Attributes:
    name: 'adamw' (Loshchilov and Hutter, arXiv:1711.05101), 'adam8bit' (see training/adam8bit.py),
      'adafactor' (see training/adafactor.py), 'lion' (Chen et al., arXiv:2302.06675), 'muon' (see
      training/muon.py; AdamW for all that is not a hidden matrix), 'sgd'.
    learning_rate: the peak, reached after warm-up.
    schedule: after warm-up: 'constant'; 'cosine' or 'linear' down to final_fraction; 'wsd'
      (warm-up, stable, decay; Hu et al., arXiv:2404.06395), constant until the last decay_fraction
      of the run, then linear.
    warmup_steps: linear warm-up from learning_rate / (warmup_steps + 1).
    warmup_fraction: the same as a share of all steps; one of the two is 0.
    final_fraction: the learning rate at the end of the run, as a share of the peak.
    decay_fraction: the share of all steps over which 'wsd' decays.
    weight_decay: decoupled, times the learning rate; on matrices and embeddings, not on norms and
      biases.
    clip_norm: largest global norm of the gradient; 0 means no clipping.
    b1, b2, epsilon: of Adam or Lion (of the AdamW group in 'muon'); epsilon of Adafactor is added
      to squared gradients.
    momentum: of 'sgd' (heavy ball) and 'muon' (Nesterov).
    adam_ratio: of 'muon': learning rate of the AdamW group (not its decay) as a multiple of
      learning_rate. Muon's updates are scaled to the RMS of AdamW's, so that one learning rate can
      serve both groups.
    prune: numbers that become 0 while it trains, and stay so, as in '0.5:begin=100:end=500', '2:4'
      or 'kept' (see training/prune.py). A run that begins with a pruned one keeps what is 0.

  Raises ValueError when a value is impossible, or is set and would not be read.
  """

  name: str = 'adamw'
  learning_rate: float = 1e-3
  schedule: str = 'cosine'
  warmup_steps: int = 0
  warmup_fraction: float = 0.0
  final_fraction: float = DEFAULT
  decay_fraction: float = DEFAULT
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  b1: float = DEFAULT
  b2: float = DEFAULT
  epsilon: float = DEFAULT
  momentum: float = DEFAULT
  adam_ratio: float = DEFAULT
  prune: str = ''

  def __post_init__(self):
    names.check('optimizer.name', self.name, OPTIMIZERS)
    names.check('optimizer.schedule', self.schedule, SCHEDULES)
    read = {**OPTIMIZERS[self.name], **SCHEDULES[self.schedule]}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name in ('name', 'schedule', 'prune') or (
        field.default == DEFAULT and value == DEFAULT
      ):
        continue
      if field.default == DEFAULT and field.name not in read:
        readers = [
          name for name, settings in {**OPTIMIZERS, **SCHEDULES}.items() if field.name in settings
        ]
        raise ValueError(
          f'optimizer.{field.name}={value} would not be read by {self.name!r} with schedule '
          f'{self.schedule!r} (it is by {", ".join(readers)}); leave it at {DEFAULT}'
        )
      least, most, limit = LIMITS[field.name]
      if not (least <= value <= most and math.isfinite(value)):
        raise ValueError(f'optimizer.{field.name}={value} must be {limit}')
    if self.warmup_steps and self.warmup_fraction:
      raise ValueError(
        f'optimizer.warmup_steps={self.warmup_steps} and '
        f'optimizer.warmup_fraction={self.warmup_fraction} both say how long the warm-up is; set '
        'one of them to 0'
      )

  def settings(self) -> dict[str, float]:
    """What this optimizer and schedule read: the fields that are set, else their defaults."""
    settings = {**OPTIMIZERS[self.name], **SCHEDULES[self.schedule]}
    return {
      **settings,
      **{name: getattr(self, name) for name in settings if getattr(self, name) != DEFAULT},
    }


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """The learning rate as a function of the number of updates made so far, for a run of `steps`
  updates.

  With W steps of warm-up the first update gets learning_rate / (W + 1), update W the peak; the
  final value would be reached at number `steps` and is held after it.

  Raises ValueError when warm-up and decay, or the steps of pruning, do not fit into the run, and
  where a share to decay over that was asked for is no step of it.
  """
  if config.prune:
    names.imported('training.prune.parsed')(config.prune, steps)
  s, peak = config.settings(), config.learning_rate
  warm = config.warmup_steps or round(config.warmup_fraction * steps)
  after = steps - warm
  decay = round(s.get('decay_fraction', 0) * steps)
  if config.decay_fraction > 0 and not decay:
    raise ValueError(
      f'optimizer.decay_fraction={config.decay_fraction} of {steps} steps is no step, and '
      f"{config.schedule!r} would never decay; use at least {1 / steps:.2g}, or schedule='constant'"
    )
  if after < max(1, decay):
    raise ValueError(
      f'optimizer.warmup_steps={warm} plus a final decay of {decay} steps do not '
      f'fit into {steps} steps; use fewer warm-up steps, a smaller decay_fraction or more steps'
    )
  if config.schedule == 'constant':
    schedule = optax.constant_schedule(peak)
  elif config.schedule == 'cosine':
    schedule = optax.cosine_decay_schedule(peak, after, alpha=s['final_fraction'])
  elif config.schedule == 'linear':
    schedule = optax.linear_schedule(peak, peak * s['final_fraction'], after)
  else:
    schedule = optax.linear_schedule(
      peak, peak * s['final_fraction'], max(1, decay), transition_begin=after - decay
    )
  if not warm:
    return schedule
  return optax.join_schedules(
    [optax.linear_schedule(peak / (warm + 1), peak, warm), schedule], [warm]
  )


def make_optimizer(
  config: OptimizerConfig, steps: int, specs, whole: bool = True
) -> optax.GradientTransformation:
  """The transformation from (clipped) gradients to updates; clipping itself is `clip`, in the train
  step.

  Args:
    steps: number of updates of the whole run.
    specs: the parameters' tree (or a prefix of it) with a description at each parameter: an object
      with `axes` (logical axis names, 'layers' first where blocks are stacked), `kind` ('matrix',
      'embedding', 'vector') and `inputs` (the number of axes, after layers and experts, that a
      matrix contracts over).
    whole: whether these are all parameters of the model, not a part of them (see training.update).
  Raises ValueError for a description that makes no sense, and when 'muon' or config.prune finds no
    matrix to work on.
  """
  for path, spec in jax.tree_util.tree_leaves_with_path(specs):
    _check_spec(jax.tree_util.keystr(path, simple=True, separator='.'), spec)

  # As a function, because optax would call a tree that is itself a callable module.
  def decayed(_):
    return jax.tree.map(lambda spec: spec.kind != 'vector', specs)

  chain = optax.chain(
    _rescaling(config, specs, whole),
    optax.add_decayed_weights(config.weight_decay, mask=decayed),
    optax.scale_by_learning_rate(make_schedule(config, steps)),
  )
  return (
    chain
    if not config.prune
    else names.imported('training.prune.pruning')(chain, config.prune, steps, specs, whole)
  )


def clip(grads, norm: Float[Array, ''], max_norm: float):
  """Gradients scaled down so that their global norm, which is given, is at most max_norm; 0 leaves
  them alone.

  Pascanu et al., arXiv:1211.5063. The norm is an argument because the train step computes it
  anyway, to log it.
  """
  if max_norm == 0:
    return grads
  factor = jnp.minimum(1.0, max_norm / norm)
  return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


def _check_spec(path: str, spec) -> None:
  if spec.kind not in KINDS:
    raise ValueError(f'{path}: kind {spec.kind!r} is unknown; known: {list(KINDS)}')
  if 'layers' in spec.axes[1:]:
    raise ValueError(f"{path}: axes {spec.axes} must name 'layers' first")
  matrix_axes = len(spec.axes) - ax.stacks(spec.axes)
  if spec.kind == 'matrix' and not 1 <= spec.inputs < matrix_axes:
    raise ValueError(
      f'{path}: inputs={spec.inputs}, but a matrix of axes {spec.axes} contracts over at least 1 '
      f'and at most {matrix_axes - 1} of them'
    )


def _rescaling(config: OptimizerConfig, specs, whole: bool) -> optax.GradientTransformation:
  """What makes the optimizer itself: gradients to updates at learning rate 1, before decay."""
  s = config.settings()
  if config.name in OWN:
    return names.imported(OWN[config.name])(s, specs, whole)
  if config.name == 'lion':
    return optax.scale_by_lion(s['b1'], s['b2'])
  return optax.trace(s['momentum'])
