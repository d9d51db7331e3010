"""What does a run that goes on do otherwise than before, and does its learning rate jump?

A rate, a schedule or a length may change without the run being another one. Each of them also
decides the rate at every step: a cosine over 24 steps that is made one over 48 goes from its end
back to its middle.
"""

import math

from objectives.objective import Batches
from training import config as configs
from training.config import Config
from training.optimizer import make_schedule
from workdir.checkpoint import Checkpoints

JUMP = 1.5  # of the rate: a factor, up or down, that no schedule is meant to have within a step


def described(old: Config, new: Config, step: int, updates: int) -> list[str]:
  """Lines for the log of what changed at a checkpoint, [] where nothing did.

  step: of the checkpoint. updates: how many it has behind it, steps that were skipped left out.
  """
  lines = configs.changes(old, new).values()
  if not lines:
    return []
  was, now = (float(make_schedule(c.optimizer, c.train.steps)(updates)) for c in (old, new))
  said = [f'changed since checkpoint {step}: ' + '; '.join(lines)]
  if math.isclose(now, was, rel_tol=1e-5):
    return said
  said.append(f'learning rate of step {step + 1}: {now:.4g}, before the change {was:.4g}')
  ratio = now / was if was else math.inf
  if not 1 / JUMP < ratio < JUMP:
    times = f'{ratio:.3g} times what' if was else 'from 0, which'
    said.append(
      f'WARNING: the learning rate jumps here, to {times} it was to be. If that is not meant, '
      'lower optimizer.learning_rate, or go on with the schedule and train.steps that the run had; '
      "schedule='wsd' and 'constant' can be made longer before they decay"
    )
  return said


def restore_order(batches: Batches, position: dict, allow_change: bool, log) -> None:
  """Goes on in the data where `position` was taken; in other data, if that is allowed, from its
  beginning.
  """
  try:
    batches.restore(position)
  except ValueError as error:
    if not allow_change:
      raise
    log(
      f'WARNING: {error}. Because of --allow_config_change, the new order starts at its beginning'
    )


def check_same_model(name: str, reference: dict, place: str, log) -> None:
  """Raises ValueError where the config names another run at `place` for a model than the one that
  the checkpoint has by this reference.

  Where no run is there, the model was moved: the reference tells where it is (convert.py rebase).
  """
  step, others = reference['step'], Checkpoints(place, log=log)
  known = others.latest() is not None
  if step in others.steps():
    known = others.reference(step)['digest'] != reference['digest']
  if known:
    raise ValueError(
      f'{name!r} of this run is checkpoint {step} of {reference["directory"]}, and the config '
      f'names {place}, which is another model; name the first one, or begin a run with that'
    )
