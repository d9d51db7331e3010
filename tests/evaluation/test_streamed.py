"""Does what an evaluation holds in memory depend on how many questions there are, and does it say
how long the others take?
"""

import dataclasses
import gc
import json
import tracemalloc

import pytest

from decode.generator import Generator
from evaluation import running
from evaluation.examples import Manner, Questions, digest_of, examples
from evaluation.measures import measures
from evaluation.scoring import Scorer
from evaluation.task import MultipleChoice, Task

QUIET = Manner()
MODEL = object.__new__(Generator)  # that is asked nothing
LONG = 8000  # characters of a question


class Told(Scorer):
  """Of a task without a model: the first choice is said to be right."""

  block = 8

  def __init__(self, model, task, manner, asked):
    self.task, self.asked, self.manner, self.measures = task, asked, manner, measures(task)

  def guessed(self, asked):
    return len(asked.choices)

  def scores(self, asked):
    right = [float(each.truth == 0) for each in asked]
    return [{'stats': {m.name: [x, 1.0] for m in self.measures}} for x in right]


def task_of(path, n: int) -> Task:
  """Of a file of n long questions of 4 choices, the second half of which are of another kind."""
  with open(path, 'w') as file:
    for i in range(n):
      row = {'q': f'{i} '.ljust(LONG, 'x'), 'options': [f'{i} {j}' for j in range(4)], 'a': i % 4}
      file.write(json.dumps(row | {'kind': f'{2 * i // n}'}) + '\n')
  return Task(MultipleChoice('options', 'a'), str(path), prompt='{{ q }}', by='kind')


def evaluated(task, output, manner=QUIET, k=0):
  """The summary, and bytes of Python at the most meanwhile."""
  output.mkdir(exist_ok=True)
  tracemalloc.start()
  (summary,), failed = running.evaluate(MODEL, {'t': task}, [k], manner, {}, output, str)
  _, most = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert not failed
  return summary, most


@pytest.fixture
def collected():
  """What checks of annotations leave behind, in tests alone, is collected as it comes."""
  before = gc.get_threshold()
  gc.set_threshold(2000, 20, 1000)
  yield
  gc.set_threshold(*before)


@pytest.mark.parametrize('k', [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.usefixtures('collected')
def test_memory_is_of_what_is_under_way(tmp_path, monkeypatch, k):
  monkeypatch.setattr(running, 'scorer', Told)
  most = {}
  for n in (20, 100):
    task = task_of(tmp_path / f'{n}.jsonl', n)
    summary, most[n] = evaluated(task, tmp_path / f'{n}', k=k)
    assert summary.n == n and summary.metrics['accuracy (sum)']['value'] == 0.25
    assert {value: of['accuracy (per character)']['n'] for value, of in summary.by.items()} == {
      '0': n // 2,
      '1': n // 2,
    }
    assert summary.prompts == digest_of(examples(task, k, QUIET)) and summary.chance == 0.25
  # Of each question numbers are kept, and not its text.
  assert most[100] < most[20] + 80 * LONG / 4


def test_questions_are_those_of_the_list_and_are_gone_through_again(tmp_path):
  task = task_of(tmp_path / 'q.jsonl', 40)
  for k, limit in ((0, 0), (1, 7)):
    manner = Manner(limit=limit, seed=1)
    asked = Questions(task, k, manner)
    assert len(asked) == (limit or 40)
    assert [*asked] == [*asked] == examples(task, k, manner)
  calls = []

  def drawn():
    calls.append(1)
    return iter([{'q': 'a', 'options': ['b', 'c'], 'a': 0}] * 3)

  asked = Questions(dataclasses.replace(task, data=drawn, by=''), 0, QUIET)
  assert len([*asked]) == len(asked) == 3 and len(calls) == 1, 'a function is asked once'
  with pytest.raises(ValueError, match='has no rows; give a file that has some'):
    Questions(dataclasses.replace(task, data=lambda: iter(())), 0, QUIET)


def test_data_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
  task = task_of(tmp_path / 'q.jsonl', 100)

  other = tmp_path / 'other.jsonl'
  task_of(other, 98)

  class Changing(Told):
    def scores(self, asked):
      if other.exists():
        other.replace(tmp_path / 'q.jsonl')
      return super().scores(asked)

  monkeypatch.setattr(running, 'scorer', Changing)
  done, failed = running.evaluate(MODEL, {'t': task}, [0], QUIET, {}, tmp_path, str)
  assert not done and 'is of another question' in failed['t']


@pytest.mark.parametrize(
  'seconds, said',
  [(0.4, '0 s'), (99.4, '99 s'), (101.0, '2 min'), (5940.0, '99 min'), (36_000.0, '10 h 0 min')],
)
def test_durations(seconds, said):
  assert running.duration(seconds) == said


def test_progress_says_how_long_the_others_take(monkeypatch):
  """Of what was done here, not of what was there already; and not at once, nor again and again."""
  now, said = [1000.0], []
  monkeypatch.setattr(running.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(running.sys.stdout, 'isatty', lambda: False)
  progress = running.ProgressLine('t, 0 shots', 10_000, 2_000, said.append)
  for seconds, done in ((19, 2_100), (21, 2_010), (30, 2_500), (100, 3_000), (900, 10_000)):
    now[0] = 1000.0 + seconds
    progress.at(done)
  progress.end()
  assert said == [
    't, 0 shots: 2010 of 10000, 20%',
    't, 0 shots: 3000 of 10000, 30%, 10 a second, 12 min left',
    't, 0 shots: 10000 in 15 min',
  ]
