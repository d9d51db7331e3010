"""Is a task that judges otherwise another task, and one that does not the same one?"""

import dataclasses
import functools

import pytest

from evaluation import code
from evaluation.differences import differences
from evaluation.examples import Manner, examples
from evaluation.task import Generate, Task, read

OWN = '''
import functools
import re

from evaluation.task import Generate, Task
from evaluation.text_metrics import Mean

NUMBER = re.compile('[0-9]+')
WORDS = {'yes', 'no', 'perhaps', 'never'}


class Share(Mean):
  name = 'share'

  def of(self, answer, references, row):
    return weighed(answer) * row['weight']


def weighed(answer):
  return float(answer in WORDS)


def extract(text):
  return NUMBER.findall(text)[0]


def passed(text, row, least=1):
  return len(text) >= least and text == row['wanted']


def rows():
  yield {'q': 'one', 'wanted': '1', 'weight': 2}


def get_task():
  of = Generate(extract=extract, passed=functools.partial(passed, least=2))
  return Task(of, rows, prompt='{{ q }}', metrics=('pass@1', Share()))
'''


def written(tmp_path, text: str, number=iter(range(99))) -> Task:
  path = tmp_path / f'own{next(number)}.py'
  path.write_text(text)
  return read(str(path))[1]


@pytest.mark.parametrize(
  'before, after, what',
  [
    ("'[0-9]+'", "'[0-9]{2}'", 'extract'),
    ('[0]', '[-1]', 'extract'),
    ('least and', 'least or', 'passed'),
    ('least=2', 'least=3', 'passed'),
    ("row['weight']", "row['weight'] / 2", 'share'),
    ("'never'", "'often'", 'share'),
    ('answer in', 'answer not in', 'share'),
  ],
)
def test_what_judges_is_told_by_what_it_does(tmp_path, before, after, what):
  assert OWN.count(before) == 1
  was, now = (written(tmp_path, text).values() for text in (OWN, OWN.replace(before, after)))
  (line,) = differences(was, now)
  assert line.startswith(f'code.{what} was ')
  # Of results that older versions wrote no more is known than names.
  assert not differences({name: each for name, each in was.items() if name != 'code'}, now)


def test_what_judges_nothing_and_what_is_elsewhere_is_of_no_account(tmp_path):
  was = written(tmp_path, OWN).values()
  other = OWN.replace("yield {'q'", "row = 1\n  yield {'q'").replace("'one'", "'two'")
  assert not differences(was, written(tmp_path, other).values())
  assert code.digest(str) == code.digest(str) != code.digest(len)
  # Made without a file: by what it does.
  made = {}
  for name, text in (('a', 'x + 1'), ('b', 'x + 1'), ('c', 'x + 2')):
    exec(f'def f(x): return {text}', {'__name__': 'm'}, made)
    made[name] = code.digest(made.pop('f'))
  assert made['a'] == made['b'] != made['c']


def test_a_row_that_is_judged_by_is_part_of_the_question(tmp_path):
  heavier = OWN.replace("'weight': 2", "'weight': 3")
  own, other = (written(tmp_path, text) for text in (OWN, heavier))
  plain = dataclasses.replace(own, kind=Generate(), target='x', metrics=('exact_match',))
  for task, apart in ((own, True), (plain, False)):
    changed = dataclasses.replace(task, data=other.data)
    ((was,), (now,)) = (examples(each, 0, Manner()) for each in (task, changed))
    assert (was.digest != now.digest) is apart
  # Whatever a function gives as a row, once and again.
  for value in ({'b', 'a'}, object(), {1: len}, functools.partial(print)):
    odd = dataclasses.replace(own, data=lambda value=value: iter([{'q': 'x', 'of': value}]))
    assert len({examples(odd, 0, Manner())[0].digest for _ in range(2)}) == 1
