"""Has every file of real data a ready task, and does each ask what its file holds?"""

import dataclasses

import pytest

from data.records import READERS
from evaluation import task as tasks
from evaluation.examples import Asker, Manner, examples
from evaluation.task import Classification, Generate, MultipleChoice, Perplexity
from tests.evaluation.test_label_scores import generator

# Formats of files that nobody has put there.
ABSENT = {'advbench', 'bbq', 'dated', 'dated_questions', 'winobias'}
# What no task is of, and why.
UNASKED = {
  'instructions/seed_tasks.jsonl': 'to train on',
  'bias/winogender_templates.csv': 'filled in, they are winogender_sentences.csv',
}


def test_every_file_is_of_a_task(shared_data):
  """Of one that asks its rows, or shows some as examples; or it is said why of none."""
  named = set()
  for name in tasks.known():
    _, task = tasks.read(name)
    named |= {source for source in (task.data, task.shots) if isinstance(source, str)}
  files = {
    str(path.relative_to(shared_data))
    for path in shared_data.rglob('*')
    if path.suffix.removeprefix('.') in (*READERS, tasks.TEXT)
  }
  assert files - named == UNASKED.keys()


def test_of_every_other_preference_the_second_is_right():
  task = tasks.read('hh_preferences')[1]
  turns = [
    {'role': 'user', 'content': 'Hi {{ x }}'},
    {'role': 'assistant', 'content': 'Yes?'},
    {'role': 'user', 'content': 'Why?'},
  ]
  given = [{'id': i, 'prompt': turns, 'chosen': 'So.', 'rejected': 'No.'} for i in range(6)]
  task = dataclasses.replace(task, data=lambda: iter(given))
  asked = examples(task, 0, Manner())
  assert [each.truth for each in asked] == [0, 1] * 3
  assert all(each.choices[each.truth] == 'So.' for each in asked)
  text = Asker(generator('llama'), task, Manner()).text(asked[0])
  assert text == 'Human: Hi {{ x }}\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:'


@pytest.mark.slow
def test_ready_tasks_ask_of_real_data(shared_data):
  """Each gives questions with an answer, and shows examples where it can."""
  for name in sorted({*tasks.known()} - ABSENT):
    _, task = tasks.read(name)
    asked = examples(task, 0, Manner(str(shared_data), limit=3))
    assert len(asked) == 3
    if not isinstance(task.kind, Perplexity):
      assert all(len(each.references or each.choices) for each in asked)
    if (
      isinstance(task.kind, Classification | Generate)
      or task.prompt
      and isinstance(task.kind, MultipleChoice)
    ):
      assert len(examples(task, 2, Manner(str(shared_data), limit=3))[0].shots) == 2
