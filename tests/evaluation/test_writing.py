"""Do tasks that follow one another write with one engine, as each would with its own?"""

import pytest

from evaluation import writing
from evaluation.task import Generate
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
