"""Is a run that cannot generate while it trains refused before anything is prepared?"""

import dataclasses

import jax
import pytest

import train
from model.execution import ExecutionConfig
from remote.address import Address
from tests.training.conftest import tiny
from training.tasks import EvaluationConfig
from workdir import able

TASKS = EvaluationConfig(tasks=('arc_easy',), every=1)


@pytest.mark.parametrize('asks', ['evaluation.tasks=arc_easy', 'train.sample_every=5'])
def test_it_is_refused_before_the_data_is_read(monkeypatch, tmp_path, asks):
  monkeypatch.setattr(jax, 'process_count', lambda: 8)
  monkeypatch.setattr(train.program, 'read', lambda *_: pytest.fail('the data was read'))
  config = tiny(data={'cache_dir': str(tmp_path / 'cache')}, train={'sample_every': 5})
  (tmp_path / 'text').write_text('text')
  source = dataclasses.replace(config.data.sources[0], path=str(tmp_path / 'text'))
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(source,)))
  if asks.startswith('evaluation'):
    config = dataclasses.replace(config, evaluation=TASKS)
  with pytest.raises(SystemExit, match=f'{asks} in 8 processes.*leave {asks.split("=")[0]}'):
    train.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_tasks_are_not_asked_in_a_bucket():
  config = dataclasses.replace(tiny(), evaluation=TASKS)
  words = 'evaluation.tasks=arc_easy with --workdir=gs://bucket/run: .*give a --workdir on a disk'
  with pytest.raises(NotImplementedError, match=words):
    able.check(config, Address('gs://bucket/run'))
  able.check(tiny(train={'sample_every': 5}), Address('gs://bucket/run'))
  able.check(tiny(), Address('gs://bucket/run'))


def test_what_holds_no_weights_on_the_device_is_refused():
  model = {'execution': ExecutionConfig(remat='full')}
  config = tiny(model=model, train={'offload_parameters': True, 'sample_every': 5})
  with pytest.raises(NotImplementedError, match='train.offload_parameters, which keeps'):
    able.check(config, '/run')
