"""Number words of 100 to 9999, English to German; made by rule, without any data."""

from evaluation import generated
from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('target', stops=('\n',), max_new_tokens=32),
    generated.asked('number_words'),
    prompt='{{ source }}',
    metrics=('exact_match', 'chrf'),
    by='class',
    # Who always says the same is right once.
    chance=1 / generated.QUESTIONS,
  )
