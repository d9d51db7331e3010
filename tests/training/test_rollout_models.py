"""Is a rollout as the config says: do reference and critic begin as the run that it names, and are
answers the same ones, however many are written side by side?
"""

import dataclasses

import jax
import numpy as np
import pytest

from tests.training.conftest import assert_close, run_here
from tests.training.test_rollouts import (
  CRITICAL,
  FAMILY,
  Started,
  asked,
  config,
  metrics_of,
  policy_of,
)


@pytest.mark.slow
@pytest.mark.long
def test_so_many_rows_side_by_side_change_no_answer(tmp_path):
  """Of groups of four, in rows for one and a half of them, which some join later than others."""
  batches = []
  for rows in (0, 6):
    made = config(asked(tmp_path), dataclasses.replace(FAMILY, rollout_rows=rows))
    with Started(made, tmp_path) as run:
      run.rollouts.take(run.state)
      assert run.stage._actor._engine.sizes.rows == (rows or 16)
      batches.append(run.rollouts._batch)
  whole, few = batches
  for name in ('tokens', 'targets', 'weights', 'scores'):
    np.testing.assert_array_equal(getattr(whole, name), getattr(few, name), err_msg=name)
  np.testing.assert_allclose(whole.behaviour, few.behaviour, atol=2e-5)


@pytest.mark.slow
@pytest.mark.long
def test_a_reference_and_a_critic_of_another_run(tmp_path):
  """By a rate at which none of them moves further than rounding shows."""
  made = config(asked(tmp_path), FAMILY, train={'steps': 1, 'seed': 5})
  other = tmp_path / 'other'
  run_here(made, other)
  objective = dataclasses.replace(CRITICAL, critic=str(other), reference=str(other))
  still = {'learning_rate': 1e-7, 'schedule': 'constant'}
  critical = config(tmp_path, objective, optimizer=still, train={'steps': 2, 'save_every': 2})
  run_here(critical, tmp_path / 'run')
  begun, policy = policy_of(made, other, 1), policy_of(critical, tmp_path / 'run', 2)
  critic = policy_of(critical, tmp_path / 'run', 2, 'critic')
  assert_close(critic, begun, 1e-6)
  apart = zip(jax.tree.leaves(critic), jax.tree.leaves(begun), strict=True)
  assert any((a != b).any() for a, b in apart), 'the critic is not trained'
  apart = zip(jax.tree.leaves(policy), jax.tree.leaves(begun), strict=True)
  assert any(np.abs(a - b).max() > 0.01 for a, b in apart)
  first, second = (line for line in metrics_of(tmp_path / 'run') if 'kl' in line)
  assert first['kl'] > 0.01 and first['log_ratio'] < 1e-4 > second['log_ratio']
