"""What is one step of training? Gradients of an objective over a batch, made into an update of what
is trained.

    prepare    what depends on the whole batch, and the denominator of every term
    gradients  of the sum over terms of sum / weight, in microbatches; the denominators are divided
               by once, at the end
    measure    norms, whether all is finite, metrics
    update     clip, optimizer, new parameters: in one piece, or in parts where memory is short
    advance    step, loss scale, balance of experts

The objective is a value (objectives/objective.py): nothing here knows which.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax

import names
from model import router, weights
from objectives.objective import or_one
from parallel import offload
from training import precision, state as states, update
from training.config import Config
from training.gradients import accumulate, check
from training.optimizer import clip, make_schedule
from training.state import TrainState
from training.trainable import Rule, joined


def make_step(config: Config, optimizer: optax.GradientTransformation):
  """The step: (state, batch) -> (new state, metrics, gradient norms by parameter); what it trains
  of the state is donated.

  optimizer: of the trained parameters, which states.rule(config) picks. Compiled for the mesh in
  context, with the options that train.compiler chooses for it.
  """
  gradients, rule = make_gradients(config), states.rule(config)
  prepared, advance = functools.partial(_prepared, config), functools.partial(_advance, config)
  if config.train.offload_optimizer == 'disk':
    spilled = names.imported('training.spill.SpilledStep')
    return Step(spilled(config, gradients, prepared, advance), rule)
  in_parts = config.train.offload_optimizer or config.train.offload_parameters

  def step(state: TrainState, frozen, batch):
    grads, measured, metrics, norms = gradients(state, frozen, batch)
    if in_parts:
      parts = update.split(config, state.models)
    else:
      parts = [update.whole(optimizer, state.models, state.optimizer)]
    # A step that is not finite leaves no trace, whether the host then stops the run or goes on.
    after, models = update.run(parts, prepared, measured, grads, state.optimizer, state.models)
    state = dataclasses.replace(state, models=models, optimizer=after)
    return advance(state, measured), metrics, norms

  options = names.imported('parallel.compiler.options')(config.train.compiler)
  compiled = functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
  if not rule.everything:
    return Step(compiled(step), rule)

  @compiled
  def train_step(state: TrainState, batch):
    _, frozen = rule.parted(state.models)
    return step(state, frozen, batch)

  return train_step


class Step:
  """A step whose frozen parameters are an argument of their own: not donated, so that models may
  share them.

  run: (state of what is trained, frozen models, batch) -> (new state of the same, metrics, norms).
  """

  def __init__(self, run, rule: Rule):
    self._run, self._rule = run, rule

  def _arguments(self, state, batch):
    trained, frozen = self._rule.parted(state.models)
    return dataclasses.replace(state, models=trained), frozen, batch

  def lower(self, state: TrainState, batch) -> jax.stages.Lowered:
    """The program, lowered."""
    return self._run.lower(*self._arguments(state, batch))

  def __call__(self, state: TrainState, batch):
    trained, frozen, batch = self._arguments(state, batch)
    state, metrics, norms = self._run(trained, frozen, batch)
    return dataclasses.replace(state, models=joined(state.models, frozen)), metrics, norms


def make_gradients(config: Config):
  """(state of what is trained, frozen models, batch) -> gradients, scaled; what an update takes of
  all of them; metrics, norms.
  """
  objective, roles = config.objective, states.roles(config)
  drawing = names.imported('training.drawing.StepDraws')(config) if config.draws else None
  zero = config.mesh.zero
  schedule = make_schedule(config.optimizer, config.train.steps)
  # What is differentiated is a sum over tokens times this, nearly a mean: sums over a large batch
  # would pass f16's largest number. A power of two costs no precision.
  unit = 2.0 ** -round(math.log2(config.data.batch_size * config.data.sequence_length))

  def gathered(trained):
    return {
      name: weights.gathered(m, roles[name].config.execution.dtype) for name, m in trained.items()
    }

  def gradients(state: TrainState, frozen, batch):
    check(batch, config.train.accumulation, objective.rows)
    batch = objective.prepare(states.applied(config, joined(state.models, frozen)), batch)
    keys = drawing and drawing.keys(state, batch)
    denominators = {name: or_one(weight) for name, weight in objective.weights(batch).items()}
    # One backward pass serves all terms: they are brought to the denominator of the first, which is
    # divided by at the end.
    first, *others = denominators
    shares = {name: denominators[first] / denominators[name] for name in others}
    # With ZeRO-2 weights are gathered once for all microbatches, with ZeRO-1 for each, and with
    # ZeRO-3 by each layer.
    whole = gathered(state.models) if zero == 2 else None

    def loss_fn(trained, part, scale):
      part, keys = part
      if zero < 3:
        again = gathered(trained) if zero == 1 else whole
        trained = weights.joined(trained, again, reduce=zero == 2)
      models = states.applied(config, joined(trained, frozen))
      terms, sums = objective.sums(drawing.on(models, keys) if drawing else models, part)
      total = sum((terms[name] * shares[name] for name in others), start=terms[first])
      return precision.scale(total * unit, scale), (terms, sums)

    grads, (terms, sums) = accumulate(
      loss_fn, state.models, (batch, keys), state.scale, config.train.accumulation, objective.rows
    )
    divisor = denominators[first] * unit * state.scale.scale

    def squares(g):
      return jnp.sum(jnp.square((g / divisor).astype(jnp.float32)))

    norms = jax.tree.map(lambda g: jnp.sqrt(offload.sum_by_layer(squares, g)), grads)
    norm = optax.tree.norm(norms)
    finite = functools.reduce(
      jnp.logical_and, map(jnp.isfinite, terms.values()), jnp.isfinite(norm)
    )
    metrics = objective.metrics(terms, denominators, sums) | {
      'grad_norm': norm,
      'learning_rate': schedule(state.step - state.scale.skipped_steps),
    }
    if config.model.execution.dtype == 'float16':
      metrics |= {'loss_scale': state.scale.scale}
    measured = update.Measured(divisor, norm, finite, sums.get('load'))
    return grads, measured, metrics, _by_model(norms)

  return gradients


def _by_model(norms):
  """Of one trained model its own, of several by name."""
  trained = {name: tree for name, tree in norms.items() if jax.tree.leaves(tree)}
  return trained if len(trained) > 1 else next(iter(trained.values()))


def _prepared(config, grads, measured: update.Measured):
  """Gradients as the optimizer takes them."""
  grads = jax.tree.map(lambda g: g / measured.divisor, grads)
  return clip(grads, measured.norm, config.optimizer.clip_norm)


def _advance(config, state: TrainState, measured: update.Measured) -> TrainState:
  """What a step does besides updating parameters by their gradients."""
  models, main = state.models, config.objective.main
  moe = config.model.moe
  if moe.experts and moe.bias_rate and not config.adapter.kind:
    # Nothing moves where all experts have the same load.
    load = jnp.where(measured.finite, measured.load, 0)
    models = models | {main: router.balanced(models[main], load, moe.bias_rate)}
  scale = precision.update(state.scale, measured.finite)
  return dataclasses.replace(state, step=state.step + 1, models=models, scale=scale)
