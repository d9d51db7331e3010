"""Is a templated sentence as it should be, or were its words shuffled? Without any data."""

from evaluation import generated
from evaluation.task import MultipleChoice, Task


def get_task() -> Task:
  return Task(
    MultipleChoice(('acceptable', 'unacceptable'), 'target', normalise='sum'),
    generated.asked('shuffled_words'),
    prompt='{{ source }}',
    balanced='target',
  )
