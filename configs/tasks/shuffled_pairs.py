"""Is a sentence of a docstring likelier than its words shuffled? Of decoders; without any data."""

from evaluation import generated
from evaluation.task import MultipleChoice, Task


def get_task() -> Task:
  return Task(
    MultipleChoice(('{{ target }}', '{{ other }}'), 0, normalise='sum'),
    generated.asked('shuffled_pairs'),
  )
