"""Is a metric that no evaluation says refused before the first step, whatever the objective?"""

import dataclasses

import pytest
from test_rollouts import FAMILY, config as rollout_config, place  # noqa: F401, a fixture

from data.config import SourceConfig
from tests.training.conftest import on, run_here
from workdir.metrics import read_metrics


def asking(config, best, **train):
  return dataclasses.replace(config, train=dataclasses.replace(config.train, best=best, **train))


@pytest.mark.slow
def test_what_no_evaluation_says_is_refused_before_a_step(corpus, tmp_path):
  (corpus / 'other.txt').write_text('another source\n' * 200)
  sources = tuple(
    SourceConfig(kind='text', path=str(corpus / name)) for name in ('text.txt', 'other.txt')
  )
  config = on(corpus, data={'sources': sources}, train={'steps': 1, 'eval_every': 1})
  for best in (
    'lowest validation_los',
    'highest validation_accuracy',
    'lowest validation_loss/oter',
  ):
    with pytest.raises(SystemExit, match='train.best: the metric=.* is unknown'):
      run_here(asking(config, best), tmp_path / 'run', quick=False)
  assert not (tmp_path / 'run' / 'checkpoints').exists()
  # What is refused is what is not said, and nothing else.
  run_here(asking(config, 'lowest validation_loss/other'), tmp_path / 'run', quick=False)
  (line,) = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  assert 'validation_loss/other' in line


@pytest.mark.slow
def test_of_rollouts_too(place, tmp_path):  # noqa: F811
  made = rollout_config(place, FAMILY, train={'steps': 1, 'eval_every': 1})
  with pytest.raises(SystemExit, match="did you mean 'validation_reward'"):
    run_here(asking(made, 'highest validation_rewards'), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'rollouts.jsonl').exists()
