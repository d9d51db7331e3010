"""Is what a model could not read, or did not say, counted beside its score?"""

import dataclasses
import weakref

import pytest

from evaluation import page, writing
from evaluation.examples import fitted
from tests.evaluation.test_label_scores import generator
from tests.evaluation.test_tasks import ROWS, WRITE, evaluated, lines_of


def check_cut() -> None:
  """Two of five prompts are too long: what is written is what stands behind their end alone."""
  model = generator('llama')
  room = model.context - WRITE.kind.max_new_tokens
  prompts = [f'{"xyz " * 40}so {i}' for i in range(2)] + [row['q'] for row in ROWS[:3]]
  ends = [text[-(room - 2) :] for text in prompts]  # behind what begins a text, before a space
  lines = []
  for texts in (prompts, ends):
    rows = [ROWS[0] | {'q': text} for text in texts]
    more, scored = lines_of(dataclasses.replace(WRITE, data=lambda rows=rows: iter(rows)))
    assert [len(ids) for ids in scored._ids[:2]] == [room] * 2
    assert scored._ids[0][0] == model.tokenizer.bos
    lines.append(more)
  assert [line['cut'] for line in lines[0]] == [1, 1, 0, 0, 0]
  assert [line['cut'] for line in lines[1]] == [0] * 5
  assert [line['answers'] for line in lines[0]] == [line['answers'] for line in lines[1]]


@pytest.mark.slow
def test_prompts_too_long_to_write_behind_are_cut_on_the_left_and_counted(tmp_path, monkeypatch):
  check_cut()
  rows = [ROWS[0] | {'q': 'x' * 200}, *ROWS[1:5]]
  asked = {'write': dataclasses.replace(WRITE, data=lambda: iter(rows))}
  (summary,), failed = evaluated(tmp_path, shots=(0,), asked=asked)
  assert not failed and summary.counts['cut'] == 1
  said = 'write-0: 1 of 5 prompts were cut on the left to fit the context'
  assert page.notes([summary]) == [said, *page.notes([summary])[1:]]

  # Cut on the right, a prompt does not end as it did.
  monkeypatch.setattr(
    'evaluation.scoring.fitted', lambda ids, limit: fitted(ids[::-1], limit)[::-1]
  )
  with pytest.raises(AssertionError):
    check_cut()


@pytest.mark.slow
def test_a_model_that_writes_nothing_is_counted(tmp_path, monkeypatch):
  """Whatever it writes first, of ASCII, is a stop: every answer is empty, and scored as one."""
  monkeypatch.setattr(generator('llama'), 'vocabulary', 128)
  # An engine of this vocabulary is nobody else's.
  monkeypatch.setattr(writing, '_spare', weakref.WeakKeyDictionary())
  kind = dataclasses.replace(WRITE.kind, stops=tuple(map(chr, range(128))))
  task = dataclasses.replace(WRITE, kind=kind)
  (summary,), failed = evaluated(tmp_path, shots=(0,), asked={'write': task})
  assert not failed and summary.counts['empty'] == len(ROWS)
  assert summary.counts['endless'] == summary.counts['failed'] == 0
  assert {metric['value'] for metric in summary.metrics.values()} == {0.0}
  assert {metric['n'] for metric in summary.metrics.values()} == {len(ROWS)}
  assert page.notes([summary]) == ['write-0: 20 of 20 answers, or texts, are empty']
