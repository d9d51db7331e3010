"""Who does what, when and where? Of dialogues that are made by templates; without any data."""

from evaluation import generated
from evaluation.task import Generate, Task


def get_task() -> Task:
  return Task(
    Generate('target', stops=('\n',), max_new_tokens=40),
    generated.asked('dialogue_summaries'),
    prompt='{{ source }}',
    metrics=('rougeL_stemmed', 'exact_match'),
    by='class',
  )
