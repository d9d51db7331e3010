"""What does a docstring say is done, and to what? A word of it; without any data."""

from evaluation import generated
from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('target', stops=('\n',), max_new_tokens=16),
    generated.asked('docstring_questions'),
    prompt='{{ source }}',
    metrics=('exact_match',),
    by='class',
    # Who gives the verb, or the noun, without a look at the question.
    chance=1 / 2,
  )
