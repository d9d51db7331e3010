"""Which of two sentences is one, by grammar (acceptability/blimp.jsonl).

BLiMP, Warstadt et al., arXiv:1912.00582.
"""

from evaluation.task import MultipleChoice, Task


def get_task() -> Task:
  return Task(
    MultipleChoice(('{{ good }}', '{{ bad }}'), 0, normalise='sum'),
    'acceptability/blimp.jsonl',
    by='phenomenon',
  )
