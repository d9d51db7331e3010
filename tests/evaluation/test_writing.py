"""Do tasks that follow one another write with one engine, as each would with its own?"""

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

  # One that ended early keeps its engine, and so do two at a time.
  begun = writing.answers(model, PROMPTS, kind, 0)
  assert next(begun) == first[0]
  assert [*writing.answers(model, PROMPTS, kind, 1)] == other
  assert [*begun] == first[1:]
  longer = Generate(max_new_tokens=6, temperature=1.0)
  assert [answers[0].text[:1] for answers in writing.answers(model, PROMPTS, longer, 0)] == [
    answers[0].text[:1] for answers in first
  ]
