"""Is patience counted as configured, and does a step that is not finite stop the run with
everything that a person needs to know?
"""

import dataclasses
import math
import types

import jax.numpy as jnp
import pytest
from hypothesis import given, strategies as st

from model.execution import ExecutionConfig
from objectives.preference import Preference
from tests.training.conftest import tiny
from training.hints import worse_than_guessing
from workdir.progress import Progress, check_finite


class Records:
  """Checkpoints as far as Progress and check_finite look at them."""

  directory = 'runs/x/checkpoints'

  def __init__(self, steps=(), progress=None):
    self._steps, self._progress, self.waited = list(steps), progress, False

  def steps(self):
    return self._steps

  def wait(self):
    self.waited = True

  def record(self, step):
    return {'progress': self._progress}


@given(st.lists(st.floats(0, 10), max_size=12))
def test_best_and_waited_are_of_the_losses_seen(losses):
  progress = Progress()
  for loss in losses:
    progress = progress.after(loss)
  if losses:
    assert progress.best == min(losses)
    assert progress.waited == len(losses) - 1 - losses.index(min(losses))
  resumed = Progress.resume(Records(progress=progress.record()), 5)
  assert resumed == progress


def test_a_run_without_checkpoint_has_no_progress():
  assert Progress.resume(Records(), 0) == Progress() and Progress().best == math.inf


def test_a_loss_that_is_not_a_number_is_no_progress():
  for loss in (math.nan, math.inf, -math.inf):
    assert Progress(2.0, 0).after(loss) == Progress(2.0, 1)
    assert Progress().after(loss) == Progress(math.inf, 1)


def test_patience_counts_evaluations_without_progress():
  assert not Progress(1.0, 2).impatient(3)
  assert '3 evaluations' in Progress(1.0, 3).impatient(3)
  assert not Progress(1.0, 1000).impatient(0)


def test_a_tuned_model_that_begins_worse_than_guessing_is_told():
  config = dataclasses.replace(tiny(), init='runs/base')
  begun = {'step': 1, 'loss': math.log(tiny().model.V) + 0.01}
  assert 'is the tokenizer, and the chat template' in worse_than_guessing(begun, config)
  for done, of in (
    (begun | {'loss': math.log(tiny().model.V) - 0.01}, config),
    (begun | {'step': 2}, config),
    (begun, tiny()),
    (None, config),
  ):
    assert not worse_than_guessing(done, of)
  # A loss that is not of tokens has another beginning: IPO's is (1 / 2 beta)^2.
  ipo = dataclasses.replace(config, objective=Preference(variant='ipo'))
  assert not worse_than_guessing(begun | {'loss': 25.0}, ipo)


NORMS = {'blocks': {'q': jnp.float32(3), 'k': jnp.float32(math.nan)}, 'head': jnp.float32(0.5)}
BAD = {'step': 7, 'loss': math.nan, 'grad_norm': math.nan}


def test_the_error_names_step_modules_and_checkpoint():
  records = Records([2, 4])
  with pytest.raises(FloatingPointError) as error:
    check_finite(BAD, NORMS, tiny(), records)
  said = str(error.value)
  for part in (
    'step 7',
    'loss nan',
    'blocks.q 3',
    'blocks.k nan',
    'head 0.5',
    "Not finite: ['blocks', 'blocks.k']",
    'checkpoint 4 in runs/x/checkpoints',
    'optimizer.learning_rate',
    'train.nonfinite=skip',
  ):
    assert part in said
  assert records.waited  # for the save in flight, which may be the last good one


def test_no_checkpoint_yet_is_said():
  with pytest.raises(FloatingPointError, match='there is none yet'):
    check_finite(BAD, NORMS, tiny(), Records())


@pytest.mark.parametrize(
  'metrics',
  [BAD, BAD | {'loss': 1.0}, BAD | {'grad_norm': 1.0}, BAD | {'loss': math.inf, 'grad_norm': 1.0}],
)
def test_either_number_is_enough(metrics):
  with pytest.raises(FloatingPointError):
    check_finite(metrics, NORMS, tiny(), Records())
  check_finite(metrics, NORMS, tiny(train={'nonfinite': 'skip'}), Records())


def test_finite_steps_and_missing_steps_pass():
  check_finite(None, None, tiny(), None)
  check_finite({'step': 1, 'loss': 1.0, 'grad_norm': 2.0}, None, tiny(), None)


def test_f16_overflows_pass_until_the_scale_can_go_no_lower():
  config = tiny(model={'execution': ExecutionConfig(dtype='float16')})
  check_finite(BAD | {'loss_scale': 2.0}, NORMS, config, types.SimpleNamespace())
  with pytest.raises(FloatingPointError):
    check_finite(BAD | {'loss_scale': 1.0}, NORMS, config, Records())


@pytest.mark.parametrize(
  'init, said', [('', 'model.init_scale, train.seed'), ('x', '--config.init=x')]
)
def test_before_any_update_no_rate_is_to_blame(init, said):
  done = {'step': 1, 'loss': math.nan, 'grad_norm': 1.0}
  config = dataclasses.replace(tiny(), init=init)
  with pytest.raises(FloatingPointError) as error:
    check_finite(done, {'head': jnp.float32(math.nan)}, config, Records())
  text = str(error.value)
  assert 'step 1: loss nan' in text and 'Last good checkpoint: there is none yet. No upd' in text
  assert said in text and 'learning_rate' not in text and '\n' not in text
