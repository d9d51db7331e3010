"""Is a sentence of praise or blame? Made by templates, some of which deny; without any data."""

from evaluation import generated
from evaluation.task import MultipleChoice, Task


def get_task() -> Task:
  return Task(
    MultipleChoice(tuple(generated.FEELINGS), 'target', normalise='sum'),
    generated.asked('templated_sentiment'),
    prompt='{{ source }}',
    balanced='target',
  )
