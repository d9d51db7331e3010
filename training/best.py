"""Does an evaluation say what `train.best` names? Known before the first step, by shapes alone."""

import jax
import numpy as np

import names
from training import state as states
from training.config import Config
from training.evaluation import verdict_of
from training.program import placed
from training.state import TrainState


def check(config: Config, prepared, put, target: TrainState) -> None:
  """Raises ValueError where it is a metric of the validation data and none of those has its name.

  put: as of training.evaluation.make_evaluate. target: the state, abstract. On the mesh in context.
  """
  if config.train.best_of_task:  # workdir/tasks.py checks it
    return
  objective = config.objective

  def judged(models, batch):
    return objective.judged(states.applied(config, models), batch)

  batch = jax.tree.map(lambda x: placed(x, config), objective.batch_like(config.data))
  sums = jax.eval_shape(judged, target.models, batch)
  ones = jax.tree.map(lambda x: np.ones(x.shape), sums)
  held_out = objective.validation_batches(prepared, config.data, put.rows)
  sources = held_out.parts() if hasattr(held_out, 'parts') else {}
  said = verdict_of(objective, prepared, dict.fromkeys(sources or [''], ones))
  names.check('train.best: the metric', config.train.best.split(maxsplit=1)[1], said)
