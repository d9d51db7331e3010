"""Is a run asked what it is to be asked, is the best checkpoint the one that answers best, and does
the run not notice?
"""

import dataclasses
import json

import jax
import pytest

from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from evaluation import running, task
from evaluation.examples import Manner
from model.params import named_leaves
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import assert_same, on, run_here, tiny
from training.config import Config, TrainConfig
from training.tasks import EvaluationConfig
from workdir.checkpoint import Checkpoints
from workdir.metrics import read_metrics
from workdir.open import open_run
from workdir.progress import Progress, cost_of
from workdir.tasks import TaskAsker

BEST = 'highest letters-1/accuracy (sum)'
TASK = '''"""Which letter follows?"""

from evaluation.task import MultipleChoice, Task


def rows():
  for i in range(20):
    yield {'first': chr(97 + i), 'choices': [chr(97 + i), chr(98 + i)], 'answer': 1}


def get_task() -> Task:
  return Task(
    MultipleChoice('choices', 'answer'),
    rows,
    prompt='After {{ first }} comes',
    target='{{ first }}',
  )
'''


@pytest.fixture
def letters(tmp_path):
  path = tmp_path / 'letters.py'
  path.write_text(TASK)
  return str(path)


def asked(config, best, evaluation):
  train = dataclasses.replace(config.train, best=best)
  return dataclasses.replace(config, train=train, evaluation=evaluation)


@pytest.mark.slow
def test_it_is_asked_and_judged(letters, corpus, tmp_path):
  """What metrics.jsonl says is what evaluate.py says of the same checkpoint, and the best one is
  the first of those that answer best.
  """
  evaluation = {'tasks': (letters,), 'every': 2, 'shots': 1, 'limit': 12}
  config = on(corpus, train={'steps': 5, 'save_every': 1, 'keep_last': 9})
  config = asked(config, BEST, EvaluationConfig(**evaluation))
  run_here(config, tmp_path / 'run')

  lines = {line['step']: line for line in read_metrics(tmp_path / 'run' / 'metrics.jsonl')}
  said = {step: line[BEST[8:]] for step, line in lines.items() if BEST[8:] in line}
  assert list(said) == [2, 4, 5]
  name, read = task.read(letters)
  for step in said:
    model = Generator.load(tmp_path / 'run', str(step), config.mesh)
    output = tmp_path / str(step)
    output.mkdir()
    (summary,), _ = running.evaluate(model, {name: read}, [1], Manner(limit=12), {}, output)
    assert summary.metrics['accuracy (sum)']['value'] == said[step]
    mine = tmp_path / 'run' / 'evaluations' / str(step) / 'letters-1.jsonl'
    assert mine.read_text() == (output / 'letters-1.jsonl').read_text()
  assert Checkpoints(tmp_path / 'run').best() == max(said, key=said.get)
  assert 'letters-1/accuracy (sum), first, last' in (tmp_path / 'run' / 'report.md').read_text()


@pytest.mark.slow
def test_the_run_does_not_notice_and_goes_on(letters, corpus, tmp_path):
  asked = EvaluationConfig(tasks=(letters,), every=1, limit=8)
  config = on(corpus, train={'steps': 3, 'save_every': 2})
  run_here(config, tmp_path / 'plain')
  config = dataclasses.replace(config, evaluation=asked)
  # What a start that came to nothing has left is of nobody.
  (tmp_path / 'run' / 'evaluations' / '0').mkdir(parents=True)
  run_here(config, tmp_path / 'run')
  plain, run = (
    named_leaves(open_run(tmp_path / name, mesh=MeshConfig(data=1)).model)
    for name in ('plain', 'run')
  )
  assert_same(plain, run)
  # What was said after the checkpoint that it goes on from is asked again.
  (tmp_path / 'run' / 'evaluations' / '4').mkdir()
  (tmp_path / 'run' / 'evaluations' / '4' / 'letters-0.json').write_text(json.dumps({}))
  again = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
  run_here(again, tmp_path / 'run')
  assert sorted(path.name for path in (tmp_path / 'run' / 'evaluations').iterdir()) == list('1234')


def test_costs_are_lowest_where_it_is_best():
  evaluation = {'validation_loss': 2.0, 'validation_accuracy': 0.5, 'a-0/f1': 0.75}
  assert cost_of('lowest validation_loss', evaluation) == 2.0
  assert cost_of('highest a-0/f1', evaluation) == -0.75
  assert cost_of('highest a-0/f1', {'validation_loss': 2.0}) is None
  with pytest.raises(ValueError, match="'validation_acc' is unknown; did you mean 'validation_acc"):
    cost_of('highest validation_acc', evaluation)
  progress = Progress(of='highest a-0/bits per byte').after(-0.5).after(-0.25)
  assert progress.best == -0.5 and 'no better a-0/bits per byte in 1' in progress.impatient(1)


class _Records:
  def record(self, step):
    return {'progress': {'best': 1.0, 'waited': 2}}


def test_another_metric_begins_anew():
  assert Progress.resume(_Records(), 4) == Progress(1.0, 2)
  assert Progress.resume(_Records(), 4, BEST) == Progress(of=BEST)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'best': 'highest letters-0/acuracy (sum)'}, r"did you mean 'letters-0/accuracy \(sum\)'"),
    ({'best': 'lowest letters-0/accuracy (sum)'}, r"say 'highest letters-0/accuracy \(sum\)'"),
    ({'tasks': ('nowhere.py',)}, 'nowhere.py is no file'),
    ({'tasks': ('arc_easy',), 'data': '/nowhere'}, 'is not there; give the directory'),
    ({'shots': 40}, '40'),
  ],
  ids=str,
)
def test_what_cannot_be_asked_is_refused_at_the_start(changes, words, letters, tmp_path):
  best = changes.pop('best', 'lowest validation_loss')
  evaluation = EvaluationConfig(**{'tasks': (letters,), 'every': 2} | changes)
  config = asked(tiny(), best, evaluation)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with pytest.raises((ValueError, OSError), match=words):
    TaskAsker(config, ByteTokenizer(), mesh, tmp_path, 0)


def test_configs_that_say_half_of_it():
  with pytest.raises(ValueError, match='tasks are asked every so many steps'):
    EvaluationConfig(tasks=('arc_easy',))
  with pytest.raises(ValueError, match="train.best='validation_loss' must be lowest or highest"):
    TrainConfig(best='validation_loss')
  with pytest.raises(ValueError, match='is of a task, and evaluation.tasks names none'):
    Config(train=TrainConfig(best=BEST))
