"""What is a function called, and what does it do? Copied from a description; without any data."""

from evaluation import generated
from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('target', stops=('\n',), max_new_tokens=32),
    generated.asked('docstring_questions'),
    prompt='{{ source }}',
    metrics=('exact_match', 'token_f1'),
    by='class',
    # Who copies one of the three parts without a look at the question.
    chance=1 / 3,
  )
