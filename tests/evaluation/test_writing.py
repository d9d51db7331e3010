"""Do tasks that follow one another write with one engine, as each would with its own?"""

import json
from types import SimpleNamespace

import pytest

from evaluation import running, writing
from evaluation.examples import Manner
from evaluation.task import Generate, Task
from tests.decode.test_engine import compilations
from tests.evaluation.test_label_scores import generator

PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 4, 4]]


def test_the_next_task_of_these_sizes_compiles_nothing():
  model, kind = generator('llama'), Generate(max_new_tokens=4, temperature=1.0)
  first = [*writing.answers(model, PROMPTS, kind, 0)]
  with compilations() as names:
    assert [*writing.answers(model, PROMPTS, kind, 0)] == first
    other = [*writing.answers(model, PROMPTS, kind, 1)]
  assert not names and other != first

  # Nor does one behind a user who asks for no more than what it wants.
  with compilations() as names:
    some = writing.answers(model, PROMPTS, kind, 0)
    assert next(some) == first[0]
    some.close()
    assert [*writing.answers(model, PROMPTS, kind, 1)] == other
  assert not names

  # Who is not done keeps its engine, and so do two at a time.
  begun = writing.answers(model, PROMPTS, kind, 0)
  assert next(begun) == first[0]
  assert [*writing.answers(model, PROMPTS, kind, 1)] == other
  assert [*begun] == first[1:]
  longer = Generate(max_new_tokens=6, temperature=1.0)
  assert [answers[0].text[:1] for answers in writing.answers(model, PROMPTS, longer, 0)] == [
    answers[0].text[:1] for answers in first
  ]


@pytest.mark.parametrize(
  'prompts, rows, tokens',
  [
    ([20] * 40, 16, 32),
    ([60] * 40, 16, 64),
    ([60] * 40, 1, 64),
    ([70] * 40, 16, 32),  # 96 read of each, not 128
    ([70] * 40, 2, 128),  # in one call each, not 3
    ([1] * 9, 4, 1),  # what a decoder begins with
    ([3000] * 4, 4, 256),
  ],
)
def test_prompts_are_read_in_parts_that_waste_little(prompts, rows, tokens):
  assert writing._part(prompts, rows) == tokens


def test_what_ctrl_c_cut_short_is_no_score(tmp_path, monkeypatch):
  """Over stages, where the generator gives what there is of the batch that it came in."""
  task = Task(
    Generate(max_new_tokens=4),
    lambda: ({'q': f'question {i}'} for i in range(writing.BATCH + 2)),
    prompt='{{ q }}',
    target='x',
    metrics=('exact_match',),
  )
  batches = [['length'] * writing.BATCH, ['stop', 'interrupted']]
  model = generator('llama')
  monkeypatch.setattr(writing, '_stages', lambda model: True)

  def in_batches(prompts, size, **options):
    return ([SimpleNamespace(text='x', finish=f) for f in finishes] for finishes in batches)

  monkeypatch.setattr(model, 'in_batches', in_batches, raising=False)
  arguments = model, {'t': task}, [0], Manner(), {'workdir': 'x'}, tmp_path
  with pytest.raises(KeyboardInterrupt):
    running.evaluate(*arguments)
  assert len((tmp_path / 't-0.jsonl').read_text().splitlines()) == writing.BATCH
  assert 'metrics' not in json.loads((tmp_path / 't-0.json').read_text())

  # It goes on behind them; and who ends early all the same says nothing of all.
  batches = [['length']]
  _, failed = running.evaluate(*arguments)
  assert failed == {
    't': f'{writing.BATCH + 1} of {writing.BATCH + 2} questions were answered; ask again'
  }
  batches = [['length', 'length']]
  (summary,), failed = running.evaluate(*arguments)
  assert not failed and summary.n == writing.BATCH + 2

  # What was summarised of some, before that was refused, is not taken for a score of all.
  said = json.loads((tmp_path / 't-0.json').read_text())
  (tmp_path / 't-0.json').write_text(json.dumps(said | {'n': writing.BATCH}))
  _, failed = running.evaluate(*arguments)
  assert 'is of 16 of 18 questions: it was interrupted' in failed['t']
