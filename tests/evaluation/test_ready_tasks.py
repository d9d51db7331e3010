"""Has every file of real data a ready task, and does each ask what its file holds?"""

import dataclasses

import pytest

from data.records import READERS
from evaluation import library, task as tasks
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


def test_the_next_line_stands_where_the_text_ends(monkeypatch):
  """Of what is asked and written the module is made again, and of no module all is asked."""
  body = ''.join(
    f'  value_{i} = {i} * other\n\n' + f'  more({i}, value)\n' * (i % 3) for i in range(30)
  )
  texts = (f'def one():\n{body}', 'x = 1\n' * 40, 'first_line = 12345\n' * 40)
  monkeypatch.setattr(library, 'held_out', lambda: texts)
  rows = [*library.next_lines()]
  for row in rows:
    (text,) = (text for text in texts if row['before'] + row['written'] in text)
    end = text.index(row['before'] + row['written']) + len(row['before'] + row['written'])
    assert text[end : end + 1] == '\n' and row['written'].strip() == row['line']
    assert library.BEFORE[0] <= row['before'].count('\n') <= library.BEFORE[1]
    assert not row['before'].endswith('  ') and row['line'] != 'x = 1', 'which is too short'
  of_first = [row in [*library._lines_of(texts[0])] for row in rows]
  assert of_first[:4] == [True, False] * 2 and 4 <= sum(of_first) <= library.OF_MODULE
  _, task = tasks.read('next_lines')
  asked = examples(task, 2, Manner(limit=4))
  text = Asker(generator('llama'), task, Manner()).text(asked[0])
  assert text.endswith(asked[0].row['before']) and asked[0].references == (asked[0].row['line'],)
  assert all(f'{shown}{answer}\n\n' in text for shown, answer in asked[0].shots)
  assert task.kind.passed(asked[0].row['line'], asked[0].row)
  assert not task.kind.passed('', asked[0].row)


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
